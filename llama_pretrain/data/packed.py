"""Tokens on disk: Megatron-LM's .bin/.idx pair, and rows read out of the packed stream.

The .bin holds the tokens of all documents one after another; the .idx holds a header and each
document's length and place. Type codes are Megatron's (its indexed_dataset.py): 4 = int32,
8 = uint16.
"""

import os
import struct
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.uint16] | type[np.int32]] = {8: np.uint16, 4: np.int32}


class TokenWriter:
    """Writes documents to PREFIX.bin, and PREFIX.idx at the end."""

    def __init__(self, prefix: Path, *, vocab_size: int):
        # Ids up to 65,535 fit 16 bits; a larger vocabulary would wrap in silence.
        self.dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
        self.lengths: list[int] = []
        self._prefix = prefix
        self._file = prefix.with_suffix(".bin").open("wb")

    def add(self, document: list[int]) -> None:
        """Append one document's token ids."""
        self._file.write(np.asarray(document, dtype=self.dtype).tobytes())
        self.lengths.append(len(document))

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if error is None:
            self._write_index()

    def _write_index(self) -> None:
        lengths = np.asarray(self.lengths, dtype=np.int32)
        width = np.dtype(self.dtype).itemsize
        pointers = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * width, out=pointers[1:])
        code = next(code for code, dtype in DTYPES.items() if dtype is self.dtype)
        with self._prefix.with_suffix(".idx").open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes() + pointers.tobytes())
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
            file.flush()
            os.fsync(file.fileno())


class TokenReader:
    """Reads rows of the packed stream of PREFIX.bin with pread.

    A memory map would be slower on a cold file and dies of SIGBUS on a truncated one.
    """

    def __init__(self, prefix: Path):
        index = prefix.with_suffix(".idx").read_bytes()
        magic, version, code, self.num_documents, _ = HEADER.unpack_from(index)
        if magic != MAGIC or version != VERSION or code not in DTYPES:
            raise ValueError(f"{prefix}.idx is not an index of uint16 or int32 tokens")
        lengths = np.frombuffer(index, np.int32, self.num_documents, HEADER.size)
        self.dtype = np.dtype(DTYPES[code])
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        self._file = os.open(prefix.with_suffix(".bin"), os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):  # rows are read at random: reading ahead is in vain
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        size = os.fstat(self._file).st_size
        if size != self.num_tokens * self.dtype.itemsize:
            wanted = self.num_tokens * self.dtype.itemsize
            raise ValueError(f"{prefix}.bin has {size} bytes where its index says {wanted}")

    def num_rows(self, sequence_length: int) -> int:
        """Whole rows of `sequence_length` inputs, each with the target after its last."""
        return max(0, (self.num_tokens - 1) // sequence_length)

    def row(self, index: int, sequence_length: int) -> NDArray[np.int64]:
        """Row `index` and the token after it: (T + 1,) int64."""
        width = self.dtype.itemsize
        wanted = (sequence_length + 1) * width
        content = os.pread(self._file, wanted, index * sequence_length * width)
        if len(content) != wanted:
            raise ValueError(f"row {index} is cut short: the token file was truncated")
        return np.frombuffer(content, self.dtype).astype(np.int64)

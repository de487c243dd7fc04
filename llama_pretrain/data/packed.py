"""Tokens on disk: Megatron-LM's .bin/.idx pair, and the sequences in such files.

The .bin holds the tokens of all documents one after another. The .idx holds a header and each
document's length and byte offset. Type codes are those of Megatron's indexed_dataset.py.
"""

import os
import struct
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llama_pretrain.data.meta import Extent, TokensMeta

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {1: "uint8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
INDEX_CHUNK = 1 << 20
"""Documents of an index that are read at a time."""
MAX_OPEN_FILES = 128


def token_dtype(vocab_size: int) -> str:
    """The type of token ids: 16 bits where all ids fit, because a larger id would wrap silently."""
    return "uint16" if vocab_size <= 1 << 16 else "int32"


@dataclass(frozen=True, kw_only=True)
class TokenWriter:
    """An open .bin file and the lengths of its documents."""

    file: BinaryIO
    lengths: list[int]

    def add(self, document: NDArray[Any]) -> None:
        """Append one document of the file's type: (length,)."""
        self.file.write(document.data)
        self.lengths.append(len(document))


@contextmanager
def write_packed(prefix: Path, *, dtype: str) -> Iterator[TokenWriter]:
    """Write PREFIX.bin, and PREFIX.idx when the block has succeeded."""
    with prefix.with_suffix(".bin").open("wb", buffering=1 << 20) as file:
        writer = TokenWriter(file=file, lengths=[])
        yield writer
        _sync(file)
    lengths = np.asarray(writer.lengths, dtype=np.int32)
    pointers = np.cumsum(lengths, dtype=np.int64) - lengths
    pointers *= np.dtype(dtype).itemsize
    code = next(code for code, name in DTYPE_CODES.items() if name == dtype)
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
        file.write(lengths.tobytes() + pointers.tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@dataclass(frozen=True, kw_only=True)
class Index:
    """The contents of a Megatron .idx."""

    dtype: str
    documents: int
    tokens: int
    first_lengths: NDArray[np.int32]
    """Of the first thousand documents."""


def read_index(path: Path) -> Index:
    """Read a Megatron .idx in chunks.

    Raises:
        ValueError: if it is damaged or of another kind.
    """
    with path.open("rb") as file:
        content = file.read(HEADER.size)
        if len(content) < HEADER.size or content[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{path} is not a Megatron index: it must begin with {MAGIC[:7]!r}")
        _, version, code, count, _ = HEADER.unpack(content)
        if version != VERSION or code not in DTYPE_CODES:
            raise ValueError(f"{path} is not supported (got version {version}, type code {code})")
        tokens, first_lengths = 0, np.empty(0, np.int32)
        for done in range(0, count, INDEX_CHUNK):
            wanted = min(count - done, INDEX_CHUNK)
            lengths = np.fromfile(file, np.int32, wanted)
            if len(lengths) < wanted:
                raise ValueError(f"{path} is truncated")
            tokens += int(lengths.sum(dtype=np.int64))
            first_lengths = first_lengths if done else lengths[:1000]
    return Index(
        dtype=DTYPE_CODES[code], documents=count, tokens=tokens, first_lengths=first_lengths
    )


class TokenSequences:
    """The sequences of a split, read with pread; a sequence never spans two extents.

    A memory map would be slower on a cold file and raise SIGBUS on a truncated one. Memory does not
    grow with the number of tokens.
    """

    def __init__(
        self,
        folder: Path,
        extents: Sequence[Extent],
        *,
        dtype: str,
        sequence_length: int,
        sequence_tokens: int | None = None,
    ):
        self._dtype = np.dtype(dtype)
        self._length = sequence_length
        self._stride = sequence_tokens or sequence_length
        self._paths = [folder / extent.file for extent in extents]
        self._first = [extent.first for extent in extents]
        for path, extent in zip(self._paths, extents, strict=True):
            needed = (extent.first + extent.tokens) * self._dtype.itemsize
            size = path.stat().st_size
            if size < needed:
                raise ValueError(f"{path} must have at least {needed:,} bytes (got {size:,})")
        overlap = (
            0 if sequence_tokens else 1
        )  # the last target is the first input of the next sequence
        counts = (max(0, extent.tokens - overlap) // self._stride for extent in extents)
        self._ends = list(accumulate(counts))
        self._files: OrderedDict[Path, int] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def sequence(self, index: int) -> NDArray[np.int64]:
        """Sequence `index` and the token after it: (T + 1,) int64."""
        place = bisect_right(self._ends, index)
        within = index - (self._ends[place - 1] if place else 0)
        width, path = self._dtype.itemsize, self._paths[place]
        first = self._first[place] + within * self._stride
        wanted = (self._length + 1) * width
        content = os.pread(self._open(path), wanted, first * width)
        if len(content) != wanted:
            raise ValueError(f"{path} is truncated: sequence {index} is incomplete")
        return np.frombuffer(content, self._dtype).astype(np.int64)

    def _open(self, path: Path) -> int:
        file = self._files.get(path)
        if file is not None:
            self._files.move_to_end(path)
            return file
        file = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):  # reads are random, so read-ahead is wasted
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        self._files[path] = file
        if len(self._files) > MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return file


def open_sequences(
    folder: Path, meta: TokensMeta, split: str, *, sequence_length: int
) -> TokenSequences:
    """Open the sequences of a split.

    Raises:
        ValueError: if a file has been truncated.
    """
    return TokenSequences(
        folder,
        meta.splits[split].extents,
        dtype=meta.dtype,
        sequence_length=sequence_length,
        sequence_tokens=meta.sequence_tokens,
    )

"""Tokens on disk: Megatron-LM's .bin/.idx pair, and rows read out of such files.

The .bin holds the tokens of all documents one after another; the .idx holds a header and each
document's length and place. Type codes are Megatron's (its indexed_dataset.py).
"""

import os
import struct
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_pretrain.data.meta import Extent, TokensMeta

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {1: "uint8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
MAX_OPEN_FILES = 128


def token_dtype(vocab_size: int) -> str:
    """Ids up to 65,535 fit 16 bits; a larger vocabulary would wrap in silence."""
    return "uint16" if vocab_size <= 1 << 16 else "int32"


class TokenWriter:
    """Writes documents to PREFIX.bin, and PREFIX.idx at the end."""

    def __init__(self, prefix: Path, *, dtype: str):
        self.lengths: list[int] = []
        self._dtype = np.dtype(dtype)
        self._prefix = prefix
        self._file = prefix.with_suffix(".bin").open("wb", buffering=1 << 20)

    def add(self, document: Any) -> None:
        """Append one document: bytes-like, of this file's type."""
        self._file.write(document)
        self.lengths.append(len(document) // self._dtype.itemsize)

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
        pointers = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self._dtype.itemsize, out=pointers[1:])
        code = next(code for code, name in DTYPE_CODES.items() if name == self._dtype.name)
        with self._prefix.with_suffix(".idx").open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes() + pointers.tobytes())
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True, kw_only=True)
class Index:
    """What a Megatron .idx says."""

    dtype: str
    documents: int
    tokens: int
    first_lengths: NDArray[np.int32]
    """Of the first thousand documents."""


def read_index(path: Path) -> Index:
    """Read a Megatron .idx, a million documents at a time.

    Raises:
        ValueError: saying what is wrong with it.
    """
    with path.open("rb") as file:
        content = file.read(HEADER.size)
        if len(content) < HEADER.size or content[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{path} is no Megatron index: it doesn't begin with {MAGIC[:7]!r}")
        _, version, code, count, _ = HEADER.unpack(content)
        if version != VERSION or code not in DTYPE_CODES:
            raise ValueError(f"{path} has version {version} and type {code}, which are not read")
        tokens, first_lengths = 0, np.empty(0, np.int32)
        for done in range(0, count, 1 << 20):
            lengths = np.fromfile(file, np.int32, min(count - done, 1 << 20))
            if len(lengths) < min(count - done, 1 << 20):
                raise ValueError(f"{path} is cut short")
            tokens += int(lengths.sum(dtype=np.int64))
            first_lengths = first_lengths if done else lengths[:1000]
    return Index(
        dtype=DTYPE_CODES[code], documents=count, tokens=tokens, first_lengths=first_lengths
    )


class TokenRows:
    """The rows of a split, read with pread; a row never spans two extents.

    A memory map would be slower on a cold file and dies of SIGBUS on a truncated one. Memory does
    not grow with the number of tokens.
    """

    def __init__(
        self,
        folder: Path,
        extents: Sequence[Extent],
        *,
        dtype: str,
        sequence_length: int,
        row_tokens: int | None = None,
    ):
        self._dtype = np.dtype(dtype)
        self._length = sequence_length
        self._stride = row_tokens or sequence_length
        self._paths = [folder / extent.file for extent in extents]
        self._first = [extent.first for extent in extents]
        for path, extent in zip(self._paths, extents, strict=True):
            wanted = (extent.first + extent.tokens) * self._dtype.itemsize
            size = path.stat().st_size
            if size < wanted:
                raise ValueError(f"{path} has {size:,} bytes where {wanted:,} are needed")
        overlap = 0 if row_tokens else 1  # the target after a row's last token is the next's first
        counts = (max(0, extent.tokens - overlap) // self._stride for extent in extents)
        self._ends = list(accumulate(counts))
        self._files: OrderedDict[Path, int] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, index: int) -> NDArray[np.int64]:
        """Row `index` and the token after it: (T + 1,) int64."""
        place = bisect_right(self._ends, index)
        within = index - (self._ends[place - 1] if place else 0)
        width = self._dtype.itemsize
        first = self._first[place] + within * self._stride
        path = self._paths[place]
        wanted = (self._length + 1) * width
        content = os.pread(self._open(path), wanted, first * width)
        if len(content) != wanted:
            raise ValueError(f"{path} was truncated: row {index} is cut short")
        return np.frombuffer(content, self._dtype).astype(np.int64)

    def _open(self, path: Path) -> int:
        file = self._files.get(path)
        if file is not None:
            self._files.move_to_end(path)
            return file
        file = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):  # rows are read at random: reading ahead is in vain
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        self._files[path] = file
        if len(self._files) > MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return file


def open_rows(folder: Path, meta: TokensMeta, split: str, *, sequence_length: int) -> TokenRows:
    """The rows of a split of prepared tokens.

    Raises:
        ValueError: if a file was cut short since.
    """
    return TokenRows(
        folder,
        meta.splits[split].extents,
        dtype=meta.dtype,
        sequence_length=sequence_length,
        row_tokens=meta.row_tokens,
    )

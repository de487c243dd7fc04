"""Read documents with their location from text, JSON lines, Parquet and datasets."""

import gzip
import importlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llama_pretrain.config.problems import Problem
from llama_pretrain.data.cache import data_error

MAX_DOCUMENT_BYTES = 32_000_000
"""A longer document is cut, so that memory does not depend on the longest one."""
MAX_LINE_BYTES = 1 << 27
"""A longer JSON line is unreadable: parsing it takes several times its size."""
BLOCK = 1 << 20
ZSTD_BLOCK = 1 << 12
"""Compressed bytes at a time: in the extreme they become 128 MiB."""
ZSTD_WINDOW = 1 << 31
"""The largest that zstd --long=31 writes."""
BOM = "\ufeff".encode()
"""A byte order mark, which some editors put before a text."""
TEXT_SUFFIXES = (".txt", ".py")
LINE_SUFFIXES = (".jsonl",)
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its location in a file: `line 7`, `byte 0`, `row 3`."""

    text: str
    unit: str
    number: int


@dataclass(frozen=True, slots=True)
class Fault:
    """An unreadable document."""

    option: str
    """The option to blame, relative to that of the source."""
    message: str
    """Includes file and location."""
    hint: str = ""

    def problem(self, source: str) -> Problem:
        """The problem to report; `source` is the path of the source's options."""
        return Problem(path=f"{source}.{self.option}", message=self.message, hint=self.hint)


Record = Document | Fault


class UnreadableError(Exception):
    """A document that cannot be read: the option to blame, and why."""

    def fault(self, place: str) -> Fault:
        option, message = self.args
        return Fault(option, f"{place}: {message}")


def suffix_of(path: Path) -> str:
    """The suffix of a file's contents, without that of a compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def import_optional(name: str, *, extra: str, path: str) -> Any:
    """Import an optional dependency.

    Raises:
        UserError: if it is not installed; `path` is the option that needs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        hint = f"pip install 'llama-pretrain[{extra}]'"
        raise data_error(path, f"requires the package {name.split('.')[0]}", hint) from error


def open_binary(path: Path) -> Any:
    """Open a file for reading and decompress it.

    Raises:
        UserError: if the package for it is not installed.
    """
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        zstandard = import_optional("zstandard", extra="zstd", path="data.paths")
        decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        return io.BufferedReader(ZstdReader(path, decompressor), BLOCK)
    return path.open("rb", buffering=BLOCK)


class ZstdReader(io.RawIOBase):
    """The contents of a .zst with any number of frames.

    The package's own reader ends silently where the last frame is truncated.
    """

    def __init__(self, path: Path, decompressor: Any):
        self._file, self._decompressor = path.open("rb"), decompressor
        self._frame: Any = None
        self._rest = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._rest or self._file.read(ZSTD_BLOCK)
            self._rest = b""
            if not block:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._ready = self._frame.decompress(block)
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def read_text(
    path: Path, *, start: int, stop: int | None, delimiter: str | None
) -> Iterator[Record]:
    """A file as one document, or the delimited documents that begin in [start, stop)."""
    with open_binary(path) as file:
        if delimiter is None:
            contents = _read_whole(file)
        else:
            mark = delimiter.replace("\\n", "\n").replace("\\t", "\t").encode("utf-8")
            contents = _read_delimited(file, mark, start=start, stop=stop)
        for offset, content in contents:
            yield _decode(content, path=path, offset=offset)


def read_lines(path: Path, *, start: int, stop: int | None, field: str) -> Iterator[Record]:
    """The JSON lines that begin in [start, stop), one document each."""
    with open_binary(path) as file:
        first = start
        if start:  # a line that begins earlier belongs to the previous span
            file.seek(start - 1)
            first = start - 1 + _skip_line(file)

        @cache
        def lines_before() -> int:  # counted only when a message needs it
            return _count_lines(path, first)

        offset, lines = first, 0
        while (stop is None or offset < stop) and (line := file.readline(MAX_LINE_BYTES + 1)):
            lines += 1
            length = len(line)
            try:
                if length > MAX_LINE_BYTES:
                    length += 0 if line.endswith(b"\n") else _skip_line(file)
                    message = f"has more than {MAX_LINE_BYTES >> 20} MiB (at byte {offset})"
                    raise UnreadableError("paths", message)
                yield _parse_line(line, path=path, offset=offset, field=field)
            except UnreadableError as error:
                yield error.fault(f"{path}, line {lines_before() + lines}")
            offset += length


def _skip_line(file: Any) -> int:
    """Read the rest of a line in blocks. Returns its bytes."""
    length = 0
    while block := file.readline(BLOCK):
        length += len(block)
        if block.endswith(b"\n"):
            break
    return length


def _count_lines(path: Path, num_bytes: int) -> int:
    """Line feeds in the first bytes of a file."""
    lines = 0
    with open_binary(path) as file:
        while num_bytes and (block := file.read(min(num_bytes, BLOCK))):
            lines += block.count(b"\n")
            num_bytes -= len(block)
    return lines


def read_parquet(path: Path, *, start: int, stop: int | None, field: str) -> Iterator[Record]:
    """The documents of row groups [start, stop)."""
    file = open_parquet(path)
    if field not in file.schema_arrow.names:
        yield _missing_column(str(path), field, file.schema_arrow.names)
        return
    groups = range(start, file.num_row_groups if stop is None else stop)
    first = sum(file.metadata.row_group(group).num_rows for group in range(start))
    batches = file.iter_batches(batch_size=1000, row_groups=list(groups), columns=[field])
    rows = (row for batch in batches for row in batch.to_pylist())
    yield from read_rows(rows, name=str(path), first=first, field=field)


def open_parquet(path: Path) -> Any:
    """Open a ParquetFile.

    Raises:
        UserError: if pyarrow is not installed, or the file is not Parquet.
    """
    parquet = import_optional("pyarrow.parquet", extra="parquet", path="data.paths")
    try:
        return parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # pyarrow raises either
        raise data_error("data.paths", f"{path}: {error}") from error


def read_rows(rows: Iterator[Any], *, name: str, first: int, field: str) -> Iterator[Record]:
    """The field of a dataset's rows, numbered from `first`."""
    for number, row in enumerate(rows, start=first):
        if field not in row:
            yield _missing_column(name, field, row)
            return
        try:
            yield Document(_check_text(row[field], field), "row", number)
        except UnreadableError as error:
            yield error.fault(f"{name}, row {number}")


def _missing_column(name: str, field: str, columns: Any) -> Fault:
    return Fault("text_field", f"{name} has no column {field!r} (got {', '.join(columns)})")


def _read_whole(file: Any) -> Iterator[tuple[int, bytes]]:
    """Offset and contents of a file, cut to MAX_DOCUMENT_BYTES."""
    rest, offset = b"", 0
    while True:
        content = rest + file.read(MAX_DOCUMENT_BYTES + 1 - len(rest))
        if len(content) <= MAX_DOCUMENT_BYTES:
            if content or offset == 0:
                yield offset, content
            return
        cut = _cut_bytes(content)
        yield offset, content[:cut]
        rest, offset = content[cut:], offset + cut


def _cut_bytes(content: bytes) -> int:
    """Where to cut UTF-8: after the last line feed, or else before the last character."""
    cut = content.rfind(b"\n") + 1
    if 0 < cut < len(content):
        return cut
    cut = len(content) - 1  # the last character may be incomplete
    while cut > 1 and content[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _read_delimited(
    file: Any, mark: bytes, *, start: int, stop: int | None
) -> Iterator[tuple[int, bytes]]:
    """Offset and contents of each document that begins in [start, stop)."""
    offset, rest, searched = start, b"", 0
    if start:
        offset = max(0, start - len(mark))
        file.seek(offset)
        while (at := rest.find(mark)) < 0:  # the first mark that ends at start or later
            block = file.read(BLOCK)
            if not block:
                return
            dropped = max(0, len(rest) - len(mark) + 1)
            rest, offset = rest[dropped:] + block, offset + dropped
        rest, offset = rest[at + len(mark) :], offset + at + len(mark)
    while stop is None or offset < stop:
        at = rest.find(mark, searched)
        if at >= 0:
            yield offset, rest[:at]
            rest, offset, searched = rest[at + len(mark) :], offset + at + len(mark), 0
            continue
        if len(rest) > MAX_DOCUMENT_BYTES:
            cut = _cut_bytes(rest[:MAX_DOCUMENT_BYTES])
            yield offset, rest[:cut]
            rest, offset = rest[cut:], offset + cut
        searched = max(0, len(rest) - len(mark) + 1)
        block = file.read(BLOCK)
        if not block:
            if rest:
                yield offset, rest
            return
        rest += block


def _decode(content: bytes, *, path: Path, offset: int) -> Record:
    try:
        text = content.decode("utf-8")
        return Document(text if offset else text.removeprefix("\ufeff"), "byte", offset)
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 at byte {offset + error.start}: {error.reason}"
        return Fault("paths", message, "Convert it, e.g. with iconv -t UTF-8")


def _parse_line(line: bytes, *, path: Path, offset: int, field: str) -> Record:
    """The document of a JSON line.

    Raises:
        UnreadableError: if it has none.
    """
    if line.strip() in (b"", BOM):
        return Document("", "byte", offset)
    text = _decode(line, path=path, offset=offset)
    if isinstance(text, Fault):
        return text
    try:
        record: Any = json.loads(text.text.removeprefix("\ufeff"))  # files may be concatenated
    except RecursionError as error:
        raise UnreadableError("paths", "is nested too deeply") from error
    except ValueError as error:
        truncated = "" if line.endswith(b"\n") else "the last line is truncated: "
        raise UnreadableError("paths", f"{truncated}{error}") from error
    del text  # a line may have 100 MB
    if not isinstance(record, dict):
        raise UnreadableError("paths", f"must be an object (got {type(record).__name__})")
    if field not in record:
        names = ", ".join(record) or "no field"
        raise UnreadableError("text_field", f"has no field {field!r} (got {names})")
    return Document(_check_text(record[field], field), "byte", offset)


def _check_text(value: Any, field: str) -> str:
    """A field as text; empty for `None`.

    Raises:
        UnreadableError: if it is not text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        message = f"field {field!r} must be text (got {type(value).__name__})"
        raise UnreadableError("text_field", message)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # "\ud800" is valid JSON but not valid text
            message = f"lone surrogate at character {error.start}"
            raise UnreadableError("paths", message) from error
    return value

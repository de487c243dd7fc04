"""Documents out of files: text, lines of JSON, Parquet and datasets, each with its place."""

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_pretrain.config.problems import Problem, UserError

MAX_DOCUMENT_BYTES = 32_000_000
"""A longer document is cut: memory must not depend on the longest one."""
BLOCK = 1 << 20
TEXT_SUFFIXES = (".txt", ".py")
LINE_SUFFIXES = (".jsonl",)
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it is: `line 7`, `byte 0`, `row 3`."""

    text: str
    unit: str
    number: int

    @property
    def place(self) -> str:
        return f"{self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Fault:
    """A document that can't be read."""

    path: str
    """The setting that it is about, below that of its source."""
    message: str
    """With file and place."""
    hint: str = ""

    def problem(self, source: str) -> Problem:
        """As the user is told it."""
        return Problem(path=f"{source}.{self.path}", message=self.message, hint=self.hint)


Record = Document | Fault


def suffix_of(path: Path) -> str:
    """The suffix that says what is in a file, without that of a compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def open_binary(path: Path) -> Any:
    """A file opened for reading, decompressed.

    Raises:
        UserError: if the package for it isn't there.
    """
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        try:
            import zstandard  # an extra
        except ImportError as error:
            hint = "pip install 'llama-pretrain[zstd]'"
            message = f"{path} needs the package zstandard"
            raise UserError([Problem(path="data.paths", message=message, hint=hint)]) from error
        return io.BufferedReader(ZstdReader(path, zstandard.ZstdDecompressor()), BLOCK)
    return path.open("rb", buffering=BLOCK)


class ZstdReader(io.RawIOBase):
    """The content of a .zst of any number of frames; the package's own ends without a word where
    the last one is cut short."""

    def __init__(self, path: Path, decompressor: Any):
        self._file, self._decompressor = path.open("rb"), decompressor
        self._frame: Any = None
        self._rest = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._rest or self._file.read(BLOCK)
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
    """A file as one document, or the documents between delimiters that begin in [start, stop)."""
    if delimiter is None:
        yield from _read_whole(path)
        return
    mark = delimiter.replace("\\n", "\n").replace("\\t", "\t").encode("utf-8")
    with open_binary(path) as file:
        for offset, content in _delimited(file, mark, start=start, stop=stop):
            yield _decode(content, path=path, offset=offset)


def read_lines(path: Path, *, start: int, stop: int | None, field: str) -> Iterator[Record]:
    """A document a line of JSON, for the lines that begin in [start, stop) of the file."""
    with open_binary(path) as file:
        offset = start
        if start:  # a line that begins before belongs to the part before
            file.seek(start - 1)
            offset = start - 1 + len(file.readline())
        place = Place(path, first=offset)
        while stop is None or offset < stop:
            line = file.readline()
            if not line:
                return
            place.offset = offset
            if line.strip():
                yield _parse_line(line, place=place, field=field)
            else:
                yield Document("", "byte", offset)
            offset += len(line)
            place.lines += 1


class Place:
    """A line of a file. Its number is only counted when somebody asks for it."""

    def __init__(self, path: Path, *, first: int):
        self.path, self.offset, self.lines = path, first, 0
        self._first = first
        self._before: int | None = None

    def __str__(self) -> str:
        if self._before is None:
            self._before, left = 0, self._first
            with open_binary(self.path) as file:
                while left and (block := file.read(min(left, BLOCK))):
                    self._before += block.count(b"\n")
                    left -= len(block)
        return f"{self.path}, line {self._before + self.lines + 1}"


def read_parquet(path: Path, *, start: int, stop: int | None, field: str) -> Iterator[Record]:
    """The column of row groups [start, stop)."""
    file = open_parquet(path)
    if field not in file.schema_arrow.names:
        seen = ", ".join(file.schema_arrow.names)
        yield Fault("text_field", f"{path} has no column {field!r} (got {seen})")
        return
    groups = range(start, file.num_row_groups if stop is None else stop)
    number = sum(file.metadata.row_group(group).num_rows for group in range(start))
    for batch in file.iter_batches(batch_size=1000, row_groups=list(groups), columns=[field]):
        for value in batch.column(0).to_pylist():
            place = f"{path}, row {number}"
            yield _take_text(value, place=place, unit="row", number=number, field=field)
            number += 1


def open_parquet(path: Path) -> Any:
    """A ParquetFile.

    Raises:
        UserError: if pyarrow is missing, or it is none.
    """
    try:
        from pyarrow import parquet  # an extra: only who reads .parquet needs it
    except ImportError as error:
        hint = "pip install 'llama-pretrain[parquet]'"
        message = f"{path} needs the package pyarrow"
        raise UserError([Problem(path="data.paths", message=message, hint=hint)]) from error
    try:
        return parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # pyarrow's errors are both
        raise UserError([Problem(path="data.paths", message=f"{path}: {error}")]) from error


def read_rows(rows: Iterator[Any], *, name: str, first: int, field: str) -> Iterator[Record]:
    """The field of a dataset's records, numbered from `first`."""
    for number, record in enumerate(rows, start=first):
        if field not in record:
            seen = ", ".join(record)
            yield Fault("text_field", f"{name} has no column {field!r} (got {seen})")
            return
        place = f"{name}, row {number}"
        yield _take_text(record[field], place=place, unit="row", number=number, field=field)


def _read_whole(path: Path) -> Iterator[Record]:
    with open_binary(path) as file:
        rest, offset = b"", 0
        while True:
            content = rest + file.read(MAX_DOCUMENT_BYTES + 1 - len(rest))
            if len(content) <= MAX_DOCUMENT_BYTES:
                if content or offset == 0:
                    yield _decode(content, path=path, offset=offset)
                return
            cut = _cut_bytes(content)
            yield _decode(content[:cut], path=path, offset=offset)
            rest, offset = content[cut:], offset + cut


def _cut_bytes(content: bytes) -> int:
    """Where to cut text in UTF-8: after the last line feed, or else between two characters."""
    cut = content.rfind(b"\n") + 1 or len(content)
    while cut < len(content) and content[cut] & 0xC0 == 0x80:
        cut -= 1
    if cut == len(content):  # the last character may be cut
        cut -= 1
        while cut > 1 and content[cut] & 0xC0 == 0x80:
            cut -= 1
    return cut


def _delimited(
    file: Any, mark: bytes, *, start: int, stop: int | None
) -> Iterator[tuple[int, bytes]]:
    """Offset and content of each record that begins in [start, stop)."""
    offset, rest, searched = start, b"", 0
    if start:
        offset = max(0, start - len(mark))
        file.seek(offset)
        while True:  # the first mark that ends at start or after
            at = rest.find(mark)
            if at >= 0:
                rest, offset = rest[at + len(mark) :], offset + at + len(mark)
                break
            block = file.read(BLOCK)
            if not block:
                return
            kept = len(mark) - 1
            dropped = max(0, len(rest) - kept)
            rest, offset = rest[dropped:] + block, offset + dropped
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
        return Document(content.decode("utf-8"), "byte", offset)
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 at byte {offset + error.start}: {error.reason}"
        return Fault("paths", message, "convert it, say with iconv -t UTF-8")


def _parse_line(line: bytes, *, place: Place, field: str) -> Record:
    text = _decode(line, path=place.path, offset=place.offset)
    if isinstance(text, Fault):
        return text
    try:
        record: Any = json.loads(text.text)
    except ValueError as error:
        cut = "" if line.endswith(b"\n") else "the last line is cut short: "
        return Fault("paths", f"{place}: {cut}{error}")
    del text, line
    if not isinstance(record, dict):
        return Fault("paths", f"{place}: no record with fields (got {type(record).__name__})")
    if field not in record:
        seen = ", ".join(record) or "no field"
        return Fault("text_field", f"{place}: there is no field {field!r} (got {seen})")
    return _take_text(record[field], place=place, unit="byte", number=place.offset, field=field)


def _take_text(value: Any, *, place: Place | str, unit: str, number: int, field: str) -> Record:
    if value is None:
        return Document("", unit, number)
    if not isinstance(value, str):
        message = f"{place}: field {field!r} holds {type(value).__name__}, not text"
        return Fault("text_field", message)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # "\ud800" is valid JSON and no text
            return Fault("paths", f"{place}: lone surrogate at character {error.start}")
    return Document(value, unit, number)

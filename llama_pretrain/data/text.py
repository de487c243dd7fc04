"""Sources of documents, read in spans by any number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_pretrain.config.data import Source
from llama_pretrain.data.cache import data_error
from llama_pretrain.data.hashing import File
from llama_pretrain.data.read import (
    COMPRESSED,
    LINE_SUFFIXES,
    Document,
    Record,
    open_parquet,
    read_lines,
    read_parquet,
    read_text,
    suffix_of,
)

MIN_TASK, MAX_TASK = 1 << 20, 1 << 26
"""Bytes of one task; in between a 64th of the corpus, so that all cores have work."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A range of a file: bytes, row groups or rows [start, stop); `None` = to the end."""

    file: int
    start: int = 0
    stop: int | None = None
    size: int
    """Bytes to read."""


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """The documents of files."""

    path: str
    """Of its options: `data` or `data.sources.NAME`."""
    config: Source
    files: list[File]
    fingerprint: str
    """Hash of everything that decides its documents."""
    num_bytes: int

    def tasks(self) -> list[list[Span]]:
        """The spans of the source in groups that do not depend on the processes."""
        target = min(max(self.num_bytes // 64, MIN_TASK), MAX_TASK)
        tasks: list[list[Span]] = []
        filled = target
        for span in self.spans(target):
            if filled >= target:
                tasks.append([])
                filled = 0
            tasks[-1].append(span)
            filled += span.size
        return tasks

    def spans(self, target: int) -> Iterator[Span]:
        """The source in spans of about `target` bytes where files can be split."""
        for number, file in enumerate(self.files):
            if file.path.suffix == ".parquet":
                groups = open_parquet(file.path).metadata
                for group in range(groups.num_row_groups):
                    size = groups.row_group(group).total_byte_size
                    yield Span(file=number, start=group, stop=group + 1, size=size)
            elif file.path.suffix in LINE_SUFFIXES or (
                self.config.delimiter is not None and file.path.suffix not in COMPRESSED
            ):
                for start in range(0, file.size, target):
                    stop = min(start + target, file.size)
                    yield Span(file=number, start=start, stop=stop, size=stop - start)
            else:
                yield Span(file=number, size=file.size)

    def read(self, span: Span) -> Iterator[Record]:
        """The documents of a span, readable or not.

        Raises:
            UserError: if the file itself cannot be read.
        """
        path, config = self.files[span.file].path, self.config
        start, stop, field = span.start, span.stop, config.text_field
        try:
            if suffix_of(path) in LINE_SUFFIXES:
                yield from read_lines(path, start=start, stop=stop, field=field)
            elif path.suffix == ".parquet":
                yield from read_parquet(path, start=start, stop=stop, field=field)
            else:
                yield from read_text(path, start=start, stop=stop, delimiter=config.delimiter)
        except EOFError as error:
            raise data_error(f"{self.path}.paths", f"{path} is truncated: {error}") from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("zstandard", "zlib", "gzip"):
                raise
            message = f"{path} cannot be decompressed: {error}"
            raise data_error(f"{self.path}.paths", message) from error

    def name(self, span: Span) -> Path | str:
        """The file of a span, for messages."""
        return self.files[span.file].path

    def place(self, span: Span, document: Document) -> str:
        """File and location of a document."""
        return f"{self.name(span)}, {document.unit} {document.number}"

    def texts(self, spans: list[Span]) -> Iterator[str]:
        """The documents that are readable and not blank."""
        for span in spans:
            for record in self.read(span):
                if isinstance(record, Document) and record.text and not record.text.isspace():
                    yield record.text

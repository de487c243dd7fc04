"""The first pass: the documents of a task, encoded, into parts that the second pass puts together.

A part is sorted by split and key, so that any range of keys is one stretch of it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_pretrain.config.data import OnError
from llama_pretrain.config.problems import UserError
from llama_pretrain.data.packed import token_dtype
from llama_pretrain.data.pool import Counter
from llama_pretrain.data.read import MAX_DOCUMENT_BYTES, Document, Fault
from llama_pretrain.data.sources import Span, TextSource
from llama_pretrain.data.tokenizer import TrainedTokenizer, open_tokenizer
from llama_pretrain.files import write_text

PART_BYTES = 1 << 26
"""Text of one part: what a process holds."""
BATCH_CHARACTERS = 250_000
"""Text encoded at a time: the library needs some hundred bytes for each token of it."""
MAX_LISTED = 20
"""Unreadable documents that are listed; all are counted."""
WINDOW = 200
"""Characters on each side of a cut that are encoded together and apart."""


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """What all tasks of a source share."""

    sources: list[tuple[TextSource, float]]
    """With the share that is held out: of training files 0 where there are files to hold out."""
    tokenizer_dir: Path
    folder: Path
    shuffle_seed: int | None
    deduplicate: bool
    on_error: OnError

    @cached_property
    def tokenizer(self) -> TrainedTokenizer:
        return open_tokenizer(self.tokenizer_dir)


@dataclass(frozen=True, kw_only=True)
class EncodeTask:
    """One of a job's tasks."""

    number: int
    source: int
    spans: list[Span]

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(span.size for span in self.spans)


@dataclass(kw_only=True)
class TaskResult:
    """What came out of a task."""

    parts: list[str] = field(default_factory=list)
    blank: int = 0
    first_blank: str = ""
    cut: int = 0
    faults: int = 0
    listed: list[str] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0


PART_DTYPE = np.dtype(
    [
        ("heldout", "?"),
        ("key", "<u8"),
        ("ordinal", "<u8"),  # which document of the source it is
        ("digest", "<u8"),  # the first 8 bytes of its text's SHA-256
        ("first", "<u8"),  # where its tokens begin in the part
        ("length", "<u4"),  # in tokens, that of the end included
        ("size", "<u4"),  # in bytes of text
    ]
)
"""An entry of a part's index, a document each, in the order of (heldout, key, ordinal)."""


def encode_task(job: EncodeJob, task: EncodeTask, counter: Counter) -> TaskResult:
    """Encode the documents of a task. Parts that are there already are kept.

    Raises:
        UserError: for a document that can't be read, unless those are skipped.
    """
    result = TaskResult()
    batch: list[str] = []
    part = _Part(job, task, result)
    characters = 0
    for text in _texts(job, task, result, counter):
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            part.add(batch)
            batch, characters = [], 0
    part.add(batch)
    part.finish()
    write_text(task_marker(job.folder, task), json.dumps(asdict(result)) + "\n")
    return result


def task_marker(folder: Path, task: EncodeTask) -> Path:
    """The file that says that a task is done, and what came out of it."""
    return folder / f"{task.number:06d}.json"


def _texts(job: EncodeJob, task: EncodeTask, result: TaskResult, counter: Counter) -> Iterator[str]:
    """Documents to encode: not blank, none longer than a piece; whatever else is counted."""
    source, _ = job.sources[task.source]
    for span in task.spans:
        counted, step = 0, max(1, span.size // 50)
        text_bytes = 0
        for record in source.read(span):
            if isinstance(record, Fault):
                if job.on_error is OnError.stop:
                    raise UserError([record.problem(source.path)])
                result.faults += 1
                if len(result.listed) < MAX_LISTED:
                    result.listed.append(record.message)
                continue
            if not record.text or record.text.isspace():
                result.blank += 1
                result.first_blank = result.first_blank or source.place(span, record)
                continue
            text_bytes += len(record.text)
            if text_bytes >= step and counted + text_bytes <= span.size:
                counter.add(text_bytes, text_bytes)
                counted, text_bytes = counted + text_bytes, 0
            if len(record.text) <= MAX_DOCUMENT_BYTES // 4:
                yield record.text
            else:
                pieces = list(_cut_document(record))
                result.cut += len(pieces) > 1
                del record  # a line of 100 MB is not held twice
                while pieces:
                    yield pieces.pop(0)
        counter.add(span.size - counted, text_bytes)


def _cut_document(document: Document) -> Iterator[str]:
    """A text of more than MAX_DOCUMENT_BYTES in pieces, each a document of its own."""
    text, limit = document.text, MAX_DOCUMENT_BYTES // 4
    if len(text.encode("utf-8")) <= MAX_DOCUMENT_BYTES:
        yield text
        return
    start = 0
    while start < len(text):
        stop = min(start + limit, len(text))
        if stop < len(text):
            stop = (text.rfind("\n", start, stop) + 1) or stop
        yield text[start:stop]
        start = stop


class _Part:
    """Collects encoded documents and writes them when there are enough."""

    def __init__(self, job: EncodeJob, task: EncodeTask, result: TaskResult):
        self._job, self._task, self._result = job, task.number, result
        self._dtype = np.dtype(token_dtype(job.tokenizer.size))
        self._threshold = int(job.sources[task.source][1] * (1 << 64))
        seed = job.shuffle_seed
        self._salt = b"" if seed is None else seed.to_bytes(8, "big")
        self._documents = 0  # of the task so far
        self._open()

    def _open(self) -> None:
        self._texts = 0
        self._tokens: list[NDArray[Any]] = []
        self._rows: list[tuple[bool, int, int, int, int, int, int]] = []
        number = len(self._result.parts)
        self._path = self._job.folder / f"{self._task:06d}-{number:04d}"
        self._index = open_part(self._path) if self._path.with_suffix(".npy").exists() else None

    def add(self, texts: list[str]) -> None:
        """Encode documents, or pass by as many as a part that is there already has."""
        done = 0
        while done < len(texts):
            todo = texts[done:]
            if self._index is not None:
                left = len(self._index) - self._texts
                self._texts += min(left, len(todo))
                done += min(left, len(todo))
                self._documents += min(left, len(todo))
                if self._texts == len(self._index):
                    self._close()
                continue
            done += self._encode(todo)

    def _encode(self, texts: list[str]) -> int:
        """Encode as many as the part takes. Returns how many that is."""
        taken = 0
        for text in texts:
            taken += 1
            raw = text.encode("utf-8")
            digest = hashlib.sha256(raw).digest()
            self._rows.append(self._row(digest, len(raw)))
            self._documents += 1
            self._texts += len(raw)
            if self._texts >= PART_BYTES:
                break
        tokenizer = self._job.tokenizer
        self._tokens += [
            np.array([*ids, tokenizer.eos_id], dtype=self._dtype)
            for ids in encode_texts(tokenizer.backend, texts[:taken])
        ]
        if self._texts >= PART_BYTES:
            self._close()
        return taken

    def _row(self, digest: bytes, size: int) -> tuple[bool, int, int, int, int, int, int]:
        ordinal = (self._task << 32) | self._documents
        heldout = int.from_bytes(digest[:8], "big") < self._threshold
        if self._job.shuffle_seed is None:
            key = ordinal
        else:
            # With duplicates dropped the same text has the same key, wherever it stands.
            what = digest if self._job.deduplicate else digest + ordinal.to_bytes(8, "big")
            key = int.from_bytes(hashlib.sha256(self._salt + what).digest()[:8], "big")
        return heldout, key, ordinal, int.from_bytes(digest[:8], "big"), 0, 0, size

    def finish(self) -> None:
        """Write what is left."""
        if self._texts:
            self._close()

    def _close(self) -> None:
        index = self._write() if self._index is None else self._index
        self._result.parts.append(self._path.name)
        self._result.documents += len(index)
        self._result.tokens += int(index["length"].sum(dtype=np.int64))
        self._open()

    def _write(self) -> NDArray[Any]:
        index = np.array(self._rows, dtype=PART_DTYPE)
        index["length"] = [len(tokens) for tokens in self._tokens]
        order = np.lexsort((index["ordinal"], index["key"], index["heldout"]))
        index = index[order]
        index["first"][1:] = np.cumsum(index["length"][:-1], dtype=np.uint64)
        with self._path.with_suffix(".bin").open("wb") as file:
            for place in order:
                file.write(self._tokens[place].data)
            file.flush()
            os.fsync(file.fileno())
        temporary = self._path.with_suffix(".tmp.npy")
        np.save(temporary, index)
        os.replace(temporary, self._path.with_suffix(".npy"))  # a part without it is torn
        return index


def open_part(path: Path) -> NDArray[Any]:
    """The index of a part, of which only what is looked at is read: PART_DTYPE."""
    index: NDArray[Any] = np.load(path.with_suffix(".npy"), mmap_mode="r")
    return index


def encode_texts(backend: Any, texts: list[str]) -> Iterator[list[int]]:
    """Token ids of each text, without special tokens around them; long ones in pieces."""
    short = [text for text in texts if len(text) <= BATCH_CHARACTERS]
    encoded = iter(backend.encode_batch_fast(short, add_special_tokens=False))
    for text in texts:
        if len(text) <= BATCH_CHARACTERS:
            yield next(encoded).ids
            continue
        ids: list[int] = []
        start = 0
        while start < len(text):
            stop = _find_cut(backend, text, start)
            ids += backend.encode_batch_fast([text[start:stop]], add_special_tokens=False)[0].ids
            start = stop
        yield ids


def _find_cut(backend: Any, text: str, start: int) -> int:
    """Where a long text may be cut without a change of its tokens.

    Tried are ends of lines and of words: what is around one is encoded whole and in two. Where no
    place is found, say in 250,000 letters without a space, it is cut all the same.
    """
    end = start + BATCH_CHARACTERS
    if end >= len(text):
        return len(text)
    low = start + BATCH_CHARACTERS * 9 // 10
    places = [match.start() for match in re.finditer(r"(?<=\S)(?= \S)", text[low:end])]
    places += [match.start() for match in re.finditer(r"(?<=\S\n)(?=\S)", text[low:end])]
    for place in sorted(places, reverse=True)[:50]:
        cut = low + place
        parts = [text[cut - WINDOW : cut], text[cut : cut + WINDOW]]
        whole, *halves = backend.encode_batch_fast(
            ["".join(parts), *parts], add_special_tokens=False
        )
        if whole.ids == halves[0].ids + halves[1].ids:
            return cut
    return end

"""The first pass: encode the documents of a task into parts, which the second pass merges.

A part is sorted by split and key, so that any range of keys is contiguous in it.
"""

import hashlib
import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_pretrain.config.data import OnError
from llama_pretrain.config.problems import UserError
from llama_pretrain.data.packed import token_dtype
from llama_pretrain.data.pool import AddProgress
from llama_pretrain.data.read import MAX_DOCUMENT_BYTES, Fault
from llama_pretrain.data.text import Span, TextSource
from llama_pretrain.data.tokenizer import TrainedTokenizer, open_tokenizer
from llama_pretrain.files import replacing, write_json

PART_BYTES = 1 << 26
"""Text of one part, which a process holds in memory."""
BATCH_CHARACTERS = 250_000
"""Text encoded at a time: the tokenizers library needs hundreds of bytes per token of it."""
MAX_LISTED = 20
"""Unreadable documents that are listed; all are counted."""
WINDOW = 200
"""Characters on each side of a cut that are encoded to test it."""


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """What all tasks of a source have in common."""

    sources: list[tuple[TextSource, float]]
    """With the share that is held out: 1 for held-out files, and then 0 for the other files."""
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
    """The spans that one call encodes."""

    number: int
    source: int
    spans: list[Span]

    @property
    def name(self) -> str:
        """Of its result, NAME.json, which marks the task complete."""
        return f"{self.number:06d}"


@dataclass(kw_only=True)
class TaskResult:
    """The outcome of a task."""

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
        ("ordinal", "<u8"),  # position in the source
        ("digest", "<u8"),  # the first 8 bytes of the text's SHA-256
        ("first", "<u8"),  # index of its first token in the part
        ("length", "<u4"),  # tokens, including the end of text
        ("size", "<u4"),  # bytes of text
    ]
)
"""The index entry of a document; a part's are sorted by (heldout, key, ordinal)."""


def encode_task(job: EncodeJob, task: EncodeTask, add: AddProgress) -> TaskResult:
    """Encode the documents of a task, except for parts that an interrupted call has written.

    Raises:
        UserError: for an unreadable document, unless they are skipped.
    """
    result = TaskResult()
    texts = _read_texts(job, task, result, add)
    for number in count():
        path = job.folder / f"{task.name}-{number:04d}"
        if path.with_suffix(".npy").exists():
            index = open_part(path)
            deque(islice(texts, len(index)), maxlen=0)
        else:
            first = (task.number << 32) + result.documents
            index = _encode_part(job, job.sources[task.source][1], texts, path, first=first)
        if not len(index):
            break
        result.parts.append(path.name)
        result.documents += len(index)
        result.tokens += int(index["length"].sum(dtype=np.int64))
    write_json(job.folder / f"{task.name}.json", asdict(result), indent=None)
    return result


def heldout_threshold(share: float) -> int:
    """Documents with a digest below this are held out, so a growing corpus moves none of them."""
    return int(share * (1 << 64))


def digest_text(raw: bytes) -> tuple[bytes, int]:
    """SHA-256 of a text, and its first 8 bytes as a number."""
    digest = hashlib.sha256(raw).digest()
    return digest, int.from_bytes(digest[:8], "big")


def _read_texts(
    job: EncodeJob, task: EncodeTask, result: TaskResult, add: AddProgress
) -> Iterator[str]:
    """The documents to encode; counts blank, cut and unreadable ones."""
    source, _ = job.sources[task.source]
    for span in task.spans:
        counted = text_bytes = 0
        for record in source.read(span):
            if isinstance(record, Fault):
                if job.on_error is OnError.stop:
                    raise UserError([record.problem(source.path)])
                result.faults += 1
                if len(result.listed) < MAX_LISTED:
                    result.listed.append(record.message)
                continue
            text = record.text
            if not text or text.isspace():
                result.blank += 1
                result.first_blank = result.first_blank or source.place(span, record)
                continue
            text_bytes += len(text)
            if text_bytes >= max(1, span.size // 50) and counted + text_bytes <= span.size:
                add(text_bytes, text_bytes)
                counted, text_bytes = counted + text_bytes, 0
            if len(text) * 4 <= MAX_DOCUMENT_BYTES or len(text.encode()) <= MAX_DOCUMENT_BYTES:
                yield text
            else:
                result.cut += 1
                yield from _cut_document(text)
        add(span.size - counted, text_bytes)


def _cut_document(text: str) -> Iterator[str]:
    """Pieces of at most MAX_DOCUMENT_BYTES, each a document of its own."""
    start = 0
    while start < len(text):
        stop = start + MAX_DOCUMENT_BYTES // 4
        if stop < len(text):
            stop = (text.rfind("\n", start, stop) + 1) or stop
        yield text[start:stop]
        start = stop


def _encode_part(
    job: EncodeJob, share: float, texts: Iterator[str], path: Path, *, first: int
) -> NDArray[Any]:
    """Encode documents up to PART_BYTES and write them. Returns the index.

    Args:
        first: ordinal of the first document.
    """
    dtype = np.dtype(token_dtype(job.tokenizer.size))
    threshold = heldout_threshold(share)
    salt = b"" if job.shuffle_seed is None else job.shuffle_seed.to_bytes(8, "big")
    tokens: list[NDArray[Any]] = []
    entries: list[tuple[bool, int, int, int, int, int, int]] = []
    batch: list[str] = []
    num_bytes = characters = 0

    def encode_batch() -> None:
        ends = [job.tokenizer.eos_id]
        tokens.extend(np.array(i + ends, dtype) for i in encode_texts(job.tokenizer.backend, batch))
        batch.clear()

    for ordinal, text in enumerate(texts, first):
        raw = text.encode("utf-8")
        digest, number = digest_text(raw)
        key = ordinal
        if job.shuffle_seed is not None:
            # With deduplication, equal texts must have equal keys.
            what = digest if job.deduplicate else digest + ordinal.to_bytes(8, "big")
            key = digest_text(salt + what)[1]
        entries.append((number < threshold, key, ordinal, number, 0, 0, len(raw)))
        batch.append(text)
        num_bytes += len(raw)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            encode_batch()
            characters = 0
        if num_bytes >= PART_BYTES:
            break
    encode_batch()
    index = np.array(entries, dtype=PART_DTYPE)
    if not entries:
        return index
    index["length"] = [len(ids) for ids in tokens]
    order = np.lexsort((index["ordinal"], index["key"], index["heldout"]))
    index = index[order]
    index["first"][1:] = np.cumsum(index["length"][:-1], dtype=np.uint64)
    with path.with_suffix(".bin").open("wb") as file:
        for place in order:
            file.write(tokens[place].data)
        file.flush()
        os.fsync(file.fileno())
    # Written last: a part without an index is incomplete.
    with replacing(path.with_suffix(".npy")) as temporary, temporary.open("wb") as file:
        np.save(file, index)
    return index


def open_part(path: Path) -> NDArray[Any]:
    """The memory-mapped index of a part: (documents,) of PART_DTYPE."""
    index: NDArray[Any] = np.load(path.with_suffix(".npy"), mmap_mode="r")
    return index


def encode_texts(backend: Any, texts: list[str]) -> Iterator[list[int]]:
    """Token ids of each text, without special tokens; long texts are encoded in pieces."""

    def encode(batch: list[str]) -> list[list[int]]:
        return [found.ids for found in backend.encode_batch_fast(batch, add_special_tokens=False)]

    encoded = iter(encode([text for text in texts if len(text) <= BATCH_CHARACTERS]))
    for text in texts:
        if len(text) <= BATCH_CHARACTERS:
            yield next(encoded)
            continue
        ids: list[int] = []
        start = 0
        while start < len(text):
            stop = _find_cut(encode, text, start)
            ids += encode([text[start:stop]])[0]
            start = stop
        yield ids


def _find_cut(encode: Any, text: str, start: int) -> int:
    """Where a long text can be cut without changing its tokens.

    Candidates are the ends of lines and words, where the surrounding text has the same tokens whole
    and in two halves. Without such a place (250,000 letters without a space) a boundary is forced.
    """
    end = start + BATCH_CHARACTERS
    if end >= len(text):
        return len(text)
    low = start + BATCH_CHARACTERS * 9 // 10
    places = [
        found.start() for found in re.finditer(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)", text[low:end])
    ]
    for place in places[:-51:-1]:
        cut = low + place
        halves = [text[cut - WINDOW : cut], text[cut : cut + WINDOW]]
        whole, left, right = encode(["".join(halves), *halves])
        if whole == left + right:
            return cut
    return end

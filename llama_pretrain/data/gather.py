"""The second pass: from sorted parts to shuffled shards of bounded size.

A shard is a range of keys. Each part has its documents of that range in one stretch, and sorting
those of all parts shuffles the whole source, because keys are hashes. Duplicates have the same key
and so lie side by side.
"""

import json
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_pretrain.data.encode import PART_DTYPE, open_part
from llama_pretrain.data.meta import HELDOUT, TRAIN
from llama_pretrain.data.packed import TokenWriter
from llama_pretrain.data.pool import Counter
from llama_pretrain.files import write_text

SHARD_TOKENS = 1 << 25
END_OF_KEYS = 1 << 64


@dataclass(frozen=True, kw_only=True)
class GatherJob:
    """What all shards of a source share."""

    parts_dir: Path
    parts: list[str]
    folder: Path
    dtype: str
    eos_id: int
    row_tokens: int | None
    """Length of a best-fit row; `None` = documents stand one after another."""
    deduplicate: bool


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A range of keys [low, high) of a split."""

    split: str
    number: int
    low: int
    high: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What a shard holds."""

    tokens: int
    documents: int
    bytes: int
    duplicates: int
    cut: int
    """Documents that a best-fit row was too short for."""
    padding: int
    """Tokens of it."""


def plan_shards(parts_dir: Path, parts: Sequence[str], *, by_key: bool) -> list[Shard]:
    """Ranges of keys with about SHARD_TOKENS tokens each.

    Args:
        by_key: whether keys are hashes, evenly spread; else they are the documents' numbers.
    """
    tokens = {TRAIN: 0, HELDOUT: 0}
    starts: dict[str, list[int]] = {TRAIN: [0], HELDOUT: [0]}
    filled = {TRAIN: 0, HELDOUT: 0}
    for part in parts:
        index = open_part(parts_dir / part)
        for split in tokens:
            mine = index[index["heldout"] == (split == HELDOUT)]
            if len(mine) == 0:
                continue
            count = int(mine["length"].sum(dtype=np.int64))
            tokens[split] += count
            if filled[split] and filled[split] + count > SHARD_TOKENS:
                starts[split].append(int(mine["key"][0]))
                filled[split] = 0
            filled[split] += count
    shards = []
    for split, count in tokens.items():
        number = -(-count // SHARD_TOKENS)
        bounds = [END_OF_KEYS * i // number for i in range(number)] if by_key else starts[split]
        if count:
            ends = [*bounds[1:], END_OF_KEYS]
            for i, (low, high) in enumerate(zip(bounds, ends, strict=True)):
                shards.append(Shard(split=split, number=i, low=low, high=high))
    return shards


def gather_shard(job: GatherJob, shard: Shard, counter: Counter) -> ShardResult:
    """Write a shard's .bin and .idx."""
    index, origins, buffers = _collect(job, shard)
    order = np.lexsort((index["ordinal"], index["key"]))
    duplicates = 0
    if job.deduplicate and len(order):
        keys, digests = index["key"][order], index["digest"][order]
        same = (keys[1:] == keys[:-1]) & (digests[1:] == digests[:-1])
        duplicates = int(same.sum())
        order = order[np.concatenate(([True], ~same))]
    width = np.dtype(job.dtype).itemsize
    lengths = index["length"][order].astype(np.int64)
    cut = padding = 0
    with TokenWriter(job.folder / shard.name, dtype=job.dtype) as writer:

        def stretch(place: int, start: int, stop: int) -> memoryview:
            buffer, base = buffers[origins[place]]
            first = int(index["first"][place]) - base
            found: memoryview = buffer[(first + start) * width : (first + stop) * width]
            return found

        if job.row_tokens is None:
            for place, length in zip(order.tolist(), lengths.tolist(), strict=True):
                writer.add(stretch(place, 0, length))
        else:
            fill = np.full(job.row_tokens, job.eos_id, dtype=job.dtype).tobytes()
            cut = int((lengths > job.row_tokens).sum())
            for row in pack_best_fit(lengths.tolist(), width=job.row_tokens):
                content = b"".join(
                    stretch(int(order[document]), start, stop) for document, start, stop in row
                )
                padding += job.row_tokens - len(content) // width
                writer.add(content + fill[len(content) :])
    tokens = sum(writer.lengths)
    counter.add(tokens * width, 0)
    result = ShardResult(
        tokens=tokens,
        documents=len(order),
        bytes=int(index["size"][order].sum(dtype=np.int64)),
        duplicates=duplicates,
        cut=cut,
        padding=padding,
    )
    write_text(shard_marker(job.folder, shard), json.dumps(asdict(result)) + "\n")
    return result


def shard_marker(folder: Path, shard: Shard) -> Path:
    """The file that says that a shard is done, and what it holds."""
    return folder / f"{shard.name}.json"


def _collect(
    job: GatherJob, shard: Shard
) -> tuple[NDArray[Any], NDArray[np.int64], list[tuple[memoryview, int]]]:
    """Index entries of a shard, which buffer each is in, and buffers with their first token."""
    heldout = shard.split == HELDOUT
    width = np.dtype(job.dtype).itemsize
    entries: list[NDArray[Any]] = []
    buffers: list[tuple[memoryview, int]] = []
    for part in job.parts:
        index = open_part(job.parts_dir / part)
        low, high = (_find(index, heldout, key) for key in (shard.low, shard.high))
        if low == high:
            continue
        mine = np.array(index[low:high])
        first, last = int(mine["first"][0]), int(mine["first"][-1]) + int(mine["length"][-1])
        with (job.parts_dir / f"{part}.bin").open("rb") as file:
            content = os.pread(file.fileno(), (last - first) * width, first * width)
        buffers.append((memoryview(content), first))
        entries.append(mine)
    origins = np.repeat(np.arange(len(entries)), [len(mine) for mine in entries])
    return np.concatenate([np.empty(0, PART_DTYPE), *entries]), origins, buffers


def _find(index: NDArray[Any], heldout: bool, key: int) -> int:
    """Where (heldout, key) would stand in a part."""
    return bisect_left(
        range(len(index)),
        (heldout, key),
        key=lambda place: (bool(index[place]["heldout"]), int(index[place]["key"])),
    )


Piece = tuple[int, int, int]
"""(document, first token, end)."""


def pack_best_fit(lengths: Sequence[int], *, width: int) -> Iterator[list[Piece]]:
    """Rows of at most `width` tokens, documents whole where they fit (arXiv 2404.10830).

    The longest go first, each into the row that it leaves the least room in. A document above the
    width is cut; the next piece begins with the last token of the one before, which is its target
    there and an input here.
    """
    rest: list[Piece] = []
    for document, length in enumerate(lengths):
        start = 0
        while length - start > width:
            yield [(document, start, start + width)]
            start += width - 1
        rest.append((document, start, length))
    rest.sort(key=lambda piece: piece[1] - piece[2])  # stable: equal lengths stay in order
    rows: list[list[Piece]] = []
    with_room: list[list[int]] = [[] for _ in range(width + 1)]  # rows by tokens left
    rooms = 0  # bit n: a row has n tokens left
    for piece in rest:
        length = piece[2] - piece[1]
        fitting = rooms >> length
        if fitting:
            room = (fitting & -fitting).bit_length() - 1 + length
            number = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, number = width, len(rows)
            rows.append([])
        rows[number].append(piece)
        with_room[room - length].append(number)
        rooms |= 1 << (room - length)
    yield from rows

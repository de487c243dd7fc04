"""The second pass: from sorted parts to shuffled shards of bounded size.

A shard is a range of keys, and a range is contiguous in every part. Keys are hashes, so sorting the
range of all parts together shuffles the whole source. Duplicates have equal keys and are adjacent.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_pretrain.data.encode import PART_DTYPE, open_part
from llama_pretrain.data.meta import HELDOUT, TRAIN
from llama_pretrain.data.packed import write_packed
from llama_pretrain.data.pool import AddProgress
from llama_pretrain.files import write_json

SHARD_TOKENS = 1 << 25
END_OF_KEYS = 1 << 64


@dataclass(frozen=True, kw_only=True)
class GatherJob:
    """What all shards of a source have in common."""

    parts_dir: Path
    parts: list[str]
    folder: Path
    dtype: str
    eos_id: int
    sequence_tokens: int | None
    """Length of a best-fit sequence; `None` = documents follow one another."""
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
        """Of its files; NAME.json is its result and marks it complete."""
        return f"{self.split}-{self.number:05d}"


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """The contents of a shard."""

    tokens: int
    documents: int
    bytes: int
    duplicates: int
    cut: int
    """Documents longer than a best-fit sequence."""
    padding: int
    """Tokens that fill best-fit sequences."""


def plan_shards(parts_dir: Path, parts: Sequence[str], *, by_key: bool) -> list[Shard]:
    """Ranges of keys with about SHARD_TOKENS tokens each.

    Args:
        by_key: whether keys are uniformly distributed hashes; otherwise they number the documents.
    """
    tokens = {TRAIN: 0, HELDOUT: 0}
    starts: dict[str, list[int]] = {TRAIN: [0], HELDOUT: [0]}
    filled = {TRAIN: 0, HELDOUT: 0}
    for part in parts:
        index = open_part(parts_dir / part)
        for split in tokens:
            entries = index[index["heldout"] == (split == HELDOUT)]
            count = int(entries["length"].sum(dtype=np.int64))
            if filled[split] and count and filled[split] + count > SHARD_TOKENS:
                starts[split].append(int(entries["key"][0]))
                filled[split] = 0
            tokens[split] += count
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


def gather_shard(job: GatherJob, shard: Shard, add: AddProgress) -> ShardResult:
    """Write a shard's .bin and .idx."""
    index, tokens = _collect(job, shard)
    order = np.lexsort((index["ordinal"], index["key"]))
    duplicates = 0
    if job.deduplicate and len(order):
        keys, digests = index["key"][order], index["digest"][order]
        same = (keys[1:] == keys[:-1]) & (digests[1:] == digests[:-1])
        duplicates = int(same.sum())
        order = order[np.concatenate(([True], ~same))]
    starts = index["first"][order].tolist()
    lengths = index["length"][order].tolist()
    cut = padding = 0
    with write_packed(job.folder / shard.name, dtype=job.dtype) as writer:
        if job.sequence_tokens is None:
            for start, length in zip(starts, lengths, strict=True):
                writer.add(tokens[start : start + length])
        else:
            cut = sum(length > job.sequence_tokens for length in lengths)
            for pieces in pack_best_fit(lengths, width=job.sequence_tokens):
                sequence, filled = np.full(job.sequence_tokens, job.eos_id, dtype=job.dtype), 0
                for document, first, stop in pieces:
                    content = tokens[starts[document] + first : starts[document] + stop]
                    sequence[filled : filled + len(content)] = content
                    filled += len(content)
                padding += job.sequence_tokens - filled
                writer.add(sequence)
    result = ShardResult(
        tokens=sum(writer.lengths),
        documents=len(order),
        bytes=int(index["size"][order].sum(dtype=np.int64)),
        duplicates=duplicates,
        cut=cut,
        padding=padding,
    )
    add(result.tokens * tokens.itemsize, 0)
    write_json(job.folder / f"{shard.name}.json", asdict(result), indent=None)
    return result


def _collect(job: GatherJob, shard: Shard) -> tuple[NDArray[Any], NDArray[Any]]:
    """The index entries of a shard's documents, with `first` in the tokens that follow."""
    heldout, dtype = shard.split == HELDOUT, np.dtype(job.dtype)
    found: list[tuple[Path, NDArray[Any]]] = []
    for part in job.parts:
        path = job.parts_dir / part
        index = open_part(path)
        low, high = (_find(index, heldout, key) for key in (shard.low, shard.high))
        if low < high:
            found.append((path, np.array(index[low:high])))
    counts = [int(entries["length"].sum(dtype=np.int64)) for _, entries in found]
    tokens, done = np.empty(sum(counts), dtype), 0
    for (path, entries), count in zip(found, counts, strict=True):
        first = int(entries["first"][0])
        tokens[done : done + count] = np.fromfile(
            path.with_suffix(".bin"), dtype, count, offset=first * dtype.itemsize
        )
        entries["first"] += np.uint64((done - first) % END_OF_KEYS)  # modulo 2^64
        done += count
    return np.concatenate([np.empty(0, PART_DTYPE), *(entries for _, entries in found)]), tokens


def _find(index: NDArray[Any], heldout: bool, key: int) -> int:
    """Where (heldout, key) belongs in a part; a bisection touches few pages of the index."""
    return bisect_left(
        range(len(index)),
        (heldout, key),
        key=lambda place: (bool(index[place]["heldout"]), int(index[place]["key"])),
    )


Piece = tuple[int, int, int]
"""(document, first token, end)."""


def pack_best_fit(lengths: Sequence[int], *, width: int) -> Iterator[list[Piece]]:
    """Pack documents into sequences of at most `width` tokens, whole where they fit.

    Best-fit decreasing (arXiv 2404.10830): the longest document comes first, and each goes into the
    sequence with the least sufficient space. A document longer than `width` is cut; each piece
    begins with the last token of the previous one, which is a target there and an input here.
    """
    rest: list[Piece] = []
    for document, length in enumerate(lengths):
        start = 0
        while length - start > width:
            yield [(document, start, start + width)]
            start += width - 1
        rest.append((document, start, length))
    rest.sort(key=lambda piece: piece[1] - piece[2])  # stable: equal lengths keep their order
    sequences: list[list[Piece]] = []
    by_space: list[list[int]] = [[] for _ in range(width + 1)]  # sequences by free tokens
    spaces = 0  # bit n: some sequence has n free tokens
    for piece in rest:
        length = piece[2] - piece[1]
        fitting = spaces >> length
        if fitting:
            space = (fitting & -fitting).bit_length() - 1 + length
            number = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, number = width, len(sequences)
            sequences.append([])
        sequences[number].append(piece)
        by_space[space - length].append(number)
        spaces |= 1 << (space - length)
    yield from sequences

"""The order of the data is a formula: the row at each global position, for any number of ranks.

A keyed Feistel network permutes [0, 4^k); cycle walking (Black and Rogaway 2002) restricts it to
the rows there are. Nothing is stored, so a position is all that a checkpoint keeps. In a mixture,
a keyed permutation of each block of positions deals them out among the sources, and each source is
read in an order of its own.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llama_pretrain.plan.sampling import SamplingPlan, StagePlan

NUM_ROUNDS = 6

_Deal = tuple[NDArray[np.int64], NDArray[np.uint64]]


class SampleOrder:
    """Sample ids by global position. The ids of a source follow those of the sources before it."""

    def __init__(self, sampling: SamplingPlan, *, num_rows: Sequence[int], seed: int):
        self.num_rows = list(num_rows)
        self._sampling = sampling
        self._first_ids = np.cumsum([0, *num_rows[:-1]], dtype=np.uint64)
        alone = len(num_rows) == 1
        # A source keeps its order when others join it.
        self._seeds = [seed if alone else _seed_of(name, seed) for name in sampling.names]
        self._seed = seed
        self._dealt: tuple[int, int, _Deal] | None = None  # of the block that was asked for last
        self._used_before = self._count_stages()

    def ids(self, first: int, count: int) -> NDArray[np.uint64]:
        """Sample ids at positions first, first + 1, ...: (count,)."""
        if len(self.num_rows) == 1:
            positions = np.arange(first, first + count, dtype=np.uint64)
            return rows_at(positions, num_rows=self.num_rows[0], seed=self._seeds[0])
        result = np.empty(count, dtype=np.uint64)
        done = 0
        while done < count:
            stage = self._sampling.stage_at(first + done)
            number = self._sampling.stages.index(stage)
            block, place = divmod(first + done - stage.first_sample, self._sampling.block)
            taken = min(self._sampling.block - place, count - done)
            if number + 1 < len(self._sampling.stages):
                end = self._sampling.stages[number + 1].first_sample
                taken = min(taken, end - first - done)
            sources, turns = self._deal(stage, number, block)
            chosen = slice(place, place + taken)
            part = result[done : done + taken]
            for index in range(len(self.num_rows)):
                mine = sources[chosen] == index
                before = self._used_before[number][index] + block * stage.quotas[index]
                positions = np.uint64(before) + turns[chosen][mine]
                if len(positions):
                    rows = rows_at(
                        positions, num_rows=self.num_rows[index], seed=self._seeds[index]
                    )
                    part[mine] = self._first_ids[index] + rows
            done += taken
        return result

    def _deal(self, stage: StagePlan, number: int, block: int) -> _Deal:
        """The source of each place of a block, and the how-manieth of that source it is."""
        if self._dealt is not None and self._dealt[:2] == (number, block):
            return self._dealt[2]
        size = self._sampling.block
        key = _mix(np.asarray([self._seed], np.uint64))
        key = _mix(_mix(key ^ np.uint64(number + 1)) ^ np.uint64(block))
        places = _permute(np.arange(size, dtype=np.uint64), num_rows=size, key=key[0])
        sources = np.searchsorted(np.cumsum(stage.quotas), places, side="right")
        turns = np.empty(size, dtype=np.uint64)
        for index in range(len(stage.quotas)):
            mine = sources == index
            turns[mine] = np.arange(mine.sum(), dtype=np.uint64)
        self._dealt = number, block, (sources, turns)
        return sources, turns

    def _count_stages(self) -> list[list[int]]:
        """Rows of each source that the stages before each stage have read."""
        stages = self._sampling.stages
        used = [[0] * len(self.num_rows)]
        if len(self.num_rows) == 1:
            return used * len(stages)
        for number, (stage, after) in enumerate(pairwise(stages)):
            blocks, rest = divmod(after.first_sample - stage.first_sample, self._sampling.block)
            sources, _ = self._deal(stage, number, blocks)
            begun = np.bincount(sources[:rest], minlength=len(self.num_rows))
            used.append(
                [
                    before + blocks * quota + int(more)
                    for before, quota, more in zip(used[-1], stage.quotas, begun, strict=True)
                ]
            )
        return used


def rows_at(positions: NDArray[np.uint64], *, num_rows: int, seed: int) -> NDArray[np.uint64]:
    """The row at each position of one source: each epoch is a permutation of its own."""
    epochs, places = np.divmod(positions, np.uint64(num_rows))
    rows = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        # Seed and epoch are mixed one after the other: seed 3 epoch 1 is not seed 4 epoch 0.
        key = _mix(_mix(np.asarray([seed], np.uint64)) ^ epoch)[0]
        rows[chosen] = _permute(places[chosen], num_rows=num_rows, key=key)
    return rows


def rank_samples(
    order: SampleOrder,
    *,
    batches: Iterable[range],
    global_batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[NDArray[np.uint64]]:
    """Sample ids of one rank for each global batch: r, r + W, r + 2W, ... of it.

    Args:
        batches: numbers of the global batches, in stretches.
    """
    at_once = max(1, 4096 // global_batch_size)  # numpy's overhead is that of a call
    for stretch in batches:
        for first in range(stretch.start, stretch.stop, at_once):
            count = min(at_once, stretch.stop - first)
            ids = order.ids(first * global_batch_size, count * global_batch_size)
            for batch in ids.reshape(count, global_batch_size):
                yield batch[rank::world_size]


def stretches(first: int, count: int, *, left_out: Iterable[int]) -> list[range]:
    """The next `count` numbers from `first` on without those that are left out, as ranges."""
    result: list[range] = []
    for hole in [*sorted(number for number in left_out if number >= first), None]:
        end = first + count if hole is None else min(hole, first + count)
        if first < end:
            result.append(range(first, end))
            count -= end - first
        if hole is not None:
            first = max(first, hole + 1)
    return result


def hash_samples(ids: NDArray[np.int64]) -> int:
    """A sum of 32-bit hashes of sample ids: the same whatever their order or their rank."""
    return int((_mix(ids.astype(np.uint64)) >> np.uint64(32)).sum())


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _permute(places: NDArray[np.uint64], *, num_rows: int, key: np.uint64) -> NDArray[np.uint64]:
    half_bits = max(1, (max(1, (num_rows - 1).bit_length()) + 1) // 2)
    result = _feistel(places, half_bits=half_bits, key=key)
    while (outside := result >= num_rows).any():
        result[outside] = _feistel(result[outside], half_bits=half_bits, key=key)
    return result


def _feistel(values: NDArray[np.uint64], *, half_bits: int, key: np.uint64) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for number in range(NUM_ROUNDS):
        round_key = _mix(np.asarray([key ^ np.uint64(number)]))[0]
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), a bijection of 64 bits."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

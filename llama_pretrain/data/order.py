"""The order of the data: a formula for the sequence at each global position, on any ranks.

A keyed Feistel network permutes [0, 4^k), and cycle walking (Black and Rogaway 2002) restricts it
to the sequences that exist. No state is stored, so a checkpoint only needs the position. In a
mixture, a keyed permutation assigns the positions of each block to the sources, and each source has
its own order.
"""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llama_pretrain.plan.sampling import SamplingPlan, StagePlan

NUM_ROUNDS = 6

_Assignment = tuple[NDArray[np.int64], NDArray[np.uint64]]


class SampleOrder:
    """Sample ids by global position. The ids of a source follow those of the previous sources."""

    def __init__(self, sampling: SamplingPlan, *, num_sequences: Sequence[int], seed: int):
        self.num_sequences = list(num_sequences)
        self._sampling = sampling
        self._first_ids = np.cumsum([0, *num_sequences[:-1]], dtype=np.uint64)
        single = len(num_sequences) == 1
        # A source keeps its order when other sources are added.
        self._seeds = [seed if single else _source_seed(name, seed) for name in sampling.names]
        self._seed = seed
        self._last_block: tuple[int, int, _Assignment] | None = None
        self._used_before = [[0] * len(num_sequences)]
        if not single:
            self._count_stages()

    def ids(self, first: int, count: int) -> NDArray[np.uint64]:
        """Sample ids at positions first, first + 1, ...: (count,)."""
        if len(self.num_sequences) == 1:
            positions = np.arange(first, first + count, dtype=np.uint64)
            return sequences_at(positions, num_sequences=self.num_sequences[0], seed=self._seeds[0])
        result = np.empty(count, dtype=np.uint64)
        stages, block_size, done = self._sampling.stages, self._sampling.block, 0
        while done < count:
            stage = self._sampling.stage_at(first + done)
            number = stages.index(stage)
            block, place = divmod(first + done - stage.first_sample, block_size)
            taken = min(block_size - place, count - done)
            if number + 1 < len(stages):
                taken = min(taken, stages[number + 1].first_sample - first - done)
            sources, turns = self._assign(stage, number, block)
            chosen = slice(place, place + taken)
            part = result[done : done + taken]
            for index, num_sequences in enumerate(self.num_sequences):
                mine = sources[chosen] == index
                if mine.any():
                    before = self._used_before[number][index] + block * stage.quotas[index]
                    positions = np.uint64(before) + turns[chosen][mine]
                    sequences = sequences_at(
                        positions, num_sequences=num_sequences, seed=self._seeds[index]
                    )
                    part[mine] = self._first_ids[index] + sequences
            done += taken
        return result

    def _assign(self, stage: StagePlan, number: int, block: int) -> _Assignment:
        """The source of each position of a block, and how many of that source precede it."""
        if self._last_block is not None and self._last_block[:2] == (number, block):
            return self._last_block[2]
        size = self._sampling.block
        key = _mix(np.asarray([self._seed], np.uint64))
        key = _mix(_mix(key ^ np.uint64(number + 1)) ^ np.uint64(block))
        places = _permute(np.arange(size, dtype=np.uint64), num_sequences=size, key=key[0])
        sources = np.searchsorted(np.cumsum(stage.quotas), places, side="right")
        turns = np.empty(size, dtype=np.uint64)
        for index in range(len(stage.quotas)):
            mine = sources == index
            turns[mine] = np.arange(mine.sum(), dtype=np.uint64)
        self._last_block = number, block, (sources, turns)
        return sources, turns

    def _count_stages(self) -> None:
        """Count the sequences of each source that the previous stages of each stage have used."""
        for number, (stage, after) in enumerate(pairwise(self._sampling.stages)):
            blocks, rest = divmod(after.first_sample - stage.first_sample, self._sampling.block)
            sources, _ = self._assign(stage, number, blocks)
            partial = np.bincount(sources[:rest], minlength=len(self.num_sequences)).tolist()
            counts = zip(self._used_before[-1], stage.quotas, partial, strict=True)
            self._used_before.append([used + blocks * quota + n for used, quota, n in counts])


def sequences_at(
    positions: NDArray[np.uint64], *, num_sequences: int, seed: int
) -> NDArray[np.uint64]:
    """The sequence at each position of one source: each epoch is another permutation."""
    epochs, places = np.divmod(positions, np.uint64(num_sequences))
    sequences = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        # Mixed one after the other, so that seed 3 epoch 1 differs from seed 4 epoch 0.
        key = _mix(_mix(np.asarray([seed], np.uint64)) ^ epoch)[0]
        sequences[chosen] = _permute(places[chosen], num_sequences=num_sequences, key=key)
    return sequences


def stretches(first: int, count: int, *, left_out: Iterable[int]) -> list[range]:
    """The next `count` numbers from `first` on, without those in `left_out`, as ranges."""
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
    """The sum of 32-bit hashes of sample ids, which does not depend on their order or rank."""
    return int((_mix(ids.astype(np.uint64)) >> np.uint64(32)).sum())


def _source_seed(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _permute(
    places: NDArray[np.uint64], *, num_sequences: int, key: np.uint64
) -> NDArray[np.uint64]:
    half_bits = max(1, (max(1, (num_sequences - 1).bit_length()) + 1) // 2)
    result = _feistel(places, half_bits=half_bits, key=key)
    while (outside := result >= num_sequences).any():
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
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014), a bijection of 64 bits."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

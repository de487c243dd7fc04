"""The order of the data is a formula: the row at each global position, for any number of ranks.

A keyed Feistel network permutes [0, 4^k); cycle walking (Black and Rogaway 2002) restricts it to
the rows there are. Nothing is stored, so a position is all that a checkpoint keeps.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 6


def rows_at(positions: NDArray[np.uint64], *, num_rows: int, seed: int) -> NDArray[np.uint64]:
    """The row at each global position: each epoch is a permutation of its own."""
    epochs, places = np.divmod(positions, np.uint64(num_rows))
    rows = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        # Seed and epoch are mixed one after the other: seed 3 epoch 1 is not seed 4 epoch 0.
        key = _mix(_mix(np.asarray([seed], np.uint64)) ^ epoch)[0]
        rows[chosen] = _permute(places[chosen], num_rows=num_rows, key=key)
    return rows


def rank_positions(
    *, first_step: int, num_steps: int, global_batch_size: int, rank: int, world_size: int
) -> Iterator[NDArray[np.uint64]]:
    """Positions of one rank for each step: r, r + W, r + 2W, ... of the step's global batch."""
    for step in range(first_step, num_steps):
        start = step * global_batch_size
        yield np.arange(start + rank, start + global_batch_size, world_size, dtype=np.uint64)


def hash_samples(rows: NDArray[np.int64]) -> int:
    """A sum of 32-bit hashes of row ids: the same whatever their order or their rank."""
    return int((_mix(rows.astype(np.uint64)) >> np.uint64(32)).sum())


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

"""Samplers and the data loader of a rank.

B is the micro batch, T the sequence length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import default_data_collator

from llama_pretrain.data.dataset import PretrainDataset
from llama_pretrain.data.order import SampleOrder


@dataclass(frozen=True, kw_only=True)
class TrainSampler(Sampler[int]):
    """Sample ids of one rank: positions r, r + W, r + 2W, ... of each global batch."""

    order: SampleOrder
    batches: Sequence[range]
    """Numbers of the global batches."""
    global_batch_size: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[int]:
        size = self.global_batch_size
        at_once = max(1, 4096 // size)  # a numpy call has a constant overhead
        for numbers in self.batches:
            for first in numbers[::at_once]:
                count = min(at_once, numbers.stop - first)
                ids = self.order.ids(first * size, count * size).reshape(count, size)
                yield from ids[:, self.rank :: self.world_size].ravel().tolist()


@dataclass(frozen=True, kw_only=True)
class EvalSampler(Sampler[int]):
    """Sequences r, r + W, ... in order, each once; -1 when a rank has none left.

    Every rank yields the same number of full micro batches: at ZeRO stage 3 the other ranks would
    wait forever for the shards of one that stopped early.
    """

    num_sequences: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[int]:
        step = self.micro_batch_size * self.world_size
        padded = -(-self.num_sequences // step) * step
        for sequence in range(self.rank, padded, self.world_size):
            yield sequence if sequence < self.num_sequences else -1


def build_loader(
    dataset: PretrainDataset, sampler: Sampler[int], *, micro_batch_size: int, num_workers: int
) -> DataLoader[dict[str, Any]]:
    """Load micro batches: `input_ids` and `shift_labels` (B, T), `sample_id` (B,), all int64."""
    return DataLoader(
        cast("Dataset[dict[str, Any]]", dataset),  # it imports no torch, and has what is called
        batch_size=micro_batch_size,
        sampler=sampler,
        collate_fn=default_data_collator,
        num_workers=num_workers,
        drop_last=True,
        # Iterating draws a seed; the global generator must not advance, because a checkpoint
        # restores it for dropout.
        generator=torch.Generator(),
    )

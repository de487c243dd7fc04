"""Rows as torch sees them: a dataset, the samplers, and the loaders that a rank iterates.

Letters: B rows of a micro batch, T tokens of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import default_data_collator

from llama_pretrain.data.order import rank_positions, rows_at
from llama_pretrain.data.packed import TokenReader

IGNORED = -100
"""The label that cross entropy leaves out."""


class PretrainDataset(Dataset[dict[str, Any]]):
    """Rows of the packed stream.

    An item has `input_ids` (T,) int64, `shift_labels` (T,) int64 (the token after each input, so
    that all T positions are trained) and `sample_id`, the row's number. Item -1 is a row without
    labels, for a rank that has nothing to evaluate while the others have.
    """

    def __init__(self, reader: TokenReader, *, sequence_length: int, limit_rows: int | None):
        self._reader = reader
        self._sequence_length = sequence_length
        rows = reader.num_rows(sequence_length)
        self._num_rows = rows if limit_rows is None else min(rows, limit_rows)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._reader.row(max(index, 0), self._sequence_length)
        labels = row[1:] if index >= 0 else np.full(self._sequence_length, IGNORED)
        return {"input_ids": row[:-1], "shift_labels": labels, "sample_id": index}


def create_pretrain_dataset(
    tokens_dir: Path, split: str, *, sequence_length: int, limit_rows: int | None = None
) -> PretrainDataset:
    """Open `train` or `heldout` of prepared tokens."""
    reader = TokenReader(tokens_dir / split)
    return PretrainDataset(reader, sequence_length=sequence_length, limit_rows=limit_rows)


@dataclass(frozen=True, kw_only=True)
class TrainSampler(Sampler[int]):
    """Row numbers of one rank from a step on, shuffled by formula."""

    num_rows: int
    seed: int
    first_step: int
    num_steps: int
    global_batch_size: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[int]:
        for positions in rank_positions(
            first_step=self.first_step,
            num_steps=self.num_steps,
            global_batch_size=self.global_batch_size,
            rank=self.rank,
            world_size=self.world_size,
        ):
            yield from rows_at(positions, num_rows=self.num_rows, seed=self.seed).tolist()


@dataclass(frozen=True, kw_only=True)
class EvalSampler(Sampler[int]):
    """Rows r, r + W, ... in order, each once; -1 where a rank has no row left.

    Every rank yields equally many whole micro batches: at ZeRO stage 3 a rank that stopped early
    would leave the others waiting for its shards.
    """

    num_rows: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[int]:
        step = self.micro_batch_size * self.world_size
        padded = -(-self.num_rows // step) * step
        for row in range(self.rank, padded, self.world_size):
            yield row if row < self.num_rows else -1


def build_loader(
    dataset: PretrainDataset, sampler: Sampler[int], *, micro_batch_size: int, num_workers: int
) -> DataLoader[dict[str, Any]]:
    """A loader of micro batches: `input_ids` and `shift_labels` (B, T), `sample_id` (B,), int64."""
    return DataLoader(
        dataset,
        batch_size=micro_batch_size,
        sampler=sampler,
        collate_fn=default_data_collator,
        num_workers=num_workers,
        drop_last=True,
        # A loader draws a seed when it is iterated: from here, and not from the generator whose
        # state a checkpoint restores for dropout.
        generator=torch.Generator(),
    )

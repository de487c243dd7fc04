"""Rows as torch sees them: a dataset, the samplers, and the loaders that a rank iterates.

Letters: B rows of a micro batch, T tokens of a row.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import default_data_collator

from llama_pretrain.data.meta import read_meta
from llama_pretrain.data.order import SampleOrder, rank_samples
from llama_pretrain.data.packed import TokenRows, open_rows
from llama_pretrain.plan.plan import Corpus

IGNORED = -100
"""The label that cross entropy leaves out."""


class PretrainDataset(Dataset[dict[str, Any]]):
    """Rows of all sources, those of the first source first.

    An item has `input_ids` (T,) int64, `shift_labels` (T,) int64 (the token after each input, so
    that all T positions are trained), `sample_id`, the row's number, and with a document mask
    `position_ids` (T,) int64, which begin anew with each document. Item -1 is a row without labels,
    for a rank that has nothing to evaluate while the others have.
    """

    def __init__(
        self,
        sources: Sequence[TokenRows],
        *,
        limits: Sequence[int | None],
        eos_id: int,
        document_mask: bool,
        padded: bool,
    ):
        self._sources = list(sources)
        self._eos_id, self._document_mask, self._padded = eos_id, document_mask, padded
        self.num_rows = [
            len(rows) if limit is None else min(len(rows), limit)
            for rows, limit in zip(sources, limits, strict=True)
        ]
        """Of each source."""
        self.ends = list(accumulate(self.num_rows))

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def masked(self) -> bool:
        """Whether rows may have fewer than T targets."""
        return self._document_mask or self._padded

    def __getitem__(self, index: int) -> dict[str, Any]:
        source = bisect_right(self.ends, max(index, 0))
        first = self.ends[source - 1] if source else 0
        row = self._sources[source].row(max(index, 0) - first)
        inputs, labels = row[:-1], row[1:]
        item = {"input_ids": inputs, "shift_labels": labels, "sample_id": index}
        if index < 0:
            item["shift_labels"] = np.full_like(labels, IGNORED)
        elif self.masked:
            item["shift_labels"] = self._mask(inputs, labels)
        if self._document_mask:
            item["position_ids"] = document_positions(inputs, eos_id=self._eos_id)
        return item

    def _mask(self, inputs: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Leave out first tokens of documents, or only the ends that fill up a row."""
        hidden = inputs == self._eos_id
        if not self._document_mask:
            hidden &= labels == self._eos_id  # no document is empty
        return np.where(hidden, IGNORED, labels)


def document_positions(inputs: NDArray[np.int64], *, eos_id: int) -> NDArray[np.int64]:
    """Each token's place in its document, counted from the row's beginning for the first: (T,)."""
    places = np.arange(len(inputs))
    starts = np.zeros_like(places)
    starts[1:][inputs[:-1] == eos_id] = places[1:][inputs[:-1] == eos_id]
    return places - np.maximum.accumulate(starts)


def create_pretrain_dataset(
    corpus: Corpus,
    split: str,
    *,
    sequence_length: int,
    limits: Sequence[int | None],
    document_mask: bool = False,
) -> PretrainDataset:
    """Open `train` or `heldout` of a run's sources, at most so many rows of each."""
    sources, padded = [], False
    for source in corpus.sources:
        folder = Path(source.tokens_dir)
        meta = read_meta(folder, path="data")
        sources.append(open_rows(folder, meta, split, sequence_length=sequence_length))
        padded = padded or meta.row_tokens is not None
    return PretrainDataset(
        sources,
        limits=limits,
        eos_id=corpus.eos_id,
        document_mask=document_mask,
        padded=padded,
    )


@dataclass(frozen=True, kw_only=True)
class TrainSampler(Sampler[int]):
    """Sample ids of one rank for some global batches, shuffled and mixed by formula."""

    order: SampleOrder
    batches: Sequence[range]
    global_batch_size: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[int]:
        for ids in rank_samples(
            self.order,
            batches=self.batches,
            global_batch_size=self.global_batch_size,
            rank=self.rank,
            world_size=self.world_size,
        ):
            yield from ids.tolist()


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

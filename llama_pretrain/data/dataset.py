"""The sequences of a split by their ids, with labels and document positions; needs no torch.

T is the sequence length.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_pretrain.data.meta import read_meta
from llama_pretrain.data.packed import TokenSequences, open_sequences
from llama_pretrain.plan.plan import Corpus

IGNORED = -100
"""The label that cross entropy ignores."""


class PretrainDataset:
    """The sequences of all sources, one source after another.

    An item has `input_ids` (T,) int64, `shift_labels` (T,) int64 (the token after each input, so
    that all T positions are trained) and its index `sample_id`. With a document mask it also has
    `position_ids` (T,) int64, which start at 0 in each document. Item -1 has no labels: a rank
    without a sequence to evaluate uses it while other ranks have one.
    """

    def __init__(
        self,
        sources: Sequence[TokenSequences],
        *,
        limits: Sequence[int | None],
        eos_id: int,
        document_mask: bool,
        padded: bool,
    ):
        self._sources = list(sources)
        self._eos_id, self._document_mask, self._padded = eos_id, document_mask, padded
        self.num_sequences = [
            len(sequences) if limit is None else min(len(sequences), limit)
            for sequences, limit in zip(sources, limits, strict=True)
        ]
        """Per source."""
        self.ends = list(accumulate(self.num_sequences))

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def masked(self) -> bool:
        """Whether a sequence may have fewer than T targets."""
        return self._document_mask or self._padded

    def __getitem__(self, index: int) -> dict[str, Any]:
        source = bisect_right(self.ends, max(index, 0))
        first = self.ends[source - 1] if source else 0
        sequence = self._sources[source].sequence(max(index, 0) - first)
        inputs, labels = sequence[:-1], sequence[1:]
        item = {"input_ids": inputs, "shift_labels": labels, "sample_id": index}
        if index < 0:
            item["shift_labels"] = np.full_like(labels, IGNORED)
        elif self.masked:
            item["shift_labels"] = self._mask(inputs, labels)
        if self._document_mask:
            item["position_ids"] = document_positions(inputs, eos_id=self._eos_id)
        return item

    def _mask(self, inputs: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ignore the first token of each document, or only the padding of best-fit packing."""
        hidden = inputs == self._eos_id
        if not self._document_mask:
            hidden &= labels == self._eos_id  # no document is empty, so this is padding
        return np.where(hidden, IGNORED, labels)


def document_positions(inputs: NDArray[np.int64], *, eos_id: int) -> NDArray[np.int64]:
    """Each token's position in its document or, for the first document, in the sequence: (T,)."""
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
    """Open split `train` or `heldout` of a run's sources.

    Args:
        limits: maximum number of sequences per source.
    """
    sources, padded = [], False
    for source in corpus.sources:
        folder = Path(source.tokens_dir)
        meta = read_meta(folder, path="data")
        sources.append(open_sequences(folder, meta, split, sequence_length=sequence_length))
        padded = padded or meta.sequence_tokens is not None
    return PretrainDataset(
        sources,
        limits=limits,
        eos_id=corpus.eos_id,
        document_mask=document_mask,
        padded=padded,
    )

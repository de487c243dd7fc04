"""Losses of masked documents and of split sequences, compared with transformers on each part."""

from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from llama_pretrain.data.dataset import IGNORED, document_positions
from llama_pretrain.train.evaluate import verify_document_mask
from llama_pretrain.train.loss import token_losses
from llama_pretrain.train.step import split_sequences
from tests.train.engines import RANK, small_llama

EOS = 2
DOCUMENTS = ([5, 6, 7, 8, EOS], [9, EOS], [11, 12, 13, 14, 15, 16, EOS], [21, 22, 23])
ORDERS = ((0, 1, 2, 3), (2, 0, 1, 3))


@pytest.fixture(scope="module")
def model() -> Any:
    return small_llama(0, num_key_value_heads=2)


def reference_losses(model: Any, ids: Tensor) -> Tensor:
    """Losses of one sequence by itself."""
    logits = model(input_ids=ids[None, :-1], use_cache=False).logits
    return functional.cross_entropy(logits[0], ids[1:], reduction="none")


def packed() -> dict[str, Tensor]:
    """Two sequences: the documents in both orders."""
    sequences = []
    for order in ORDERS:
        stream = np.array([token for number in order for token in DOCUMENTS[number]])
        inputs, labels = stream[:-1], stream[1:]
        labels = np.where(inputs == EOS, IGNORED, labels)
        sequences.append((inputs, labels, document_positions(inputs, eos_id=EOS)))
    names = ("input_ids", "shift_labels", "position_ids")
    return {
        name: torch.from_numpy(np.stack(column))
        for name, column in zip(names, zip(*sequences, strict=True), strict=True)
    }


def test_masked_losses_equal_those_of_separate_documents(model: Any) -> None:
    batch = packed()
    losses = token_losses(model, batch).view(2, -1)
    for row, order in enumerate(ORDERS):
        expected: list[float] = []
        for number in order:
            expected += reference_losses(model, torch.tensor(DOCUMENTS[number])).tolist()
            expected.append(0.0)  # the next document's first token is not a target
        assert losses[row].tolist() == pytest.approx(expected[:-1], abs=1e-6)
    del batch["position_ids"]  # without them, documents attend to each other
    assert (token_losses(model, batch).view(2, -1) - losses).abs().max() > 1e-3


def test_a_leak_between_documents_is_found(model: Any) -> None:
    engine: Any = MagicMock(side_effect=model, module=model)
    summary = verify_document_mask(engine, eos_id=EOS, rank=RANK)
    assert summary.startswith("document mask: logits change by 0, without it by 0.")
    engine.side_effect = lambda position_ids=None, **inputs: model(**inputs)  # as with a cache
    with pytest.raises(RuntimeError, match="documents of a sequence attend to each other"):
        verify_document_mask(engine, eos_id=EOS, rank=RANK)


def test_split_sequences_are_independent(model: Any) -> None:
    """A sequence of 12 split into 4s has the same targets and sees only its own part."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (2, 13), generator=generator)
    batch = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}
    batch["sample_id"] = torch.tensor([7, 9])
    split = split_sequences(batch, 4)
    assert split["input_ids"].shape == (6, 4)
    assert split["sample_id"].tolist() == [7, 9]
    assert split["shift_labels"].flatten().tolist() == batch["shift_labels"].flatten().tolist()
    losses = token_losses(model, split).view(2, 12)
    for row in range(2):
        for start in (0, 4, 8):
            expected = reference_losses(model, ids[row, start : start + 5])
            torch.testing.assert_close(losses[row, start : start + 4], expected)
    assert split_sequences(batch, 12)["input_ids"] is batch["input_ids"]

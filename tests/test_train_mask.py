"""Documents of a row, apart: against transformers on each document alone."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from transformers import LlamaConfig, LlamaForCausalLM

from llama_pretrain.data.dataset import IGNORED, document_positions
from llama_pretrain.distributed import Rank
from llama_pretrain.train.loss import token_losses
from llama_pretrain.train.mask import prove_document_mask
from llama_pretrain.train.step import cut_rows

EOS = 2


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


DOCUMENTS = ([5, 6, 7, 8, EOS], [9, EOS], [11, 12, 13, 14, 15, 16, EOS], [21, 22, 23])


def packed() -> dict[str, torch.Tensor]:
    """Two rows: the documents in order, and in another one."""
    rows = []
    for order in ((0, 1, 2, 3), (2, 0, 1, 3)):
        stream = np.array([token for number in order for token in DOCUMENTS[number]])
        inputs, labels = stream[:-1], stream[1:]
        labels = np.where(inputs == EOS, IGNORED, labels)
        rows.append((inputs, labels, document_positions(inputs, eos_id=EOS)))
    names = ("input_ids", "shift_labels", "position_ids")
    return {
        name: torch.from_numpy(np.stack(column))
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def test_masked_losses_are_those_of_each_document_alone(model: LlamaForCausalLM) -> None:
    batch = packed()
    losses = token_losses(model, batch).view(2, -1)
    for row, order in enumerate(((0, 1, 2, 3), (2, 0, 1, 3))):
        expected: list[float] = []
        for number in order:
            document = torch.tensor([DOCUMENTS[number]])
            logits = model(input_ids=document[:, :-1], use_cache=False).logits
            expected += functional.cross_entropy(
                logits[0], document[0, 1:], reduction="none"
            ).tolist()
            expected.append(0.0)  # what follows the end is no target
        assert losses[row].tolist() == pytest.approx(expected[:-1], abs=1e-6)
    # Without positions of their own they see each other.
    del batch["position_ids"]
    assert (token_losses(model, batch).view(2, -1) - losses).abs().max() > 1e-3


class Engine:
    """A model with the few names of DeepSpeed's engine that the proof uses."""

    def __init__(self, model: LlamaForCausalLM, *, deaf: bool):
        self.module, self._deaf = model, deaf

    def eval(self) -> None:
        self.module.train(False)

    def train(self) -> None:
        self.module.train()

    def __call__(self, **inputs: Any) -> Any:
        if self._deaf:  # as transformers is where a cache is filled
            inputs.pop("position_ids", None)
        return self.module(**inputs)


def test_the_proof_finds_a_leak(model: LlamaForCausalLM) -> None:
    rank = Rank(index=0, local_index=0, world_size=1, device=torch.device("cpu"))
    said = prove_document_mask(Engine(model, deaf=False), eos_id=EOS, rank=rank)
    assert said.startswith("document mask: logits change by 0, without it by 0.")
    with pytest.raises(RuntimeError, match="documents leak into each other"):
        prove_document_mask(Engine(model, deaf=True), eos_id=EOS, rank=rank)


def test_cut_rows_are_rows_of_their_own(model: LlamaForCausalLM) -> None:
    """A row of 12 cut to 4 is three rows that don't see each other, with the same targets."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (2, 13), generator=generator)
    batch = {
        "input_ids": ids[:, :-1],
        "shift_labels": ids[:, 1:],
        "sample_id": torch.tensor([7, 9]),
    }
    cut = cut_rows(batch, 4)
    assert cut["input_ids"].shape == (6, 4)
    assert cut["sample_id"].tolist() == [7, 9]
    assert cut["shift_labels"].flatten().tolist() == batch["shift_labels"].flatten().tolist()
    losses = token_losses(model, cut).view(2, 12)
    for row in range(2):
        for start in (0, 4, 8):
            part = ids[row : row + 1, start : start + 5]
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
            expected = functional.cross_entropy(logits[0], part[0, 1:], reduction="none")
            torch.testing.assert_close(losses[row, start : start + 4], expected)
    assert cut_rows(batch, 12)["input_ids"] is batch["input_ids"]

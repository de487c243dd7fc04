"""Text during training, compared with transformers' greedy search."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from llama_pretrain.process import StopRequest
from llama_pretrain.train import loop
from llama_pretrain.train.generation import Prompt, generate_with_engine
from llama_pretrain.train.progress import Progress
from tests.train.engines import RANK, small_llama

EOS = 2
IDS = [5, 6, 7]

pytestmark = pytest.mark.usefixtures("process_group")


ID_TOKENIZER = SimpleNamespace(decode=lambda ids, *, skip_special_tokens: " ".join(map(str, ids)))
"""Its text is the ids themselves."""
PROMPT = Prompt(
    text="5 6 7", ids=IDS, num_tokens=12, max_length=64, eos_id=EOS, document_mask=False,
    gather_once=False, tokenizer=ID_TOKENIZER,
)  # fmt: skip


@pytest.fixture
def model() -> Any:
    ids = {"eos_token_id": EOS, "pad_token_id": 0}
    return small_llama(3, attention_dropout=0.5, initializer_range=0.5, **ids).train()


def generate_ids(model: Any, **changes: Any) -> list[int]:
    """The ids after the prompt's."""
    text = generate_with_engine(model, replace(PROMPT, **changes), RANK)
    assert text is not None
    ids = [int(word) for word in text.split()]
    assert ids[: len(IDS)] == IDS
    return ids[len(IDS) :]


def greedy(model: Any, ids: list[int], num_tokens: int) -> list[int]:
    """What transformers adds, with its cache."""
    inputs = torch.tensor([ids])
    options = {"attention_mask": torch.ones_like(inputs), "do_sample": False}
    found = model.eval().generate(inputs, max_new_tokens=num_tokens, **options)
    model.train()
    added: list[int] = found[0, len(ids) :].tolist()
    return added


@pytest.mark.parametrize("document_mask", [False, True])
def test_generation_equals_transformers(model: Any, document_mask: bool) -> None:
    """And it changes neither random generators, nor modes, nor gradients."""
    expected = greedy(model, IDS, 12)
    assert len(set(expected)) > 3
    before = torch.get_rng_state()
    assert generate_ids(model, document_mask=document_mask) == expected
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_ends_with_the_document(model: Any) -> None:
    first, second, third, *_ = greedy(model, IDS, 12)
    assert third not in (first, second)
    assert generate_ids(model, eos_id=third) == [first, second, third]


def test_no_input_is_longer_than_in_training(model: Any) -> None:
    """With sequences of 4 tokens, each token depends only on the 4 before it."""
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, inputs: lengths.append(inputs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    found = generate_ids(model, max_length=4, num_tokens=4)
    assert lengths == [4, 4, 4, 4]
    ids = list(IDS)
    for _ in range(4):
        ids += greedy(model, ids[-4:], 1)
    assert found == ids[len(IDS) :]


def test_a_signal_interrupts_it(model: Any) -> None:
    rank, passes = replace(RANK, stop=StopRequest()), []

    def stop(*_: Any) -> None:
        passes.append(1)
        rank.stop.number = 15 if len(passes) == 2 else 0

    model.register_forward_pre_hook(stop)
    assert generate_with_engine(model, PROMPT, rank) is None
    assert len(passes) == 2
    assert model.training


@pytest.mark.parametrize(("num_tokens", "expected"), [(60, [8, 60, 60]), (3, [3, 3, 3])])
def test_untrained_weights_generate_few_tokens(
    num_tokens: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = MagicMock(return_value="")
    monkeypatch.setattr(loop, "generate_with_engine", generate)
    monkeypatch.setattr(loop, "sum_losses", MagicMock())
    training: Any = MagicMock(rank=RANK, prompt=replace(PROMPT, num_tokens=num_tokens))
    training.position.return_value = {"step": 0, "tokens": 0}
    for step in (0, 1, 2):
        assert loop._evaluate(training, MagicMock(), Progress(step=step))
    assert [call.args[1].num_tokens for call in generate.call_args_list] == expected

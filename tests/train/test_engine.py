"""The engine keeps initial weights, skips steps without a trace, and trains as PyTorch does."""

import math
from itertools import chain
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from llama_pretrain.checkpoint.engine_state import collect_tensors
from llama_pretrain.train.engine import apply_update
from llama_pretrain.train.loss import token_losses
from tests.train.engines import RANK, build_small_engine, plain_model, random_batches, take_step

pytestmark = pytest.mark.usefixtures("process_group")
ADAMW_AND_MUON = [
    *(("torch_adamw", stage) for stage in range(4)),
    *(("muon", stage) for stage in (1, 2, 3)),
]
COMPILED = ("cpu_adam", "fused_adam", "cpu_lion", "cpu_adagrad")


def copy_tensors(engine: Any) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in collect_tensors(engine, RANK).items()}


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        *ADAMW_AND_MUON,
        *(pytest.param(n, s, marks=pytest.mark.slow) for n in COMPILED for s in range(4)),
    ],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_initialization_changes_no_weight_and_no_state(name: str, stage: int, bf16: bool) -> None:
    """The fp32 weights after deepspeed.initialize are the drawn ones, rounded with bf16."""
    drawn = {name: p.detach().clone() for name, p in plain_model().named_parameters()}
    if bf16:
        drawn = {name: p.bfloat16().float() for name, p in drawn.items()}
    engine = build_small_engine(stage, bf16=bf16, name=name, learning_rate=0.1)
    wrapper = engine.optimizer
    state = getattr(wrapper, "optimizer", wrapper).state
    values = [value for each in state.values() for value in each.values()]
    assert not any(value.any() for value in values if torch.is_tensor(value) and value.numel() > 1)
    named = dict(engine.module.named_parameters())
    if stage > 0:
        found = {name: safe_get_full_fp32_param(p) for name, p in named.items()}
    else:
        found = {name: p.detach().float() for name, p in named.items()}
        if bf16:  # safe_get_full_fp32_param does not support these wrappers
            assert len(state) == 0
            flat = hasattr(wrapper, "fp32_groups_flat")
            masters = wrapper.fp32_groups_flat if flat else chain(*wrapper.fp32_groups)
            halves = wrapper.fp16_groups_flat if flat else chain(*wrapper.fp16_groups)
            for master, half in zip(masters, halves, strict=True):
                assert torch.equal(master, half.float())
    for name, value in drawn.items():
        assert torch.equal(found[name].reshape(value.shape), value), name


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("name", "stage"), ADAMW_AND_MUON)
def test_a_skipped_step_changes_nothing(stage: int, bf16: bool, name: str) -> None:
    """Skipped for a NaN loss, for a finite loss with a NaN gradient, and on request."""
    engine, batches = build_small_engine(stage, bf16=bf16, name=name), random_batches(3)
    take_step(engine, batches[0])
    before, rates = copy_tensors(engine), engine.get_lr()
    for number, kind in enumerate(("loss", "gradient", "request")):
        losses = token_losses(engine, batches[1])
        loss = losses.mean()
        if kind == "gradient":  # sqrt has no derivative at 0
            loss = loss + (losses * 0).sum().abs().sqrt()
            assert torch.isfinite(loss)
        else:
            loss = loss * float("nan")
        engine.backward(loss)
        assert apply_update(engine, skip=kind != "gradient") is None
        assert engine.skipped_steps == number + 1
    after = copy_tensors(engine)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    assert engine.get_lr() == rates
    loss_value, norm = take_step(engine, batches[2])
    assert norm is not None
    assert engine.lr_scheduler.last_epoch == 2
    assert math.isfinite(loss_value)
    changed = copy_tensors(engine)
    assert not all(torch.equal(tensor, changed[key]) for key, tensor in before.items())


def test_a_step_can_be_skipped_without_overflow_check() -> None:
    """With bf16.check_grad_overflow=false DeepSpeed would apply a NaN gradient."""
    engine = build_small_engine(2, bf16={"enabled": True, "check_grad_overflow": False})
    batches = random_batches(2)
    take_step(engine, batches[0])
    before = copy_tensors(engine)
    engine.backward(token_losses(engine, batches[1]).mean() * float("nan"))
    assert apply_update(engine, skip=True) is None
    assert all(torch.equal(before[key], tensor) for key, tensor in copy_tensors(engine).items())

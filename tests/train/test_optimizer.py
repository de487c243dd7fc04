"""Parameter groups, schedule, and optimizers compared with PyTorch's or a paper's."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from llama_pretrain.config.schedule import Schedule, ScheduleName
from llama_pretrain.plan.ds_config import get_train_ds_config
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.model_size import count_parameters
from llama_pretrain.plan.plan import build_plan
from llama_pretrain.plan.schedule import learning_rate_factor
from llama_pretrain.train.engine import enable_activation_checkpointing
from llama_pretrain.train.loss import token_losses
from llama_pretrain.train.model import build_model
from llama_pretrain.train.optimizer import (
    audit_groups,
    build_optimizer,
    get_optimizer_grouped_parameters,
)
from tests.machines import plan_for_cluster
from tests.train.engines import BATCH_SIZE, CONFIG, SHAPE, SHARD_ALL, plain_model, random_batches


def is_plain(name: str) -> bool:
    """Whether a parameter of LLaMA never decays."""
    return "norm" in name or name.endswith("bias")


def test_groups_depend_on_the_type_of_module_not_its_name() -> None:
    whole = plain_model()
    names = {parameter: name for name, parameter in whole.named_parameters()}
    decayed, plain = get_optimizer_grouped_parameters(whole, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {names[p] for p in plain["params"]} == {n for n in names.values() if is_plain(n)}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    misnamed = nn.ModuleDict({"layernorm": nn.Linear(2, 2, bias=False), "dense": nn.RMSNorm(2)})
    decayed, plain = get_optimizer_grouped_parameters(misnamed, 0.1)
    assert decayed["params"] == [misnamed["layernorm"].weight]
    assert plain["params"] == [misnamed["dense"].weight]
    # Tied and frozen parameters.
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    decayed, plain = get_optimizer_grouped_parameters(model, 0.1)
    assert len(decayed["params"]) == 1
    model["embed"].weight.requires_grad = False
    decayed, plain = get_optimizer_grouped_parameters(model, 0.1)
    assert decayed["params"] == plain["params"] == []


def test_a_parameter_in_no_group_or_in_two_is_an_error() -> None:
    model = plain_model()
    model.model.layers[1].mlp.scale = nn.Parameter(torch.ones(3))
    model.gate = nn.Conv1d(2, 2, 1)
    model.model.norm.weight = model.model.layers[0].self_attn.q_proj.weight
    text = (
        "trainable parameters: model.layers.1.mlp.scale (of LlamaMLP), gate.weight (of Conv1d),"
        " gate.bias (of Conv1d) in no optimizer group;"
        " model.layers.0.self_attn.q_proj.weight = model.norm.weight in two optimizer groups"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        get_optimizer_grouped_parameters(model, 0.1)


# By hand, for SHAPE: embedding and head 2 * 64 * 32, in each of two layers 4 * 32 * 32 for
# attention and 3 * 32 * 48 for the feed-forward; four biases of 32 and two norms of 32 per layer,
# and the last norm. Tensors: 2 + 2 * 7 with, 2 * (4 + 2) + 1 without.
COUNTED = "weight decay: 21,504 parameters in 16 tensors with, 416 in 13 without, as planned"


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.usefixtures("process_group")
def test_audit_of_groups(stage: int) -> None:
    model = plain_model(stage=stage)
    assert all((parameter.numel() == 0) is (stage == 3) for parameter in model.parameters())
    groups = get_optimizer_grouped_parameters(model, 0.1)
    assert audit_groups(groups, planned=count_parameters(SHAPE)) == COUNTED
    planned = count_parameters(replace(SHAPE, attention_bias=False))
    text = "the plan has 21,504 parameters with and 160 without (got 21,504 and 416)"
    with pytest.raises(ValueError, match=re.escape(text)):
        audit_groups(groups, planned=planned)


@pytest.mark.parametrize(
    ("name", "decay", "expected"),
    [
        # step:   0    1    2 (first after warmup) ... 9 (last)
        ("cosine", 8, {0: 0.5, 1: 1.0, 5: 0.1 + 0.45 * (1 + math.cos(math.pi / 2)), 9: 0.1}),
        ("linear", 8, {0: 0.5, 1: 1.0, 5: 0.55, 9: 0.1}),
        ("constant", 0, {0: 0.5, 1: 1.0, 5: 1.0, 9: 1.0}),
        ("wsd", 4, {0: 0.5, 1: 1.0, 5: 1.0, 7: 0.55, 9: 0.1}),
    ],
)
def test_learning_rate(name: str, decay: int, expected: dict[int, float]) -> None:
    schedule = Schedule(name=ScheduleName(name), min_learning_rate_ratio=0.1)

    def rates(total: int, warmup: int, decay: int) -> list[float]:
        steps: Any = SimpleNamespace(total=total, warmup=warmup, decay=decay)
        return [learning_rate_factor(schedule, steps)(step) for step in range(total)]

    found = rates(10, 2, decay)
    assert {step: found[step] for step in expected} == pytest.approx(expected)
    assert rates(3, 10, 0) == pytest.approx([0.1, 0.2, 0.3])  # shorter than the warmup


def engine_losses(*overrides: str, stage: int = 1) -> list[float]:
    """Losses of a rank with the JSON and the optimizer of a run with these overrides."""
    words = ["launch.device=cpu", "launch.num_processes=1", f"batch.global_batch_size={BATCH_SIZE}"]
    words += ["train.gradient_clipping=0", f"zero.stage={stage}"]
    words += [f"zero.{name}={size}" for name, size in SHARD_ALL.items() if stage == 3]
    if "precision=bf16_autocast" not in overrides:
        words.append("precision=fp32")
    run = plan_for_cluster(*words, *overrides, machine=detect_machine())
    ds_config = get_train_ds_config(run, build_plan(run).batch, run_dir=None)
    model = build_model(CONFIG, seed=1, weights=None, ds_config=ds_config)
    if run.train.gradient_checkpointing:
        enable_activation_checkpointing(model, ds_config)
    groups = get_optimizer_grouped_parameters(model, run.optim.weight_decay)
    optimizer = build_optimizer(model, groups, run.optim)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
    )
    engine.train()
    losses = []
    for batch in random_batches():
        loss = token_losses(engine, batch).mean()
        assert loss.dtype == torch.float32
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


Build = Callable[[nn.Module], list[torch.optim.Optimizer]]


def plain_losses(build: Build, *, autocast: bool = False) -> list[float]:
    """Losses of a plain PyTorch loop."""
    model, losses = plain_model(), []
    optimizers = build(model)
    for batch in random_batches():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits.float().reshape(-1, 64), batch["shift_labels"].reshape(-1)
        )
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    decayed = [value for name, value in named.items() if not is_plain(name)]
    plain = [value for name, value in named.items() if is_plain(name)]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]


class PlainLion(torch.optim.Optimizer):
    """Lion as in arXiv 2302.06675, algorithm 2."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure here
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("m", torch.zeros_like(parameter))
                direction = (first * momentum + (1 - first) * parameter.grad).sign()
                parameter -= group["lr"] * (direction + group["weight_decay"] * parameter)
                momentum.mul_(second).add_(parameter.grad, alpha=1 - second)


def plain_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(two_groups(model), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)]


def plain_muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """torch's Muon for the layers' matrices, AdamW for the rest."""
    matrices = {p for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    assert len(matrices) == 14
    rest = two_groups(model)
    for group in rest:
        group["params"] = [p for p in group["params"] if p not in matrices]
    return [
        torch.optim.Muon(list(matrices), lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.95), eps=1e-8),
    ]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.usefixtures("process_group")
def test_muon_equals_torch(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        # torch orthogonalizes in bfloat16, DeepSpeed on a CPU in fp32.
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        expected = plain_losses(plain_muon)
    with torch.compiler.set_stance("force_eager"):  # as in ranks on a CPU
        found = engine_losses("optim=muon", "optim.learning_rate=1e-2", stage=stage)
    # Orthogonalization amplifies rounding: 6e-6 on a Xeon, below 2e-6 on an EPYC.
    assert found == pytest.approx(expected, abs=2e-5)


def plain_lion(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [PlainLion(two_groups(model), {"lr": 1e-3, "betas": (0.95, 0.98)})]


def plain_adagrad(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adagrad(two_groups(model), lr=1e-2, eps=1e-10)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "build"),
    [
        ("optim=lion optim.learning_rate=1e-3", plain_lion),
        ("optim=cpu_adagrad optim.learning_rate=1e-2", plain_adagrad),
    ],
)
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.usefixtures("process_group")
def test_host_optimizers_equal_their_reference(
    words: str, build: Build, stage: int, offload: str
) -> None:
    device = f"zero.offload_optimizer.device={offload}"
    found = engine_losses(*words.split(), device, stage=stage)
    assert found == pytest.approx(plain_losses(build), abs=2e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.usefixtures("process_group")
def test_autocast_equals_torch(stage: int) -> None:
    """Products in bfloat16, weights and loss in fp32; at stage 3 through DeepSpeed's linear."""
    losses = {on: plain_losses(plain_adamw, autocast=on) for on in (True, False)}
    words = ["precision=bf16_autocast", "optim=torch_adamw", "optim.learning_rate=1e-2"]
    found = engine_losses(*words, stage=stage)
    assert found[0] == pytest.approx(losses[True][0], abs=1e-6)
    # How much the rounding of products differs after that depends on the processor's kernels.
    assert found == pytest.approx(losses[True], abs=5e-4)
    assert found != pytest.approx(losses[False], abs=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.usefixtures("process_group")
def test_deepspeed_recomputes_activations(stage: int, capfd: pytest.CaptureFixture[str]) -> None:
    """With any of its settings, DeepSpeed's own checkpointing runs and changes no loss."""
    adamw = ("optim=torch_adamw", "optim.learning_rate=1e-2")
    plain = engine_losses(*adamw, stage=stage)
    assert "time (ms) | backward" not in capfd.readouterr().out
    more = ["train.gradient_checkpointing=true", "deepspeed.activation_checkpointing.profile=true"]
    assert engine_losses(*adamw, *more, stage=stage) == plain
    assert "time (ms) | backward" in capfd.readouterr().out

"""Parts of a rank: groups, schedule, initial weights, DeepSpeed's engine left as it should be."""

import hashlib
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llama_pretrain import distributed
from llama_pretrain.config.model import Model
from llama_pretrain.config.optim import Optim, OptimName
from llama_pretrain.config.run import Run
from llama_pretrain.config.schedule import Schedule, ScheduleName
from llama_pretrain.plan.ds_config import get_train_ds_config
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.model_size import count_parameters
from llama_pretrain.plan.plan import Steps, build_plan
from llama_pretrain.plan.resolve import resolve_choices
from llama_pretrain.train.loss import token_losses
from llama_pretrain.train.model import (
    build_llama_config,
    build_model,
    hash_parameters,
    restore_rotary,
)
from llama_pretrain.train.optimizer import (
    audit_groups,
    build_optimizer,
    get_optimizer_grouped_parameters,
    learning_rate_factor,
)
from llama_pretrain.train.recompute import recompute_activations
from tests.conftest import compose_run

SHAPE = Model(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    attention_bias=True,
    max_position_embeddings=128,
)
CONFIG = build_llama_config(SHAPE, vocab_size=64, special_ids={})


def test_cores_are_shared_out_by_socket_and_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sockets of two cores of two threads, numbered as Linux often does; one is not ours."""
    for number in range(8):
        topology = tmp_path / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{number % 2}\n")
        (topology / "core_id").write_text(f"{number // 2 % 2}\n")
    monkeypatch.setattr(distributed, "CORES", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {*range(8)} - {5})
    kept: list[list[int]] = []
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cores: kept.append(cores))
    for index in range(3):
        distributed.keep_to_cores(index, num_ranks=3)
    assert kept == [[0, 4], [2, 6], [1, 3]]
    distributed.keep_to_cores(7, num_ranks=8)
    assert len(kept) == 3


def plain_model(**changes: Any) -> Any:
    ds_config = {"zero_optimization": {"stage": 0}}
    return build_model(CONFIG, **{"seed": 1, "weights": None, "ds_config": ds_config, **changes})


def test_groups_go_by_the_kind_of_module() -> None:
    model = plain_model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, plain = get_optimizer_grouped_parameters(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    plain_names = {names[parameter] for parameter in plain["params"]}
    assert plain_names == {n for n in names.values() if "norm" in n or n.endswith("bias")}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_groups_do_not_go_by_names() -> None:
    """A linear layer that is called a norm decays, and a norm that is not called one doesn't."""
    model = nn.ModuleDict({"layernorm": nn.Linear(2, 2, bias=False), "dense": nn.RMSNorm(2)})
    decayed, plain = get_optimizer_grouped_parameters(model, 0.1)
    assert decayed["params"] == [model["layernorm"].weight]
    assert plain["params"] == [model["dense"].weight]


def test_frozen_and_tied_parameters() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    decayed, plain = get_optimizer_grouped_parameters(model, 0.1)
    assert len(decayed["params"]) == 1
    model["embed"].weight.requires_grad = False
    decayed, plain = get_optimizer_grouped_parameters(model, 0.1)
    assert decayed["params"] == plain["params"] == []


def test_a_parameter_in_no_group_is_named() -> None:
    model = plain_model()
    model.model.layers[1].mlp.scale = nn.Parameter(torch.ones(3))
    model.gate = nn.Conv1d(2, 2, 1)
    text = (
        "trainable parameters: model.layers.1.mlp.scale (of LlamaMLP), gate.weight (of Conv1d),"
        " gate.bias (of Conv1d) in no optimizer group"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        get_optimizer_grouped_parameters(model, 0.1)
    for parameter in (model.model.layers[1].mlp.scale, *model.gate.parameters()):
        parameter.requires_grad = False
    assert len(get_optimizer_grouped_parameters(model, 0.1)) == 2


def test_a_parameter_in_two_groups_is_named() -> None:
    model = plain_model()
    model.model.norm.weight = model.model.layers[0].self_attn.q_proj.weight
    text = (
        "trainable parameters: model.layers.0.self_attn.q_proj.weight = model.norm.weight"
        " in two optimizer groups"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        get_optimizer_grouped_parameters(model, 0.1)


# By hand, for SHAPE: embedding and head 2 * 64 * 32, in each of two layers 4 * 32 * 32 for
# attention and 3 * 32 * 48 for the feed-forward; four biases of 32 and two norms of 32 a layer, and
# the last norm. Tensors: 2 + 2 * 7 with, 2 * (4 + 2) + 1 without.
COUNTED = "weight decay: 21,504 parameters in 16 tensors with, 416 in 13 without, as planned"


def test_audit_of_groups() -> None:
    groups = get_optimizer_grouped_parameters(plain_model(), 0.1)
    assert audit_groups(groups, planned=count_parameters(SHAPE)) == COUNTED
    planned = count_parameters(replace(SHAPE, attention_bias=False))
    text = "of the model's parameters 21,504 decay and 416 don't; the plan has 21,504 and 160"
    with pytest.raises(ValueError, match=text):
        audit_groups(groups, planned=planned)


def steps(total: int, warmup: int, decay: int) -> Steps:
    return Steps(
        total=total,
        last=total,
        warmup=warmup,
        decay=decay,
        tokens_per_step=1,
        tokens=total,
        epochs=None,
        eval_rows=None,
        eval_rows_of=None,
    )


@pytest.mark.parametrize(
    ("name", "decay", "expected"),
    [
        # step:   0    1    2 (first after warm-up) ... 9 (last)
        ("cosine", 8, {0: 0.5, 1: 1.0, 5: 0.1 + 0.45 * (1 + math.cos(math.pi / 2)), 9: 0.1}),
        ("linear", 8, {0: 0.5, 1: 1.0, 5: 0.55, 9: 0.1}),
        ("constant", 0, {0: 0.5, 1: 1.0, 5: 1.0, 9: 1.0}),
        ("wsd", 4, {0: 0.5, 1: 1.0, 5: 1.0, 7: 0.55, 9: 0.1}),
    ],
)
def test_learning_rate(name: str, decay: int, expected: dict[int, float]) -> None:
    schedule = Schedule(name=ScheduleName(name), min_learning_rate_ratio=0.1)
    factor = learning_rate_factor(schedule, steps(10, 2, decay))
    for step, value in expected.items():
        assert factor(step) == pytest.approx(value), step


def test_a_run_shorter_than_its_warmup() -> None:
    factor = learning_rate_factor(Schedule(), steps(3, 10, 0))
    assert [factor(step) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


def test_initial_weights_follow_the_seed_and_the_names() -> None:
    one, same, other = plain_model(), plain_model(), plain_model(seed=2)
    assert hash_parameters(one.named_parameters()) == hash_parameters(same.named_parameters())
    assert hash_parameters(one.named_parameters()) != hash_parameters(other.named_parameters())
    query = one.model.layers[0].self_attn.q_proj
    assert query.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert query.bias.abs().max().item() == 0.0
    assert torch.equal(one.model.norm.weight, torch.ones(32))
    assert not torch.equal(query.weight, one.model.layers[1].self_attn.q_proj.weight)


@pytest.mark.parametrize("stage", [0, 3])
def test_initial_weights_are_hashed_as_they_are_drawn(process_group: None, stage: int) -> None:
    """In fp32, though at stage 3 in bf16 a parameter never has them; and nothing is altered."""
    ds_config: dict[str, Any] = {
        "train_batch_size": 1,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": True},
    }
    digest = hashlib.sha256()
    plain_model(ds_config=ds_config, digest=digest)
    assert digest.hexdigest() == hash_parameters(plain_model().named_parameters())


def test_weights_of_a_checkpoint_are_read_by_name(tmp_path: Path) -> None:
    source = plain_model(seed=9)
    source.save_pretrained(tmp_path)
    loaded = plain_model(weights=tmp_path)
    assert hash_parameters(loaded.named_parameters()) == hash_parameters(source.named_parameters())
    (tmp_path / "other").mkdir()
    nn_only = {"model.norm.weight": torch.ones(32)}
    from safetensors.torch import save_file

    save_file(nn_only, tmp_path / "other" / "model.safetensors")
    with pytest.raises(KeyError, match="has no weights for"):
        plain_model(weights=tmp_path / "other")


@pytest.fixture(autouse=True)
def own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """zero.Init replaces torch's linear for good: put it back after each test."""
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)


def engine_of(stage: int, *, bf16: bool, name: str = "torch_adamw") -> tuple[Any, Any]:
    import deepspeed

    ds_config: dict[str, Any] = {
        "train_batch_size": 1,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_scatter": name != "muon"},
    }
    if bf16:
        ds_config["bf16"] = {"enabled": True}
    model = build_model(CONFIG, seed=1, weights=None, ds_config=ds_config)
    optim = Optim(name=OptimName(name), learning_rate=0.1)
    optimizer = build_optimizer(model, get_optimizer_grouped_parameters(model, 0.1), optim)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
    )
    return engine, optimizer


COMPILED = ("cpu_adam", "fused_adam", "cpu_lion", "cpu_adagrad")


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        *(("torch_adamw", stage) for stage in (0, 1, 2, 3)),
        *(("muon", stage) for stage in (1, 2, 3)),
        *(
            pytest.param(name, stage, marks=pytest.mark.slow)
            for name in COMPILED
            for stage in (0, 1, 2, 3)
        ),
    ],
)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.usefixtures("process_group")
def test_initialisation_changes_no_weight_and_no_state(name: str, stage: int, bf16: bool) -> None:
    """The fp32 weights after deepspeed.initialize are the drawn ones, rounded where bf16."""
    from deepspeed.utils import safe_get_full_fp32_param

    from llama_pretrain.train.engine import undo_initial_step

    drawn = {name: p.detach().clone() for name, p in plain_model().named_parameters()}
    if bf16:
        drawn = {name: p.bfloat16().float() for name, p in drawn.items()}
    engine, optimizer = engine_of(stage, bf16=bf16, name=name)
    undo_initial_step(engine)
    moments = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.numel() > 1
    ]
    assert all(not moment.any() for moment in moments)
    if stage == 0 and bf16:
        # safe_get_full_fp32_param has no way into these wrappers: compare the masters themselves.
        wrapper = engine.optimizer
        if hasattr(wrapper, "fp32_groups"):
            masters = [master for group in wrapper.fp32_groups for master in group]
            halves = [half for group in wrapper.fp16_groups for half in group]
        else:
            masters, halves = wrapper.fp32_groups_flat, wrapper.fp16_groups_flat
        assert len(optimizer.state) == 0
        for master, half in zip(masters, halves, strict=True):
            assert torch.equal(master, half.float())
        found = {name: p.detach().float() for name, p in engine.module.named_parameters()}
    elif stage == 0:
        found = {name: p.detach() for name, p in engine.module.named_parameters()}
    else:
        found = {n: safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()}
    for name, value in drawn.items():
        assert torch.equal(found[name].reshape(value.shape), value), name


@pytest.mark.usefixtures("process_group")
def test_audit_counts_what_is_sharded() -> None:
    model = plain_model(ds_config={"train_batch_size": 1, "zero_optimization": {"stage": 3}})
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    groups = get_optimizer_grouped_parameters(model, 0.1)
    assert audit_groups(groups, planned=count_parameters(SHAPE)) == COUNTED


@pytest.mark.usefixtures("process_group")
def test_deepspeed_does_take_a_step_at_stage_0() -> None:
    """What undo_initial_step is there for: if this fails, DeepSpeed has mended it."""
    engine, optimizer = engine_of(0, bf16=True)
    assert len(optimizer.state) > 0
    master, half = engine.optimizer.fp32_groups[0][0], engine.optimizer.fp16_groups[0][0]
    assert not torch.equal(master, half.float())


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.usefixtures("process_group")
def test_rotary_frequencies_stay_exact_in_bf16(stage: int) -> None:
    exact = 1.0 / 10_000.0 ** (torch.arange(0, 8, 2, dtype=torch.float) / 8)
    engine, _ = engine_of(stage, bf16=True)
    rotary = engine.module.model.rotary_emb
    if stage == 3:  # zero.Init rounds them: what is put right
        assert not torch.equal(rotary.inv_freq.float(), exact)
    restore_rotary(engine.module, CONFIG, torch.device("cpu"))
    assert torch.equal(rotary.inv_freq, exact)
    assert rotary.inv_freq.dtype == torch.float32


def test_print_rank_0_prints_once(capsys: pytest.CaptureFixture[str]) -> None:
    from llama_pretrain.distributed import Rank, print_rank_0

    for index in range(2):
        device = torch.device("cpu")
        rank = Rank(index=index, local_index=index, world_size=2, device=device)
        print_rank_0("once", rank)
    assert capsys.readouterr().out == "once\n"


ROWS = 2
SHARD_ALL = [
    "zero.stage3_param_persistence_threshold=0",
    "zero.stage3_max_live_parameters=0",
    "zero.stage3_max_reuse_distance=0",
    "zero.stage3_prefetch_bucket_size=0",
]
"""Without these so small a model would stay whole on each rank at stage 3."""


def random_batches(number: int = 6) -> list[dict[str, torch.Tensor]]:
    """Rows of all 64 tokens, so that each row of the embedding has a gradient at every step."""
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randperm(64, generator=generator).view(ROWS, 32) for _ in range(number)]
    return [{"input_ids": rows, "shift_labels": rows.flip(1)} for rows in tokens]


def losses_of_engine(*overrides: str, stage: int = 1) -> list[float]:
    """Losses of a rank with the JSON and the optimizer that a run of these overrides has."""
    import deepspeed

    words = ["launch.device=cpu", "launch.num_processes=1", f"batch.global_batch_size={ROWS}"]
    words += ["train.gradient_clipping=0", f"zero.stage={stage}"]
    words += SHARD_ALL if stage == 3 else []
    if "precision=bf16_autocast" not in overrides:
        words.append("precision=fp32")
    run: Run = resolve_choices(compose_run([*words, *overrides]), detect_machine())
    ds_config = get_train_ds_config(run, build_plan(run, None).batch, run_dir=None)
    model = build_model(CONFIG, seed=1, weights=None, ds_config=ds_config)
    if run.train.gradient_checkpointing:
        recompute_activations(model, ds_config)
    groups = get_optimizer_grouped_parameters(model, run.optim.weight_decay)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, groups, run.optim),
        config=ds_config,
        dist_init_required=False,
    )
    losses = []
    engine.train()
    for batch in random_batches():
        loss = token_losses(engine, batch).mean()
        assert loss.dtype == torch.float32
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def losses_of_plain(*optimizers: Any, model: nn.Module, autocast: bool = False) -> list[float]:
    """Losses of a plain loop of PyTorch."""
    losses = []
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


def is_plain(name: str) -> bool:
    """Whether a parameter of LLaMA never decays."""
    return "norm" in name or name.endswith("bias")


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


def plain_muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """torch's Muon for the layers' matrices, AdamW for the rest."""
    named = dict(model.named_parameters())
    matrices = {name for name in named if name.endswith("_proj.weight")}
    assert len(matrices) == 14
    rest = two_groups(model)
    for group in rest:
        group["params"] = [p for p in group["params"] if all(p is not named[m] for m in matrices)]
    return [
        torch.optim.Muon([named[m] for m in matrices], lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.95), eps=1e-8),
    ]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.usefixtures("process_group")
def test_muon_is_that_of_torch(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_model()
    with monkeypatch.context() as patch:
        # torch orthogonalises in bfloat16, and DeepSpeed on a CPU in fp32.
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        expected = losses_of_plain(*plain_muon(model), model=model)
    with torch.compiler.set_stance("force_eager"):  # as ranks on a CPU have it
        found = losses_of_engine("optim=muon", "optim.learning_rate=1e-2", stage=stage)
    # Orthogonalising multiplies what rounding differs by: 6e-6 on a Xeon, below 2e-6 on an EPYC.
    assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.usefixtures("process_group")
def test_lion_is_that_of_the_paper(stage: int, offload: str) -> None:
    words = ["optim=lion", "optim.learning_rate=1e-3", f"zero.offload_optimizer.device={offload}"]
    found = losses_of_engine(*words, stage=stage)
    model = plain_model()
    lion = PlainLion(two_groups(model), {"lr": 1e-3, "betas": (0.95, 0.98)})
    assert found == pytest.approx(losses_of_plain(lion, model=model), abs=2e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_lion_of_deepspeed_moves_what_has_no_gradient() -> None:
    """Where the paper's sign is 0, its kernels take it for 1: tokens never seen drift."""
    from deepspeed.ops.lion import DeepSpeedCPULion

    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.tensor([1.0, -1.0, 0.0, 0.0])
    DeepSpeedCPULion([weight], lr=0.5, betas=(0.95, 0.98)).step()
    assert weight.tolist() == [-0.5, 0.5, -0.5, -0.5]


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.usefixtures("process_group")
def test_cpu_adagrad_is_that_of_torch(stage: int, offload: str) -> None:
    words = ["optim=cpu_adagrad", "optim.learning_rate=1e-2"]
    found = losses_of_engine(*words, f"zero.offload_optimizer.device={offload}", stage=stage)
    model = plain_model()
    adagrad = torch.optim.Adagrad(two_groups(model), lr=1e-2, eps=1e-10)
    assert found == pytest.approx(losses_of_plain(adagrad, model=model), abs=2e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.usefixtures("process_group")
def test_autocast_is_that_of_torch(stage: int) -> None:
    """Products in bfloat16, weights and loss in fp32; at stage 3 through DeepSpeed's linear."""
    losses = {}
    for autocast in (True, False):
        model = plain_model()
        adamw = torch.optim.AdamW(two_groups(model), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
        losses[autocast] = losses_of_plain(adamw, model=model, autocast=autocast)
    words = ["precision=bf16_autocast", "optim=torch_adamw", "optim.learning_rate=1e-2"]
    found = losses_of_engine(*words, stage=stage)
    assert found[0] == pytest.approx(losses[True][0], abs=1e-6)
    # How far the rounding of products differs after that depends on the processor's kernels.
    assert found == pytest.approx(losses[True], abs=5e-4)
    assert found != pytest.approx(losses[False], abs=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.usefixtures("process_group")
def test_deepspeed_recomputes_activations(stage: int, capfd: pytest.CaptureFixture[str]) -> None:
    """With any of its settings DeepSpeed's own checkpointing runs, and changes no loss."""
    adamw = ("optim=torch_adamw", "optim.learning_rate=1e-2")
    plain = losses_of_engine(*adamw, stage=stage)
    assert "time (ms) | backward" not in capfd.readouterr().out
    more = ["train.gradient_checkpointing=true", "deepspeed.activation_checkpointing.profile=true"]
    assert losses_of_engine(*adamw, *more, stage=stage) == plain
    assert "time (ms) | backward" in capfd.readouterr().out

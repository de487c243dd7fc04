"""An engine's state survives on disk, at any stage, and a step that is skipped leaves it alone."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_pretrain.checkpoint.engine_state import collect_tensors, collect_values, restore
from llama_pretrain.checkpoint.tensors import (
    STATE,
    WEIGHT,
    StoredState,
    piece_key,
    rank_file,
    write_bytes,
    write_tensors,
)
from llama_pretrain.config.optim import Optim, OptimName
from llama_pretrain.distributed import Rank
from llama_pretrain.train.engine import apply_update, undo_initial_step
from llama_pretrain.train.loss import token_losses
from llama_pretrain.train.model import build_model
from llama_pretrain.train.optimizer import build_optimizer, get_optimizer_grouped_parameters
from llama_pretrain.train.progress import Progress, spike_score
from tests.test_train import CONFIG, own_linear, random_batches

__all__ = ["own_linear"]  # a fixture

RANK = Rank(index=0, local_index=0, world_size=1, device=torch.device("cpu"))
FORMS = [(stage, bf16) for stage in (0, 1, 2, 3) for bf16 in (False, True)]


def engine_at(
    stage: int,
    *,
    bf16: bool = False,
    name: str = "torch_adamw",
    section: dict[str, Any] | None = None,
) -> Any:
    """A training engine of the smallest model, everything sharded that can be."""
    import deepspeed
    from torch.optim.lr_scheduler import LambdaLR

    zero: dict[str, Any] = {"stage": stage, "reduce_scatter": name != "muon"}
    if stage == 3:
        zero |= dict.fromkeys(
            (
                "stage3_param_persistence_threshold",
                "stage3_max_live_parameters",
                "stage3_max_reuse_distance",
                "stage3_prefetch_bucket_size",
            ),
            0,
        )
    ds_config: dict[str, Any] = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0 if name == "muon" else 1.0,
        "zero_optimization": zero,
        "bf16": section or {"enabled": bf16},
    }
    model = build_model(CONFIG, seed=1, weights=None, ds_config=ds_config)
    optim = Optim(name=OptimName(name), learning_rate=0.01)
    optimizer = build_optimizer(model, get_optimizer_grouped_parameters(model, 0.1), optim)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=LambdaLR(optimizer, lambda step: 1 / (step + 1)),
        config=ds_config,
        dist_init_required=False,
    )
    undo_initial_step(engine)
    engine.train()
    return engine


def step(engine: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float | None]:
    """One step. Returns its loss and the norm of its gradient."""
    loss = token_losses(engine, batch).mean()
    engine.backward(loss)
    return loss.item(), apply_update(engine, skip=False)


def copy_of(engine: Any) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in collect_tensors(engine, RANK).items()}


def save(engine: Any, folder: Path) -> None:
    folder.mkdir()
    write_tensors(folder / rank_file(0), collect_tensors(engine, RANK))
    write_bytes(folder / STATE, [json.dumps(collect_values(engine)).encode()])


@pytest.fixture(scope="module")
def of_stage_1(tmp_path_factory: pytest.TempPathFactory, process_group: None) -> Any:
    """A checkpoint after three steps at stage 1, and the three losses after it."""
    engine, batches = engine_at(1), random_batches(6)
    for batch in batches[:3]:
        step(engine, batch)
    folder = tmp_path_factory.mktemp("state") / "stage1"
    save(engine, folder)
    return folder, [step(engine, batch) for batch in batches[3:]]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.usefixtures("process_group")
def test_state_goes_on_at_any_stage(of_stage_1: Any, tmp_path: Path, stage: int) -> None:
    folder, expected = of_stage_1
    engine, batches = engine_at(stage), random_batches(6)
    with StoredState(folder) as stored:
        restore(engine, stored, RANK)
    assert engine.lr_scheduler.last_epoch == 3
    assert engine.get_lr() == [0.01 / 4] * 2
    save(engine, tmp_path / "again")  # the same elements, whichever stage holds them
    with StoredState(folder) as stored, StoredState(tmp_path / "again") as again:
        for name, shape in stored.shapes.items():
            assert sorted(stored.kinds(name)) == sorted(again.kinds(name))
            for kind in stored.kinds(name):
                size = torch.Size(shape).numel()
                assert torch.equal(
                    stored.read(name, kind, 0, size), again.read(name, kind, 0, size)
                )
    found = [step(engine, batch) for batch in batches[3:]]
    assert found == [pytest.approx(pair, abs=1e-6) for pair in expected]


@pytest.mark.parametrize(("stage", "bf16"), FORMS)
@pytest.mark.parametrize("name", ["torch_adamw", "muon"])
@pytest.mark.usefixtures("process_group")
def test_a_skipped_step_moves_nothing(stage: int, bf16: bool, name: str) -> None:
    """A loss that is no number, one with a gradient that is none, and one that is not wanted."""
    if name == "muon" and stage == 0:
        pytest.skip("Muon needs ZeRO")
    engine, batches = engine_at(stage, bf16=bf16, name=name), random_batches(3)
    step(engine, batches[0])
    before, rates = copy_of(engine), engine.get_lr()
    for number, kind in enumerate(("loss", "gradient", "asked")):
        losses = token_losses(engine, batches[1])
        loss = losses.mean()
        if kind == "gradient":  # the root of zero: a value, and no slope
            loss = loss + (losses * 0).sum().abs().sqrt()
            assert torch.isfinite(loss)
        else:
            loss = loss * float("nan")
        engine.backward(loss)
        assert apply_update(engine, skip=kind != "gradient") is None
        assert engine.skipped_steps == number + 1
    after = copy_of(engine)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    assert engine.get_lr() == rates
    loss_value, norm = step(engine, batches[2])
    assert norm is not None
    assert engine.lr_scheduler.last_epoch == 2
    assert math.isfinite(loss_value)
    changed = copy_of(engine)
    assert not all(torch.equal(tensor, changed[key]) for key, tensor in before.items())


@pytest.mark.usefixtures("process_group")
def test_a_skip_is_kept_where_deepspeed_looks_at_nothing() -> None:
    """bf16.check_grad_overflow=false lets a gradient through that is no number."""
    engine = engine_at(2, section={"enabled": True, "check_grad_overflow": False})
    batches = random_batches(2)
    step(engine, batches[0])
    before = copy_of(engine)
    engine.backward(token_losses(engine, batches[1]).mean() * float("nan"))
    assert apply_update(engine, skip=True) is None
    assert all(torch.equal(before[key], tensor) for key, tensor in copy_of(engine).items())


def test_any_range_is_read_from_whatever_files_have_it(tmp_path: Path) -> None:
    values = torch.arange(10.0)
    write_tensors(tmp_path / rank_file(0), {piece_key("w", WEIGHT, 0): values[:4]})
    write_tensors(
        tmp_path / rank_file(1),
        {piece_key("w", WEIGHT, 4): values[4:7], piece_key("w", WEIGHT, 7): values[7:]},
    )
    write_bytes(tmp_path / STATE, [b'{"parameters": {"w": [2, 5]}}'])
    with StoredState(tmp_path) as stored:
        assert torch.equal(stored.weight("w"), values.view(2, 5))
        assert torch.equal(stored.read("w", WEIGHT, 3, 5), values[3:8])
        with pytest.raises(ValueError, match="lacks 2 elements of w"):
            stored.read("w", WEIGHT, 8, 4)


def test_files_are_read_by_safetensors_itself(tmp_path: Path) -> None:
    import hashlib

    from safetensors.torch import load_file

    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(4),
        "d": torch.zeros(0),
    }
    size, digest = write_tensors(tmp_path / "x.safetensors", tensors)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_spikes_are_measured_against_a_full_window() -> None:
    window = [2.0, 4.0] * 5  # mean 3, sample deviation sqrt(10 / 9)
    assert spike_score(9.0, window, size=10) == pytest.approx(6 / (10 / 9) ** 0.5)
    assert spike_score(9.0, window[:9], size=10) == 0.0
    assert spike_score(2.0, [1.0] * 8, size=8) > 1e5  # without spread, anything above is one


def test_a_rollback_keeps_what_earlier_ones_have_left_out() -> None:
    """Three, to the checkpoint of step 30, whose next batch is 32."""
    kept: dict[str, Any] = {
        "step": 30,
        "next_batch": 32,
        "left_out": [7, 8],
        "window": [1.0],
        "recent": [1.0],
    }
    progress = Progress(step=33, next_batch=35, left_out=[7, 8], window=[1.0, 2.0])
    assert progress.go_back(Progress(**kept), spiked=34, batches=2) == [33, 34]
    assert (progress.step, progress.next_batch, progress.window) == (30, 32, [1.0])
    assert progress.take_batch() == 32
    assert progress.go_back(Progress(**kept), spiked=32, batches=2) == [32]  # not before it
    assert progress.take_batch() == 35
    assert progress.go_back(Progress(**kept), spiked=35, batches=2) == [35]  # 34 is out already
    assert progress.left_out == [7, 8, 32, 33, 34, 35]
    assert progress.rollbacks == [30, 30, 30]
    assert progress.take_batch() == 36


def test_batches_that_are_left_out_are_never_taken() -> None:
    from llama_pretrain.data.order import stretches

    progress = Progress(next_batch=3, left_out=[3, 4, 6])
    assert [progress.take_batch() for _ in range(4)] == [5, 7, 8, 9]
    assert stretches(3, 4, left_out=[3, 4, 6]) == [range(5, 6), range(7, 10)]
    assert stretches(0, 5, left_out=[9]) == [range(5)]

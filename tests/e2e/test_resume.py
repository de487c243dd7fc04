"""A resumed run has the losses, norms and samples of one that was never cut, to the bit."""

import json
import math
from pathlib import Path

import pytest

from tests.conftest import Command, Runner
from tests.e2e.test_parity import at_stage

IN_HOST_MEMORY = "zero.offload_optimizer.device=cpu"
POINTS = [
    pytest.param(2, "bf16", ()),
    pytest.param(0, "fp32", (), marks=pytest.mark.slow),
    pytest.param(0, "bf16", (), marks=pytest.mark.slow),
    pytest.param(1, "fp32", (), marks=pytest.mark.slow),
    pytest.param(1, "bf16", (), marks=pytest.mark.slow),
    pytest.param(1, "bf16", ("precision.grad_accum_dtype=fp32",), marks=pytest.mark.slow),
    pytest.param(2, "fp32", (), marks=pytest.mark.slow),
    pytest.param(3, "fp32", (), marks=pytest.mark.slow),
    pytest.param(3, "bf16", ("model.attention_dropout=0.1",), marks=pytest.mark.slow),
    pytest.param(1, "fp32", ("optim=muon",), marks=pytest.mark.slow),
    pytest.param(3, "fp32", ("optim=muon",), marks=pytest.mark.slow),
    pytest.param(2, "fp32", ("optim=lion", IN_HOST_MEMORY), marks=pytest.mark.slow),
    pytest.param(3, "fp32", ("optim=cpu_adagrad", IN_HOST_MEMORY), marks=pytest.mark.slow),
    pytest.param(1, "bf16_autocast", (), marks=pytest.mark.slow),
]


def numbers(done: Command) -> list[tuple[object, ...]]:
    """What must be equal, step by step."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "sample_hash", "tokens")
    return [tuple(row[key] for key in keys) for row in done.rows("loss")]


@pytest.mark.parametrize(("stage", "precision", "more"), POINTS)
def test_resume_equals_the_uninterrupted_run(
    runner: Runner, stage: int, precision: str, more: tuple[str, ...]
) -> None:
    settings = (
        *at_stage(stage),
        f"precision={precision}",
        "launch.num_processes=2",
        "batch.micro_batch_size=1",
        "optim.learning_rate=3e-3",
        "train.max_steps=6",
        "train.eval_every_steps=2",
        *more,
    )
    # A run with a checkpoint of step 3, and what is left of it where it is killed after step 4.
    cut = runner(*settings, "checkpoint.every_steps=3")
    whole, evaluations = numbers(cut), cut.rows("eval_loss")
    if (stage, precision) == (2, "bf16"):  # and writing checkpoints changes nothing
        assert numbers(runner(*settings)) == whole
    forget_after(cut, step=4)
    resumed = runner.bare(f"resume={cut.run_dir.path}", run_dir=cut.run_dir)
    assert "going on from step-00000003" in resumed.output
    assert numbers(resumed) == whole
    # The torn checkpoint of step 6 is gone: a later resume could not tell it from a new one.
    assert sorted(path.name for path in cut.run_dir.checkpoints.glob("step-*")) == ["step-00000003"]
    assert resumed.rows("eval_loss") == evaluations
    assert json.loads(resumed.run_dir.status.read_text())["status"] == "completed"


def forget_after(done: Command, *, step: int) -> None:
    """Leave a finished run as a kill after `step` would have left it."""
    lines = done.run_dir.metrics.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step and "finished" not in line]
    # A kill also cuts the line that is being written.
    done.run_dir.metrics.write_text("".join(kept) + lines[-1][:20])
    for folder in done.run_dir.checkpoints.glob("step-*"):
        if int(folder.name[5:]) > step:
            (folder / "manifest.json").unlink()


@pytest.fixture(scope="module")
def with_checkpoints(shared_runner: Runner) -> Command:
    return shared_runner(
        "train.max_steps=4", "checkpoint.every_steps=1", "checkpoint.keep_last=3", "zero=stage1"
    )


def test_a_resumed_run_can_be_made_longer(shared_runner: Runner) -> None:
    """Its learning rates are the longer schedule's from the first resumed step on."""
    settings = ("checkpoint.every_steps=2", "schedule.warmup_steps=1", "monitor=csv")
    done = shared_runner("train.max_steps=3", *settings)
    again = shared_runner.bare(
        f"resume={done.run_dir.path}", "train.max_steps=6", run_dir=done.run_dir
    )
    assert [row["step"] for row in again.rows("loss")] == [1, 2, 3, 4, 5, 6]
    rates = [row["learning_rate"] for row in again.rows("loss")]
    # A cosine from 1e-3 to 1e-4 over five steps after one of warm-up.
    cosine = [1e-4 + 4.5e-4 * (1 + math.cos(math.pi * k / 5)) for k in range(2, 6)]
    assert rates[2:] == pytest.approx(cosine)
    table = (done.run_dir.path / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["step", "1", "2", "3", "4", "5", "6"]


def test_old_checkpoints_are_deleted(with_checkpoints: Command) -> None:
    folders = sorted(with_checkpoints.run_dir.checkpoints.glob("*/"))
    assert [path.name for path in folders] == ["step-00000001", "step-00000002", "step-00000003"]
    assert (with_checkpoints.run_dir.checkpoints / "latest").read_text() == "step-00000003\n"


def test_a_damaged_checkpoint_is_passed_over_by_name(with_checkpoints: Command) -> None:
    from llama_pretrain.runs.checkpoints import newest_complete

    checkpoints = with_checkpoints.run_dir.checkpoints
    newest = checkpoints / "step-00000003"
    victim = next(iter(sorted(newest.glob("*.pt"))))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(bytes(content))
    folder, passed_over = newest_complete(checkpoints)
    assert folder == checkpoints / "step-00000002"
    assert passed_over == [
        f"step-00000003 is passed over: the contents of {victim.name} have changed"
    ]


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("launch.num_processes=1", "launch.num_processes: step-0000000"),
        ("optim.learning_rate=1e-4", "optim: differs from what the run was started with"),
        ("seed=5", "seed: differs from what the run was started with"),
        ("zero.stage=2", "zero.stage: differs from what the run was started with"),
        ("train.max_steps=2", "resume: the run has done its 2 steps; raise train.max_steps"),
        ("zero=stage2", "zero: a snapshot has values and no options (got zero=stage2); set its"),
    ],
)
def test_resume_refuses_another_run(
    runner: Runner, with_checkpoints: Command, override: str, text: str
) -> None:
    done = runner.bare(f"resume={with_checkpoints.run_dir.path}", override, expect=1)
    assert text in done.output
    assert "Traceback" not in done.output


def test_resume_of_nothing_is_refused(runner: Runner, tmp_path: Path) -> None:
    done = runner.bare(f"resume={tmp_path}", expect=1)
    assert f"{tmp_path}/snapshot.yaml: there is no snapshot here" in done.output

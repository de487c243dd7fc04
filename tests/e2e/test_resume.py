"""A resumed run has the losses, norms and samples of one that was never cut, to the bit."""

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from shlex import split

import pytest
from safetensors import safe_open

from llama_pretrain.checkpoint.manifest import (
    find_fault,
    list_folders,
    read_manifest,
    write_manifest,
)
from llama_pretrain.cli.listing import list_runs
from llama_pretrain.config.snapshot import config_hash, load_snapshot
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.tasks.verify_resume import compare
from tests.checkpoint.damage import EXAMPLE, damage
from tests.conftest import Command, Runner, small_disk
from tests.e2e.test_parity import at_stage
from tests.rows import json_rows, step_row, write_rows

IN_HOST_MEMORY = "zero.offload_optimizer.device=cpu"
POINTS = [
    pytest.param(2, "bf16", ""),
    *(
        pytest.param(*point, marks=pytest.mark.slow)
        for point in (
            *((0, "fp32", ""), (0, "bf16", ""), (1, "fp32", ""), (1, "bf16", "")),
            *((2, "fp32", ""), (3, "fp32", ""), (1, "bf16_autocast", "")),
            (1, "bf16", "precision.grad_accum_dtype=fp32"),
            (3, "bf16", "model.attention_dropout=0.1"),
            *((1, "fp32", "optim=muon"), (3, "fp32", "optim=muon")),
            (2, "fp32", f"optim=lion {IN_HOST_MEMORY}"),
            (3, "fp32", f"optim=cpu_adagrad {IN_HOST_MEMORY}"),
        )
    ),
]


def numbers(done: Command) -> list[tuple[object, ...]]:
    """What must be equal, step by step."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "sample_hash", "tokens")
    return [tuple(row[key] for key in keys) for row in done.rows("loss")]


@pytest.mark.parametrize(("stage", "precision", "more"), POINTS)
def test_resume_equals_the_uninterrupted_run(
    runner: Runner, stage: int, precision: str, more: str
) -> None:
    words = (
        f"precision={precision} launch.num_processes=2 batch.micro_batch_size=1"
        f" optim.learning_rate=3e-3 train.max_steps=6 train.eval_every_steps=2 {more}"
    )
    settings = (*at_stage(stage), *split(words))
    # A run with a checkpoint of step 3, and what is left of it where it is killed after step 4.
    cut = runner(*settings, "checkpoint.every_steps=3")
    whole, evaluations = numbers(cut), cut.rows("eval_loss")
    if (stage, precision) == (2, "bf16"):  # and writing checkpoints changes nothing
        assert numbers(runner(*settings)) == whole
    forget_after(cut, step=4)
    resumed = runner.bare(f"resume={cut.run_dir.path}", run_dir=cut.run_dir)
    assert "resuming from step-00000003" in resumed.output
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
    for folder in list_folders(done.run_dir.checkpoints):
        if int(folder.name[5:]) > step:
            (folder / "manifest.json").unlink()


@pytest.fixture(scope="module")
def with_checkpoints(shared_runner: Runner) -> Command:
    words = (
        "train.max_steps=8 checkpoint.every_steps=1 checkpoint.keep_last=3 zero=stage1"
        " checkpoint.keep_every_steps=2 checkpoint.asynchronous=true"
    )
    return shared_runner(*split(words))


def test_a_resumed_run_can_be_made_longer(shared_runner: Runner) -> None:
    """Its learning rates are the longer schedule's from the first resumed step on."""
    settings = ("checkpoint.every_steps=2", "schedule.warmup_steps=1", "monitor=csv")
    done = shared_runner("train.max_steps=3", *settings)
    resume = (f"resume={done.run_dir.path}", "train.max_steps=6")
    again = shared_runner.bare(*resume, run_dir=done.run_dir)
    assert [row["step"] for row in again.rows("loss")] == [1, 2, 3, 4, 5, 6]
    rates = [row["learning_rate"] for row in again.rows("loss")]
    # A cosine from 1e-3 to 1e-4 over five steps after one of warm-up.
    cosine = [1e-4 + 4.5e-4 * (1 + math.cos(math.pi * k / 5)) for k in range(2, 6)]
    assert rates[2:] == pytest.approx(cosine)
    table = (done.run_dir.path / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["step", "1", "2", "3", "4", "5", "6"]


def test_old_checkpoints_are_deleted(with_checkpoints: Command) -> None:
    """The last three stay, and every second one; written while training went on."""
    folders = sorted(with_checkpoints.run_dir.checkpoints.glob("*/"))
    assert [int(path.name[5:]) for path in folders] == [2, 4, 5, 6, 7]
    assert all(find_fault(path) is None for path in folders)
    assert (with_checkpoints.run_dir.checkpoints / "latest").read_text() == "step-00000007\n"
    rows = with_checkpoints.rows("checkpoint")
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert all(row["checkpoint_stall_seconds"] <= row["checkpoint_seconds"] for row in rows)


def test_a_checkpoint_holds_all_that_is_needed(with_checkpoints: Command) -> None:
    """And nothing in it is a pickle: every file is JSON or safetensors."""
    folder = with_checkpoints.run_dir.checkpoints / "step-00000007"
    ranks = ["rank00000.safetensors", "rank00001.safetensors"]
    files = split(
        "config.json index.json logits.safetensors manifest.json metrics.jsonl state.json"
    )
    assert sorted(path.name for path in folder.iterdir()) == sorted([*files, *ranks])
    for name in ranks:
        with safe_open(folder / name, framework="pt") as file:
            kinds = {key.split(":")[1] for key in file.keys()}  # noqa: SIM118  # no mapping
        assert kinds == {"weight", "exp_avg", "exp_avg_sq", "cpu"}
    state = json.loads((folder / "state.json").read_text())
    assert state["optimizer_scalars"] == {"step": ["float32", 7.0]}
    assert state["schedule_step"] == 7
    assert state["progress"]["next_batch"] == 7
    # Weights, 7 steps, 1 start, 1 evaluation, 6 checkpoints.
    assert len(json_rows(folder / "metrics.jsonl")) == 16
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.world_size, manifest.zero_stage) == (7, 2, 1)
    assert manifest.consumed_samples == 7 * manifest.global_batch_size == 28
    assert manifest.config_hash == config_hash(load_snapshot(with_checkpoints.run_dir.snapshot))


@pytest.mark.parametrize("kind", ["bit flipped", "missing"])
def test_a_damaged_checkpoint_is_passed_over(
    runner: Runner, with_checkpoints: Command, tmp_path: Path, kind: str
) -> None:
    """A resume says so and takes the one before; metrics come from the checkpoint."""
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(with_checkpoints.run_dir.path, copy.path)
    copy.metrics.unlink()
    run_hash = config_hash(load_snapshot(copy.snapshot))
    told = damage(copy.checkpoints / "step-00000007", kind, random.Random(1), config_hash=run_hash)
    done = runner.bare(f"resume={copy.path}", run_dir=copy)
    assert f"step-00000007 is skipped: {told}" in done.output
    assert "resuming from step-00000006" in done.output
    assert done.losses == with_checkpoints.losses


@pytest.mark.slow
def test_what_comes_after_the_last_step_is_made_up_for(runner: Runner) -> None:
    """Killed between its last step and its end: nothing is trained again, and the rest is done."""
    done = runner("train.max_steps=2", "checkpoint.at_end=true", "checkpoint.export=true")
    before, evaluations = done.losses, done.rows("eval_loss")
    (summary,) = done.rows("finished")
    shutil.rmtree(done.run_dir.export)
    done.run_dir.report.unlink()
    status = json.loads(done.run_dir.status.read_text())
    done.run_dir.status.write_text(json.dumps(status | {"status": "running"}))
    again = runner.bare(f"resume={done.run_dir.path}", run_dir=done.run_dir)
    assert (again.losses, again.rows("eval_loss")) == (before, evaluations)
    (last,) = again.rows("finished")  # over all launches: the last one had no step
    assert last["median_tokens_per_s"] == summary["median_tokens_per_s"]
    assert last["peak_memory_bytes"] >= max(row["memory_bytes"] for row in done.rows("loss"))
    assert (done.run_dir.export / "model.safetensors").is_file()
    assert done.run_dir.report.is_file()
    assert json.loads(done.run_dir.status.read_text())["status"] == "completed"


def test_a_failed_export_is_reported_and_can_be_repeated(runner: Runner, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    run_dir.export.write_text("in the way")
    place = f"hydra.run.dir={run_dir.path}"
    done = runner(place, "train.max_steps=1", "checkpoint.export=true", expect=1)
    status = json.loads(run_dir.status.read_text())
    assert status["status"] == "completed_unsaved"
    assert status["objective"] == done.rows("eval_loss")[-1]["eval_loss"]
    assert "there is no export: export.target: exists and is not an export" in status["error"]
    assert done.output.splitlines()[-1] == f"all steps are done, but {status['error']}"
    run_dir.export.unlink()
    runner.bare(f"resume={run_dir.path}", run_dir=run_dir)
    assert json.loads(run_dir.status.read_text())["status"] == "completed"
    assert (run_dir.export / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_run_goes_on_with_a_full_disk(runner: Runner, tmp_path: Path) -> None:
    """There is room for one checkpoint: it stays, others are told of, and the run completes."""
    run_dir = RunDir(tmp_path / "full")
    with small_disk(run_dir.checkpoints, "2500k"):
        words = "train.max_steps=4 checkpoint.every_steps=null checkpoint.every_minutes=1e-6"
        done = runner(*split(words), f"hydra.run.dir={run_dir.path}", expect=1)
        assert json.loads(run_dir.status.read_text())["status"] == "completed_unsaved"
        last = done.output.splitlines()[-1]
        assert last.startswith("all steps are done, but step-00000003 was not written: it needs")
        assert last.endswith("(rank 0); the newest checkpoint is step-00000001")
        assert [row["checkpoint"] for row in done.rows("checkpoint")] == ["step-00000001"]
        told = done.rows("checkpoint_error")
        assert [row["step"] for row in told] == [2, 3]
        assert "step-00000002 was not written: it needs 1.7 MiB (got 0.7 MiB free)" in done.output
        assert "step-00000003 was not written: it needs 1.7 MiB" in run_dir.report.read_text()
        assert find_fault(run_dir.checkpoints / "step-00000001") is None
        assert [path.name for path in run_dir.checkpoints.glob("*step*")] == ["step-00000001"]


@pytest.mark.slow
def test_other_ranks_and_other_stages(runner: Runner) -> None:
    """2 ranks at stage 3, then 1 at stage 1, then 4 at stage 2: the losses of 2 at stage 3."""
    words = (
        "precision=fp32 launch.num_processes=2 batch.micro_batch_size=1 optim.learning_rate=3e-3"
        " train.max_steps=9 train.eval_every_steps=3 checkpoint.every_steps=3"
        " checkpoint.keep_last=3"
    )
    cut = runner(*at_stage(3), *split(words))
    whole, evaluations = cut.rows("loss"), cut.rows("eval_loss")
    for ranks, stage, step in ((1, 1, 3), (4, 2, 6)):
        forget_after(cut, step=step)
        place = (f"zero=stage{stage}", f"launch.num_processes={ranks}")
        resumed = runner.bare(f"resume={cut.run_dir.path}", *place, run_dir=cut.run_dir)
        assert f"resuming from step-0000000{step}" in resumed.output
    found = cut.rows("loss")
    assert [row["sample_hash"] for row in found] == [row["sample_hash"] for row in whole]
    for key, ours, theirs in (
        *((key, found, whole) for key in ("loss", "grad_norm", "learning_rate")),
        ("eval_loss", cut.rows("eval_loss"), evaluations),
    ):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], abs=1e-5)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("optim.learning_rate=1e-4", "optim: differs from what the run was started with"),
        ("batch.global_batch_size=8", "batch.global_batch_size: the run was started with 4"),
        ("train.max_steps=7", "resume: the run has completed its 7 steps. Raise train.max_steps"),
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


@pytest.mark.slow
def test_verify_resume(runner: Runner) -> None:
    done = runner("task=verify_resume", "train.max_steps=4", "resume.verify_steps=2", "zero=stage3")
    assert "bitwise equal: 4 steps" in done.output
    result = json.loads((done.run_dir.path / "verify_resume.json").read_text())
    assert result == {"steps": 4, "cut_after": 2, "differences": []}


def test_verify_names_the_first_difference(tmp_path: Path) -> None:
    folders = [RunDir(tmp_path / name) for name in ("whole", "cut")]
    for folder, norms in zip(folders, ((1.5, 2.5), (1.5, 2.25)), strict=True):
        checkpoint = folder.checkpoints / "step-00000002"
        checkpoint.mkdir(parents=True)
        rows = [step_row(step, grad_norm=norm) for step, norm in enumerate(norms, start=1)]
        write_rows(folder.metrics, rows)
        files: dict[str, list[int | str]] = {"rank00000.safetensors": [1, str(norms)]}
        write_manifest(checkpoint, replace(EXAMPLE, files=files))
    norm, state = compare(*folders, last=2)
    assert norm == "step 2: grad_norm is 2.25 when resumed and 2.5 without interruption"
    assert state.startswith("the weights or the optimizer state after step 2 differ")


@pytest.mark.parametrize("size", ["40k", "90k", "140k"])
def test_a_disk_that_is_full_for_the_run_itself(runner: Runner, tmp_path: Path, size: str) -> None:
    """One line, exit code 1, and `list` does not find it running."""
    with small_disk(tmp_path / "disk", size) as disk:
        place = f"hydra.run.dir={disk / 'run'}"
        done = runner(place, "train.max_steps=400", "train.eval_every_steps=null", expect=1)
        assert "Traceback" not in done.output
        assert "No space left on device" in done.output
        found = [run.status for run in list_runs(disk)]
    assert set(found) <= {"crashed", "failed", "unknown"}


def test_a_schedule_that_jumps_and_fewer_steps_are_reported(runner: Runner) -> None:
    """A cosine of 3 steps made 6 long: its last rate is that of the middle of the new one."""
    rate = "optim.learning_rate=1e-3"
    done = runner("train.max_steps=3", "checkpoint.at_end=true", rate, "schedule.warmup_steps=1")
    folder = done.run_dir.path
    short = runner.bare(f"resume={folder}", "train.max_steps=2", expect=1)
    assert "train.max_steps: the run has already done 3 steps (got 2)" in short.output
    longer = runner.bare(f"resume='{folder}'", "train.max_steps=6", run_dir=done.run_dir)
    expected = 1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 2 / 5)))
    line = f"warning: the learning rate jumps from 0.0001 to {expected:g} after step 3"
    assert line in longer.output
    assert [row["step"] for row in longer.rows("loss")] == [1, 2, 3, 4, 5, 6]

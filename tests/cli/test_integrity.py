"""A real run, whole; and each file of it damaged in turn."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_pretrain.cli.integrity import iter_failures, verify_run
from llama_pretrain.cli.run_files import Result
from llama_pretrain.config.snapshot import load_snapshot
from llama_pretrain.plan.ds_config import get_train_ds_config
from llama_pretrain.plan.plan import load_plan
from llama_pretrain.runs.layout import RunDir, hold
from tests.conftest import Runner, run_module

WORDS = (
    "launch.num_processes=1",
    "batch.micro_batch_size=4",
    "precision=fp32",
    "train.max_steps=4",
    "train.eval_every_steps=2",
    "train.sample_tokens=4",
    "checkpoint.every_steps=2",
    "checkpoint.at_end=true",
    "checkpoint.export=true",
)


@pytest.fixture(scope="module")
def whole(shared_runner: Runner) -> RunDir:
    """A run with two checkpoints and an export."""
    return shared_runner(*WORDS).run_dir


@pytest.fixture(scope="module")
def other(shared_runner: Runner) -> RunDir:
    """A run of the same config on other data."""
    return shared_runner(*WORDS, "data.shuffle_seed=1").run_dir


@pytest.fixture
def copy(whole: RunDir, tmp_path: Path) -> RunDir:
    shutil.copytree(whole.path, tmp_path / "run")
    return RunDir(tmp_path / "run")


def failures(run_dir: RunDir, **options: Any) -> dict[str, str]:
    return {check.name: check.text for check in iter_failures(verify_run(run_dir.path, **options))}


def test_a_run_is_whole(whole: RunDir) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.path.rglob("*")}
    checks = verify_run(whole.path, deep=True)
    assert [check.name for check in checks if check.result is Result.passed] == [
        "snapshot.yaml",
        "plan.json",
        "ds_config.json",
        "provenance.json",
        "tokenizer",
        "data",
        "tokens",
        "status.json",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoints",
        "checkpoints/step-00000002",
        "checkpoints/step-00000004",
        "export",
    ]
    assert len(checks) == 14
    told = {check.name: check.text for check in checks}
    assert told["plan.json"] == "4 steps of 4 sequences, as in the snapshot"
    assert told["metrics.jsonl"] == "4 steps without a gap, 3 evaluations"
    assert told["export"] == "6 files of step-00000004"
    assert before == {path: path.stat().st_mtime_ns for path in whole.path.rglob("*")}


def flip(path: Path, at: int = -200) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def edit_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def drop_line(path: Path, holding: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if holding not in line]
    assert len(kept) == len(lines) - 1
    path.write_text("".join(kept))


def double_line(path: Path, holding: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line * (1 + (holding in line)) for line in lines))


def change_batch(path: Path, step: int) -> None:
    """Give a step's batch another hash."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["step"] == step and "sample_hash" in row:
            row["sample_hash"] = "0" * 16
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def checkpoint_of(run_dir: RunDir) -> Path:
    return run_dir.checkpoints / "step-00000004"


DAMAGES = yaml.safe_load((Path(__file__).parent / "damages.yaml").read_text())
OPERATIONS: dict[str, Callable[..., Any]] = {
    "edit": edit,
    "edit_json": edit_json,
    "cut": cut,
    "flip": flip,
    "drop_line": drop_line,
    "double_line": double_line,
    "change_batch": change_batch,
    "delete": Path.unlink,
    "write": Path.write_text,
}


@pytest.mark.parametrize("case", DAMAGES.values(), ids=DAMAGES)
def test_a_damage_is_found(copy: RunDir, case: dict[str, Any]) -> None:
    assert failures(copy) == {}
    operation, name, *arguments = case["damage"]
    OPERATIONS[operation](copy.path / name, *arguments)
    found = failures(copy)
    for check, text in case["found"].items():
        assert text in found[check]


@pytest.mark.slow
def test_what_is_of_another_run_is_found(copy: RunDir, other: RunDir) -> None:
    """The same config, and whole in itself: checkpoint, metrics, export and tokenizer."""
    assert failures(other) == {}
    shutil.rmtree(checkpoint_of(copy))
    shutil.copytree(checkpoint_of(other), checkpoint_of(copy))
    assert "is of another run: " in failures(copy)["checkpoints/step-00000004"]
    shutil.rmtree(checkpoint_of(copy))
    shutil.copytree(copy.checkpoints / "step-00000002", checkpoint_of(copy))
    assert failures(copy)["checkpoints/step-00000004"] == "is of step 2"
    shutil.copyfile(other.metrics, copy.metrics)
    found = failures(copy)
    assert "is of another run: " in found["checkpoints/step-00000002"]
    assert "its objective is " in found["status.json"]
    shutil.copyfile(other.plan, copy.plan)
    assert "the hashes differ: " in failures(copy)["data"]


def test_tokens_are_checked_where_they_still_are(copy: RunDir, tmp_path: Path) -> None:
    plan = json.loads(copy.plan.read_text())
    folder = tmp_path / "tokens"
    shutil.copytree(plan["corpus"]["sources"][0]["tokens_dir"], folder)
    plan["corpus"]["sources"][0]["tokens_dir"] = str(folder)
    copy.plan.write_text(json.dumps(plan))
    assert failures(copy, deep=True) == {}
    tokens = folder / "heldout-00000.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-200])
    assert "heldout of text: " in failures(copy)["tokens"]
    tokens.write_bytes(b"\xff\xff" + whole[2:])
    assert failures(copy) == {}  # of the right size
    assert "has ids outside of the vocabulary" in failures(copy, deep=True)["tokens"]
    eos = plan["corpus"]["eos_id"].to_bytes(2, "little")
    tokens.write_bytes(eos + whole[2:])
    assert "ends of documents, not" in failures(copy, deep=True)["tokens"]
    tokens.write_bytes(whole)
    edit(folder / "meta.json", '"data_hash": "', '"data_hash": "0')
    assert "have changed" in failures(copy)["tokens"]
    (folder / "meta.json").unlink()
    (gone,) = [check for check in verify_run(copy.path) if check.name == "tokens"]
    assert (gone.result, gone.text) == (
        Result.absent,
        "no longer in the cache; the next run prepares them again",
    )


def test_a_run_that_is_going_on_is_no_damage(copy: RunDir) -> None:
    edit_json(copy.status, {"status": "running"})
    drop_line(copy.metrics, '"finished"')
    with hold(copy):
        assert failures(copy) == {}
    assert list(failures(copy)) == ["status.json"]


def test_what_a_run_need_not_have(copy: RunDir) -> None:
    """One that failed before its first step."""
    for folder in (copy.export, copy.checkpoints):
        shutil.rmtree(folder)
    copy.metrics.unlink()
    copy.samples.unlink()
    edit_json(copy.status, {"status": "failed"})
    checks = verify_run(copy.path)
    absent = [check.name for check in checks if check.result is Result.absent]
    assert absent == ["metrics.jsonl", "samples.jsonl", "checkpoints", "export"]
    assert failures(copy) == {}


def test_a_moved_run_is_whole(copy: RunDir) -> None:
    """DeepSpeed's own monitors are told where the run was."""
    edit(copy.snapshot, "  tensorboard:\n    enabled: false", "  tensorboard:\n    enabled: true")
    run, plan = load_snapshot(copy.snapshot), load_plan(copy.plan)
    config = get_train_ds_config(run, plan.batch, run_dir=Path("/where/it/was"))
    assert "/where/it/was" in json.dumps(config)
    copy.ds_config.write_text(json.dumps(config))
    assert failures(copy) == {}


def test_a_completed_status_by_another_name(copy: RunDir) -> None:
    for status in ("reproduced", "diverged"):
        edit_json(copy.status, {"status": status})
        assert failures(copy) == {}


def test_the_verify_command(copy: RunDir, tmp_path: Path) -> None:
    done = run_module("verify", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("whole: 14 checks, none fails\n")
    assert "ok  export                     6 files of step-00000004\n" in done.stdout
    flip(copy.export / "config.json")
    done = run_module("verify", "run", cwd=tmp_path)
    assert done.returncode == 1
    assert "FAIL  export " in done.stdout
    assert done.stdout.endswith("1 of 14 checks fails\n")
    done = run_module("verify", "run", "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert [check["name"] for check in json.loads(done.stdout) if check["result"] == "fail"] == [
        "export"
    ]
    done = run_module("verify", "run/export", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: run/export is no run directory\n"


@pytest.mark.slow
def test_an_evaluation_is_checked_too(shared_runner: Runner, copy: RunDir, tmp_path: Path) -> None:
    place = RunDir(tmp_path / "evaluation")
    words = ("task=evaluate", f"run={copy.path}", f"hydra.run.dir={place.path}")
    shared_runner.bare(*words)
    assert failures(place) == {}
    edit(place.metrics, '"eval_loss": ', '"eval_loss": NaN, "x": ')
    edit(place.ds_config, '"stage": ', '"stage": 1')
    assert set(failures(place)) == {"metrics.jsonl", "ds_config.json"}

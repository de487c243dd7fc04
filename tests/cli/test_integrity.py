"""A real run, whole; and each file of it damaged in turn."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.cli.integrity import iter_failures, verify_run
from llama_pretrain.cli.run_files import Result
from llama_pretrain.config.snapshot import load_snapshot
from llama_pretrain.plan.ds_config import get_train_ds_config
from llama_pretrain.plan.plan import load_plan
from llama_pretrain.runs.layout import RunDir, hold
from tests.conftest import ROOT, Runner

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
Damage = Callable[[RunDir], None]


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


def edit_json(path: Path, **values: Any) -> None:
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


def change_batch(path: Path, *, step: int) -> None:
    """Give a step's batch another hash."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["step"] == step and "sample_hash" in row:
            row["sample_hash"] = "0" * 16
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def checkpoint_of(run_dir: RunDir) -> Path:
    return run_dir.checkpoints / "step-00000004"


STEP_3 = '"step": 3,'
BOTH = {"checkpoints/step-00000002", "checkpoints/step-00000004"}
DAMAGES = [
    pytest.param(
        lambda d: edit(d.snapshot, "seed: 1234", "seed: 12x4"),
        {"snapshot.yaml": "unable to parse string as an integer"},
        id="snapshot-type",
    ),
    pytest.param(
        lambda d: edit(d.snapshot, "seed: 1234", "seed: 1235"),
        dict.fromkeys(BOTH, "is of another run: its model, optimizer, seed or precision differ"),
        id="snapshot-seed",
    ),
    pytest.param(
        lambda d: edit(d.snapshot, "max_steps: 4", "max_steps: 5"),
        {"plan.json": "steps differs from the snapshot: steps.total is 4, not 5"},
        id="snapshot-steps",
    ),
    pytest.param(
        lambda d: edit(d.snapshot, "seed: 1234", "_target_: os.system"),
        {"snapshot.yaml": "names hydra settings, interpolations or _target_"},
        id="snapshot-unsafe",
    ),
    pytest.param(
        lambda d: edit(d.snapshot, "num_key_value_heads: 2", "num_key_value_heads: 3"),
        {"snapshot.yaml": "breaks a rule: "},
        id="snapshot-rule",
    ),
    pytest.param(
        lambda d: d.snapshot.unlink(),
        {"snapshot.yaml": "there is no snapshot here"},
        id="snapshot-deleted",
    ),
    pytest.param(lambda d: cut(d.plan), {"plan.json": "cannot be read: "}, id="plan-cut"),
    pytest.param(lambda d: d.plan.unlink(), {"plan.json": "is missing"}, id="plan-deleted"),
    pytest.param(
        lambda d: edit(d.plan, '"global_batch_size": 4', '"global_batch_size": 8'),
        {"plan.json": "batch.global_batch_size is 8, not 4"},
        id="plan-batch",
    ),
    pytest.param(
        lambda d: edit(d.plan, '"data_hash": "', '"data_hash": "0'),
        {"data": "corpus.content_hash is not that of its sources and tokenizer"},
        id="plan-data",
    ),
    pytest.param(
        lambda d: edit(d.ds_config, '"stage": 1', '"stage": 2'),
        {"ds_config.json": "zero_optimization.stage is 2, not 1"},
        id="ds_config-stage",
    ),
    pytest.param(
        lambda d: d.ds_config.unlink(), {"ds_config.json": "is missing"}, id="ds_config-deleted"
    ),
    pytest.param(
        lambda d: cut(d.provenance), {"provenance.json": "is not JSON"}, id="provenance-cut"
    ),
    pytest.param(
        lambda d: flip(d.tokenizer / "tokenizer.json"),
        {"tokenizer": "the contents of tokenizer.json have changed"},
        id="tokenizer-flip",
    ),
    pytest.param(
        lambda d: cut(d.tokenizer / "tokenizer_config.json"),
        {"tokenizer": "tokenizer_config.json is not JSON"},
        id="tokenizer-cut",
    ),
    pytest.param(
        lambda d: edit_json(d.status, status="complfted"),
        {"status.json": "has no known status (got complfted)"},
        id="status-flip",
    ),
    pytest.param(
        lambda d: edit_json(d.status, status="running"),
        {"status.json": "is running, but no process trains here: the run has crashed"},
        id="status-crashed",
    ),
    pytest.param(
        lambda d: edit_json(d.status, objective=1.5),
        {"status.json": "its objective is 1.5, and the last loss "},
        id="status-objective",
    ),
    pytest.param(
        lambda d: drop_line(d.metrics, '"finished"'),
        {"status.json": "is completed, but metrics.jsonl has no summary"},
        id="metrics-unfinished",
    ),
    pytest.param(
        lambda d: double_line(d.metrics, STEP_3),
        {"metrics.jsonl": "step 4 is missing or repeated"},
        id="metrics-twice",
    ),
    pytest.param(
        lambda d: drop_line(d.metrics, STEP_3),
        {"metrics.jsonl": "step 3 is missing or repeated"},
        id="metrics-gap",
    ),
    pytest.param(
        lambda d: edit(d.metrics, '"tokens": 768', '"tokens": 769'),
        {"metrics.jsonl": "a line of step 3 has 769 tokens, not 768"},
        id="metrics-tokens",
    ),
    pytest.param(
        lambda d: edit(d.metrics, '"grad_norm": ', '"grad_norm": NaN, "x": '),
        {"metrics.jsonl": "line 3: grad_norm is not finite"},
        id="metrics-nan",
    ),
    pytest.param(
        lambda d: edit(d.metrics, '"sample_hash": "', '"sample_hash": "x'),
        {"metrics.jsonl": "step 1 has no hash of its batch"},
        id="metrics-hash",
    ),
    pytest.param(
        lambda d: cut(d.metrics), {"metrics.jsonl": "line 12 was cut short"}, id="metrics-cut"
    ),
    pytest.param(
        lambda d: change_batch(d.metrics, step=4),
        {"checkpoints/step-00000004": "its last batch differs from that of metrics.jsonl"},
        id="metrics-batch",
    ),
    pytest.param(
        lambda d: drop_line(d.metrics, '"step": 4, "tokens": 1024, "loss"'),
        {
            "metrics.jsonl": "a line is of step 4, and steps end at 3",
            "checkpoints/step-00000004": "is of step 4, which metrics.jsonl does not have",
            "export": "is of step 4, which metrics.jsonl does not have",
        },
        id="metrics-end",
    ),
    pytest.param(
        lambda d: edit(d.plan, '"last": 4', '"last": 5'),
        {"status.json": "is completed, but the last step is 4, not 5"},
        id="plan-last",
    ),
    pytest.param(lambda d: d.metrics.unlink(), {"metrics.jsonl": "is missing"}, id="no-metrics"),
    pytest.param(
        lambda d: edit(d.samples, '"step": 2', '"step": 3'),
        {"samples.jsonl": "has a text of step 3, which was not evaluated"},
        id="samples-step",
    ),
    pytest.param(
        lambda d: (d.checkpoints / "latest").write_text("step-00000002\n"),
        {"checkpoints": "latest names step-00000002, and the newest is step-00000004"},
        id="latest",
    ),
    pytest.param(
        lambda d: flip(checkpoint_of(d) / "rank00000.safetensors"),
        {"checkpoints/step-00000004": "the contents of rank00000.safetensors have changed"},
        id="checkpoint-flip",
    ),
    pytest.param(
        lambda d: cut(checkpoint_of(d) / "rank00000.safetensors"),
        {"checkpoints/step-00000004": "rank00000.safetensors must have "},
        id="checkpoint-cut",
    ),
    pytest.param(
        lambda d: (checkpoint_of(d) / "state.json").unlink(),
        {"checkpoints/step-00000004": "state.json is missing"},
        id="checkpoint-deleted",
    ),
    pytest.param(
        lambda d: flip(checkpoint_of(d) / "manifest.json"),
        {"checkpoints/step-00000004": "its manifest cannot be read"},
        id="manifest-flip",
    ),
    pytest.param(
        lambda d: flip(d.export / "model.safetensors"),
        {"export": "the contents of model.safetensors have changed"},
        id="export-flip",
    ),
    pytest.param(
        lambda d: (d.export / "README.md").unlink(),
        {"export": "README.md is missing"},
        id="export-deleted",
    ),
    pytest.param(
        lambda d: (d.export / "pytorch_model.bin").touch(),
        {"export": "export.json does not list pytorch_model.bin"},
        id="export-more",
    ),
    pytest.param(
        lambda d: (d.export / "export.json").unlink(),
        {"export": "export.json is missing"},
        id="export-proof",
    ),
    pytest.param(
        lambda d: edit_json(d.export / "export.json", logit_difference=0.5),
        {"export": "the logits differ by more than its tolerance"},
        id="export-logits",
    ),
    pytest.param(
        lambda d: edit_json(d.export / "export.json", step=9),
        {"export": "is of step 9, which metrics.jsonl does not have"},
        id="export-step",
    ),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGES)
def test_a_damage_is_found(copy: RunDir, damage: Damage, expected: dict[str, str]) -> None:
    assert failures(copy) == {}
    damage(copy)
    found = failures(copy)
    for name, told in expected.items():
        assert told in found[name]


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
    edit_json(copy.status, status="running")
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
    edit_json(copy.status, status="failed")
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
        edit_json(copy.status, status=status)
        assert failures(copy) == {}


def verify(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "llama_pretrain", "verify", *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_the_verify_command(copy: RunDir, tmp_path: Path) -> None:
    done = verify("run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("whole: 14 checks, none fails\n")
    assert "ok  export                     6 files of step-00000004\n" in done.stdout
    flip(copy.export / "config.json")
    done = verify("run", cwd=tmp_path)
    assert done.returncode == 1
    assert "FAIL  export " in done.stdout
    assert done.stdout.endswith("1 of 14 checks fails\n")
    done = verify("run", "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert [check["name"] for check in json.loads(done.stdout) if check["result"] == "fail"] == [
        "export"
    ]
    done = verify("run/export", cwd=tmp_path)
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

"""Mistakes end before any rank starts: exit code 1, no traceback, each with what to do."""

import importlib.util
import json
from pathlib import Path
from shlex import split

import pytest

from llama_pretrain.config.snapshot import render_snapshot
from tests.conftest import Runner
from tests.machines import resolve_for

CASES = {
    "words": (
        "optim.learning_rte=1 train.max_steps=x zero=stage9",
        ["3 problems", "Did you mean optim.learning_rate", "Did you mean zero=stage3"],
    ),
    "list": ("zero=stage1,stage2", ["zero: has several values", "--multirun"]),
    "launcher": (
        "-m seed=1,2 hydra/launcher=ray",
        ["hydra/launcher has no option 'ray'. Options: basic"],
    ),
    "cache": ("data.cache_dir=/proc/none", ["data", "/proc/none"]),
    "no-data": ("data.paths=[/none/*.txt]", ["data.paths: ", "/none/*.txt"]),
    "tokenizer": ("tokenizer.vocab_size=600", ["tokenizer.vocab_size: "]),
}
"""Words that are refused, by the step that refuses them, and parts of what is printed."""


@pytest.mark.parametrize(("words", "texts"), CASES.values(), ids=CASES)
def test_refused_before_launch(runner: Runner, words: str, texts: list[str]) -> None:
    done = runner(*split(words), expect=1)
    assert [text for text in texts if text not in done.output] == []
    assert "Traceback" not in done.output
    assert not done.run_dir.status.exists()


def test_cpu_adam_without_a_compiler(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = runner("optim=cpu_adam", expect=1)
    assert "cpu_adam is compiled at its first use, but there is no C++" in done.output
    assert "add optim=torch_adamw" in done.output


def test_unknown_key_in_yaml(runner: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "optim"
    folder.mkdir(parents=True)
    (folder / "bad.yaml").write_text("name: adamw\nlearning_rte: 1.0e-3\n")
    done = runner.bare("--config-dir", str(folder.parent), "optim=bad", expect=1)
    assert "learning_rte" in done.output
    assert "optim/bad" in done.output
    assert "Traceback" not in done.output


def test_used_run_directory_is_refused(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "snapshot.yaml").write_text("x")
    done = runner(f"hydra.run.dir={tmp_path}", expect=1)
    assert f"hydra.run.dir: {tmp_path} " in done.output


def test_a_schema_beside_a_snapshot_is_not_read(runner: Runner, tmp_path: Path) -> None:
    """Hydra takes a file before a registered schema: in a run directory it could name code."""
    folder = tmp_path / "from-elsewhere"
    folder.mkdir()
    (folder / "snapshot.yaml").write_text(render_snapshot(resolve_for("seed=7")))
    evil = "hydra: {callbacks: {x: {_target_: os.mkdir, path: owned}}}\n"
    (folder / "run_schema.yaml").write_text(f"# @package _global_\n{evil}")
    done = runner.bare(f"reproduce={folder}", "task=plan")
    assert "command line" in done.output
    assert not (tmp_path / "owned").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_without_its_package(runner: Runner) -> None:
    done = runner("monitor=wandb", expect=1)
    assert "monitor.wandb: requires the package wandb, which is not installed" in done.output


def test_a_failing_rank_ends_the_run_with_its_error(runner: Runner) -> None:
    # A file where rank 0 needs a folder: a fault that only a rank meets.
    folder = runner.folder / "broken"
    (folder / "tensorboard").parent.mkdir(parents=True)
    (folder / "tensorboard").write_text("in the way")
    done = runner("monitor=tensorboard", f"hydra.run.dir={folder}", expect=1)
    status = json.loads(done.run_dir.status.read_text())
    assert (status["status"], status["rank"]) == ("failed", 0)
    assert "FileExistsError" in status["error"] or "NotADirectoryError" in status["error"]
    assert Path(status["log"]).is_file()
    assert "rank 0 failed" in done.output
    assert status["log"] in done.output
    assert "Traceback" not in done.output
    assert "torch/distributed" not in done.output

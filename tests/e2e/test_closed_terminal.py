"""A run whose terminal, pipe or log can no longer be written to trains on, or saves and exits."""

import contextlib
import json
import os
import pty
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llama_pretrain.checkpoint.manifest import find_fault
from llama_pretrain.runs.layout import RunDir
from tests.conftest import OPERATORS, ROOT, SMALL, Runner
from tests.rows import json_rows

STEPS = 60
RUN = (
    f"train.max_steps={STEPS}",
    "train.eval_every_steps=null",
    "checkpoint.at_end=true",
    "model.hidden_size=128",
    "model.intermediate_size=256",
)


def command(runner: Runner, *words: str) -> list[str]:
    paths = f"data.paths=['{runner.corpus}/*.py']"
    place = f"hydra.run.dir={runner.folder / 'run'}"
    more = (*SMALL, paths, f"data.cache_dir={runner.cache_dir}", *RUN, *words, place)
    return [sys.executable, str(ROOT / "run.py"), *more]


@contextmanager
def on_terminal(
    runner: Runner, *before: str, words: tuple[str, ...] = ()
) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """The command as the leader of a terminal's session; yields it and the terminal's other end."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", *before, *command(runner, *words)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=runner.folder,
        env=os.environ | OPERATORS | {"TERM": "xterm-256color"},
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(OSError):
            os.close(ours)


def wait_for_step(
    process: "subprocess.Popen[bytes]", terminal: int, folder: Path, step: int
) -> None:
    """Read what is printed, as a terminal does, until a step has been trained."""
    os.set_blocking(terminal, False)
    end = time.monotonic() + 90
    while max((row["step"] for row in json_rows(folder / "metrics.jsonl")), default=0) < step:
        assert process.poll() is None
        assert time.monotonic() < end
        with contextlib.suppress(BlockingIOError, OSError):
            os.read(terminal, 1 << 16)
        time.sleep(0.02)


def status_of(folder: Path) -> str:
    return str(json.loads((folder / "status.json").read_text())["status"])


@pytest.mark.parametrize(
    ("fork", "step"),
    [
        (True, 7),
        *(pytest.param(True, step, marks=pytest.mark.slow) for step in (1, 3, 20, 40)),
        *(pytest.param(False, step, marks=pytest.mark.slow) for step in (1, 20)),
    ],
)
def test_a_closed_terminal_saves_and_exits(runner: Runner, fork: bool, step: int) -> None:
    run_dir = RunDir(runner.folder / "run")
    with on_terminal(runner, words=(f"launch.fork={fork}",)) as (process, terminal):
        wait_for_step(process, terminal, run_dir.path, step)
        os.close(terminal)
        code = process.wait(60)
    last = json_rows(run_dir.metrics)[-1]["step"]
    if last < STEPS:
        assert (code, status_of(run_dir.path)) == (75, "preempted")
    assert find_fault(run_dir.checkpoints / f"step-{last:08d}") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [("nohup",), ("sh", "-c", 'trap "" HUP; exec "$@"', "sh")],
    ids=["nohup", "ignored"],
)
def test_with_the_signal_ignored_the_run_completes(runner: Runner, before: tuple[str, ...]) -> None:
    run_dir = RunDir(runner.folder / "run")
    with on_terminal(runner, *before) as (process, terminal):
        wait_for_step(process, terminal, run_dir.path, 3)
        os.close(terminal)
        code = process.wait(120)
    assert (code, status_of(run_dir.path)) == (0, "completed")
    assert find_fault(run_dir.checkpoints / f"step-{STEPS:08d}") is None


def test_a_reader_that_has_seen_enough_does_not_end_the_run(runner: Runner) -> None:
    script = f"set -o pipefail; {shlex.join(command(runner))} | head -1"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        cwd=runner.folder,
        env=os.environ | OPERATORS,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert status_of(runner.folder / "run") == "completed"

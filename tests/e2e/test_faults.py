"""Signals and kills of a running command; tests/launch has what one process can show."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import split

import pytest

from benchmarks.faults import numbers, pieces
from llama_pretrain.__main__ import main as commands
from llama_pretrain.checkpoint.manifest import checkpoint_name, list_folders, newest_of
from llama_pretrain.process import list_processes
from llama_pretrain.runs.layout import RunDir
from tests.conftest import OPERATORS, ROOT, SMALL, Runner
from tests.e2e.processes import processes_in, start, wait_for
from tests.rows import json_rows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="they are ended through /proc")

STEPS = 240
LONG = split(
    f"train.max_steps={STEPS} train.eval_every_steps=null launch.num_processes=2"
    " checkpoint.every_steps=40 checkpoint.at_end=true"
)
"""A run of some five seconds of training."""


class Started:
    """A running `python run.py`."""

    def __init__(self, runner: Runner, *words: str, run_dir: RunDir | None = None):
        self.folder, self.run_dir = runner.folder, run_dir or RunDir(runner.folder / "run")
        if run_dir is None:
            place = f"hydra.run.dir={self.run_dir.path}"
            paths = f"data.paths=['{runner.corpus}/*.py']"
            words = (*SMALL, paths, f"data.cache_dir={runner.cache_dir}", *words, place)
        self.process = start(self.folder, *words)

    @property
    def steps(self) -> int:
        return max((row["step"] for row in json_rows(self.run_dir.metrics)), default=0)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Poll until it holds, while the run lives."""
        wait_for(lambda: condition() or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()[0]

    def end(self, *, limit_s: float = 60) -> str:
        """Wait for its end, after which no process of it is left. Returns its output."""
        output = self.process.communicate(timeout=limit_s)[0]
        wait_for(lambda: not processes_in(self.folder), 5)
        assert "Traceback" not in output
        assert "torch/distributed" not in output
        return output


@contextmanager
def started(runner: Runner, *words: str, run_dir: RunDir | None = None) -> Iterator[Started]:
    run = Started(runner, *words, run_dir=run_dir)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()
        for pid in processes_in(run.folder):  # only where a test fails
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_run_that_signals_have_interrupted_equals_the_uninterrupted_one(runner: Runner) -> None:
    words = LONG
    run_dir: RunDir | None = None
    for number, from_step in ((signal.SIGTERM, 20), (signal.SIGINT, 90), (signal.SIGUSR1, 150)):
        with started(runner, *words, run_dir=run_dir) as run:
            run.wait_for(lambda run=run, step=from_step: run.steps >= step)  # type: ignore[misc]
            run.process.send_signal(number)
            output = run.end()
        assert run.process.returncode == 75, output
        (line,) = re.findall(rf"^{number.name}: (.*)$", output, re.MULTILINE)
        assert line == "finishing the step and writing a checkpoint; repeat it to exit at once"
        last = json_rows(run.run_dir.metrics)[-1]
        assert last["preempted"] == number.name
        assert run.steps == last["step"] < STEPS
        resume = f"python run.py resume={run.run_dir.path}"
        assert output.splitlines()[-2:] == [
            f"preempted by {number.name}; all processes have ended",
            f"to resume from {checkpoint_name(last['step'])}: {resume}",
        ]
        assert json.loads(run.run_dir.status.read_text())["status"] == "preempted"
        run_dir = run.run_dir
        words = [f"resume={run_dir.path}"]
    assert run_dir is not None
    done = runner.bare(*words, run_dir=run_dir)
    assert json.loads(done.run_dir.status.read_text())["status"] == "completed"
    whole = runner(*LONG).run_dir
    assert numbers(run_dir) == numbers(whole)
    name = checkpoint_name(STEPS)
    assert pieces(run_dir.checkpoints / name) == pieces(whole.checkpoints / name)


def test_a_checkpoint_on_demand_does_not_end_the_run(
    runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*LONG, "train.max_steps=1000", "checkpoint.every_steps=null", "checkpoint.keep_last=9")
    with started(runner, *words) as run:
        run.wait_for(lambda: run.steps >= 10)
        run.process.send_signal(signal.SIGUSR2)
        run.wait_for(lambda: newest_of(run.run_dir.checkpoints) is not None)
        assert commands(["checkpoint", str(run.run_dir.path)]) == 0
        shown = Path(capsys.readouterr().out.strip())
        output = run.end()
    assert run.process.returncode == 0, output
    assert "SIGUSR2: writing a checkpoint after this step\n" in output
    kept = list_folders(run.run_dir.checkpoints)
    assert [each.name for each in kept][-1] == checkpoint_name(1000)
    assert shown in kept
    assert len(kept) == 3
    assert not run.run_dir.request.exists()
    assert numbers(run.run_dir) == numbers(runner(*words).run_dir)
    assert commands(["checkpoint", str(run.run_dir.path)]) == 1
    assert "is not training: it is completed" in capsys.readouterr().err
    assert commands(["checkpoint", str(runner.folder)]) == 2


def test_a_run_directory_has_one_command_and_no_process_survives_it(runner: Runner) -> None:
    with started(runner, *LONG, "train.max_steps=100000") as run:
        run.wait_for(lambda: run.steps >= 3)
        refused = runner.bare(f"resume={run.run_dir.path}", expect=1)
        assert f"another process is training in {run.run_dir.path}" in refused.output
        run.process.kill()
        run.end()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_while_data_is_prepared(runner: Runner, tmp_path: Path, processes: int) -> None:
    """The processes that encode are gone; the next command continues their work."""
    folder = tmp_path / "texts"
    folder.mkdir()
    text = (runner.corpus / "message.py").read_text() * 20
    for number in range(16):
        (folder / f"{number}.txt").write_text(f"{number} {text}")
    words = [*SMALL, "task=prepare", f"data.paths=['{folder}/*.txt']"]
    words += [f"data.prepare_processes={processes}", f"data.cache_dir={tmp_path}/cache"]
    run_dir = RunDir(tmp_path / "prepare")
    with started(runner, *words, run_dir=run_dir) as run:
        run.wait_for(lambda: any((tmp_path / "cache").rglob("*partial*")))
        time.sleep(0.5)
        run.process.send_signal(signal.SIGUSR1)
        output = run.end(limit_s=10)
    assert run.process.returncode == 75, output
    assert output.splitlines()[-1] == "preempted by SIGUSR1; all processes have ended"
    runner.bare(*words)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal; before, the interpreter itself starts."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = [line.split()[1] for line in lines if line.startswith("SigCgt")]
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("delay_s", [0.01, 0.3])
def test_a_signal_while_the_command_starts(runner: Runner, delay_s: float) -> None:
    """The server that imports for ranks runs by then, and ends with the command."""
    with started(runner, f"data.cache_dir={runner.folder}/cache") as run:
        run.wait_for(lambda: catches(run.process.pid, signal.SIGUSR1))
        time.sleep(delay_s)
        run.process.send_signal(signal.SIGUSR1)
        output = run.end(limit_s=10)
    assert run.process.returncode == 75, output
    assert output.splitlines()[-1].startswith("preempted by SIGUSR1; ")


@pytest.mark.slow
def test_no_compiler_survives_a_signal_or_a_killed_parent(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    for number in (signal.SIGTERM, signal.SIGKILL):
        monkeypatch.setitem(OPERATORS, "TORCH_EXTENSIONS_DIR", str(tmp_path / number.name))
        with started(runner, *LONG, "optim=cpu_adam") as run:
            run.wait_for(lambda run=run: compiles(run.process.pid))  # type: ignore[misc]
            run.process.send_signal(number)
            run.end(limit_s=10)
        assert run.process.returncode == (75 if number == signal.SIGTERM else -9)
        shutil.rmtree(run.run_dir.path)


def compiles(pid: int) -> bool:
    """Whether there is a compiler somewhere below a process."""
    parents = {process.pid: process.parent for process in list_processes()}
    for child in parents:
        with contextlib.suppress(OSError):
            above = child if Path(f"/proc/{child}/comm").read_text() == "cc1plus\n" else 0
            while above in parents and above != pid:
                above = parents[above]
            if above == pid:
                return True
    return False


@pytest.mark.slow
def test_a_few_kills_of_the_benchmark() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--kills", "4"]
    values = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=values, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "losses of the uninterrupted run, to the bit" in done.stdout

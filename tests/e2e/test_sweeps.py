"""Sweeps as a user calls them: failing points, kills, Ctrl-C, going on, several at once, Optuna."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from shlex import split
from typing import Any

import pytest

from llama_pretrain.__main__ import main
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.sweep.directory import SweepDir
from tests.conftest import SMALL, Command, Runner
from tests.e2e.processes import processes_in, start, wait_for
from tests.e2e.test_resume import numbers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="they are ended through /proc")

RATES = "1e-4,2e-4,4e-4,8e-4,1e-3,2e-3,4e-3,8e-3,1e-2,1e30,-1,1e39"
"""Nine that train; one that makes NaN, one that no rule allows, one that no fp32 holds."""


class Sweep:
    """A sweep's command, called in a folder of its own."""

    def __init__(self, runner: Runner):
        self._runner = runner

    def words(self, *words: str) -> list[str]:
        given = {word.split("=")[0] for word in words}
        small = [word for word in SMALL if word.split("=")[0] not in given]
        paths = f"data.paths=['{self._runner.corpus}/*.py']"
        return ["-m", *small, paths, f"data.cache_dir={self._runner.cache_dir}", *words]

    def __call__(self, *words: str, expect: int = 0) -> str:
        return self._runner.bare(*self.words(*words), expect=expect).output

    def start(self, *words: str) -> "subprocess.Popen[str]":
        return start(self._runner.folder, *self.words(*words))

    @property
    def folder(self) -> SweepDir:
        (found,) = (self._runner.folder / "outputs" / "sweeps").iterdir()
        return SweepDir(found)

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.folder.results.read_text().splitlines()]

    def points(self) -> list[RunDir]:
        return [RunDir(path.parent) for path in sorted(self.folder.path.glob("*/snapshot.yaml"))]


@pytest.fixture
def sweep(runner: Runner) -> Sweep:
    return Sweep(runner)


def count_completed(folder: Path) -> int:
    """How many jobs of the sweep below a folder have."""
    files = folder.glob("outputs/sweeps/*/*/status.json")
    return sum('"completed"' in file.read_text() for file in files)


def count_at_work(folder: Path) -> int:
    """How many jobs have done some steps."""
    files = folder.glob("outputs/sweeps/*/*/metrics.jsonl")
    return sum(file.read_text().count('"grad_norm"') > 5 for file in files)


def test_a_sweep_plans_runs_and_tells(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    output = sweep("seed=1,2,-3", expect=1)
    assert "3 jobs, 2 to run" in output
    assert re.search(r"seed=-3 +refused +seed: must be greater than or equal to 0", output)
    assert "1/3 seed=1: running\n" in output
    assert re.search(r"2/3 seed=2: completed \(step 3, loss 6\.\d+, eval loss 6\.\d+", output)
    assert re.search(r"leaderboard.*\n# +seed +eval loss .*\n1 +[12] +6\.", output)
    assert "3 jobs: 2 completed, 1 refused" in output
    assert "Traceback" not in output
    rows = sweep.rows()
    assert [row["status"] for row in rows] == ["completed", "completed", "refused"]
    for run_dir in sweep.points():  # each is a run like any other
        assert run_dir.report.is_file()
        assert "step 3: eval loss" in (run_dir.path / "console.log").read_text()
    assert sweep.folder.report.read_text().count("<circle") >= 2
    assert len(list(sweep.folder.hparams.glob("*/events.*"))) == 2
    for file in (sweep.folder.results, sweep.folder.report):
        file.unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["leaderboard"]) == 0
    assert "3 jobs: 2 completed, 1 refused" in capsys.readouterr().out
    assert sweep.rows() == rows
    assert sweep.folder.report.is_file()
    again = sweep("seed=1,2,-3", expect=1)
    assert "2 jobs have finished before" in again
    assert ": running" not in again
    assert sweep.rows() == rows


def test_what_is_wrong_with_every_point_starts_nothing(sweep: Sweep, tmp_path: Path) -> None:
    output = sweep("optim.learning_rte=1", "seed=1,2", expect=1)
    assert "Did you mean optim.learning_rate?" in output
    output = sweep("batch.global_batch_size=3", "launch.num_processes=2", "seed=1,2", expect=1)
    assert "must be a multiple of 2 ranks (got 3)" in output
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_twelve_points_of_which_three_fail_killed_twice(
    sweep: Sweep, runner: Runner, tmp_path: Path
) -> None:
    words = split(
        f"optim.learning_rate={RATES} train.max_steps=12 train.eval_every_steps=6"
        " checkpoint.every_steps=4 precision=fp32"
    )
    for finished in (2, 6):
        process = sweep.start(*words)
        wait_for(lambda count=finished: count_completed(tmp_path) >= count)  # type: ignore[misc]
        process.kill()
        process.communicate()
        wait_for(lambda: not processes_in(tmp_path), 10)
    output = sweep(*words, expect=1)
    assert "jobs have finished before" in output
    rows = sweep.rows()
    assert len(rows) == 12
    states = [row["status"] for row in rows]
    assert states == ["completed"] * 9 + ["failed", "refused", "failed"]
    assert "NonFiniteError" in rows[9]["reason"]
    assert "must be greater than 0 (got -1" in rows[10]["reason"]
    assert "overflow" in rows[11]["reason"] or "NonFinite" in rows[11]["reason"]
    # Right to the bit: as each point is where it is run alone, and nothing was cut.
    for row in (rows[0], rows[4], rows[8]):
        alone = runner(f"optim.learning_rate={row['settings']['optim.learning_rate']}", *words[1:])
        run_dir = RunDir(sweep.folder.path / row["run_dir"])
        assert numbers(Command(0, "", run_dir)) == numbers(alone)
        assert row["eval_loss"] == alone.rows("eval_loss")[-1]["eval_loss"]
    assert [row["objective"] for row in rows[:9]] == [row["eval_loss"] for row in rows[:9]]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_one_signal_ends_the_sweep_and_the_command_goes_on(
    sweep: Sweep, tmp_path: Path, launcher: str
) -> None:
    words = ["seed=1,2,3", "train.max_steps=300", "train.eval_every_steps=null"]
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        words += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "launch.num_processes=1"]
    process = sweep.start(*words)
    wait_for(lambda: count_at_work(tmp_path) >= (2 if launcher == "joblib" else 1))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "to continue, run it again: python run.py -m" in output
    wait_for(lambda: not processes_in(tmp_path), 10)
    rows = sweep.rows()
    states = [row["status"] for row in rows]
    # Of two jobs at a time, one may have completed before the other has begun its steps.
    assert 1 <= states.count("preempted") <= (2 if launcher == "joblib" else 1)
    assert set(states) <= {"preempted", "waiting", "completed"}
    for row in rows:
        if row["status"] == "preempted":
            run_dir = RunDir(sweep.folder.path / row["run_dir"])
            assert list(run_dir.checkpoints.glob("step-*"))
    output = sweep(*words)
    assert [row["status"] for row in sweep.rows()] == ["completed"] * 3
    logs = [(run_dir.path / "console.log").read_text() for run_dir in sweep.points()]
    assert sum("resuming from step-" in log for log in logs) == states.count("preempted")


@pytest.mark.slow
def test_two_points_at_a_time_do_not_share_cores(sweep: Sweep, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core")
    words = "seed=1,2 train.max_steps=200 hydra/launcher=joblib hydra.launcher.n_jobs=2"
    process = sweep.start(*split(words))
    seen: dict[int, set[int]] = {}
    while process.poll() is None:
        # The servers that ranks are forked from: each leads a session, and is no rank.
        for pid in processes_in(tmp_path):
            with contextlib.suppress(OSError):
                folder = Path(f"/proc/{pid}")
                ranks = b"RANK=" in (folder / "environ").read_bytes()
                server = b"forkserver" in (folder / "cmdline").read_bytes()
                if server and not ranks and os.getsid(pid) == pid:
                    seen[pid] = os.sched_getaffinity(pid)
        time.sleep(0.2)
    process.communicate()
    assert process.returncode == 0
    assert {len(cores) for cores in seen.values()} == {len(os.sched_getaffinity(0)) // 2}
    assert len({frozenset(cores) for cores in seen.values()}) == 2
    snapshots = [run_dir.snapshot.read_text() for run_dir in sweep.points()]
    assert all("num_processes: 1" in text for text in snapshots)


@pytest.mark.slow
def test_slurms_launcher_runs_points_in_processes_of_its_own(sweep: Sweep) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    output = sweep("seed=1,2,3", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5")
    assert "3 jobs: 3 completed" in output
    assert len(sweep.points()) == 3


@pytest.mark.slow
def test_optuna_looks_prunes_and_goes_on(sweep: Sweep) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = split(
        "sweep=optuna_lr train.max_tokens=null train.max_steps=20 train.eval_every_steps=5"
        " sweep.prune_after=3 precision=fp32"
    )
    output = sweep(*words, "hydra.sweeper.n_trials=4")
    assert "4 jobs: " in output
    first = sweep.rows()
    assert all(row["objective"] is not None for row in first)
    longer = [*words, "hydra.sweeper.n_trials=9", f"hydra.sweep.dir={sweep.folder.path}"]
    again = sweep(*longer)
    rows = sweep.rows()
    assert rows[:4] == first  # the sampler is seeded: it asks for the same, and they were done
    assert again.count(": running") == 5
    assert len(rows) == 9
    assert {row["status"] for row in rows} <= {"completed", "pruned"}
    pruned = [row for row in rows if row["status"] == "pruned"]
    assert pruned, [(row["label"], row["eval_loss"]) for row in rows]
    assert all(row["steps"] < 20 for row in pruned)
    assert "the others' median is" in pruned[0]["reason"]

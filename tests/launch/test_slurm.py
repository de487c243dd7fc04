"""Job scripts of Slurm, and what is known of a job before it runs; e2e/test_nodes.py runs some."""

import os
import shlex
import signal
from pathlib import Path

import pytest

from llama_pretrain.config.launch import Launch, SlurmJob
from llama_pretrain.launch.slurm import (
    REQUEUE,
    count_job_gpus,
    describe_restart,
    requeue,
    validate_job,
    write_job_script,
)
from llama_pretrain.runs.layout import RunDir

HERE = "HERE"


def script_of(folder: Path, job: SlurmJob, *words: str) -> list[str]:
    run_dir = RunDir(folder / "my run 50%")
    write_job_script(Launch(slurm=job), 2, words, run_dir)
    return run_dir.job_script.read_text().splitlines()


def words_of(line: str, folder: Path) -> list[str]:
    """The words of a line that runs the command, with its run directory as `HERE`."""
    first, _, _, program, *words = shlex.split(line)
    assert first == "exec"
    assert program.endswith("run.py")
    return [word.replace(f"{folder}/my run 50%", HERE) for word in words]


def test_a_job_script_has_the_options_that_are_set(tmp_path: Path) -> None:
    extra = {"mem": 0, "exclusive": True, "cpus-per-task": 64, "hold": False}
    job = SlurmJob(partition="gpu", time="12:00:00", gres="gpu:8", constraint="a&b", extra=extra)
    lines = script_of(tmp_path, job, "model=60m", "launch=slurm")
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert options[1:3] == ["nodes=2", "ntasks-per-node=1"]
    assert options[3] == f"output='{tmp_path}/my run 50%%/slurm-%j.log'"
    assert options[4:] == [
        "open-mode=append",
        "requeue",
        "signal=B:USR1@300",
        "partition=gpu",
        "time=12:00:00",
        "gres=gpu:8",
        "constraint='a&b'",
        "mem=0",
        "exclusive",
        "cpus-per-task=64",
    ]
    assert f"cd {shlex.quote(os.getcwd())}" in lines


@pytest.mark.parametrize(
    ("words", "ends"),
    [
        (["model=60m"], ["model=60m", "resume=auto", f"hydra.run.dir='{HERE}'"]),
        (["model=60m", "resume=auto"], ["model=60m", "resume=auto", f"hydra.run.dir='{HERE}'"]),
        (["resume=/a", "train.max_steps=9"], ["resume=/a", "train.max_steps=9"]),
        (["resume=/auto/a"], ["resume=/auto/a"]),
        (["reproduce=/a"], ["reproduce=/a", f"hydra.run.dir='{HERE}'"]),
    ],
)
def test_a_requeued_job_continues(tmp_path: Path, words: list[str], ends: list[str]) -> None:
    *lines, last = script_of(tmp_path, SlurmJob(), *words)
    assert words_of(last, tmp_path) == ends
    again = [words_of(line, tmp_path) for line in lines if line.startswith("    exec")]
    assert again == ([[f"resume={HERE}"]] if words == ["reproduce=/a"] else [])


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        (None, 0),
        ("gpu", 1),
        ("gpu:8", 8),
        ("gpu:h100:4", 4),
        ("gpu:h100", 1),
        ("nvme:1,gpu:a100:2", 2),
        ("nvme:1", 0),
    ],
)
def test_gpus_that_a_job_asks_for(gres: str | None, count: int) -> None:
    assert count_job_gpus(SlurmJob(gres=gres)) == count


def test_what_cannot_be_submitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    job = SlurmJob(time="43200", extra={"signal": "USR2@60", "gres": "gpu:8", "mem": 0})
    assert [str(problem) for problem in validate_job(job)] == [
        (
            "launch: there is no allocation here, and no sbatch to submit a job with. Run it on a"
            " login node of the cluster, or set launch=local."
        ),
        (
            "launch.slurm.time: is in minutes without colons: 30 days (got 43200). Write it as"
            " D-HH:MM:SS or HH:MM:SS, in quotes in a YAML file."
        ),
        (
            "launch.slurm.extra.signal: is set by another setting or by the job script (got"
            " USR2@60). Remove it."
        ),
        (
            "launch.slurm.extra.gres: is set by another setting or by the job script (got gpu:8)."
            " Remove it."
        ),
    ]


@pytest.mark.parametrize(
    ("number", "shown", "requeued"),
    [
        (signal.SIGUSR1, "", True),
        (signal.SIGTERM, "JobState=RUNNING PreemptTime=2026-11-30T11:03:50 ", True),
        (signal.SIGTERM, "JobState=RUNNING PreemptTime=None ", False),
        (signal.SIGTERM, "JobState=CANCELLED PreemptTime=None ", False),
    ],
)
def test_a_job_goes_back_into_the_queue_unless_it_was_cancelled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, shown: str, requeued: bool
) -> None:
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/calls\necho '{shown}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr("llama_pretrain.launch.slurm.ignore_signals", lambda: None)
    requeue(number)
    assert not (tmp_path / "calls").exists()  # a script of somebody's own
    monkeypatch.setenv(REQUEUE, "1")
    requeue(number)
    assert ("requeue 12" in (tmp_path / "calls").read_text().splitlines()) is requeued


def test_a_restart_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert describe_restart() == ""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert describe_restart() == "by job 12 of Slurm, restart 3"

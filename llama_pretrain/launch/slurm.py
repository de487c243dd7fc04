"""Jobs of Slurm: write a job script, submit it, ask for its state, and requeue it."""

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

from llama_pretrain.config.launch import Launch, SlurmJob
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.files import read_json, write_json, write_text
from llama_pretrain.launch.server import ROOT
from llama_pretrain.launch.signals import ignore_signals
from llama_pretrain.runs.layout import RunDir

REQUEUE = "LLAMA_PRETRAIN_REQUEUE"
"""Set by job scripts: the command requeues its own job at the time limit."""
OWN = (
    "job-name",
    "nodes",
    "ntasks-per-node",
    "output",
    "open-mode",
    "requeue",
    "signal",
    "chdir",
    "no-kill",
)
"""Options of sbatch that a job script sets itself."""
MINUTES = 10_000
"""A time limit of as many minutes was 2:46:40 or more in a YAML file, which makes it seconds."""
RESUMED = """
if [ -e {snapshot} ]; then  # the job was requeued
    exec {again}
fi
"""


def validate_job(job: SlurmJob, path: str = "launch.slurm") -> Iterator[Problem]:
    """Problems of submitting a job from here."""
    if shutil.which("sbatch") is None:
        message = "there is no allocation here, and no sbatch to submit a job with"
        hint = "Run it on a login node of the cluster, or set launch=local"
        yield Problem(path="launch", message=message, hint=hint)
    if (job.time or "").isdigit() and int(job.time or 0) >= MINUTES:
        message = f"is in minutes without colons: {int(job.time or 0) / 1440:.0f} days"
        hint = "Write it as D-HH:MM:SS or HH:MM:SS, in quotes in a YAML file"
        yield Problem(path=f"{path}.time", message=f"{message} (got {job.time})", hint=hint)
    for key in job.extra:
        if key in OWN or hasattr(job, key):
            message = f"is set by another setting or by the job script (got {job.extra[key]})"
            yield Problem(path=f"{path}.extra.{key}", message=message, hint="Remove it")


def count_job_gpus(job: SlurmJob) -> int:
    """GPUs of each node that a job asks for, as far as its `gres` says."""
    found = re.search(r"\bgpu(?::[A-Za-z]\w*)?(?::(\d+))?", job.gres or "")
    return int(found[1] or 1) if found else 0


def write_job_script(launch: Launch, nodes: int, words: Sequence[str], run_dir: RunDir) -> None:
    """Write the script of a job that runs a command, and continues it when it is requeued.

    Args:
        words: of `python run.py`, without the run directory.
    """
    job = launch.slurm
    options = {
        "job-name": run_dir.path.name,
        "nodes": nodes,
        "ntasks-per-node": 1,
        "output": f"{str(run_dir.path).replace('%', '%%')}/slurm-%j.log",
        "open-mode": "append",
        "requeue": True,
        "signal": f"B:USR1@{job.signal_s}",
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "time": job.time,
        "gres": job.gres,
        "constraint": job.constraint,
        "no-kill": launch.min_nodes is not None,
        **job.extra,
    }
    lines = [
        f"#SBATCH --{name}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for name, value in options.items()
        if value is not None and value is not False
    ]
    keys = {word.partition("=")[0] for word in words}
    place, again = str(run_dir.path), ""
    if "reproduce" in keys:
        again = RESUMED.format(
            snapshot=shlex.quote(str(run_dir.snapshot)), again=_command([f"resume={place}"])
        )
    elif "resume" not in keys:
        words = [*words, "resume=auto"]
    if "resume=auto" in words or again:
        words = [*words, f"hydra.run.dir='{place}'"]
    body = f"cd {shlex.quote(os.getcwd())}\nexport {REQUEUE}=1\n{again}"
    text = "\n".join(["#!/bin/bash", *lines, "", f"{body}exec {_command(words)}", ""])
    write_text(run_dir.job_script, text)


def _command(words: Sequence[str]) -> str:
    """A command line; `exec` makes it the process that Slurm signals."""
    return shlex.join([sys.executable, "-u", str(ROOT / "run.py"), *words])


def submit(run_dir: RunDir) -> str:
    """Submit the job of a run directory. Returns its id.

    Raises:
        UserError: if Slurm refuses it.
    """
    words = ["sbatch", "--parsable", str(run_dir.job_script)]
    done = subprocess.run(words, capture_output=True, text=True)
    job = done.stdout.strip().partition(";")[0]
    if done.returncode or not job.isdigit():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        message = f"sbatch refused the job: {lines[-1].removeprefix('sbatch: error: ')}"
        hint = f"Its script is {run_dir.job_script}"
        raise UserError([Problem(path="launch.slurm", message=message, hint=hint)])
    write_json(run_dir.job, {"job": job})
    return job


def job_of(run_dir: RunDir) -> str | None:
    """The job that was submitted for a run directory, if any."""
    found = (read_json(run_dir.job) or {}).get("job")
    return None if found is None else str(found)


def list_states(jobs: Iterable[str]) -> dict[str, str]:
    """The states of jobs that have not ended: PENDING, RUNNING, COMPLETING...

    Raises:
        OSError: if Slurm does not answer; it may a moment later.
    """
    words = ["squeue", "--noheader", "--format=%i %T (%r)", f"--jobs={','.join(jobs)}"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise OSError(errno.EAGAIN, done.stderr.strip() or "squeue failed")
    found = dict(line.split(None, 1) for line in done.stdout.splitlines())
    return {job: state.removesuffix(" (None)") for job, state in found.items()}


def describe_restart() -> str:
    """Which job of Slurm this is, where it has been started before; else empty."""
    job, count = (os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "RESTART_COUNT"))
    return f"by job {job} of Slurm, restart {count}" if job and count.isdigit() else ""


def requeue(number: int) -> None:
    """Put this job back into the queue, if its script wants that. Slurm ends this process then.

    A job that is preempted may end before its partition's grace is over: then Slurm does not
    requeue it. One that is cancelled gets the same signal.

    Args:
        number: the signal that has ended the run.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job or not os.environ.get(REQUEUE):
        return
    if number == signal.SIGUSR1 or _is_preempted(job):
        ignore_signals()
        subprocess.run(["scontrol", "requeue", job], check=False)


def _is_preempted(job: str) -> bool:
    words = ["scontrol", "--oneliner", "show", "job", job]
    shown = subprocess.run(words, capture_output=True, text=True).stdout
    runs = re.search(r"\bJobState=RUNNING\b", shown) is not None
    return runs and re.search(r"\bPreemptTime=(?!None)\S", shown) is not None

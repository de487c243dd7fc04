"""Compile the DeepSpeed operators that a run needs, once per machine, before any rank starts."""

import fcntl
import hashlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from llama_pretrain.config.launch import Device
from llama_pretrain.config.optim import OptimName
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.files import flock
from llama_pretrain.launch.environment import extensions_dir, worker_environment
from llama_pretrain.process import PARENT, kill_session
from llama_pretrain.runs.provenance import cpu_name

BUILDERS = {
    OptimName.cpu_adam: "CPUAdamBuilder",
    OptimName.fused_adam: "FusedAdamBuilder",
    OptimName.cpu_lion: "CPULionBuilder",
    OptimName.fused_lion: "FusedLionBuilder",
    OptimName.cpu_adagrad: "CPUAdagradBuilder",
    OptimName.lamb: "FusedLambBuilder",
}
BUILD = """
import sys
from llama_pretrain.process import end_session_with_parent
end_session_with_parent()
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder(sys.argv[1]).load(verbose=False)
"""


def build_operators(
    run: ResolvedRun, *, log: Path, taking_time: Callable[[str], AbstractContextManager[None]]
) -> None:
    """Compile what the optimizer needs, unless it has been compiled for this machine before.

    A file lock lets one process of a machine build at a time. A build that was killed leaves
    torch's own lock file behind, for which every later start would wait forever; nobody builds
    while we hold our lock, so that file is removed.

    Args:
        taking_time: shows that something is in progress while its block runs.

    Raises:
        UserError: if the build fails.
    """
    if run.optim.name not in BUILDERS:
        return
    name, folder = run.optim.name.value, extensions_dir(run)
    built = folder / f".{name}-{_machine_key()}"
    if built.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".build.lock").open("w") as lock:
        try:
            flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with taking_time("waiting for another process that compiles operators on this machine"):
                flock(lock.fileno(), fcntl.LOCK_EX)
        if built.exists():
            return
        for stale in folder.glob("*/lock"):
            stale.unlink()
        with taking_time(f"compiling DeepSpeed's {name}, once per machine: a minute or two"):
            code = _compile(run, log)
        if code == 0:
            built.touch()
            return
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line] or lines[-1:] or ["no output"]
    message = f"DeepSpeed's {name} did not compile: {errors[0][:300]} (log: {log})"
    hint = "add optim=torch_adamw" if run.launch.device is Device.cpu else "see the log"
    raise UserError([Problem(path="optim.name", message=message, hint=hint)])


def _compile(run: ResolvedRun, log: Path) -> int:
    """Compile in a session of its own. Returns the exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", BUILD, BUILDERS[run.optim.name]],
            env=os.environ | worker_environment(run) | {PARENT: str(os.getpid())},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait()
        finally:  # at a signal, its ninja and their compilers as well
            kill_session(process.pid)
            process.wait()


def describe_operators(run: ResolvedRun) -> dict[str, dict[str, str]]:
    """The compiled operators that the optimizer uses: what they were built for, and their hash."""
    if run.optim.name not in BUILDERS:
        return {}
    name = "fused_lamb" if run.optim.name is OptimName.lamb else run.optim.name.value
    library = extensions_dir(run) / name / f"{name}.so"
    built = {"built_for": _machine_key()}
    if library.is_file():
        built["sha256"] = hashlib.sha256(library.read_bytes()).hexdigest()
    return {name: built}


def _machine_key() -> str:
    """A hash of what a compiled operator depends on: its sources, the interpreter, the CPU."""
    versions = [importlib.metadata.version(name) for name in ("torch", "deepspeed")]
    parts = [*versions, sys.version, sys.prefix, cpu_name()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

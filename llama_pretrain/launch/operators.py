"""Compile the DeepSpeed operators that a run needs, once a machine, before any rank starts."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.schema import Device, OptimName, Run
from llama_pretrain.launch.environment import extensions_dir, worker_environment

BUILDERS = {OptimName.cpu_adam: "CPUAdamBuilder", OptimName.fused_adam: "FusedAdamBuilder"}
BUILD = """
import sys
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder(sys.argv[1]).load(verbose=False)
"""


def build_operators(run: Run, *, log: Path, report: Callable[[str], None]) -> None:
    """Compile what the optimizer needs, unless it is there.

    A lock of ours lets one process of a machine build at a time. A build that was killed leaves
    torch's own lock file behind, for which every later start would wait for ever; while we hold
    ours, no build of ours is running, and the file is removed.

    Raises:
        UserError: if the build fails.
    """
    if run.optim.name not in BUILDERS:
        return
    folder = extensions_dir(run)
    folder.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with (folder / ".build.lock").open("w") as lock, log.open("w") as output:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in folder.glob("*/lock"):
            stale.unlink()
        name = run.optim.name.value
        if not list(folder.glob(f"{name}/*.so")):
            report(f"compiling DeepSpeed's {name}, once on this machine: a minute or two")
        done = subprocess.run(
            [sys.executable, "-c", BUILD, BUILDERS[run.optim.name]],
            env=os.environ | worker_environment(run),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if done.returncode != 0:
        hint = "add optim=torch_adamw" if run.launch.device is Device.cpu else "see the log"
        message = f"DeepSpeed's {name} could not be compiled (log: {log})"
        raise UserError([Problem(path="optim.name", message=message, hint=hint)])

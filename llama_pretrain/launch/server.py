"""Start the server that ranks are forked from: multiprocessing's, with preloaded modules.

`run.py` calls this before it imports anything else, so that the server's imports run beside the
composing of the config. Nothing here may import what takes long, or depend on the config.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

from llama_pretrain.plan.machine import count_gpus
from llama_pretrain.process import PARENT

ISOLATE, LIBRARIES = "llama_pretrain.launch.isolate", "llama_pretrain.launch.libraries"
ROOT = Path(__file__).resolve().parents[2]
"""The folder of the package."""
READ_AT_IMPORT = (
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "TORCHDYNAMO_DISABLE",
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_THRESHOLD_",
)
"""Variables that cannot be set after the fork. The server has this machine's default values;
a rank that needs others replaces itself by a fresh interpreter."""
KEEP_MEMORY = (
    f"glibc.malloc.mmap_threshold={1 << 32}",
    f"glibc.malloc.trim_threshold={1 << 42}",
    # Before 2.38 the cached ends of a freed aligned block do not merge with it, and nothing reuses
    # it. No mallopt parameter turns that cache off.
    "glibc.malloc.tcache_count=0",
)
"""glibc's tunables that make freed memory stay with the process."""
MAX_TEMPDIR = 64
"""A socket's path has at most 107 bytes."""
NOT_TRAINING = ("-", "task=", "sweep=", "hydra/", "launch.fork=", "import_deepspeed=")
"""Prefixes of arguments of commands that may train nothing, or fork nothing in this process."""


def import_environment(
    *, on_gpu: bool, keep_memory: bool, compiling: bool = False
) -> dict[str, str]:
    """The variables that imports read, or the interpreter at its start, beside our own."""
    values = {
        # ninja, which compiles operators, may lie beside the interpreter and off the PATH
        "PATH": _join(str(Path(sys.executable).parent), os.environ.get("PATH", "")),
        "PYTHONPATH": _join(str(ROOT), os.environ.get("PYTHONPATH", "")),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # everything a rank reads is a file
        "PYTHONWARNINGS": "ignore::FutureWarning:torch.distributed.c10d_logger",
        # Sockets of gloo on one node: the loopback interface, which no other machine reaches.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        # Look for devices through NVML: a process that has touched CUDA cannot be forked.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    if not on_gpu:
        values |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        if not compiling:
            # DeepSpeed compiles Muon's update: half a minute at each start, and a C++ compiler.
            values["TORCHDYNAMO_DISABLE"] = "1"
    if keep_memory:
        values["GLIBC_TUNABLES"] = _join(*KEEP_MEMORY, os.environ.get("GLIBC_TUNABLES", ""))
    return values


def _join(*paths: str) -> str:
    return os.pathsep.join(path for path in paths if path)


def may_train(argv: list[str]) -> bool:
    """Whether a command may fork ranks, as far as its arguments tell before Hydra reads them."""
    submits = "launch=slurm" in argv and "SLURM_JOB_NODELIST" not in os.environ
    return not submits and not any(word.startswith(NOT_TRAINING) for word in argv)


def start_server(*, libraries: bool = True) -> None:
    """Start the server, unless it is running. It dies with this process, and with this thread.

    Nothing in it depends on a config: a rank's environment, cores and threads are set after the
    fork.

    Args:
        libraries: whether it imports what ranks need; without, they become fresh interpreters.
    """
    multiprocessing.set_forkserver_preload([ISOLATE, *([LIBRARIES] if libraries else [])])
    on_gpu = count_gpus() > 0
    values = import_environment(on_gpu=on_gpu, keep_memory=not on_gpu)
    # Libraries must not start threads, which a fork would lose.
    with _environment(values | {"OMP_NUM_THREADS": "1", PARENT: str(os.getpid())}):
        forkserver.ensure_running()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables while a process is started: multiprocessing takes no environment.

    The server's socket is in the directory for temporary files, unless that is too long for one.
    """
    before, folder = dict(os.environ), tempfile.gettempdir()
    os.environ.update(values)
    tempfile.tempdir = folder if len(folder) < MAX_TEMPDIR else "/tmp"
    try:
        yield
    finally:
        tempfile.tempdir = folder
        os.environ.clear()
        os.environ.update(before)

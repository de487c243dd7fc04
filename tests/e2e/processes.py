"""Commands in processes of their own, which tests signal and kill."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from llama_pretrain.process import list_processes
from tests.conftest import OPERATORS, ROOT


def start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    """Start `python run.py WORDS` in a folder and a session of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=folder,
        env=os.environ | {"COLUMNS": "200"} | OPERATORS,
        start_new_session=True,
        # Where pytest runs in the background, SIGINT is ignored by all below.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def processes_in(folder: Path) -> list[int]:
    """Living processes of commands that were started in a folder, but for this process's own."""
    found = []
    for process in list_processes():
        with contextlib.suppress(OSError):
            where = Path(f"/proc/{process.pid}/cwd").readlink()
            lives = process.state not in "ZX" and process.parent != os.getpid()
            if lives and where.is_relative_to(folder):
                found.append(process.pid)
    return found


def wait_for(ready: Callable[[], object], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)

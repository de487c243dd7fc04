"""Processes as the system lists them: who lives, and ending those of a session (Linux: /proc)."""

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from llama_pretrain.train.signals import die_with_parent

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """One line of the system's list."""

    pid: int
    state: str
    """As ps shows it: `R`, `S`, `T` (stopped), `Z` (ended, not yet waited for)..."""
    parent: int
    session: int


def read_process(pid: int) -> Process | None:
    """A process by its id; `None` if there is none."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    state, parent, _group, session = stat.rpartition(")")[2].split()[:4]
    return Process(pid, state, int(parent), int(session))


def list_processes() -> list[Process]:
    """All processes; none where there is no /proc."""
    if not PROC.is_dir():
        return []
    numbers = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]
    return [process for pid in numbers if (process := read_process(pid)) is not None]


def is_alive(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    if PROC.is_dir():
        process = read_process(pid)
        return process is not None and process.state not in "ZX"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def kill_session(leader: int) -> None:
    """End every process of a session with SIGKILL: whoever starts others may put them into groups
    of their own, as ninja does, but they stay in its session."""
    if not PROC.is_dir():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)
        return
    members = [process.pid for process in list_processes() if process.session == leader]
    for pid in sorted(members, key=lambda pid: pid == os.getpid()):  # who asks for it comes last
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def end_session_with_parent() -> None:
    """End this process and its session on SIGTERM, and when the launcher dies, however it dies."""

    def end(_number: int, _frame: FrameType | None) -> None:
        kill_session(os.getsid(0))

    signal.signal(signal.SIGTERM, end)
    die_with_parent(signal.SIGTERM)

"""Processes: signals of a rank, heartbeats, and process trees (Linux: /proc)."""

import contextlib
import ctypes
import faulthandler
import math
import os
import signal
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


DUMP = signal.SIGUSR2
"""Makes a rank write the stacks of all its threads to its log, even from within a collective."""


PARENT = "LLAMA_PRETRAIN_PARENT"
"""The environment variable with the launcher's process id."""


class StopRequest:
    """Whether this rank has been asked to finish its step, save, and end."""

    def __init__(self) -> None:
        self.number = 0
        """The signal; 0 for none."""

    def install(self) -> None:
        """Catch the signals from here on."""
        for number in STOPPING:
            signal.signal(number, self._remember)
        faulthandler.register(DUMP, all_threads=True)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.number = number


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Get a signal when the launcher dies, however it dies (Linux alone)."""
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").prctl(1, number)  # PR_SET_PDEATHSIG
    parent = os.environ.get(PARENT)
    if parent is not None and int(parent) != os.getppid():  # it was gone before we asked
        os._exit(1)


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


SLOT = struct.Struct("<qqd")


STARTED = 3
"""Beats before there is anything to lose: begun, met the others, built the engine."""


@dataclass(frozen=True)
class Beat:
    """How far a rank has come."""

    pid: int
    """0 before the rank has begun."""
    count: int
    at: float
    """On this machine's monotonic clock, in seconds; infinite when the rank has done its work."""

    @property
    def finished(self) -> bool:
        """Whether the rank needs nothing any more."""
        return math.isinf(self.at)


class Heartbeat:
    """One rank's slot."""

    def __init__(self, path: Path, rank: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._offset, self._count = rank * SLOT.size, 0
        self.beat()

    def beat(self) -> None:
        """Say that something has been done: a micro batch, a batch of an evaluation, a file."""
        self._write(time.monotonic())

    def finish(self) -> None:
        """Say that this rank has done its work, and that its end is no death."""
        self._write(math.inf)

    def _write(self, at: float) -> None:
        self._count += 1
        os.pwrite(self._file, SLOT.pack(os.getpid(), self._count, at), self._offset)


def read_beats(path: Path, *, world_size: int) -> list[Beat]:
    """Where each rank is."""
    content = path.read_bytes() if path.is_file() else b""
    content = content.ljust(world_size * SLOT.size, b"\0")
    return [Beat(*SLOT.unpack_from(content, rank * SLOT.size)) for rank in range(world_size)]

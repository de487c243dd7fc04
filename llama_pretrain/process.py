"""Processes: the signals of a rank, heartbeats, and process trees (Linux: /proc)."""

import contextlib
import ctypes
import errno
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
from typing import Any, TextIO

from llama_pretrain.files import open_regular

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
DUMP = signal.SIGUSR2
"""Makes a rank write the stacks of all its threads to its log, even inside a collective."""
SAVE = signal.SIGUSR2
"""Asks the launching process, or the agent of another node, for a checkpoint."""
PARENT = "LLAMA_PRETRAIN_PARENT"
"""The environment variable with the process id that a worker's parent must have."""
STORE_FD = "LLAMA_PRETRAIN_STORE_FD"
"""The environment variable with the listening socket on which rank 0 is to host the store."""
PROC = Path("/proc")


class LossyStream:
    """A standard stream whose failures are ignored: a closed terminal or pipe, or a full disk."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write texts, or drop them."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Flush, or drop what is pending."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return  # a log on a full disk may have room again
        # Nobody will read it again: without this, each flush would fail, also at the exit.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


def ignore_lost_output() -> None:
    """From here on output that cannot be written is dropped, and nothing else happens."""
    for name in ("stdout", "stderr"):
        # Without the descriptor, as after `>&-`, the interpreter has no stream at all.
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115  # until the exit
        setattr(sys, name, LossyStream(stream))


class StopRequest:
    """Whether this rank has been asked to finish its step, save, and exit."""

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
    """Receive a signal when the parent process dies, however it dies."""
    ctypes.CDLL("libc.so.6").prctl(1, number)  # PR_SET_PDEATHSIG
    parent = os.environ.get(PARENT)
    if parent is not None and int(parent) != os.getppid():  # it died before the call above
        os._exit(1)


def end_session_with_parent() -> None:
    """Kill this process and its session on SIGTERM, and when the parent dies."""

    def end(_number: int, _frame: FrameType | None) -> None:
        kill_session(os.getsid(0))

    signal.signal(signal.SIGTERM, end)
    die_with_parent(signal.SIGTERM)


@dataclass(frozen=True)
class Process:
    """One entry of the process table."""

    pid: int
    state: str
    """As ps shows it: `R`, `S`, `T` (stopped), `Z` (ended, not yet waited for)..."""
    parent: int
    session: int


def read_process(pid: int) -> Process | None:
    """Look up a process; `None` if there is none with this id."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    state, parent, _group, session = stat.rpartition(")")[2].split()[:4]
    return Process(pid, state, int(parent), int(session))


def list_processes() -> list[Process]:
    """List all processes."""
    pids = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]
    return [process for pid in pids if (process := read_process(pid)) is not None]


def is_alive(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    process = read_process(pid)
    return process is not None and process.state not in "ZX"


def kill_session(leader: int) -> None:
    """Send SIGKILL to every process of a session.

    Programs may put their children into other process groups, as ninja does; the session stays.
    """
    members = [process.pid for process in list_processes() if process.session == leader]
    for pid in sorted(members, key=lambda pid: pid == os.getpid()):  # this process comes last
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


SLOT = struct.Struct("<qqd")
STARTED = 3
"""Heartbeats before there is anything to lose: begun, process group joined, engine built."""


@dataclass(frozen=True)
class Beat:
    """The last heartbeat of a rank."""

    pid: int
    """0 before the rank has begun."""
    count: int
    at: float
    """On this node's monotonic clock, in seconds; infinite once the rank has done its work."""

    @property
    def finished(self) -> bool:
        """Whether the rank has done its work."""
        return math.isinf(self.at)


class Heartbeat:
    """One rank's slot in the file of its node's heartbeats."""

    def __init__(self, path: Path, slot: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_regular(path, os.O_RDWR | os.O_CREAT)
        self._offset, self._count = slot * SLOT.size, 0
        self.beat()

    def beat(self) -> None:
        """Record progress: a micro batch, a batch of an evaluation, a file."""
        self._write(time.monotonic())

    def finish(self) -> None:
        """Record that this rank has done its work, so that its exit is no failure."""
        self._write(math.inf)

    def _write(self, at: float) -> None:
        self._count += 1
        os.pwrite(self._file, SLOT.pack(os.getpid(), self._count, at), self._offset)


def read_beats(path: Path, *, ranks: int) -> list[Beat]:
    """Read the last heartbeat of each rank of a node."""
    content = path.read_bytes() if path.is_file() else b""
    content = content.ljust(ranks * SLOT.size, b"\0")
    return [Beat(*SLOT.unpack_from(content, slot * SLOT.size)) for slot in range(ranks)]

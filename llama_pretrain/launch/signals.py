"""Signals to the launching process: what each asks for, and how a command that got one exits."""

import contextlib
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from llama_pretrain.process import SAVE, STOPPING

PREEMPTED_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again. Slurm's RequeueExit acts on it."""
SAME_S = 1.0
"""Signals this close together are one request: `timeout` and Slurm send theirs twice."""


class _Ended(BaseException):
    """A signal has ended the command. As an `Exception`, Hydra would start the next job."""

    how = ""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"{self.how} by {signal.Signals(number).name}")


class Preempted(_Ended):
    """The first signal has ended the command, and no work is lost."""

    how = "preempted"


class Stopped(_Ended):
    """A second signal has killed the ranks."""

    how = "stopped at once"


class Detached(_Ended):
    """A signal has ended a command that only watched jobs, which go on."""

    how = "ended"


class Requests:
    """The signals that have come, each request counted once."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.save = False
        """Whether a checkpoint is asked for."""
        self._last = 0.0

    def add(self, number: int) -> bool:
        """Record a signal. Returns whether it is a new request."""
        now, before = time.monotonic(), self._last
        self._last = now
        if self.numbers and now - before < SAME_S:
            return False
        self.numbers.append(number)
        return True

    def check(self) -> None:
        """Act on a signal whose exception was lost, as one raised during an import may be.

        Raises:
            Preempted: if there was one.
        """
        if self.numbers:
            raise Preempted(self.numbers[0])


def leave_at_signals() -> None:
    """From here on a signal ends this process, which has not started anything yet.

    Without an exception: extension modules lose one that is raised while they are imported.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"{Preempted(number)}; nothing was started\n".encode())
        os._exit(PREEMPTED_CODE)

    _handle(leave)
    signal.signal(SAVE, signal.SIG_IGN)  # there is nothing to save before ranks run


def catch_signals(requests: Requests) -> None:
    """From here on a signal ends the command at once, by an exception that cleans up.

    For work that can be repeated: composing, preparing data, compiling, planning, exporting. While
    ranks run, `receive_signals` takes over.

    Args:
        requests: records the signals.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        if requests.add(number):
            raise Preempted(number) if len(requests.numbers) == 1 else Stopped(number)

    _handle(end)


def ignore_signals() -> None:
    """From here on signals are ignored: the interpreter's exit would restore handlers that kill."""
    for number in (*STOPPING, SAVE):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def receive_signals(on_request: Callable[[int], None] = lambda number: None) -> Iterator[Requests]:
    """Record signals instead of acting on them.

    Args:
        on_request: called with each new request.
    """
    requests = Requests()

    def record(number: int, _frame: FrameType | None) -> None:
        if number == SAVE:
            requests.save = True
        elif requests.add(number):
            on_request(number)

    before = _handle(record) | {SAVE: signal.signal(SAVE, record)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Install a handler, except for ignored signals, as SIGHUP is under nohup.

    Returns the handlers before.
    """
    return {
        number: signal.signal(number, handler)
        for number in STOPPING
        if signal.getsignal(number) is not signal.SIG_IGN
    }


def describe_resume(path: Path, *, checkpoint: Path | None) -> str:
    """The command that continues a run."""
    folder = shlex.quote(str(path))
    if checkpoint is None:
        return f"the run has no checkpoint yet; to start again: python run.py reproduce={folder}"
    return f"to resume from {checkpoint.name}: python run.py resume={folder}"

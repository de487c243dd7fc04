"""The launching process's signals: what each asks for, and how a command that got one ends."""

import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from llama_pretrain.process import STOPPING

PREEMPTED_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again. Slurm's RequeueExit acts on it."""
SAME_S = 1.0
"""Signals so close together are one request: `timeout` and Slurm send each of theirs twice."""


class Preempted(BaseException):
    """A signal has ended the command, and nothing that was done is lost.

    No `Exception`: Hydra would go on with the next job of a sweep.
    """

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"preempted by {signal.Signals(number).name}")


class Stopped(BaseException):
    """A second signal has ended the ranks where they were."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"stopped at once by {signal.Signals(number).name}")


class Requests:
    """The signals of one stretch of the command, each request counted once."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._last = 0.0

    def add(self, number: int) -> bool:
        """Note a signal. Returns whether it is a new request."""
        now, before = time.monotonic(), self._last
        self._last = now
        if self.numbers and now - before < SAME_S:
            return False
        self.numbers.append(number)
        return True

    def check(self) -> None:
        """Act on a signal whose exception was lost: one that comes in an import may be.

        Raises:
            Preempted: if there was one.
        """
        if self.numbers:
            raise Preempted(self.numbers[0])


def leave_at_signals() -> None:
    """From here on a signal ends this process, which has begun nothing: SIGUSR1 would just kill it.

    Not by an exception: extension modules lose one that comes while they are imported.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        os.write(2, f"{Preempted(number)}; nothing was started\n".encode())
        os._exit(PREEMPTED_CODE)

    for number in _heeded():
        signal.signal(number, leave)


def catch_signals(requests: Requests) -> None:
    """From here on a signal ends the command at once, with every child and every status seen to.

    That is for what can be done again: composing, preparing data, compiling, planning, exporting.
    While ranks run, `receive_signals` takes over.

    Args:
        requests: where the signals that come are noted.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        if requests.add(number):
            raise Preempted(number) if len(requests.numbers) == 1 else Stopped(number)

    for number in _heeded():
        signal.signal(number, end)


def ignore_signals() -> None:
    """From here on nothing is left to end; the interpreter would put handlers back that kill."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def receive_signals(tell: Callable[[int], None] = lambda number: None) -> Iterator[Requests]:
    """Collect signals instead of acting on them.

    Args:
        tell: called with each that is a new request.
    """
    requests = Requests()

    def note(number: int, _frame: FrameType | None) -> None:
        if requests.add(number):
            tell(number)

    before = {number: signal.signal(number, note) for number in _heeded()}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _heeded() -> list[signal.Signals]:
    """Those that we act on: what is ignored stays so, as SIGHUP is under nohup."""
    return [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]


def how_to_go_on(path: Path, *, checkpoint: Path | None) -> str:
    """The command that goes on with a run."""
    folder = shlex.quote(str(path))
    if checkpoint is None:
        return f"it has no checkpoint yet; to start it anew: python run.py reproduce={folder}"
    return f"to go on from {checkpoint.name}: python run.py resume={folder}"

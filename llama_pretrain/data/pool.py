"""Tasks on all cores, in processes that end with the parent, and progress on the way."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

LOOK_EVERY_S = 0.2


class Report(Protocol):
    """Who is told of preparing (console.DataReport, for one)."""

    def say(self, line: str) -> None:
        """A line."""

    def progress(self, what: str, total: int) -> AbstractContextManager[Callable[[int, int], None]]:
        """A bar over bytes to read. The function takes bytes read, and bytes of text in them."""


class Counter(Protocol):
    """Bytes read and bytes of text, added up over processes."""

    def add(self, read: int, text: int) -> None: ...


class LocalCounter:
    """For tasks that run in this process."""

    def __init__(self, show: Callable[[int, int], None]):
        self._read = self._text = 0
        self._show, self._shown = show, 0.0

    def add(self, read: int, text: int) -> None:
        self._read += read
        self._text += text
        now = time.monotonic()
        if now - self._shown > LOOK_EVERY_S:
            self._shown = now
            self._show(self._read, self._text)


class SharedCounter:
    """For tasks in other processes."""

    def __init__(self) -> None:
        self._values = multiprocessing.get_context("spawn").Array("q", 2)

    def add(self, read: int, text: int) -> None:
        with self._values.get_lock():
            self._values[0] += read
            self._values[1] += text

    def read(self) -> tuple[int, int]:
        """Both sums."""
        with self._values.get_lock():
            return self._values[0], self._values[1]


def run_tasks(
    work: Callable[[Any, Task, Counter], Result],
    job: Any,
    tasks: Sequence[Task],
    *,
    processes: int,
    show: Callable[[int, int], None],
) -> Generator[tuple[int, Result], None, None]:
    """`work(job, task, counter)` for each task, as they come: (number of the task, result).

    Who stops before the end closes it, which ends the processes.

    Raises:
        RuntimeError: if a process was killed.
    """
    if processes == 1 or len(tasks) <= 1:
        counter = LocalCounter(show)
        for number, task in enumerate(tasks):
            yield number, work(job, task, counter)
        return
    shared = SharedCounter()
    # A fork would copy the locks of the tokenizer's threads, and hang on them.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(processes, len(tasks)),
        mp_context=context,
        initializer=_start,
        initargs=(work, job, shared, os.getpid()),
    )
    try:
        futures = {pool.submit(_run, task): number for number, task in enumerate(tasks)}
        for future in _as_completed(futures, lambda: show(*shared.read())):
            yield futures[future], future.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        message = "a process that prepares data was killed, perhaps for lack of memory"
        raise RuntimeError(message) from error
    finally:  # after an error or a signal, what runs is stopped at once
        children = multiprocessing.active_children()
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.kill()


def _as_completed(
    futures: Iterable[Future[Any]], look: Callable[[], None]
) -> Iterator[Future[Any]]:
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=LOOK_EVERY_S, return_when=FIRST_COMPLETED)
        look()
        yield from done


_OWN: list[Any] = []
"""What this process works with; set once, when it starts."""


def _start(work: Any, job: Any, counter: SharedCounter, parent: int) -> None:
    # Ctrl-C and `timeout` reach all processes: the parent decides, and ends the others.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process
    _OWN.extend((work, job, counter))


def _run(task: Any) -> Any:
    work, job, counter = _OWN
    return work(job, task, counter)

"""Run tasks in worker processes that end with their parent."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from llama_pretrain.data.cache import ShowProgress

Task = TypeVar("Task")
Result = TypeVar("Result")
AddProgress = Callable[[int, int], None]
"""Adds bytes read, and bytes of text in them, to the progress of all tasks."""

POLL_INTERVAL_S = 0.2


def run_tasks(
    work: Callable[[Any, Task, AddProgress], Result],
    job: Any,
    tasks: Sequence[Task],
    *,
    processes: int,
    show: ShowProgress,
) -> Generator[tuple[int, Result], None, None]:
    """Yield (index of the task, `work(job, task, add)`) in the order of completion.

    Closing the generator early kills the processes.

    Raises:
        RuntimeError: if a process was killed.
    """
    if processes == 1 or len(tasks) <= 1:
        totals = [0, 0]

        def add(read: int, text: int) -> None:
            totals[:] = totals[0] + read, totals[1] + text
            show(*totals)

        for number, task in enumerate(tasks):
            yield number, work(job, task, add)
        return
    # A forked process would inherit locked locks of the tokenizer's threads and deadlock.
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 2)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(processes, len(tasks)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(work, job, counts, os.getpid()),
    )
    try:
        futures = {pool.submit(_run_task, task): number for number, task in enumerate(tasks)}
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, POLL_INTERVAL_S, FIRST_COMPLETED)
            show(*counts[:])
            for future in done:
                yield futures[future], future.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        message = "a process that prepares data was killed, possibly by the OOM killer"
        raise RuntimeError(message) from error
    finally:  # after an error or a signal, running tasks are not waited for
        children = set(multiprocessing.active_children()) - others
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.kill()


_WORKER: list[Any] = []
"""The work, job and counts of this process; set once, when it starts."""


def _start_worker(work: Any, job: Any, counts: Any, parent: int) -> None:
    # Ctrl-C and `timeout` signal the whole process group; only the parent handles it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process
    _WORKER.extend((work, job, counts))


def _run_task(task: Any) -> Any:
    work, job, counts = _WORKER

    def add(read: int, text: int) -> None:
        with counts.get_lock():
            counts[0] += read
            counts[1] += text

    return work(job, task, add)

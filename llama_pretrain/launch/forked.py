"""Ranks that are forked from a server with everything imported (launch/server.py).

A fresh interpreter spends seconds on imports, in each rank of each launch. The server imports once,
beside the parent's own work; each rank starts as a copy of it.
"""

import multiprocessing
import os
import socket
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

from llama_pretrain.launch.environment import worker_environment
from llama_pretrain.launch.failures import Failure
from llama_pretrain.launch.server import LIBRARIES, READ_AT_IMPORT
from llama_pretrain.launch.spec import LaunchSpec
from llama_pretrain.process import PARENT, STORE_FD, kill_session
from llama_pretrain.train.worker import begin

WORKER = "llama_pretrain.train.worker"
POLL_S = 0.1
LAST_WORDS_S = 2.0
"""What the other ranks have after a failure to exit by themselves."""
SERVER_DIED = 255
"""multiprocessing's exit code of a process whose server has died."""


class Supervisor(threading.Thread):
    """Has the ranks of this node forked, and waits until all have ended.

    It is a thread of its own, which receives no signals: the main thread decides what they mean.
    """

    def __init__(self, spec: LaunchSpec, *, error_dir: Path):
        super().__init__(name="supervisor", daemon=True)
        self.failures: dict[int, Failure] = {}
        """By rank."""
        self.error: BaseException | None = None
        """Why the ranks could not be supervised."""
        self._spec = spec
        self._error_files = [error_dir / f"{rank}.json" for rank in spec.ranks]
        self._processes: list[BaseProcess] = []

    def pids(self) -> list[int]:
        """The process ids of ranks that have not ended, with or without a heartbeat."""
        return [each.pid for each in self._processes if each.pid and each.exitcode is None]

    def run(self) -> None:
        """Supervise, and leave no rank when that fails."""
        try:
            self._supervise()
        except BaseException as error:
            self.error = error
            for pid in self.pids():
                kill_session(pid)

    def _supervise(self) -> None:
        try:
            self._fork()
        except (EOFError, ConnectionError):  # by now the server has died
            self._note(self._spec.ranks[len(self._processes)], SERVER_DIED)
        failed_at: float | None = None
        running = dict(zip(self._spec.ranks, self._processes, strict=False))
        while running:
            wait([process.sentinel for process in running.values()], timeout=POLL_S)
            for rank, process in list(running.items()):
                if process.exitcode is not None:
                    self._note(rank, process.exitcode)
                    del running[rank]
            if self.failures:
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > LAST_WORDS_S:  # also ranks without a heartbeat
                    for pid in self.pids():
                        kill_session(pid)

    def _fork(self) -> None:
        cores = os.sched_getaffinity(0)
        context = multiprocessing.get_context("forkserver")
        fresh = not self._spec.run.launch.fork
        place = self._spec.place
        listener = place.listener
        if place.store is None:
            listener = socket.create_server((place.address, 0))
        with listener or nullcontext(), _plain_process():
            store = place.store or (listener.getsockname() if listener else ("", 0))
            for rank in self._spec.ranks:
                hosted = listener if rank == 0 else None
                environment = self._environment(rank, store)
                arguments = (self._spec.worker_args, environment, cores, hosted, fresh)
                process = context.Process(target=run_rank, args=arguments)
                process.start()
                self._processes.append(process)

    def _environment(self, rank: int, store: tuple[str, int]) -> dict[str, str]:
        """The environment of a rank, with what torch's elastic agent would set."""
        launch, place = self._spec.run.launch, self._spec.place
        values = {
            **os.environ,
            **worker_environment(self._spec.run),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % launch.num_processes),
            "WORLD_SIZE": str(self._spec.plan.world_size),
            "LOCAL_WORLD_SIZE": str(launch.num_processes),
            "GROUP_RANK": str(place.node),
            "GROUP_WORLD_SIZE": str(launch.nodes),
            "MASTER_ADDR": store[0],
            "MASTER_PORT": str(store[1]),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 hosts it before it joins
            "TORCHELASTIC_RESTART_COUNT": str(place.attempt),
            "TORCHELASTIC_ERROR_FILE": str(self._error_file(rank)),
        }
        if launch.nodes > 1:
            values["GLOO_SOCKET_IFNAME"] = values["NCCL_SOCKET_IFNAME"] = place.interface
        return values

    def _error_file(self, rank: int) -> Path:
        return self._error_files[rank - self._spec.ranks.start]

    def _note(self, rank: int, code: int) -> None:
        if code == SERVER_DIED:
            text = "the server that ranks are forked from has died"
            self.failures[rank] = Failure(code, int(time.time()), text)
        elif code != 0:
            self.failures[rank] = Failure.of(code, self._error_file(rank))


@contextmanager
def _plain_process() -> Iterator[None]:
    """Hide what multiprocessing would carry over to ranks: `__main__`, which they would import
    again, and a start method that they do not know, as joblib's workers have."""
    main, method = sys.modules["__main__"], multiprocessing.get_start_method(allow_none=True)
    sys.modules["__main__"] = types.ModuleType("__main__")
    multiprocessing.set_start_method(None, force=True)
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        multiprocessing.set_start_method(method, force=True)


def run_rank(
    args: Sequence[str],
    environment: Mapping[str, str],
    cores: set[int],
    store: socket.socket | None,
    fresh: bool,
) -> NoReturn:
    """Turn a fork of the server into a rank, as if it had been started in this environment."""
    os.setsid()  # so that everything it starts can be found
    os.sched_setaffinity(0, cores)
    same = all(os.environ.get(name) == environment.get(name) for name in READ_AT_IMPORT)
    can_serve = not fresh and same and LIBRARIES in sys.modules and not _has_touched_cuda()
    parent = os.environ[PARENT]
    os.environ.clear()
    os.environ.update(environment)
    os.environ[PARENT] = parent
    if store is not None:
        os.environ[STORE_FD] = str(store.detach())
        os.set_inheritable(int(os.environ[STORE_FD]), True)
    if not can_serve:
        os.execv(sys.executable, [sys.executable, "-u", "-m", WORKER, *args])
    begin(args)


def _has_touched_cuda() -> bool:
    """Whether an import has touched the CUDA runtime: no fork of that process can use it."""
    torch = sys.modules["torch"]
    return bool(getattr(torch._C, "_cuda_isInBadFork", lambda: False)())

"""Ranks that are forked from a server with everything imported (launch/server.py).

A fresh interpreter spends seconds on imports, in each rank of each launch. The server imports once,
beside the parent's own work; each rank starts as a copy of it.
"""

import multiprocessing
import os
import socket
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

from llama_pretrain.launch.environment import worker_environment
from llama_pretrain.launch.failures import Failure
from llama_pretrain.launch.server import LIBRARIES, READ_AT_IMPORT
from llama_pretrain.launch.spec import LaunchSpec
from llama_pretrain.launch.supervisor import POLL_S, WORKER, Supervisor
from llama_pretrain.process import PARENT, STORE_FD, kill_session
from llama_pretrain.train.worker import begin

LAST_WORDS_S = 2.0
"""What the other ranks have after a failure to exit by themselves."""
SERVER_DIED = 255
"""multiprocessing's exit code of a process whose server has died."""


class ForkSupervisor(Supervisor):
    """Has ranks forked, and waits for them."""

    def __init__(self, spec: LaunchSpec, *, error_dir: Path):
        super().__init__()
        self._spec = spec
        self._error_files = [error_dir / f"{rank}.json" for rank in range(spec.plan.world_size)]
        self._processes: list[BaseProcess] = []

    def pids(self) -> list[int]:
        return [each.pid for each in self._processes if each.pid and each.exitcode is None]

    def supervise(self) -> None:
        try:
            self._fork()
        except (EOFError, ConnectionError):  # by now the server has died
            self._note(len(self._processes), SERVER_DIED)
        failed_at: float | None = None
        running = dict(enumerate(self._processes))
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
        with socket.create_server(("127.0.0.1", 0)) as store, _plain_process():
            for rank in range(len(self._error_files)):
                environment = self._environment(rank, port=store.getsockname()[1])
                hosted = store if rank == 0 else None
                arguments = (self._spec.worker_args, environment, cores, hosted)
                process = context.Process(target=run_rank, args=arguments)
                process.start()
                self._processes.append(process)

    def _environment(self, rank: int, *, port: int) -> dict[str, str]:
        """The environment of a rank, with what torch's elastic agent would set."""
        size = str(len(self._error_files))
        return {
            **os.environ,
            **worker_environment(self._spec.run),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 hosts it before it joins
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_ERROR_FILE": str(self._error_files[rank]),
        }

    def _note(self, rank: int, code: int) -> None:
        if code == SERVER_DIED:
            text = "the server that ranks are forked from has died"
            self.failures[rank] = Failure(code, int(time.time()), text)
        elif code != 0:
            self.failures[rank] = Failure.of(code, self._error_files[rank])


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
) -> NoReturn:
    """Turn a fork of the server into a rank, as if it had been started in this environment."""
    os.setsid()  # so that everything it starts can be found
    os.sched_setaffinity(0, cores)
    same = all(os.environ.get(name) == environment.get(name) for name in READ_AT_IMPORT)
    can_serve = same and LIBRARIES in sys.modules and not _has_touched_cuda()
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

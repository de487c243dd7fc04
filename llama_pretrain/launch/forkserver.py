"""A process that has imported all that ranks need, and forks them: `launch/forks.py` starts it,
or one that waits for commands (`launch/kept.py`) is forked.

It reads a request as a JSON line from standard input, `{"ranks": [ENVIRONMENT, ...], "words":
[...], "cores": [...], "label": ...}`, and answers with a line of ids, then with one for each rank
that has ended. It trains nothing itself: each rank begins with what was imported and nothing else.
"""

import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llama_pretrain.process import PARENT, die_with_parent
from llama_pretrain.train.worker import begin

WORKER = "llama_pretrain.train.worker"


def import_everything() -> None:
    """What a rank would import, bit by bit."""
    gc.disable()  # imports make many objects and drop few: a sixth of their time
    import deepspeed  # noqa: F401
    from torch.distributed.elastic.multiprocessing.errors import record  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    import llama_pretrain.train.evaluate
    import llama_pretrain.train.loop
    import llama_pretrain.train.mask  # noqa: F401

    # What is here will stay: a collection in a rank would write to its pages, and copy them. To
    # collect before would take a quarter of a second for 2 MB.
    gc.freeze()
    gc.enable()


def cannot_use_gpus() -> bool:
    """Whether an import has touched the CUDA runtime: then no fork of this process can use it."""
    import torch

    poisoned: Callable[[], bool] = getattr(torch._C, "_cuda_isInBadFork", lambda: False)
    return poisoned()


def describe_state() -> dict[str, Any]:
    """What a rank that leaks would change: for the proof that none does."""
    import deepspeed
    import torch

    return {
        "threads": len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1,
        "python_threads": threading.active_count(),
        "modules": sorted(sys.modules),
        "environment": dict(os.environ),
        "open_files": len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0,
        "generator": torch.get_rng_state().sum().item(),
        "num_threads": torch.get_num_threads(),
        "default_dtype": str(torch.get_default_dtype()),
        "process_group": torch.distributed.group.WORLD is not None,
        "deepspeed_group": deepspeed.comm.comm.cdb is not None,
        "cuda": torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]  # torch's
    }


def show(label: str) -> None:
    """Put a label where processes are listed: into the room at the command line's end."""
    room = len(sys.argv[-1].encode())
    end = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[46])  # arg_end
    if end and sys.argv[-1].isspace():
        ctypes.memmove(end - room - 1, os.fsencode(label)[:room].ljust(room), room)


class Server:
    """Forks ranks until its input ends."""

    def __init__(self) -> None:
        self._requests, self._answers = os.dup(0), os.dup(1)
        # What a library prints must not get between the answers.
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        self._woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake)
        self._own = [self._requests, self._answers, self._woken, wake]
        self._ranks: set[int] = set()
        self._stores: dict[int, set[int]] = {}
        """Processes in which ranks meet, each with its ranks."""

    def serve(self) -> None:
        """Answer requests. When whoever makes them is gone, nothing is left."""
        self._answer({"ready": os.getpid()})
        rest = b""
        while True:
            ready, _, _ = select.select([self._requests, self._woken], [], [])
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._reap()
            if self._requests in ready:
                content = os.read(self._requests, 1 << 20)
                if not content:
                    break
                *lines, rest = (rest + content).split(b"\n")
                for line in lines:
                    self._do(json.loads(line))
        for pid in {*self._ranks, *self._stores}:
            os.kill(pid, signal.SIGKILL)

    def _do(self, request: Mapping[str, Any]) -> None:
        if "ranks" not in request:
            self._answer(describe_state())
            return
        show(request["label"])
        store, port = self._fork_store()
        meet = {"MASTER_PORT": str(port)}
        pids = [self._fork({**values, **meet}, request) for values in request["ranks"]]
        self._stores[store] = set(pids)
        self._answer({"started": pids})

    def _fork_store(self) -> tuple[int, int]:
        """Where ranks meet, as torch's agent has it in itself: here that would be threads, which
        no process may have that forks. Returns the id of its process, and its port."""
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._become_store(tell)
        os.close(tell)
        port = int(os.read(told, 16))
        os.close(told)
        return pid, port

    def _become_store(self, tell: int) -> NoReturn:
        try:
            self._leave_server()
            os.environ[PARENT] = str(os.getppid())
            die_with_parent()
            import torch.distributed as dist

            store = dist.TCPStore(  # type: ignore[attr-defined]  # torch does not list it
                "localhost", 0, is_master=True, wait_for_workers=False
            )
            os.write(tell, str(store.port).encode())
            while True:
                signal.pause()
        finally:
            os._exit(1)

    def _leave_server(self) -> None:
        """Keep nothing of the server's in a process that was forked from it."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in self._own:
            os.close(descriptor)
        os.setsid()

    def _fork(self, environment: Mapping[str, str], request: Mapping[str, Any]) -> int:
        pid = os.fork()
        if pid == 0:
            self._become_rank(environment, request["words"], request["cores"])
        self._ranks.add(pid)
        return pid

    def _become_rank(
        self, environment: Mapping[str, str], words: Sequence[str], cores: Sequence[int]
    ) -> NoReturn:
        """Go on as a process that was just started with this environment and these words."""
        try:
            self._leave_server()
            os.sched_setaffinity(0, cores)
            os.environ.clear()
            os.environ.update(environment)
            if cannot_use_gpus():
                os.execv(sys.executable, [sys.executable, "-u", "-m", WORKER, *words])
            begin(words)
        except BaseException:  # it has not even begun
            traceback.print_exc()
        finally:  # never back into the server's loop
            os._exit(1)

    def _reap(self) -> None:
        for pid in list(self._ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._ranks.discard(pid)
                self._answer({"ended": pid, "code": os.waitstatus_to_exitcode(status)})
        for store, ranks in list(self._stores.items()):
            if not ranks & self._ranks:
                del self._stores[store]
                os.kill(store, signal.SIGKILL)
                os.waitpid(store, 0)

    def _answer(self, values: Mapping[str, Any]) -> None:
        os.write(self._answers, json.dumps(values).encode() + b"\n")


def wait_for_commands(listener: socket.socket, path: Path, *, seconds: float) -> None:
    """With all imports made, fork a server for each that connects, until none has for so long."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    import_everything()
    _fork_servers(listener, seconds=seconds)
    for file in (path, path.with_suffix(".pid")):
        file.unlink(missing_ok=True)
    _fork_servers(listener, seconds=0)  # for who has come meanwhile


def _fork_servers(listener: socket.socket, *, seconds: float) -> None:
    while select.select([listener], [], [], seconds)[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            try:
                listener.close()
                _become_server(connection)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        connection.close()


def _become_server(connection: socket.socket) -> NoReturn:
    """Go on as if the command at the other end had started this process."""
    os.setsid()
    told, (log,), _, _ = socket.recv_fds(connection, 1 << 16, 1)
    for number in (0, 1):
        os.dup2(connection.fileno(), number)
    os.dup2(log, 2)
    for descriptor in (connection.detach(), log):
        os.close(descriptor)
    place = json.loads(told)
    os.chdir(place["folder"])
    os.umask(place["umask"])
    Server().serve()
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--keep"]:
        seconds, number, path, _ = sys.argv[2:]
        wait_for_commands(socket.socket(fileno=int(number)), Path(path), seconds=float(seconds))
    else:
        die_with_parent()
        server = Server()  # first: what an import prints must not be taken for an answer
        import_everything()
        server.serve()

"""Ranks that are forked from a process that has imported everything.

A fresh interpreter imports for some seconds, in each rank of each launch. Here that is done once,
by a server that does nothing else, and that begins while the parent still prepares data and plans;
each rank begins as a copy of it.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from llama_pretrain.config.run import Run
from llama_pretrain.launch.ahead import FORKED, SERVER, ServerProcess, remember, start_server
from llama_pretrain.launch.environment import seconds_kept, worker_environment
from llama_pretrain.launch.failures import Failure
from llama_pretrain.launch.kept import ask_for_server
from llama_pretrain.process import PARENT, is_alive, kill_session

LAST_WORDS_S = 1.0
"""What the others have, when a rank has failed that never registered, to end by themselves."""


def can_fork(run: Run) -> bool:
    """Whether a run's ranks are forked: elsewhere than on Linux a fork with libraries is unsafe."""
    return run.launch.fork and sys.platform == "linux"


class ServerError(Exception):
    """The process that forks ranks has ended."""


class ForkServers:
    """A server for each environment that ranks were wanted with; use it in a `with` block.

    What an environment says is read while modules are imported, so it can't be changed later.
    """

    def __init__(self, label: str = "", *, ahead: ServerProcess | None = None) -> None:
        """`label`: shown where processes are listed, by servers that have ranks, and by these.
        `ahead`: a server that was begun on a guess."""
        self._label, self._ahead = label, ahead
        self._servers: dict[tuple[tuple[str, str], ...], ForkServer] = {}

    def __enter__(self) -> "ForkServers":
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._servers.values():
            server.end()
        self._take_ahead(None)

    def warm_up(self, run: Run) -> None:
        """Have the imports of a run's ranks begin, where they are to be forked."""
        values = worker_environment(run)
        if can_fork(run):
            self.of_environment(values)
            remember(values)
        else:
            self._take_ahead(None)

    def of_environment(self, values: Mapping[str, str]) -> "ForkServer":
        """The server whose environment is ours with these values; a new one where it has ended.

        Call it in the main thread: the server ends with the thread that has started it.
        """
        key = tuple(sorted(values.items()))
        server = self._servers.get(key)
        if server is None or server.has_ended:
            ahead = self._take_ahead(values)
            server = self._servers[key] = ForkServer(values, label=self._label, ahead=ahead)
        return server

    def _take_ahead(self, values: Mapping[str, str] | None) -> ServerProcess | None:
        """What was begun on a guess, if that was right; it is ended otherwise. `None` = no ranks
        are forked."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (values is None or not ahead.suits(values)):
            ahead.end()
            ahead = None
        return ahead


class ForkServer:
    """The process of launch/forkserver.py: one of ours, or one whose imports were kept."""

    def __init__(
        self, values: Mapping[str, str], *, label: str, ahead: ServerProcess | None = None
    ):
        self.values, self.label = {**values, **FORKED}, label
        self._process: subprocess.Popen[bytes] | None = None
        seconds = seconds_kept()
        if seconds:
            self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as it
            connection = ask_for_server(SERVER, self.values, seconds=seconds, log=self._log)
            self._requests: IO[bytes] = connection.makefile("wb")
            self._answers: IO[bytes] = connection.makefile("rb")
            connection.close()  # once both files are
        else:
            begun = ahead or start_server(values)
            self._process, self._log = begun.process, begun.log
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._requests, self._answers = self._process.stdin, self._process.stdout
        self._ready: int | None = None

    @property
    def pid(self) -> int:
        """Its id. Waits until a process of kept imports has told it."""
        if self._process is not None:
            return self._process.pid
        return self._wait_until_ready()

    @property
    def has_ended(self) -> bool:
        if self._process is not None:
            return self._process.poll() is not None
        return self._ready is not None and not is_alive(self._ready)

    def _wait_until_ready(self) -> int:
        if self._ready is None:
            self._ready = int(self.wait()["ready"])
        return self._ready

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request, and wait for its answer."""
        self._wait_until_ready()
        self._requests.write(json.dumps(request).encode() + b"\n")
        self._requests.flush()
        return self.wait()

    def wait(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            ServerError: if the server has ended.
        """
        try:
            line = self._answers.readline()
        except ConnectionError:
            line = b""
        if not line:
            if self._process is not None:
                self._process.wait()
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").strip()[-2000:]
            raise ServerError(f"the process that forks ranks has ended: {said}")
        values: dict[str, Any] = json.loads(line)
        return values

    def end(self) -> None:
        """End it, and any rank that it has."""
        if self._process is not None or self._ready is not None:
            kill_session(self.pid)
        if self._process is not None:
            self._process.wait()
        for file in (self._requests, self._answers, self._log):  # of which kept imports' ends too
            file.close()


class ForkAgent(threading.Thread):
    """Has ranks forked, and waits for them: the part that torch's elastic agent has otherwise."""

    def __init__(
        self, server: ForkServer, *, words: Sequence[str], world_size: int, early_logs: Path
    ):
        super().__init__(name="agent", daemon=True)
        self.failures: dict[int, Failure] = {}
        """Of ranks, by number."""
        self.error: BaseException | None = None
        """Of the server."""
        self._server, self._words, self._world_size = server, list(words), world_size
        self._error_files = [early_logs / f"error{rank}.json" for rank in range(world_size)]
        self._pids: list[int] = []
        self._ended: set[int] = set()

    def workers(self) -> list[int]:
        """The ids of ranks that live, as far as the server has told."""
        return [pid for pid in self._pids if pid not in self._ended]

    def run(self) -> None:
        """Have them forked, and wait until all have ended."""
        try:
            environments = [self._environment(rank) for rank in range(self._world_size)]
            cores = sorted(os.sched_getaffinity(0))  # as a process has that we start
            request = {
                "words": self._words,
                "ranks": environments,
                "cores": cores,
                "label": self._server.label,
            }
            self._pids = self._server.ask(request)["started"]
            while len(self._ended) < self._world_size:
                self._note_end(self._server.wait())
        except BaseException as error:
            self.error = error
            for pid in self.workers():
                kill_session(pid)

    def _environment(self, rank: int) -> dict[str, str]:
        """What torch's agent sets, but for the port at which ranks meet: the server knows it."""
        return {
            **os.environ,
            **self._server.values,
            PARENT: str(self._server.pid),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._world_size),
            "LOCAL_WORLD_SIZE": str(self._world_size),
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": "localhost",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_ERROR_FILE": str(self._error_files[rank]),
        }

    def _note_end(self, answer: Mapping[str, Any]) -> None:
        pid, code = answer["ended"], answer["code"]
        self._ended.add(pid)
        if code == 0:
            return
        rank = self._pids.index(pid)
        self.failures[rank] = Failure.of(code, self._error_files[rank])
        if len(self.failures) == 1 and self.workers():
            threading.Thread(target=self._end_others, daemon=True).start()

    def _end_others(self) -> None:
        """The watch does it for ranks that have registered; here it is for one that never has."""
        time.sleep(2 * LAST_WORDS_S)
        for pid in self.workers():
            kill_session(pid)

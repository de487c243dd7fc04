"""A node other than node 0: `python -m llama_pretrain.launch.agent RUN_DIR HOST:PORT NODE`.

It joins the launches of node 0 one after another, starts this node's ranks from the run directory,
and reports how they ended.
"""

import contextlib
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.elastic.rendezvous.api import RendezvousError

from llama_pretrain.config.launch import Launch
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.snapshot import load_snapshot
from llama_pretrain.files import read_json
from llama_pretrain.launch.failures import Failure
from llama_pretrain.launch.forked import POLL_S, Supervisor
from llama_pretrain.launch.group import HANGING, NODES, report_of, same_directory
from llama_pretrain.launch.network import choose_address
from llama_pretrain.launch.operators import build_operators
from llama_pretrain.launch.rendezvous import (
    LOST_S,
    Attempt,
    Pulse,
    connect_store,
    meet,
    wait_for,
)
from llama_pretrain.launch.server import start_server
from llama_pretrain.launch.signals import (
    PREEMPTED_CODE,
    Preempted,
    Requests,
    Stopped,
    receive_signals,
)
from llama_pretrain.launch.spec import LaunchSpec, Place
from llama_pretrain.launch.watch import LAST_WORDS_S, RankError, Watch
from llama_pretrain.plan.plan import load_plan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.provenance import describe_installation

SHOWN = 10
"""Differences between nodes beyond this number are only counted."""


def serve(
    node: int,
    master: tuple[str, int],
    launch: Launch,
    *,
    run_dir: Path | None = None,
    report: Callable[[str], None] = print,
) -> int:
    """Be one node of a run until node 0 ends it. Returns the exit code.

    Args:
        launch: of this node; the run's own settings come from the run directory.
        run_dir: as this node was started with; `None` = where node 0 says.
    """
    host, port = master
    with receive_signals() as requests:
        report(f"node {node}: waiting for node 0 at {host}:{port}")
        store = _connect(master, requests, timeout_s=launch.join_timeout_s)
        if store is None:
            if requests.numbers:
                return PREEMPTED_CODE
            limit = f"{launch.join_timeout_s} s (launch.join_timeout_s)"
            report(f"error: node 0 does not answer at {host}:{port} within {limit}")
            return 1
        store.set(f"host/{node}", socket.gethostname())
        store.delete_key(f"refused/{node}")
        place = run_dir or Path(store.get("run_dir").decode())
        token = store.get("token").decode()
        if not same_directory(place, token):
            text = f"{place} is not the directory that node 0 writes: it must be on a file system"
            return _refuse(store, node, f"{text} that all nodes share", report)
        run = load_snapshot(RunDir(place).snapshot)
        if differences := find_differences(place):
            report("\n".join(differences))
            if not run.launch.allow_node_drift:
                text = f"{differences[0]} (launch.allow_node_drift=true trains anyway)"
                return _refuse(store, node, text, report)
        member = _Member(node, master, store, token, RunDir(place), run)
        try:
            return member.serve(requests, report)
        except Preempted:
            return PREEMPTED_CODE
        except Stopped as error:
            return 128 + error.number


def _connect(master: tuple[str, int], requests: Requests, *, timeout_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and not requests.numbers:
        with contextlib.suppress(OSError), socket.create_connection(master, timeout=2):
            return connect_store(*master, timeout_s=LOST_S)
        time.sleep(POLL_S)
    return None


def _refuse(store: Any, node: int, text: str, report: Callable[[str], None]) -> int:
    store.set(f"refused/{node}", text)
    report(f"error: {text}")
    return 1


def find_differences(run_dir: Path) -> list[str]:
    """Lines about what is installed here and differs from node 0."""
    there, here = read_json(run_dir / NODES) or {}, describe_installation()
    found = []
    for name, ours in here.items():
        theirs = there.get(name, {})
        keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        found += [f"{key}: node 0 has {theirs.get(key)}, this one {ours.get(key)}" for key in keys]
    more = [f"{len(found) - SHOWN} more"] if len(found) > SHOWN else []
    if not found:
        return []
    return [f"code or packages differ from those of node 0: {found[0]}", *found[1:SHOWN], *more]


class _Member:
    """A node that has found node 0."""

    def __init__(
        self,
        node: int,
        master: tuple[str, int],
        store: Any,
        token: str,
        run_dir: RunDir,
        run: ResolvedRun,
    ):
        self._node, self._master, self._store = node, master, store
        self._token, self._run_dir, self._run = token, run_dir, run
        self._pulse = Pulse(master, node=node)
        self._attempts: set[int] = set()
        """Those that this process has taken part in."""

    def serve(self, requests: Requests, report: Callable[[str], None]) -> int:
        """Take part in attempts until node 0 ends the run, or is lost."""
        start_server(libraries=self._run.launch.fork)
        launch, attempt = self._run.launch, int(self._store.get("current"))
        if self._has_begun(attempt):
            attempt += 1
        address, interface = choose_address(interface=launch.interface, towards=self._master[0])
        self._pulse.start()
        while True:
            announced = self._wait(attempt, requests, report)
            if isinstance(announced, int):
                return announced
            self._pulse.send(f"joined/{attempt}/{self._node}", "1")
            try:
                members = self._join(announced, requests)
            except (RendezvousError, RuntimeError) as error:
                report(f"error: not all nodes have joined: {error}")
                return 1
            if self._node not in members:  # it has come too late
                attempt += 1
                continue
            self._attempts.add(attempt)
            place = Place(
                node=members.index(self._node),
                address=address,
                interface=interface,
                store=announced.store,
                attempt=attempt,
            )
            spec = LaunchSpec(
                load_snapshot(self._run_dir.snapshot),
                load_plan(self._run_dir.plan),
                self._run_dir,
                None if announced.checkpoint is None else Path(announced.checkpoint),
                place,
            )
            try:
                self._build_operators(spec, report)
                ended = self._run_ranks(spec, requests, report)
            except UserError as error:
                text = "; ".join(str(problem) for problem in error.problems)
                ended = {spec.ranks.start: Failure(1, int(time.time()), text)}, set()
            self._pulse.send(f"report/{attempt}/{self._node}", report_of(*ended))
            attempt += 1

    def _has_begun(self, attempt: int) -> bool:
        """Whether an attempt has begun, or has had this node before it was lost."""
        return any(
            self._store.check([key])
            for key in (f"members/{attempt}", f"joined/{attempt}/{self._node}")
        )

    def _wait(
        self, attempt: int, requests: Requests, report: Callable[[str], None]
    ) -> Attempt | int:
        """The announcement of the next attempt, or the code to exit with."""
        before = attempt - 1
        while self._pulse.silence() < LOST_S:
            if before not in self._attempts and self._pulse.receive(f"members/{before}"):
                self._attempts.add(before)  # it goes on without this process: ask to be let in
                self._pulse.send(f"back/{before}/{self._node}", "1")
            if (code := self._pulse.receive("exit")) is not None:
                self._pulse.send(f"bye/{self._node}", "1")
                self._pulse.flush(timeout_s=1)
                return int(code)
            if (text := self._pulse.receive(f"attempt/{attempt}")) is not None:
                values = json.loads(text)
                return Attempt(**{**values, "store": tuple(values["store"])})
            time.sleep(POLL_S)
        if not requests.numbers:
            report(f"error: node 0 is lost: no answer for {self._pulse.silence():.0f} s")
        return PREEMPTED_CODE if requests.numbers else 1

    def _join(self, attempt: Attempt, requests: Requests) -> list[int]:
        """Wait for the other nodes of an attempt.

        Returns those that take part, by their places; none if the attempt is given up.

        Raises:
            RendezvousError, RuntimeError: if it cannot begin.
        """
        decided: list[list[int]] = []

        def join() -> None:
            meet(self._store, attempt, token=self._token, node=self._node)

        def check() -> bool:
            requests.check()
            if self._pulse.silence() > LOST_S:
                raise RuntimeError("node 0 is lost")
            if (text := self._pulse.receive(f"members/{attempt.number}")) is not None:
                decided.append(json.loads(text))
            return bool(decided)

        wait_for(join, check)
        while not decided:
            time.sleep(POLL_S)
            check()
        return decided[0]

    def _build_operators(self, spec: LaunchSpec, report: Callable[[str], None]) -> None:
        """Compile what ranks need, where nodes do not share a cache of operators.

        Raises:
            UserError: if that fails.
        """

        @contextmanager
        def taking_time(text: str) -> Iterator[None]:
            report(text)
            yield

        log = spec.run_dir.ranks / f"build.node{self._node}.log"
        build_operators(spec.run, log=log, taking_time=taking_time)

    def _run_ranks(
        self, spec: LaunchSpec, requests: Requests, report: Callable[[str], None]
    ) -> tuple[dict[int, Failure], set[int]]:
        """Run this node's ranks to their end."""
        spec.run_dir.heartbeats(spec.place.node).unlink(missing_ok=True)
        limit_s = min(LOST_S, spec.run.launch.timeout_s)
        hung: dict[int, Failure] = {}
        with tempfile.TemporaryDirectory() as folder:
            supervisor = Supervisor(spec, error_dir=Path(folder))
            watch = Watch(spec, requests=requests, report=report, pids=supervisor.pids)
            supervisor.start()
            end_at: float | None = None
            try:
                while supervisor.is_alive():
                    supervisor.join(POLL_S)
                    watch.check()
                    if self._pulse.receive(f"end/{spec.place.attempt}") == HANGING:
                        raise watch.blame()
                    if end_at is None and self._is_over(spec.place.attempt, limit_s):
                        end_at = time.monotonic() + LAST_WORDS_S
                    if end_at is not None and time.monotonic() > end_at:
                        watch.kill()
            except RankError as error:
                hung[error.rank] = Failure(1, int(time.time()), error.error, error.suspicion)
            finally:
                while supervisor.is_alive():
                    watch.kill()
                    supervisor.join(POLL_S)
        failures = {**supervisor.failures, **hung}
        if supervisor.error is not None:  # its ranks could not be started, or not be watched
            text = f"{type(supervisor.error).__name__}: {supervisor.error}"
            failures.setdefault(spec.ranks.start, Failure(1, int(time.time()), text))
        return failures, watch.killed - set(hung)

    def _is_over(self, attempt: int, limit_s: float) -> bool:
        """Whether node 0 has ended the attempt, or is lost."""
        ended = self._pulse.receive(f"end/{attempt}") is not None
        return ended or self._pulse.silence() > limit_s


def main(arguments: Sequence[str]) -> int:
    """Serve the run directory that the command names."""
    run_dir, master, node = arguments
    host, _, port = master.rpartition(":")
    launch = replace(Launch(), join_timeout_s=60)
    return serve(int(node), (host, int(port)), launch, run_dir=Path(run_dir))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # not through the exit of torch's threads

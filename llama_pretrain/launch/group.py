"""The nodes of a run: they meet at torch's elastic rendezvous, and watch each other in its store.

Node 0 hosts the store on the one address that leads to the other nodes; torch's stores have no
authentication. Each attempt to train has another store, of its ranks, on the same address: keys of
an attempt that failed would mislead the next.
"""

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch.distributed.elastic.rendezvous.api import RendezvousError

from llama_pretrain.config.launch import Launcher
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.files import write_json
from llama_pretrain.launch.failures import Failure
from llama_pretrain.launch.forked import POLL_S
from llama_pretrain.launch.network import choose_address
from llama_pretrain.launch.rendezvous import (
    BEAT_S,
    LOST_S,
    Attempt,
    Pulse,
    host_store,
    meet,
    read_key,
    wait_for,
)
from llama_pretrain.launch.signals import PREEMPTED_CODE, Preempted, Requests
from llama_pretrain.launch.spec import LaunchSpec, Place
from llama_pretrain.launch.starters import Agent, other_hosts, start_agents
from llama_pretrain.launch.watch import NodeError
from llama_pretrain.plan.nodes import master_of
from llama_pretrain.plan.plan import TrainingPlan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.provenance import describe_installation

Replan = Callable[[int], tuple[ResolvedRun, TrainingPlan]]
"""Plans the run anew for a number of nodes, and writes its directory for them."""
REPORT_S = 20.0
"""What the other nodes have to report how their ranks ended."""
GOODBYE_S = 5.0
SEEK_S = 10.0
"""How often nodes that are missing are started again."""
HANGING = "hanging"
"""How an attempt ends in which ranks make no progress."""
NODES = "nodes.json"


class Group:
    """What node 0 knows of the other nodes of a run, over all attempts."""

    def __init__(
        self,
        run: ResolvedRun,
        run_dir: RunDir,
        *,
        report: Callable[[str], None],
        replan: Replan,
    ):
        self._run, self._run_dir, self._report, self._replan = run, run_dir, report, replan
        launch = run.launch
        host, port = master_of(launch)
        if launch.name is Launcher.torchrun:
            towards = host
        else:
            port = 0 if launch.master is None else port
            towards = other_hosts(launch)[0]
        address, interface = choose_address(interface=launch.interface, towards=towards)
        try:
            self._store = host_store(address, port)
        except OSError as error:
            message = f"node 0 cannot listen on {address}:{port}: {error.strerror}"
            raise UserError([Problem(path="launch.master", message=message)]) from error
        self._token = secrets.token_hex(8)
        self._master = (self._store.host, self._store.port)
        self._place = Place(node=0, address=address, interface=interface, attempt=-1)
        self._others = list(range(1, launch.nodes))
        self._members = [0, *self._others]
        """The nodes that take part in this attempt, by their places."""
        self._planned = launch.nodes
        """The number of nodes that the run directory is written for."""
        self._sought_at = time.monotonic()
        self._reports: dict[int, Any] = {}
        self._agents: dict[int, Agent] = {}
        written = {"token": self._token, **describe_installation()}
        write_json(run_dir.path / NODES, written)
        self._store.set("token", self._token)
        self._store.set("run_dir", str(run_dir.path))
        self._pulse = Pulse(self._master, node=0, others=self._others)
        self._pulse.start()

    def begin(self, spec: LaunchSpec, requests: Requests) -> LaunchSpec:
        """Start the agents that are not running, and wait for all nodes, or enough for a restart.

        Raises:
            NodeError: if a node cannot join, or not in time.
            Preempted: after a signal.
        """
        attempt, launch = self._announce(spec), self._run.launch
        self._reports = {}
        self._start_missing()
        host, port = self._master
        self._report(f"waiting for {self._count(self._others)} at {host}:{port}")

        def join() -> None:
            meet(self._store, attempt, token=self._token, node=0)

        def check() -> bool:
            if requests.numbers:
                raise Preempted(requests.numbers[0])
            self._check_joining()
            return False

        try:
            wait_for(join, check)
            members = self._list_members()
        except (RendezvousError, RuntimeError) as error:
            joined = {n: self._key(f"joined/{attempt.number}/{n}") for n in self._others}
            absent = [node for node, key in joined.items() if key is None]
            limit = f"{launch.join_timeout_s} s (launch.join_timeout_s)"
            text = f"{self._count(absent)} did not join within {limit}: {error}"
            raise NodeError(text) from error
        if members is None:
            self._report("a node was lost while the others waited for it")
            self._store.set(f"members/{attempt.number}", "[]")
            if self._place.listener is not None:
                self._place.listener.close()
            return self.begin(spec, requests)
        self._members = members
        self._pulse.forgive()
        count = len(self._members)
        if count < launch.nodes:
            self._report(f"going on with {count} of {launch.nodes} nodes")
        if {count, self._planned} != {launch.nodes}:
            run, plan = self._replan(count)
            spec, self._planned = replace(spec, run=run, plan=plan), count
        self._store.set(f"members/{attempt.number}", json.dumps(self._members))
        return replace(spec, place=self._place)

    def _announce(self, spec: LaunchSpec) -> Attempt:
        """Choose a port for the ranks' store, and tell all nodes of the next attempt."""
        launch, listener = self._run.launch, socket.create_server((self._place.address, 0))
        host, port = listener.getsockname()
        number = self._place.attempt + 1
        attempt = Attempt(
            number=number,
            checkpoint=None if spec.checkpoint is None else str(spec.checkpoint),
            store=(host, port),
            min_nodes=launch.nodes if number == 0 else launch.min_nodes or launch.nodes,
            max_nodes=launch.nodes,
            # Nodes that are back need not be waited for.
            last_call_s=LOST_S if self._find_returned() else launch.rejoin_timeout_s,
            # torch's last call ends with it.
            join_timeout_s=max(launch.join_timeout_s, number and launch.rejoin_timeout_s + 60),
        )
        self._place = replace(
            self._place, store=attempt.store, listener=listener, attempt=attempt.number
        )
        self._store.set(f"attempt/{number}", json.dumps(asdict(attempt)))
        self._store.set("current", str(number))
        return attempt

    def _start_missing(self) -> None:
        """Start agents of nodes that have none."""
        missing = [n for n in self._others if n not in self._agents or self._agents[n].has_ended()]
        self._agents |= start_agents(self._run, self._run_dir, missing, self._master)
        self._sought_at = time.monotonic()

    def _check_joining(self) -> None:
        """Look after nodes that do not join; at a restart they may take time to come back."""
        for node in self._others:
            refusal = self._key(f"refused/{node}")
            optional = self._place.attempt > 0 and self._run.launch.min_nodes is not None
            if refusal is not None and not optional:
                raise NodeError(f"{self.name_of(node)} cannot join: {refusal}")
            agent = self._agents.get(node)
            if agent is not None and agent.has_ended() and self._place.attempt == 0:
                raise NodeError(f"{self.name_of(node)} did not start: {agent.describe_end()}")
        if time.monotonic() - self._sought_at > SEEK_S:
            self._start_missing()

    def _list_members(self) -> list[int] | None:
        """The nodes that have met, by their places; `None` if one of them is lost at once."""
        prefix, deadline = f"place/{self._place.attempt}", time.monotonic() + LOST_S
        while True:
            places = {node: self._key(f"{prefix}/{node}") for node in (0, *self._others)}
            met = [node for node, place in places.items() if place is not None]
            if len(met) == int(str(places[0]).split(" of ")[1]):
                return sorted(met, key=lambda node: int(str(places[node]).split(" of ")[0]))
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_S)

    def have_returned(self) -> bool:
        """Whether a node is back that does not take part; meanwhile such nodes are sought."""
        absent = [node for node in self._others if node not in self._members]
        if absent and time.monotonic() - self._sought_at > SEEK_S:
            self._start_missing()
        return bool(self._find_returned())

    def _find_returned(self) -> list[int]:
        absent = [node for node in self._others if node not in self._members]
        attempt = self._place.attempt
        return [node for node in absent if self._key(f"back/{attempt}/{node}") is not None]

    def have_failed(self) -> bool:
        """Whether a rank of another node has failed, or a node is lost."""
        others = self._members[1:]
        reported = [node for node in others if self._has_reported(node)]
        failed = any(self._reports[node]["failures"] for node in reported)
        return failed or any(self.is_lost(node) for node in others)

    def _has_reported(self, node: int) -> bool:
        if node not in self._reports:
            text = self._key(f"report/{self._place.attempt}/{node}")
            if text is not None:
                self._reports[node] = json.loads(text)
        return node in self._reports

    def is_lost(self, node: int) -> bool:
        """Whether a node that has not reported has been silent for too long, or its agent has ended
        or was started again."""
        if node in self._reports:
            return False
        agent = self._agents.get(node)
        again = self._key(f"back/{self._place.attempt}/{node}") is not None
        if again or (agent is not None and agent.has_ended()):
            return True
        return self._pulse.silence_of(node) > min(LOST_S, self._run.launch.timeout_s)

    def end(self, *, hanging: bool = False) -> tuple[dict[int, Failure], set[int]]:
        """End the attempt on all nodes.

        Args:
            hanging: ask the other nodes first which of their ranks hangs.

        Returns:
            The failures of ranks of other nodes, where a lost node is one of its first rank, and
            the ranks that were killed there because of others.
        """
        self._store.set(f"end/{self._place.attempt}", HANGING if hanging else "now")
        failures: dict[int, Failure] = {}
        killed: set[int] = set()
        deadline = time.monotonic() + REPORT_S
        for node in self._members[1:]:
            while not self._has_reported(node) and not self.is_lost(node):
                if time.monotonic() > deadline:
                    break
                time.sleep(POLL_S)
            report = self._reports.get(node)
            if report is None:
                first = self._members.index(node) * self._run.launch.num_processes
                text, most_suspect = self._describe_loss(node), (False, -1, False)
                failures[first] = Failure(1, int(time.time()), text, most_suspect)
                continue
            failures |= {int(rank): Failure(**each) for rank, each in report["failures"].items()}
            killed |= set(report["killed"])
        return failures, killed

    def _describe_loss(self, node: int) -> str:
        agent = self._agents.get(node)
        if agent is not None and agent.has_ended():
            return f"the node is lost: {agent.describe_end()}"
        silence = self._pulse.silence_of(node)
        if silence < BEAT_S * 10:
            return "the node is lost: its command has ended, and was started again"
        return f"the node is lost: no sign of life for {silence:.0f} s"

    def close(self, code: int) -> None:
        """Let the other nodes exit, with a code."""
        self._store.set("exit", str(code))
        deadline = time.monotonic() + GOODBYE_S
        while time.monotonic() < deadline:
            if all(self._key(f"bye/{n}") or self.is_gone(n) for n in self._others):
                break
            time.sleep(POLL_S)
        self._pulse.close()
        for agent in self._agents.values():
            agent.close()

    def is_gone(self, node: int) -> bool:
        """Whether nothing is to be expected of a node any more."""
        agent = self._agents.get(node)
        silent = self._pulse.silence_of(node) > GOODBYE_S
        return silent or (agent is not None and agent.has_ended())

    def name_of(self, node: int) -> str:
        """A node by its index, host name and ranks."""
        count = self._run.launch.num_processes
        place = self._members.index(node) if node in self._members else node
        first, last = place * count, (place + 1) * count - 1
        ranks = f"rank {first}" if count == 1 else f"ranks {first} to {last}"
        host = self._key(f"host/{node}")
        return f"node {node} ({host + ', ' if host else ''}{ranks})"

    def name_of_rank(self, rank: int) -> str:
        """The node of a rank, by its index, host name and ranks."""
        return self.name_of(self._members[rank // self._run.launch.num_processes])

    def _count(self, nodes: list[int]) -> str:
        return self.name_of(nodes[0]) if len(nodes) == 1 else f"{len(nodes)} nodes"

    def _key(self, key: str) -> str | None:
        return read_key(self._store, key)


@contextmanager
def open_group(
    run: ResolvedRun, run_dir: RunDir, *, report: Callable[[str], None], replan: Replan
) -> Iterator[Group]:
    """The nodes of a run, while it trains; all have exited afterwards."""
    group, code = Group(run, run_dir, report=report, replan=replan), 1
    try:
        yield group
        code = 0
    except Preempted:
        code = PREEMPTED_CODE
        raise
    finally:
        group.close(code)


def report_of(failures: Mapping[int, Failure], killed: set[int]) -> str:
    """How the ranks of a node ended, for node 0."""
    failed = {rank: asdict(failure) for rank, failure in failures.items()}
    return json.dumps({"failures": failed, "killed": sorted(killed)})


def same_directory(run_dir: Path, token: str) -> bool:
    """Whether a path leads to the run directory that node 0 has written."""
    try:
        return bool(json.loads((run_dir / NODES).read_text(encoding="utf-8"))["token"] == token)
    except (OSError, ValueError, KeyError, TypeError):
        return False

"""Where nodes meet: torch's elastic rendezvous, its store, and signs of life in it."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import distributed as dist
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from llama_pretrain.launch.forked import POLL_S

BEAT_S = 0.2
LOST_S = 15.0
"""Silence after which a node is given up, if launch.timeout_s is not less."""


def host_store(address: str, port: int) -> Any:
    """A store that listens on one address only; port 0 = any."""
    listener = socket.create_server((address, port))
    host, port = listener.getsockname()
    return dist.TCPStore(  # type: ignore[attr-defined]  # torch does not list it
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def connect_store(host: str, port: int, *, timeout_s: float) -> Any:
    """A connection to the store of node 0, which may not listen yet.

    Raises:
        RuntimeError: if it does not answer in time.
    """
    limit = timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, port, is_master=False, timeout=limit)  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=LOST_S))
    return store


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What node 0 announces of an attempt to train."""

    number: int
    """From 0; the others are restarts."""
    checkpoint: str | None
    store: tuple[str, int]
    """Host and port of the store of the ranks."""
    min_nodes: int
    max_nodes: int
    last_call_s: float
    """How long further nodes are waited for when there are enough."""
    join_timeout_s: float


def meet(store: Any, attempt: Attempt, *, token: str, node: int) -> None:
    """Wait at torch's rendezvous until all nodes of an attempt are there, or enough for a restart.

    Sets `place/ATTEMPT/NODE` in the store to this node's place among them, and their number.

    Raises:
        RendezvousTimeoutError: if they are not in time.
    """
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else it hosts another store
    name = f"{token}.{attempt.number}"
    handler = DynamicRendezvousHandler.from_backend(
        name,
        store,
        C10dRendezvousBackend(store, name),
        min_nodes=attempt.min_nodes,
        max_nodes=attempt.max_nodes,
        local_addr=f"{node:06d}",  # torch numbers nodes in the order of their addresses
        timeout=RendezvousTimeout(
            join=timedelta(seconds=attempt.join_timeout_s),
            last_call=timedelta(seconds=attempt.last_call_s),
        ),
    )
    info = handler.next_rendezvous()
    store.set(f"place/{attempt.number}/{node}", f"{info.rank} of {info.world_size}")


class Pulse(threading.Thread):
    """Talks to the store for a node that must go on when the store does not answer.

    It shows the other nodes that this one lives, sees which of them do, and carries messages.
    """

    def __init__(self, master: tuple[str, int], *, node: int, others: Sequence[int] = ()):
        super().__init__(name="pulse", daemon=True)
        self._store = connect_store(*master, timeout_s=LOST_S)
        self._node, self._closed = node, threading.Event()
        now = time.monotonic()
        self._seen: dict[int, tuple[str | None, float]] = dict.fromkeys(others, (None, now))
        self._contact = now
        self._outbox: dict[str, str] = {}
        self._wanted: dict[str, str | None] = {}

    def run(self) -> None:
        """Beat until closed."""
        count = 0
        while not self._closed.wait(BEAT_S):
            with contextlib.suppress(RuntimeError, ValueError):  # the store does not answer
                count += 1
                self._store.set(f"beat/{self._node}", str(count))
                now = time.monotonic()
                for node, (before, _) in list(self._seen.items()):
                    value = read_key(self._store, f"beat/{node}")
                    if value != before:
                        self._seen[node] = (value, now)
                for key, text in list(self._outbox.items()):
                    self._store.set(key, text)
                    del self._outbox[key]
                for key in [key for key, value in self._wanted.items() if value is None]:
                    self._wanted[key] = read_key(self._store, key)
                self._contact = now

    def send(self, key: str, text: str) -> None:
        """Set a key of the store soon."""
        self._outbox[key] = text

    def receive(self, key: str) -> str | None:
        """The value of a key, once it has one; it is looked up from the first call on."""
        return self._wanted.setdefault(key, None)

    def flush(self, *, timeout_s: float) -> None:
        """Wait until everything has been sent."""
        deadline = time.monotonic() + timeout_s
        while self._outbox and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def silence_of(self, node: int) -> float:
        """Seconds since another node was last seen alive."""
        return time.monotonic() - self._seen[node][1]

    def silence(self) -> float:
        """Seconds since the store has answered."""
        return time.monotonic() - self._contact

    def forgive(self) -> None:
        """Begin anew to count the silence of the other nodes."""
        self._seen = dict.fromkeys(self._seen, (None, time.monotonic()))

    def close(self) -> None:
        """Stop beating."""
        self._closed.set()


def read_key(store: Any, key: str) -> str | None:
    """The value of a key of a store; `None` if it has none."""
    return str(store.get(key).decode()) if store.check([key]) else None


def wait_for(work: Callable[[], None], check: Callable[[], bool]) -> None:
    """Do in a thread what may block for long; raise what it raises.

    Args:
        check: called meanwhile; true ends the wait.
    """
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded, name="rendezvous", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        if check():
            return
    if errors:
        raise errors[0]

"""What a launch needs to know."""

import socket
from dataclasses import dataclass
from pathlib import Path

from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.plan.plan import TrainingPlan
from llama_pretrain.runs.layout import RunDir


@dataclass(frozen=True, kw_only=True)
class Place:
    """One node among the nodes of a launch, as torch's elastic agent would describe it."""

    node: int = 0
    """Its place among the nodes that take part."""
    address: str = "127.0.0.1"
    """Of this node, for the others."""
    interface: str = "lo"
    """The network interface that has it."""
    store: tuple[str, int] | None = None
    """Host and port of the store of the ranks, which rank 0 hosts; `None` = choose a port."""
    listener: socket.socket | None = None
    """On node 0: the socket of that port."""
    attempt: int = 0
    """Launches of the same nodes before this one."""


@dataclass(frozen=True)
class LaunchSpec:
    """A run directory that has been written, and the checkpoint to start from, if any."""

    run: ResolvedRun
    plan: TrainingPlan
    run_dir: RunDir
    checkpoint: Path | None = None
    place: Place = Place()

    @property
    def ranks(self) -> range:
        """The ranks of this node."""
        count = self.run.launch.num_processes
        return range(self.place.node * count, (self.place.node + 1) * count)

    @property
    def worker_args(self) -> list[str]:
        """The arguments of `python -m llama_pretrain.train.worker`."""
        return [str(path) for path in (self.run_dir.path, self.checkpoint) if path is not None]

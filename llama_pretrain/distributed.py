"""Which rank this process is, and the few collectives that training needs."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from llama_pretrain.config.resolved import ResolvedLaunch
from llama_pretrain.process import STORE_FD, Heartbeat, StopRequest
from llama_pretrain.runs.phases import Phases

CORES = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, kw_only=True)
class Rank:
    """This process among the others."""

    index: int
    local_index: int
    world_size: int
    device: torch.device
    stop: StopRequest = field(default_factory=StopRequest)
    heartbeat: Heartbeat | None = None
    phases: Phases = field(default_factory=Phases)
    """Of this start, until its first step is done."""
    sequence_size: int = 1
    """Ranks that share each sequence; groups of neighbours."""

    def beat(self) -> None:
        """Show the parent that this rank makes progress."""
        if self.heartbeat is not None:
            self.heartbeat.beat()

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def data_index(self) -> int:
        """Which of the groups that read different sequences this rank is in."""
        return self.index // self.sequence_size

    @property
    def data_size(self) -> int:
        """The number of these groups."""
        return self.world_size // self.sequence_size

    @property
    def sequence_index(self) -> int:
        """This rank's part of a sequence."""
        return self.index % self.sequence_size


def init_distributed(
    *,
    launch: ResolvedLaunch,
    device: str,
    stop: StopRequest,
    heartbeat: Heartbeat | None,
    phases: Phases,
) -> Rank:
    """Join the process group that the launcher's environment describes."""
    local_index = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(local_index)
        here = torch.device("cuda", local_index)
    else:
        torch.set_num_threads(launch.threads_per_process)
        here = torch.device("cpu")
        # On a CPU DeepSpeed would compile its shared-memory collectives at the first start; only
        # inference_all_reduce uses them. Newer versions build the list when it is first read, with
        # a compiler, and read nothing else of it.
        compatible = vars(deepspeed.ops).setdefault("__compatible_ops__", {})
        compatible["deepspeed_shm_comm"] = False
    if STORE_FD in os.environ:
        _host_store()
    deepspeed.init_distributed(
        dist_backend="nccl" if device == "cuda" else "gloo",
        # The parent's timeout comes first: its error says more.
        timeout=timedelta(seconds=launch.timeout_s + 60),
        verbose=False,
    )
    return Rank(
        index=dist.get_rank(),
        local_index=local_index,
        world_size=dist.get_world_size(),
        device=here,
        stop=stop,
        heartbeat=heartbeat,
        phases=phases,
        sequence_size=launch.sequence_parallel_size,
    )


@cache  # it lives as long as the rank
def _host_store() -> Any:
    """Host the store on the socket that the launcher has bound, so that no port can be lost."""
    return dist.TCPStore(  # type: ignore[attr-defined]  # torch does not list it
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=int(os.environ[STORE_FD]),
    )


def keep_to_cores(index: int, *, num_ranks: int) -> None:
    """Bind this rank, and all threads yet to start, to its share of the available cores.

    A share consists of neighbours: threads of a core, then cores of a socket. With more ranks than
    cores every rank may use them all.
    """
    cores = sorted(os.sched_getaffinity(0), key=_place_of_core)
    share = len(cores) // num_ranks
    if share:
        os.sched_setaffinity(0, cores[index * share : (index + 1) * share])


def _place_of_core(number: int) -> tuple[int, ...]:
    """The socket and the core on it, where known, and the system's own number."""
    topology = CORES / f"cpu{number}" / "topology"
    files = [topology / name for name in ("physical_package_id", "core_id")]
    return *(int(file.read_text()) for file in files if file.is_file()), number


def print_rank_0(message: str, rank: Rank) -> None:
    """Print once for all ranks, to the log of rank 0."""
    if rank.is_first:
        print(message, flush=True)


def sum_over_ranks(values: Iterable[float], rank: Rank) -> list[float]:
    """Sum plain numbers over all ranks, in float64: integers below 2^53 stay exact."""
    total = torch.tensor(list(values), dtype=torch.float64, device=rank.device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def largest_over_ranks(value: float, rank: Rank) -> float:
    """Return the largest value that any rank passes."""
    largest = torch.tensor(value, dtype=torch.float64, device=rank.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest.item())


def signal_of_any(rank: Rank) -> int:
    """The signal by which any rank was asked to stop; 0 for none. A collective."""
    return int(largest_over_ranks(rank.stop.number, rank))

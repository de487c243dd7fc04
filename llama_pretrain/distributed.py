"""Which rank this process is, and the few collectives that training needs."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from llama_pretrain.process import Heartbeat, StopRequest
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

    def beat(self) -> None:
        """Show the parent that this rank goes on."""
        if self.heartbeat is not None:
            self.heartbeat.beat()

    @property
    def is_first(self) -> bool:
        return self.index == 0


def init_distributed(
    *,
    device: str,
    timeout_s: int,
    threads: int,
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
        torch.set_num_threads(threads)
        here = torch.device("cpu")
        # On a CPU DeepSpeed would compile its shared-memory collectives at every first start;
        # training doesn't use them (only inference_all_reduce does). Newer versions make the list
        # when it is first read, with a compiler, and read nothing else of it.
        compatible = vars(deepspeed.ops).setdefault("__compatible_ops__", {})
        compatible["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
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
    )


def keep_to_cores(index: int, *, num_ranks: int) -> None:
    """Keep this rank to its share of the cores that it may use, with all threads yet to start.

    A share is of neighbours: threads of a core, then cores of a socket. With more ranks than cores
    every rank keeps them all.
    """
    cores = sorted(os.sched_getaffinity(0), key=_place_of_core)
    share = len(cores) // num_ranks
    if share:
        os.sched_setaffinity(0, cores[index * share : (index + 1) * share])


def _place_of_core(number: int) -> tuple[int, int, int]:
    """Its socket, its core there, and the system's own number."""
    topology = CORES / f"cpu{number}" / "topology"
    socket, core = (
        int((topology / name).read_text()) if (topology / name).is_file() else 0
        for name in ("physical_package_id", "core_id")
    )
    return socket, core, number


def print_rank_0(message: str, rank: Rank) -> None:
    """Print once for all ranks, to the log of rank 0."""
    if rank.is_first:
        print(message, flush=True)


def sum_over_ranks(values: Iterable[float], rank: Rank) -> list[float]:
    """Sum plain numbers over all ranks: float64, so that hashes below 2^53 stay exact."""
    total = torch.tensor(list(values), dtype=torch.float64, device=rank.device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def largest_over_ranks(value: float, rank: Rank) -> float:
    """The largest of one number a rank."""
    largest = torch.tensor(value, dtype=torch.float64, device=rank.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest.item())


def signal_of_any(rank: Rank) -> int:
    """The signal by which any rank was asked to stop; 0 if none was. Every rank calls it."""
    return int(largest_over_ranks(rank.stop.number, rank))

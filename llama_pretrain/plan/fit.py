"""What fits a device of a given memory: stages, offloads and recomputation, best first."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llama_pretrain.config.optim import OptimName
from llama_pretrain.config.run import Run
from llama_pretrain.config.zero import OffloadDevice, OffloadOptimizer, OffloadParam
from llama_pretrain.plan.batch import BatchPlan, count_ranks, count_replicas
from llama_pretrain.plan.memory import MemoryPlan, estimate_memory
from llama_pretrain.plan.traffic import count_traffic

ZEROS = ("stage0", "stage1", "stage2", "stage3", "stage2_offload", "stage3_offload")
"""Options of the group `zero` that are tried, from what costs least time to what costs most."""


MOST_ROWS = 4096
"""The search for the largest micro batch ends here."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One way to run that was tried."""

    overrides: tuple[str, ...]
    """What to add to the command, with the largest micro batch that divides the global batch."""
    micro_batch_size: int | None
    """The largest that fits, whatever the global batch; `None` if not even one row does."""
    memory: MemoryPlan
    """With the micro batch of `overrides`."""
    traffic: int
    """Bytes that a rank sends in a step."""


def list_fits(run: Run, batch: BatchPlan, *, limit: int) -> list[Fit]:
    """Every stage, with and without recomputation: what fits `limit` bytes first, best first.

    Best is a rule of thumb: no offload before offload, no recomputation (a third more work) before
    recomputation, then the fewest bytes between ranks, then the larger micro batch.
    """

    def cost(fit: Fit) -> tuple[bool, int, bool, int, int]:
        option = fit.overrides[0].partition("=")[2]
        offloads = ("stage2_offload", "stage3_offload").index(option) + 1 if "_" in option else 0
        recomputes = len(fit.overrides) > 2
        missing = fit.micro_batch_size is None
        return missing, offloads, recomputes, fit.traffic, -(fit.micro_batch_size or 0)

    return sorted(_tried(run, batch, limit=limit), key=cost)


def _tried(run: Run, batch: BatchPlan, *, limit: int) -> Iterator[Fit]:
    world_size, share = count_ranks(run), batch.global_batch_size // count_replicas(run)
    for option in ZEROS:
        for recompute in (False, True):
            candidate = _with(run, option, recompute=recompute)
            words = [f"zero={option}"]
            words += ["train.gradient_checkpointing=true"] if recompute else []

            def memory(
                rows: int, accumulated: int = 1, *, candidate: Run = candidate
            ) -> MemoryPlan:
                trial = replace(
                    batch, micro_batch_size=rows, gradient_accumulation_steps=accumulated
                )
                return estimate_memory(candidate, trial, world_size=world_size)

            # Memory grows with the rows: the first size that doesn't fit ends the search.
            most = bisect_right(range(1, MOST_ROWS + 1), limit, key=lambda rows: memory(rows).total)
            usable = [
                size
                for size in range(1, min(most, share) + 1)
                if share % size == 0 and memory(size, share // size).total <= limit
            ]
            rows = max(usable, default=1)
            chosen = replace(
                batch, micro_batch_size=rows, gradient_accumulation_steps=share // rows
            )
            yield Fit(
                overrides=(*words, f"batch.micro_batch_size={rows}"),
                micro_batch_size=most if usable else None,
                memory=memory(rows, share // rows),
                traffic=count_traffic(candidate, chosen, world_size=world_size).total,
            )


def _with(run: Run, option: str, *, recompute: bool) -> Run:
    """The run at another stage, with sizes as plan/resolve.py derives them."""
    stage, width = int(option[len("stage")]), run.model.hidden_size
    host = OffloadDevice.cpu if option.endswith("_offload") else OffloadDevice.none
    zero = replace(
        run.zero,
        stage=stage,
        offload_optimizer=OffloadOptimizer(device=host),
        offload_param=OffloadParam(device=host if stage == 3 else OffloadDevice.none),
        reduce_bucket_size=width**2 if stage == 3 else 500_000_000,
        stage3_prefetch_bucket_size=9 * width**2 // 10,
        zero_hpz_partition_size=1,
    )
    optim = run.optim.name
    if host is not OffloadDevice.none:
        optim = OptimName.cpu_lion if "lion" in optim.value else OptimName.cpu_adam
    return replace(
        run,
        zero=zero,
        optim=replace(run.optim, name=optim),
        train=replace(run.train, gradient_checkpointing=recompute),
    )

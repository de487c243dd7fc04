"""What fits a device of a given memory: stages, offload and recomputation, best first."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llama_pretrain.config.optim import OptimName
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.zero import OffloadDevice, OffloadOptimizer, OffloadParam, Zero
from llama_pretrain.plan.batch import BatchPlan
from llama_pretrain.plan.feasible import validate_world_size
from llama_pretrain.plan.memory import MemoryPlan, estimate_memory
from llama_pretrain.plan.resolve import resolve_zero
from llama_pretrain.plan.traffic import count_traffic

ZEROS = ("stage0", "stage1", "stage2", "stage3", "stage2_offload", "stage3_offload")
"""Options of the group `zero` to try, from the fastest to the slowest."""

MAX_MICRO_BATCH = 4096
"""Where the search for the largest micro batch ends."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One way to run."""

    overrides: tuple[str, ...]
    """What to add to the command, with the largest micro batch that divides the global batch."""
    micro_batch_size: int | None
    """The largest that fits, whatever the global batch; `None` if not even one sequence does."""
    memory: MemoryPlan
    """With the micro batch of `overrides`."""
    traffic: int
    """Bytes that a rank sends in a step."""


def list_fits(run: ResolvedRun, batch: BatchPlan, *, limit: int) -> list[Fit]:
    """Every stage, with and without recomputation: what fits `limit` bytes first, best first.

    The order is a rule of thumb: no offload first, then no shared sequences, then no recomputation
    (which costs a third more work), then the fewest bytes between ranks, then the larger micro
    batch.
    """

    def cost(fit: Fit) -> tuple[bool, int, bool, bool, int, int]:
        option = fit.overrides[0].partition("=")[2]
        offloads = ("stage2_offload", "stage3_offload").index(option) + 1 if "_" in option else 0
        shares, recomputes = (
            any(word.startswith(name) for word in fit.overrides)
            for name in ("launch.sequence_parallel_size", "train.gradient_checkpointing")
        )
        missing = fit.micro_batch_size is None
        return missing, offloads, shares, recomputes, fit.traffic, -(fit.micro_batch_size or 0)

    return sorted(_candidates(run, batch, limit=limit), key=cost)


def _candidates(run: ResolvedRun, batch: BatchPlan, *, limit: int) -> Iterator[Fit]:
    """Every combination; ranks share sequences where not even one sequence fits otherwise."""
    for option in ZEROS:
        for recompute in (False, True):
            candidate = _at_option(run, option, recompute=recompute)
            words = [f"zero={option}"]
            words += ["train.gradient_checkpointing=true"] if recompute else []
            fit = _fit(candidate, batch, words, limit=limit)
            yield fit
            if fit.micro_batch_size is None:
                shared = (_fit(each, batch, words, limit=limit) for each in _sharing(candidate))
                yield from [fit for fit in shared if fit.micro_batch_size][:1]


def _sharing(run: ResolvedRun) -> Iterator[ResolvedRun]:
    """The run with more and more ranks that share each sequence, as far as rules allow."""
    first = run.launch.sequence_parallel_size + 1
    for size in range(first, run.num_ranks + 1):
        launch = replace(run.launch, sequence_parallel_size=size)
        candidate = replace(run, launch=launch)
        if not any(validate_world_size(candidate)):
            yield candidate


def _fit(run: ResolvedRun, batch: BatchPlan, words: Sequence[str], *, limit: int) -> Fit:
    """A way to run, with its largest micro batch."""
    share = batch.global_batch_size // run.data_parallel_size

    def solved(size: int, accumulation: int = 1) -> BatchPlan:
        return replace(batch, micro_batch_size=size, gradient_accumulation_steps=accumulation)

    def memory(size: int, accumulation: int = 1) -> MemoryPlan:
        return estimate_memory(run, solved(size, accumulation))

    # Memory grows with the micro batch: the first size that does not fit ends the search.
    most = bisect_right(range(1, MAX_MICRO_BATCH + 1), limit, key=lambda size: memory(size).total)
    usable = [
        size
        for size in range(1, min(most, share) + 1)
        if share % size == 0 and memory(size, share // size).total <= limit
    ]
    size = max(usable, default=1)
    if (sharing := run.launch.sequence_parallel_size) > 1:
        words = [*words, f"launch.sequence_parallel_size={sharing}"]
    return Fit(
        overrides=(*words, f"batch.micro_batch_size={size}"),
        micro_batch_size=most if usable else None,
        memory=memory(size, share // size),
        traffic=count_traffic(run, solved(size, share // size)).total,
    )


def _at_option(run: ResolvedRun, option: str, *, recompute: bool) -> ResolvedRun:
    """The run with another option of `zero`, with sizes derived as plan/resolve.py does."""
    stage = int(option[len("stage")])
    host = OffloadDevice.cpu if option.endswith("_offload") else OffloadDevice.none
    zero = Zero(
        **{
            **vars(run.zero),
            "stage": stage,
            "offload_optimizer": OffloadOptimizer(device=host),
            "offload_param": OffloadParam(device=host if stage == 3 else OffloadDevice.none),
            "reduce_bucket_size": None,
            "stage3_prefetch_bucket_size": None,
            "zero_hpz_partition_size": 1,
        }
    )
    optim = run.optim.name
    if host is not OffloadDevice.none:
        optim = OptimName.cpu_lion if "lion" in optim.value else OptimName.cpu_adam
    return replace(
        run,
        zero=resolve_zero(zero, run, num_processes=run.launch.num_processes),
        optim=replace(run.optim, name=optim),
        train=replace(run.train, gradient_checkpointing=recompute),
    )

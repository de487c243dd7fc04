"""What to change when a rank has run out of memory: settings that are valid for the run, with the
plan's estimate for each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llama_pretrain.config.batch import Batch
from llama_pretrain.config.launch import Device
from llama_pretrain.config.optim import OptimName
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.validate import validate_run
from llama_pretrain.config.zero import OffloadDevice, OffloadOptimizer, Zero
from llama_pretrain.plan.memory import MemoryPlan, estimate_memory
from llama_pretrain.plan.plan import Plan, validate_plan
from llama_pretrain.plan.resolve import resolve_zero

OUT_OF_MEMORY = (
    "OutOfMemoryError",
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "MemoryError",
    "bad_alloc",
)
"""In messages of torch, CUDA, Python, the system and C++."""
AMBIGUOUS = (
    "could not create a primitive",
    "could not execute a primitive",
    "can't start new thread",
)
"""In messages of oneDNN about its allocations, of Python about a thread's stack, and of other
failures."""
ON_THE_HOST = {
    OptimName.fused_adam: OptimName.cpu_adam,
    OptimName.torch_adamw: OptimName.cpu_adam,
    OptimName.fused_lion: OptimName.cpu_lion,
}
"""The same update rule with offloaded state, for optimizers that have one."""
WORTH = 0.98
"""Advice that does not lower the estimate to this share is left out."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One way to reduce memory."""

    words: str
    """What to add to the command."""
    cost: str
    """What it costs."""
    memory: MemoryPlan


def is_out_of_memory(error: str) -> bool:
    """Whether an error says that memory ran out."""
    return any(text in error for text in OUT_OF_MEMORY)


def may_be_out_of_memory(error: str) -> bool:
    """Whether memory may have run out, by an error that does not say so."""
    return any(text in error for text in AMBIGUOUS)


def advise_memory(run: ResolvedRun, plan: Plan, *, certain: bool = True) -> str:
    """The plan's estimate for a rank, and what would lower it, best first: a few lines.

    Args:
        certain: whether memory is known to have run out.
    """
    memory = plan.memory
    largest = sorted(memory.parts.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {_size(size)}" for name, size in largest)
    expected = f"the plan expects a peak of {_size(memory.total)} a rank ({parts})"
    about = "memory" if certain else "memory, if that ran out (the error does not say)"
    lines = [f"  {about}: {expected}, and its device has {_size(plan.device_memory)}"]
    advices = list_advice(run, plan)
    if advices:
        lines.append("  to reduce it, best first:")
        lines += [
            f"    {advice.words}  ({_size(advice.memory.total)}; {advice.cost})"
            for advice in advices
        ]
    else:
        lines.append(
            "  to reduce it: a shorter data.sequence_length, a smaller model, or more ranks"
        )
    return "\n".join(lines)


def list_advice(run: ResolvedRun, plan: Plan) -> list[Advice]:
    """Changes that are valid for this run and lower its estimate, best first.

    If activations and logits take more memory than the optimizer state, they come first.
    """
    memory = plan.memory
    per_batch = memory.activations + memory.logits
    states = memory.weights + memory.master_weights + memory.gradients + memory.optimizer
    of_batches, of_stages = list(_smaller_batches(run, plan)), list(_higher_stages(run, plan))
    ordered = [*of_batches, *of_stages] if per_batch >= states else [*of_stages, *of_batches]
    ordered += [*_offload(run, plan), *_return_memory(run, plan)]
    return [advice for advice in ordered if advice.memory.total <= WORTH * memory.total]


def _smaller_batches(run: ResolvedRun, plan: Plan) -> Iterator[Advice]:
    """A smaller micro batch, and recomputation."""
    batch = plan.batch
    share = batch.micro_batch_size * batch.gradient_accumulation_steps
    smaller = [n for n in range(1, batch.micro_batch_size // 2 + 1) if share % n == 0]
    if smaller:
        micro = smaller[-1]
        more = share // micro
        solved = replace(batch, micro_batch_size=micro, gradient_accumulation_steps=more)
        yield Advice(
            # Both, so that the global batch stays the same, given or derived.
            words=f"batch.micro_batch_size={micro} batch.gradient_accumulation_steps={more}",
            cost="the same steps, in smaller micro batches",
            memory=estimate_memory(run, solved),
        )
    else:
        yield from _shared_sequences(run, plan)
    if not run.train.gradient_checkpointing:
        candidate = replace(run, train=replace(run.train, gradient_checkpointing=True))
        yield from _advise(
            candidate,
            plan,
            words="train.gradient_checkpointing=true",
            cost="about a third more time",
        )


def _shared_sequences(run: ResolvedRun, plan: Plan) -> Iterator[Advice]:
    """The fewest ranks above today's that can share each sequence."""
    size, batch = run.launch.sequence_parallel_size, plan.batch
    for factor in range(2, run.data_parallel_size + 1):
        launch = replace(run.launch, sequence_parallel_size=size * factor)
        more = batch.gradient_accumulation_steps * factor
        solved = replace(batch, gradient_accumulation_steps=more)
        candidate = replace(run, launch=launch, batch=Batch(**vars(solved)))
        if not any(validate_plan(candidate)):
            yield Advice(
                words=f"launch.sequence_parallel_size={size * factor}"
                f" batch.gradient_accumulation_steps={more}",
                cost="ranks share each sequence; more communication",
                memory=estimate_memory(candidate, solved),
            )
            return


def _higher_stages(run: ResolvedRun, plan: Plan) -> Iterator[Advice]:
    """Higher ZeRO stages, if there are several ranks."""
    stages = range(run.zero.stage + 1, 4) if run.num_ranks > 1 else ()
    for stage in stages:
        cost = "more communication" if stage == 3 else "hardly slower"
        yield from _advise(_at_stage(run, stage), plan, words=f"zero.stage={stage}", cost=cost)


def _offload(run: ResolvedRun, plan: Plan) -> Iterator[Advice]:
    """Offload from a GPU to the host."""
    offloads = run.zero.offload_optimizer.device is not OffloadDevice.none
    name = ON_THE_HOST.get(run.optim.name)
    if run.launch.device is Device.cpu or offloads or name is None:
        return
    stage = max(run.zero.stage, 2)
    moved = _at_stage(run, stage)
    on_host = OffloadOptimizer(device=OffloadDevice.cpu)
    moved = replace(
        moved,
        zero=replace(moved.zero, offload_optimizer=on_host),
        optim=replace(run.optim, name=name),
    )
    words = f"zero.offload_optimizer.device=cpu optim.name={name.value}"
    if stage != run.zero.stage:
        words = f"zero.stage={stage} {words}"
    yield from _advise(moved, plan, words=words, cost="a slower update; for a new run")


def _at_stage(run: ResolvedRun, stage: int) -> ResolvedRun:
    """The run at another stage, its sizes derived anew."""
    zero = Zero(
        **{
            **vars(run.zero),
            "stage": stage,
            "reduce_scatter": None,
            "reduce_bucket_size": None,
            "stage3_prefetch_bucket_size": None,
            "stage3_param_persistence_threshold": None,
        }
    )
    return replace(run, zero=resolve_zero(zero, run, num_processes=run.launch.num_processes))


def _return_memory(run: ResolvedRun, plan: Plan) -> Iterator[Advice]:
    """On a CPU, memory that glibc keeps after it is freed."""
    if run.launch.device is Device.cpu and run.launch.malloc_mmap_threshold is None:
        threshold = 262_144
        candidate = replace(run, launch=replace(run.launch, malloc_mmap_threshold=threshold))
        yield from _advise(
            candidate,
            plan,
            words=f"launch.malloc_mmap_threshold={threshold}",
            cost="up to 25% more time",
        )


def _advise(candidate: ResolvedRun, plan: Plan, *, words: str, cost: str) -> Iterator[Advice]:
    """A changed run, unless a rule refuses it."""
    if not any(validate_run(candidate)) and not any(validate_plan(candidate)):
        memory = estimate_memory(candidate, plan.batch)
        yield Advice(words=words, cost=cost, memory=memory)


def _size(num_bytes: int) -> str:
    if num_bytes < 1 << 30:
        return f"{num_bytes / (1 << 20):,.0f} MiB"
    return f"{num_bytes / (1 << 30):,.1f} GiB"

"""What to lower when a rank has run out of memory: settings that are valid for the run, with what
the plan expects of each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llama_pretrain.config.launch import Device
from llama_pretrain.config.optim import OptimName
from llama_pretrain.config.run import Run
from llama_pretrain.config.validate import validate_run
from llama_pretrain.config.zero import OffloadDevice, OffloadOptimizer
from llama_pretrain.plan.batch import count_ranks
from llama_pretrain.plan.memory import MemoryPlan, estimate_memory
from llama_pretrain.plan.plan import Plan, check_plan
from llama_pretrain.plan.resolve import resolve_zero

OUT_OF_MEMORY = (
    "OutOfMemoryError",
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "MemoryError",
    "bad_alloc",
)
"""What torch, CUDA, Python, the system and C++ say."""
PERHAPS_OUT_OF_MEMORY = (
    "could not create a primitive",
    "could not execute a primitive",
    "can't start new thread",
)
"""What oneDNN says of its own allocations, and Python of a thread's stack; of other faults too."""
ON_THE_HOST = {
    OptimName.fused_adam: OptimName.cpu_adam,
    OptimName.torch_adamw: OptimName.cpu_adam,
    OptimName.fused_lion: OptimName.cpu_lion,
}
"""The same rule where the state is offloaded; the others have none there, or are there already."""
WORTH = 0.97
"""What doesn't lower the estimate to this share of it is not worth saying."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One way to need less memory."""

    words: str
    """What to add to the command."""
    cost: str
    """What it costs."""
    memory: MemoryPlan


def is_out_of_memory(error: str) -> bool:
    """Whether an error says that memory was short."""
    return any(text in error for text in OUT_OF_MEMORY)


def may_be_out_of_memory(error: str) -> bool:
    """Whether memory may have been short, by an error that doesn't say."""
    return any(text in error for text in PERHAPS_OUT_OF_MEMORY)


def advise_memory(run: Run, plan: Plan, *, certain: bool = True) -> str:
    """What the plan expected of a rank, and what would lower it, best first: a few lines.

    Args:
        run: with its choices resolved.
        certain: whether memory is known to be what was short.
    """
    memory = plan.memory
    largest = sorted(memory.parts.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {_size(size)}" for name, size in largest)
    expected = f"the plan expects {_size(memory.total)} of a rank at its peak ({parts})"
    about = "memory" if certain else "memory, if that was short (the error doesn't say)"
    lines = [f"  {about}: {expected}, and its device has {_size(plan.device_memory)}"]
    advices = list_advice(run, plan)
    if advices:
        lines.append("  to need less, best first:")
        lines += [
            f"    {advice.words}  ({_size(advice.memory.total)}; {advice.cost})"
            for advice in advices
        ]
    else:
        lines.append(
            "  to need less: a shorter data.sequence_length, a smaller model, or more ranks"
        )
    return "\n".join(lines)


def list_advice(run: Run, plan: Plan) -> list[Advice]:
    """What is valid for this run and lowers its estimate, best first.

    Where activations and logits weigh more than what the optimizer keeps, they come first.
    """
    memory = plan.memory
    rows = memory.activations + memory.logits
    states = memory.weights + memory.master_weights + memory.gradients + memory.optimizer
    of_rows, of_stages = list(_of_rows(run, plan)), list(_of_stages(run, plan))
    ordered = [*of_rows, *of_stages] if rows >= states else [*of_stages, *of_rows]
    ordered += [*_of_host(run, plan), *_of_allocator(run, plan)]
    return [advice for advice in ordered if advice.memory.total <= WORTH * memory.total]


def _of_rows(run: Run, plan: Plan) -> Iterator[Advice]:
    """Fewer rows at a time, and recomputation."""
    batch = plan.batch
    share = batch.micro_batch_size * batch.gradient_accumulation_steps
    smaller = [n for n in range(1, batch.micro_batch_size // 2 + 1) if share % n == 0]
    if smaller:
        micro = smaller[-1]
        more = share // micro
        solved = replace(batch, micro_batch_size=micro, gradient_accumulation_steps=more)
        yield Advice(
            # Both, so that the global batch stays what it is, given or derived.
            words=f"batch.micro_batch_size={micro} batch.gradient_accumulation_steps={more}",
            cost="the same steps, in smaller pieces",
            memory=estimate_memory(run, solved, world_size=count_ranks(run)),
        )
    if not run.train.gradient_checkpointing:
        candidate = replace(run, train=replace(run.train, gradient_checkpointing=True))
        yield from _advise(
            candidate,
            plan,
            words="train.gradient_checkpointing=true",
            cost="about a third more time",
        )


def _of_stages(run: Run, plan: Plan) -> Iterator[Advice]:
    """Higher ZeRO stages, where there are ranks to share with."""
    stages = range(run.zero.stage + 1, 4) if count_ranks(run) > 1 else ()
    for stage in stages:
        cost = "more between ranks" if stage == 3 else "hardly slower"
        yield from _advise(_at_stage(run, stage), plan, words=f"zero.stage={stage}", cost=cost)


def _of_host(run: Run, plan: Plan) -> Iterator[Advice]:
    """The host's memory beside a GPU's."""
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


def _at_stage(run: Run, stage: int) -> Run:
    """The run at another stage, its sizes derived anew."""
    zero = replace(
        run.zero,
        stage=stage,
        reduce_scatter=None,
        reduce_bucket_size=None,
        stage3_prefetch_bucket_size=None,
        stage3_param_persistence_threshold=None,
    )
    return replace(run, zero=resolve_zero(replace(run, zero=zero)))


def _of_allocator(run: Run, plan: Plan) -> Iterator[Advice]:
    """On a CPU, what glibc keeps of what was freed."""
    if run.launch.device is Device.cpu and run.launch.malloc_mmap_threshold is None:
        threshold = 262_144
        candidate = replace(run, launch=replace(run.launch, malloc_mmap_threshold=threshold))
        yield from _advise(
            candidate,
            plan,
            words=f"launch.malloc_mmap_threshold={threshold}",
            cost="up to a quarter more time",
        )


def _advise(candidate: Run, plan: Plan, *, words: str, cost: str) -> Iterator[Advice]:
    """A changed run, unless a rule refuses it."""
    if not any(validate_run(candidate)) and not any(check_plan(candidate)):
        memory = estimate_memory(candidate, plan.batch, world_size=count_ranks(candidate))
        yield Advice(words=words, cost=cost, memory=memory)


def _size(num_bytes: int) -> str:
    if num_bytes < 1 << 30:
        return f"{num_bytes / (1 << 20):,.0f} MiB"
    return f"{num_bytes / (1 << 30):,.1f} GiB"

"""The batch triangle: global = micro x accumulation x ranks, exactly or not at all."""

from dataclasses import dataclass

from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.schema import Batch


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The solved triangle, in rows."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int


def solve_batch(batch: Batch, *, world_size: int) -> BatchPlan:
    """Derive what is null.

    Raises:
        UserError: if it doesn't divide (with the nearest choices that do), is not enough, or the
            three disagree.
    """
    whole, micro = batch.global_batch_size, batch.micro_batch_size
    accumulation = batch.gradient_accumulation_steps
    if whole is None:
        if micro is None:
            message = "neither this nor batch.micro_batch_size is given"
            raise UserError([Problem(path="batch.global_batch_size", message=message)])
        accumulation = 1 if accumulation is None else accumulation
        whole = micro * accumulation * world_size
    elif micro is None:
        accumulation = 1 if accumulation is None else accumulation
        micro = whole // (accumulation * world_size)
    elif accumulation is None:
        accumulation = whole // (micro * world_size)
    if micro * accumulation * world_size != whole:
        raise UserError([_explain(batch, whole=whole, world_size=world_size)])
    return BatchPlan(
        global_batch_size=whole,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
    )


def _explain(batch: Batch, *, whole: int, world_size: int) -> Problem:
    given = [("batch.micro_batch_size", batch.micro_batch_size)]
    given.append(("batch.gradient_accumulation_steps", batch.gradient_accumulation_steps))
    factors = [f"{name}={value}" for name, value in given if value is not None]
    unit = world_size
    for _, value in given:
        unit *= 1 if value is None else value
    if None not in (batch.micro_batch_size, batch.gradient_accumulation_steps):
        message = f"is not {' x '.join(factors)} x {world_size} ranks = {unit} (got {whole})"
        hint = f"set batch.global_batch_size={unit}, or leave one of the three null"
        return Problem(path="batch.global_batch_size", message=message, hint=hint)
    by = " x ".join([*factors, f"{world_size} rank{'s' if world_size > 1 else ''}"])
    choices = [size for size in (whole // unit * unit, (whole // unit + 1) * unit) if size > 0]
    hints = [f"nearest batch.global_batch_size that do: {', '.join(str(c) for c in choices)}"]
    if whole % world_size == 0 and batch.micro_batch_size is not None:
        share = whole // world_size
        fits = [m for m in range(1, share + 1) if share % m == 0]
        below = [m for m in fits if m < batch.micro_batch_size][-1:]
        near = below + [m for m in fits if m > batch.micro_batch_size][:1]
        hints.append(f"or batch.micro_batch_size: {', '.join(str(m) for m in near)}")
    message = f"does not divide by {by} (got {whole})"
    return Problem(path="batch.global_batch_size", message=message, hint=" ".join(hints))

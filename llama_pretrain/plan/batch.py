"""The batch sizes: global = micro x accumulation x ranks, exactly or not at all."""

from dataclasses import dataclass

from llama_pretrain.config.batch import Batch
from llama_pretrain.config.fields import divisors_near
from llama_pretrain.config.problems import Problem, UserError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The solved batch sizes, in sequences."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int


def solve_batch(batch: Batch, *, sequence_length: int, world_size: int) -> BatchPlan:
    """Derive what is null.

    Raises:
        UserError: if it does not divide (with the nearest triples that do), or the values
            contradict each other.
    """
    whole = _requested_batch_size(batch, sequence_length=sequence_length)
    micro, accumulation = batch.micro_batch_size, batch.gradient_accumulation_steps
    if whole is None:
        if micro is None:
            message = "is required, or batch.global_batch_tokens, or batch.micro_batch_size"
            hint = "Add batch.micro_batch_size=1"
            raise UserError([Problem(path="batch.global_batch_size", message=message, hint=hint)])
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


def _requested_batch_size(batch: Batch, *, sequence_length: int) -> int | None:
    """The global batch size in sequences, if it is given."""
    sequences, tokens = batch.global_batch_size, batch.global_batch_tokens
    if tokens is None:
        return sequences
    if tokens % sequence_length:
        whole = tokens // sequence_length
        near = [whole * sequence_length, (whole + 1) * sequence_length]
        message = f"must be a multiple of data.sequence_length={sequence_length} (got {tokens})"
        hint = f"Nearest multiples: {', '.join(str(n) for n in near if n)}"
        raise UserError([Problem(path="batch.global_batch_tokens", message=message, hint=hint)])
    if sequences is not None and sequences * sequence_length != tokens:
        asked = f"{sequences} x {sequence_length} tokens"
        message = f"contradicts batch.global_batch_size={asked} (got {tokens})"
        hint = "Set batch.global_batch_size=null, or batch.global_batch_tokens=null"
        raise UserError([Problem(path="batch.global_batch_tokens", message=message, hint=hint)])
    return tokens // sequence_length


def _explain(batch: Batch, *, whole: int, world_size: int) -> Problem:
    micro, accumulation = batch.micro_batch_size, batch.gradient_accumulation_steps
    given = [("batch.micro_batch_size", micro), ("batch.gradient_accumulation_steps", accumulation)]
    factors = [f"{name}={value}" for name, value in given if value is not None]
    by = " x ".join([*factors, f"{world_size} rank{'s' if world_size > 1 else ''}"])
    in_tokens = batch.global_batch_size is None
    verb = "must be" if len(factors) == 2 else "must be a multiple of"
    message = f"{verb} {by} (got {whole}{' sequences' if in_tokens else ''})"
    triples = nearest_triples(whole, micro, accumulation, world_size=world_size)
    choices = ", ".join(f"{g} = {m} x {a} x {world_size}" for g, m, a in triples)
    hint = f"Nearest choices, global = micro x accumulation x ranks: {choices}"
    path = f"batch.global_batch_{'tokens' if in_tokens else 'size'}"
    return Problem(path=path, message=message, hint=hint)


def nearest_triples(
    whole: int, micro: int | None, accumulation: int | None, *, world_size: int
) -> list[tuple[int, int, int]]:
    """Valid (global, micro, accumulation) near what was requested: at most four.

    First the global sizes nearest below and above that keep the micro batch and the accumulation
    as far as they were given; then, where the global size can be kept, the micro batches nearest
    below and above (the accumulations, where that is what was given).
    """
    unit = (micro or 1) * (accumulation or 1) * world_size
    below = whole // unit * unit
    sizes = [below, below + unit] if micro is None or accumulation is None else [unit]
    found = []
    for size in sizes:
        if size > 0:
            share = size // world_size
            kept = accumulation or (share // micro if micro else 1)
            found.append((size, share // kept, kept))
    if whole % world_size == 0:
        share = whole // world_size
        if micro is None and accumulation is not None:
            found += [(whole, share // n, n) for n in divisors_near(share, accumulation)]
        else:
            found += [(whole, n, share // n) for n in divisors_near(share, micro or 1)]
    return list(dict.fromkeys(found))

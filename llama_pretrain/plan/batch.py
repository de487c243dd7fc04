"""The batch triangle: global = micro x accumulation x replicas, exactly or not at all.

A replica is what reads rows of its own: a rank, or the ranks that share a row or a layer.
"""

from dataclasses import dataclass

from llama_pretrain.config.batch import Batch
from llama_pretrain.config.fields import divisors_near
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.run import Run


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The solved triangle, in rows."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int


def count_ranks(run: Run) -> int:
    """Ranks of a run whose choices are resolved."""
    assert run.launch.num_processes is not None
    return run.launch.num_processes * run.launch.nodes


def count_replicas(run: Run) -> int:
    """Ranks, or groups of ranks, that read rows of their own."""
    deepspeed = run.deepspeed
    shared = deepspeed.tensor_parallel.autotp_size * deepspeed.sequence_parallel_size
    return max(1, count_ranks(run) // shared)


def solve_batch(batch: Batch, *, sequence_length: int, replicas: int) -> BatchPlan:
    """Derive what is null.

    Raises:
        UserError: if it doesn't divide (with the nearest triples that do), is not enough, or the
            values disagree.
    """
    whole = _global_rows(batch, sequence_length=sequence_length)
    micro, accumulation = batch.micro_batch_size, batch.gradient_accumulation_steps
    if whole is None:
        if micro is None:
            message = "neither this, batch.global_batch_tokens nor batch.micro_batch_size is given"
            hint = "add batch.micro_batch_size=1"
            raise UserError([Problem(path="batch.global_batch_size", message=message, hint=hint)])
        accumulation = 1 if accumulation is None else accumulation
        whole = micro * accumulation * replicas
    elif micro is None:
        accumulation = 1 if accumulation is None else accumulation
        micro = whole // (accumulation * replicas)
    elif accumulation is None:
        accumulation = whole // (micro * replicas)
    if micro * accumulation * replicas != whole:
        raise UserError([_explain(batch, whole=whole, replicas=replicas)])
    return BatchPlan(
        global_batch_size=whole,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
    )


def _global_rows(batch: Batch, *, sequence_length: int) -> int | None:
    """The global size in rows, as far as it is given."""
    rows, tokens = batch.global_batch_size, batch.global_batch_tokens
    if tokens is None:
        return rows
    if tokens % sequence_length:
        whole = tokens // sequence_length
        near = [whole * sequence_length, (whole + 1) * sequence_length]
        message = f"is not a whole number of rows of {sequence_length} tokens (got {tokens})"
        hint = f"nearest that are: {', '.join(str(n) for n in near if n)}"
        raise UserError([Problem(path="batch.global_batch_tokens", message=message, hint=hint)])
    if rows is not None and rows * sequence_length != tokens:
        message = f"is not batch.global_batch_size={rows} x {sequence_length} tokens (got {tokens})"
        hint = "set batch.global_batch_size=null, or batch.global_batch_tokens=null"
        raise UserError([Problem(path="batch.global_batch_tokens", message=message, hint=hint)])
    return tokens // sequence_length


def _explain(batch: Batch, *, whole: int, replicas: int) -> Problem:
    micro, accumulation = batch.micro_batch_size, batch.gradient_accumulation_steps
    given = [("batch.micro_batch_size", micro), ("batch.gradient_accumulation_steps", accumulation)]
    factors = [f"{name}={value}" for name, value in given if value is not None]
    by = " x ".join([*factors, f"{replicas} rank{'s' if replicas > 1 else ''}"])
    in_tokens = batch.global_batch_size is None
    verb = "is not" if len(factors) == 2 else "does not divide by"
    message = f"{verb} {by} (got {whole}{' rows' if in_tokens else ''})"
    triples = nearest_triples(whole, micro, accumulation, replicas=replicas)
    choices = ", ".join(f"{g} = {m} x {a} x {replicas}" for g, m, a in triples)
    hint = f"nearest global = micro x accumulation x ranks: {choices}"
    path = f"batch.global_batch_{'tokens' if in_tokens else 'size'}"
    return Problem(path=path, message=message, hint=hint)


def nearest_triples(
    whole: int, micro: int | None, accumulation: int | None, *, replicas: int
) -> list[tuple[int, int, int]]:
    """Valid (global, micro, accumulation) near what was asked: at most four.

    First the global sizes nearest below and above that keep the micro batch and the accumulation
    as far as they were given; then, where the global size can be kept, the micro batches nearest
    below and above (the accumulations, where that is what was given).
    """
    unit = (micro or 1) * (accumulation or 1) * replicas
    below = whole // unit * unit
    sizes = [below, below + unit] if micro is None or accumulation is None else [unit]
    found = []
    for size in sizes:
        if size > 0:
            share = size // replicas
            kept = accumulation or (share // micro if micro else 1)
            found.append((size, share // kept, kept))
    if whole % replicas == 0:
        share = whole // replicas
        if micro is None and accumulation is not None:
            found += [(whole, share // n, n) for n in divisors_near(share, accumulation)]
        else:
            found += [(whole, n, share // n) for n in divisors_near(share, micro or 1)]
    return list(dict.fromkeys(found))

"""Which source each sequence of a run comes from, as counts: quotas of a block, stages, epochs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llama_pretrain.config.data import Data, DataName
from llama_pretrain.config.problems import Problem, UserError


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What applies from a sample on."""

    first_sample: int
    """A multiple of the global batch size: a stage begins with a step."""
    quotas: list[int]
    """Sequences of each source in every block of the stage; they add up to the block."""
    sequence_length: int
    """Sequences are cut to this length."""


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """Where the sequences of a run come from. A sample is one sequence at one global position."""

    names: list[str]
    block: int
    stages: list[StagePlan]

    def stage_at(self, sample: int) -> StagePlan:
        """The stage that a sample belongs to."""
        return next(stage for stage in reversed(self.stages) if stage.first_sample <= sample)

    def consumed(self, samples: int) -> list[float]:
        """Sequences of each source among the first samples, but for the rounding of a block."""
        total = [0.0] * len(self.names)
        ends = [stage.first_sample for stage in self.stages[1:]] + [samples]
        for stage, end in zip(self.stages, ends, strict=True):
            length = max(0, min(end, samples) - stage.first_sample)
            for index, quota in enumerate(stage.quotas):
                total[index] += length * quota / self.block
        return total


def plan_sampling(data: Data, *, global_batch_size: int) -> SamplingPlan:
    """Quotas and stages of a run.

    Raises:
        UserError: if a block is too small for a source's weight.
    """
    mixed = data.name is DataName.mixture
    weights: Mapping[str, float] = {data.name.value: 1.0}
    if mixed:
        weights = {name: source.weight for name, source in data.sources.items()}
    block = data.mixture_block if mixed else 1
    names, length = list(weights), data.sequence_length
    stages = [StagePlan(first_sample=0, quotas=_quotas(weights, block), sequence_length=length)]
    for stage in data.stages:
        weights = stage.weights or weights
        per_step = data.sequence_length * global_batch_size
        planned = StagePlan(
            first_sample=-(-stage.from_tokens // per_step) * global_batch_size,
            quotas=_quotas({name: weights[name] for name in names}, block),
            sequence_length=stage.sequence_length or length,
        )
        if stages[-1].first_sample == planned.first_sample:
            stages.pop()  # it would have no steps
        stages.append(planned)
    return SamplingPlan(names=names, block=block, stages=stages)


def _quotas(weights: Mapping[str, float], block: int) -> list[int]:
    """Integers in the ratio of the weights that add up to the block, by largest remainder."""
    total = sum(weights.values())
    exact = [weight / total * block for weight in weights.values()]
    quotas = [int(share + 1e-9) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (quotas[i] - exact[i], i))
    for index in by_rest[: block - sum(quotas)]:
        quotas[index] += 1
    for (name, weight), quota in zip(weights.items(), quotas, strict=True):
        if weight > 0 and quota == 0:
            message = f"gives {name} less than one sequence of a block (got {block})"
            hint = f"Set it to {int(total / weight) + 1}, or raise the weight of {name}"
            raise UserError([Problem(path="data.mixture_block", message=message, hint=hint)])
    return quotas


def share_evenly(available: Sequence[int], wanted: int | None) -> list[int]:
    """How many sequences of each source an evaluation reads: equally many, as far as they exist."""
    if wanted is None:
        return list(available)
    shares, left = [0] * len(available), wanted
    while left:
        open_sources = [i for i, count in enumerate(available) if shares[i] < count]
        if not open_sources:
            break
        each = max(1, left // len(open_sources))
        for index in open_sources:
            more = min(each, available[index] - shares[index], left)
            shares[index] += more
            left -= more
    return shares

"""The config group `schedule`: the learning rate over the run."""

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING

from llama_pretrain.config.fields import Fraction, NonNegativeInt, PositiveInt, schema
from llama_pretrain.config.problems import Problem

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


class ScheduleName(str, Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


@schema
class Schedule:
    """The learning rate over the run."""

    name: ScheduleName = ScheduleName.cosine
    """Shape after warm-up; `wsd` = warm-up, stable, decay (arXiv 2404.06395)."""
    warmup_steps: NonNegativeInt | None = None
    """Length of the linear warm-up in optimizer steps; `null` = see warmup_tokens, else none."""
    warmup_tokens: NonNegativeInt | None = None
    """Length of the linear warm-up in tokens, rounded up to whole steps."""
    decay_steps: PositiveInt | None = None
    """`wsd`: length of the final linear decay in optimizer steps; `null` = see decay_tokens."""
    decay_tokens: PositiveInt | None = None
    """`wsd`: length of the final decay in tokens, rounded up; both `null` = a tenth of the run."""
    min_learning_rate_ratio: Fraction = 0.1
    """Learning rate of the last step as a share of the peak (`constant` stays at the peak)."""


def validate_schedule(run: "Run") -> Iterator[Problem]:
    schedule = run.schedule
    least = schedule.min_learning_rate_ratio
    if schedule.name is ScheduleName.constant and least != Schedule().min_learning_rate_ratio:
        yield Problem(
            path="schedule.min_learning_rate_ratio",
            message=f"is not used with schedule=constant (got {least})",
            hint="add schedule=cosine, or leave it out",
        )
    for what in ("warmup", "decay"):
        steps, tokens = getattr(schedule, f"{what}_steps"), getattr(schedule, f"{what}_tokens")
        if steps is not None and tokens is not None:
            yield Problem(
                path=f"schedule.{what}_tokens",
                message=f"is given as well as schedule.{what}_steps={steps} (got {tokens})",
                hint=f"set schedule.{what}_steps=null, or schedule.{what}_tokens=null",
            )
        if what == "decay" and schedule.name is not ScheduleName.wsd:
            for name, value in (("decay_steps", steps), ("decay_tokens", tokens)):
                if value is not None:
                    yield Problem(
                        path=f"schedule.{name}",
                        message=f"is not used with schedule={schedule.name.value} (got {value})",
                        hint="add schedule=wsd",
                    )

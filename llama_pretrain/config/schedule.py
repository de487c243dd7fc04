"""The config group `schedule`: the learning rate over the run."""

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from llama_pretrain.config.fields import Fraction, NonNegativeInt, PositiveInt, UsedWhen, schema
from llama_pretrain.config.problems import Problem

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


class ScheduleName(str, Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


WSD = UsedWhen("schedule.name", ("wsd",))


@schema
class Schedule:
    """The learning rate over the run."""

    name: ScheduleName = ScheduleName.cosine
    """Shape after warm-up; `wsd` = warm-up, stable, decay (arXiv 2404.06395)."""
    warmup_steps: NonNegativeInt | None = None
    """Length of the linear warm-up in optimizer steps; `null` = see warmup_tokens, else none."""
    warmup_tokens: NonNegativeInt | None = None
    """Length of the linear warm-up in tokens, rounded up to whole steps."""
    decay_steps: Annotated[PositiveInt | None, WSD] = None
    """`wsd`: length of the final linear decay in optimizer steps; `null` = see decay_tokens."""
    decay_tokens: Annotated[PositiveInt | None, WSD] = None
    """`wsd`: length of the final decay in tokens, rounded up; both `null` = a tenth of the run."""
    min_learning_rate_ratio: Annotated[
        Fraction, UsedWhen("schedule.name", ("cosine", "linear", "wsd"))
    ] = 0.1
    """Learning rate of the last step as a fraction of the peak."""


def validate_schedule(run: "Run") -> Iterator[Problem]:
    """A length is given in steps or in tokens."""
    for name in ("warmup", "decay"):
        steps = getattr(run.schedule, f"{name}_steps")
        tokens = getattr(run.schedule, f"{name}_tokens")
        if steps is not None and tokens is not None:
            yield Problem(
                path=f"schedule.{name}_tokens",
                message=f"contradicts schedule.{name}_steps={steps} (got {tokens})",
                hint=f"Set schedule.{name}_steps=null, or schedule.{name}_tokens=null",
            )

"""The config group `train`: length of the run, evaluation, clipping, loss spikes."""

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from llama_pretrain.config.fields import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UsedWhen,
    schema,
)
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.tasks import Task

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


class Spike(str, Enum):
    none = "none"
    skip = "skip"
    rollback = "rollback"


SPIKES = UsedWhen("train.spike", ("skip", "rollback"))


@schema
class Train:
    """Length of the run, evaluation, and what a step does."""

    max_steps: PositiveInt | None = None
    """Optimizer steps of the run; with max_tokens too, the shorter of the two."""
    max_tokens: PositiveInt | None = None
    """Training tokens of the run, rounded up to whole steps."""
    tokens_per_parameter: PositiveFloat | None = None
    """Training tokens as a multiple of the model's parameters: 20 is near the best loss for the
    compute (arXiv 2203.15556). A snapshot has it as max_tokens; with max_steps, the shorter of the
    two."""
    eval_every_steps: PositiveInt | None = 100
    """Evaluate every this many steps; `null` = only before the first and after the last step."""
    eval_sequences: PositiveInt | None = 64
    """Sequences of the eval set in one evaluation; `null` = all."""
    gradient_clipping: NonNegativeFloat | None = None
    """Maximum norm of the gradient; 0 = no clipping; `null` = 1.0, but 0 with Muon, whose update
    DeepSpeed would clip instead of the gradient."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    sample_prompt: str = "The"
    """Prompt that the model continues after each evaluation and at the end; empty = no generation.
    """
    sample_tokens: PositiveInt = 60
    """Maximum number of tokens of each generation; before the first step at most 8."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of one rank's device for MFU; `null` = a table for GPUs, measured on a CPU."""
    max_nonfinite_steps: PositiveInt = 5
    """A step whose loss or gradient is not finite is skipped; after this many in a row the run
    stops. (fp16: overflows of the gradient, which lower the loss scale, are not counted.)"""
    spike: Spike = Spike.none
    """What happens to a step whose loss spikes: `none`; `skip` its update; `rollback` to the
    newest checkpoint and leave out the batches of the spike (arXiv 2204.02311, section 5.1)."""
    spike_window: Annotated[int, Ge(8), SPIKES] = 100
    """Number of recent losses, of applied steps, that a loss is compared with; until there are
    that many, no step is a spike."""
    spike_z: Annotated[PositiveFloat, SPIKES] = 6.0
    """A loss is a spike when it is this many standard deviations above the mean of the window."""
    spike_batches: Annotated[PositiveInt, UsedWhen("train.spike", ("rollback",))] = 2
    """`rollback`: number of batches that are left out: that of the spike and those before it."""
    profile_steps: NonNegativeInt = 0
    """Steps that torch's profiler records after the first two, to profile/ in the run directory."""


def validate_train(run: "Run") -> Iterator[Problem]:
    """A run needs an end, a profile needs steps, and a rollback needs checkpoints."""
    train, checkpoint = run.train, run.checkpoint
    steps, profiled = train.max_steps, train.profile_steps
    if steps is train.max_tokens is train.tokens_per_parameter is None:
        yield Problem(
            path="train.max_steps",
            message="the run has no end",
            hint="Set train.max_steps=1000, for example, or train.max_tokens",
        )
    if profiled and steps is not None and run.task is Task.pretrain and profiled + 2 > steps:
        yield Problem(
            path="train.profile_steps",
            message=f"exceeds the run's {steps} steps: the first two are not recorded"
            f" (got {profiled})",
            hint=f"Set train.max_steps={profiled + 2}",
        )
    if train.spike is Spike.rollback and checkpoint.every_steps is checkpoint.every_minutes is None:
        yield Problem(
            path="train.spike",
            message="rollback requires checkpoints to return to",
            hint="Set checkpoint.every_steps=100, or train.spike=skip",
        )

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


@schema
class Train:
    """How long, how often to evaluate, and what a step does."""

    max_steps: PositiveInt | None = None
    """Optimizer steps of the run; with max_tokens too, the shorter one."""
    max_tokens: PositiveInt | None = None
    """Training tokens of the run, rounded up to whole steps."""
    tokens_per_parameter: PositiveFloat | None = None
    """Training tokens as a multiple of the model's parameters: 20 is near the best loss for the
    compute (arXiv 2203.15556). A snapshot has it as max_tokens; with max_steps, the shorter one."""
    eval_every_steps: PositiveInt | None = 100
    """Evaluate each so many steps; `null` = only before the first and after the last step."""
    eval_rows: PositiveInt | None = 64
    """Rows of held-out text in one evaluation; `null` = all."""
    gradient_clipping: NonNegativeFloat | None = None
    """Largest norm of the gradient; 0 = no clipping; `null` = 1.0, but 0 with Muon, whose update
    DeepSpeed would clip in the gradient's place."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    sample_prompt: str = "The"
    """Text that the model continues, after each evaluation and when it is finished; empty = no
    samples."""
    sample_tokens: PositiveInt = 60
    """Tokens of each sample, at most; before the first step 8 at most."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of one rank's device for MFU; `null` = a table for GPUs, measured on a CPU."""
    max_nonfinite_steps: PositiveInt = 5
    """A step whose loss or gradient is not finite is skipped; after so many in a row the run stops.
    (fp16: overflows of the gradient, which lower the loss scale, don't count.)"""
    spike: Spike = Spike.none
    """What is done with a step whose loss spikes: `none`; `skip` its update; `rollback` to the
    newest checkpoint and leave out the batches of the spike (arXiv 2204.02311, section 5.1)."""
    spike_window: Annotated[int, Ge(8)] = 100
    """Losses, of the last applied steps, that a loss is compared with; none is judged before."""
    spike_z: PositiveFloat = 6.0
    """A loss spikes where it is so many standard deviations above the window's mean."""
    spike_batches: PositiveInt = 2
    """`rollback`: batches that are left out: that of the spike and those before it."""
    profile_steps: NonNegativeInt = 0
    """Steps that torch's profiler records after the first two, to profile/ in the run directory."""


def validate_train(run: "Run") -> Iterator[Problem]:
    steps, profiled = run.train.max_steps, run.train.profile_steps
    lengths = (steps, run.train.max_tokens, run.train.tokens_per_parameter)
    if all(length is None for length in lengths):
        yield Problem(
            path="train.max_steps",
            message="the run has no end",
            hint="set train.max_steps=1000, say, or train.max_tokens",
        )
    if profiled and steps is not None and run.task is Task.pretrain and profiled + 2 > steps:
        yield Problem(
            path="train.profile_steps",
            message=f"would go on after the run's {steps} steps: the first two are not recorded"
            f" (got {profiled})",
            hint=f"set train.max_steps={profiled + 2}",
        )
    monitor = run.monitor
    if monitor.wandb_project != type(monitor)().wandb_project and not monitor.wandb:
        yield Problem(
            path="monitor.wandb_project",
            message=f"is read with monitor.wandb=true alone (got {monitor.wandb_project})",
            hint="leave it out, or set monitor.wandb=true",
        )


def validate_spikes(run: "Run") -> Iterator[Problem]:
    """What is read where spikes are looked for."""
    train, default = run.train, Train()
    readers = {
        "spike_window": (Spike.skip, Spike.rollback),
        "spike_z": (Spike.skip, Spike.rollback),
        "spike_batches": (Spike.rollback,),
    }
    for name, policies in readers.items():
        value = getattr(train, name)
        if value != getattr(default, name) and train.spike not in policies:
            named = " or ".join(policy.value for policy in policies)
            yield Problem(
                path=f"train.{name}",
                message=f"is read with train.spike={named} alone (got {value})",
                hint=f"set train.spike={policies[0].value}, or leave it out",
            )
    settings = run.checkpoint
    if train.spike is Spike.rollback and settings.every_steps is settings.every_minutes is None:
        yield Problem(
            path="train.spike",
            message="has no checkpoint to go back to (got rollback)",
            hint="set checkpoint.every_steps=100, or train.spike=skip",
        )

"""The config group `checkpoint`: how often checkpoints are saved and how many are kept."""

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING

from llama_pretrain.config.fields import PositiveFloat, PositiveInt, schema
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.tasks import Task

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


# `continue` can't be written as a name of a class.
OnError = Enum("OnError", {"continue": "continue", "stop": "stop"}, type=str)


@schema
class Checkpoint:
    """What is kept of the weights and the optimizer."""

    every_steps: PositiveInt | None = 100
    """Write a checkpoint each so many steps; `null` = by every_minutes alone."""
    every_minutes: PositiveFloat | None = None
    """Write one when so many minutes have gone by since the last; `null` = by every_steps alone."""
    keep_last: PositiveInt = 2
    """Older complete checkpoints are deleted."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints of multiples of so many steps are kept for good."""
    at_end: bool = True
    """Whether the last step is followed by a checkpoint."""
    asynchronous: bool | None = None
    """Copy the state to host memory, and write it while training goes on; `null` = where there are
    saves before the last step, and the plan finds room for the copy."""
    on_error: OnError = OnError["continue"]
    """What a run does whose checkpoint can't be written: `continue` without it, or `stop`."""
    export: bool = True
    """Whether the run ends with an export in Hugging Face format."""


def validate_checkpoint(run: "Run") -> Iterator[Problem]:
    """Checkpoints that would never be written, or never be kept."""
    every, kept = run.checkpoint.every_steps, run.checkpoint.keep_every_steps
    if kept is not None and (every is None or kept % every):
        message = f"should be a multiple of checkpoint.every_steps={every} (got {kept})"
        hint = f"set checkpoint.every_steps={kept}"
        if every is not None:
            hint = f"set it to {-(-kept // every) * every}"
        yield Problem(path="checkpoint.keep_every_steps", message=message, hint=hint)
    saves = every is not None or run.checkpoint.every_minutes is not None
    if run.checkpoint.asynchronous and not saves:
        yield Problem(
            path="checkpoint.asynchronous",
            message="has nothing to go on beside: only the last step is saved (got true)",
            hint="set checkpoint.every_steps=100, or leave it out",
        )
    default = type(run.resume)().verify_steps
    if run.resume.verify_steps != default and run.task is not Task.verify_resume:
        yield Problem(
            path="resume.verify_steps",
            message=f"is read by task=verify_resume alone (got task={run.task.value})",
            hint="add task=verify_resume, or leave it out",
        )

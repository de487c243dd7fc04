"""The config group `checkpoint`: how often checkpoints are saved and how many are kept."""

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING

from llama_pretrain.config.fields import PositiveFloat, PositiveInt, schema
from llama_pretrain.config.problems import Problem

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


# `continue` is a keyword: it cannot be a name in a class body.
OnError = Enum("OnError", {"continue": "continue", "stop": "stop"}, type=str)


@schema
class Checkpoint:
    """When the weights and the optimizer state are saved, and how long checkpoints are kept."""

    every_steps: PositiveInt | None = 100
    """Save a checkpoint every this many steps; `null` = only by every_minutes."""
    every_minutes: PositiveFloat | None = None
    """Save a checkpoint when this many minutes have passed since the last; `null` = only by
    every_steps."""
    keep_last: PositiveInt = 2
    """Number of complete checkpoints to keep; older ones are deleted."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints of multiples of this many steps are never deleted."""
    at_end: bool = True
    """Whether a checkpoint is saved after the last step."""
    asynchronous: bool | None = None
    """Copy the state to host memory, and write it while training continues; `null` = if there are
    saves before the last step and the plan finds memory for the copy."""
    on_error: OnError = OnError["continue"]
    """What a run does when a checkpoint cannot be written: `continue` without it, or `stop`."""
    export: bool = True
    """Whether the run ends with an export in Hugging Face format."""


def validate_checkpoint(run: "Run") -> Iterator[Problem]:
    """Checkpoints that would never be kept, or never be written in the background."""
    every, kept = run.checkpoint.every_steps, run.checkpoint.keep_every_steps
    if kept is not None and (every is None or kept % every):
        hint = (
            f"checkpoint.every_steps={kept}"
            if every is None
            else f"it to {-(-kept // every) * every}"
        )
        yield Problem(
            path="checkpoint.keep_every_steps",
            message=f"must be a multiple of checkpoint.every_steps={every} (got {kept})",
            hint=f"Set {hint}",
        )
    if run.checkpoint.asynchronous and every is run.checkpoint.every_minutes is None:
        yield Problem(
            path="checkpoint.asynchronous",
            message="requires checkpoints before the last step (got true)",
            hint="Set checkpoint.every_steps=100, or remove it",
        )

"""What a run does, and the settings of single tasks: resume, export, generate, plan."""

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Interval

from llama_pretrain.config.fields import (
    NUMBER,
    PATH,
    IsPath,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    UsedWhen,
    parse_size,
    schema,
)
from llama_pretrain.config.problems import Problem

if TYPE_CHECKING:
    from llama_pretrain.config.run import Run


class Task(str, Enum):
    pretrain = "pretrain"
    plan = "plan"
    probe = "probe"
    prepare = "prepare"
    inspect = "inspect"
    verify_resume = "verify_resume"
    export = "export"
    evaluate = "evaluate"
    generate = "generate"

    @property
    def trains(self) -> bool:
        """Whether ranks are started that train."""
        return self in (Task.pretrain, Task.probe, Task.verify_resume)

    @property
    def reads_a_run(self) -> bool:
        """Whether it works on an existing run: `run=DIR`."""
        return self in (Task.export, Task.evaluate, Task.generate)


SPEED_KNOWN = UsedWhen(("plan.tokens_per_s", "task"), (NUMBER, "probe"))


@schema
class Export:
    """The model in Hugging Face format: at the end of a run, and task=export."""

    checkpoint: Annotated[str | None, UsedWhen("task", ("export", "evaluate", "generate"))] = None
    """Name of the checkpoint, such as step-00000100, also for task=evaluate; `null` = the newest
    complete one."""
    target: Annotated[str | None, UsedWhen("task", ("export",)), IsPath()] = None
    """Directory to write to, for task=export; `null` = export/ in the run directory."""
    max_shard_size: str = "4GiB"
    """Maximum size of one file of weights."""
    logit_tolerance: PositiveFloat | None = None
    """Maximum difference, relative to the largest logit or 1, between the exported model's logits
    and those of the training engine; `null` = 1e-5 in fp32 and 0.02 in 16 bits."""


SAMPLING = UsedWhen("generate.temperature", (NUMBER,))


@schema
class Generate:
    """task=generate: continue a prompt with a finished run's model."""

    prompt: str = "The"
    """Text to continue."""
    num_tokens: PositiveInt = 100
    """Tokens to add."""
    temperature: NonNegativeFloat = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_k: Annotated[PositiveInt | None, SAMPLING] = 50
    """Sample from this many of the most likely tokens; `null` = from all."""
    top_p: Annotated[float, Interval(gt=0, le=1), SAMPLING] = 1.0
    """Sample from the most likely tokens whose probabilities add up to this."""


@schema
class PlanSettings:
    """What task=plan and task=probe compute beyond the plan itself."""

    fit: Annotated[str | None, UsedWhen("task", ("plan",))] = None
    """A memory size, as in 80GiB: list which stages, offloads and recomputation fit a device of
    that size, and the largest micro batch of each."""
    tokens_per_s: PositiveFloat | None = None
    """Tokens a second over all ranks, as measured by task=probe: gives the hours of the run."""
    price_per_device_hour: Annotated[NonNegativeFloat | None, SPEED_KNOWN] = None
    """Price of one device (on a CPU, of one node) for an hour, in any currency: gives a cost."""
    watts_per_device: Annotated[PositiveFloat | None, SPEED_KNOWN] = None
    """Power of one device (on a CPU, of one node) in W: gives an energy."""
    probe_steps: Annotated[int, Ge(3), UsedWhen("task", ("probe",))] = 8
    """Steps of task=probe; the first two are not counted."""


@schema
class Resume:
    """Resuming a run: `resume=DIR` on the command line."""

    run_dir: str | None = None
    """What `resume=DIR` sets: resume in DIR from its newest complete checkpoint. `auto` = in the
    run's own directory if it holds a run."""
    verify_steps: Annotated[PositiveInt, UsedWhen("task", ("verify_resume",))] = 3
    """task=verify_resume: steps before the interruption, and steps after it."""
    allow_data_change: Annotated[bool, UsedWhen("resume.run_dir", (PATH,))] = False
    """Resume although the data differs from what the checkpoint was trained on."""


class DriftPolicy(str, Enum):
    warn = "warn"
    error = "error"
    off = "off"


def validate_tasks(run: "Run") -> Iterator[Problem]:
    """Tasks that work on an existing run, and settings of single tasks."""
    if run.task.reads_a_run and run.of_run is None:
        yield Problem(
            path="run",
            message=f"is required by task={run.task.value}",
            hint="Add run=DIR, the run directory",
        )
    if run.of_run is not None and not run.task.reads_a_run:
        yield Problem(
            path="task",
            message=f"must be export, evaluate or generate with run=DIR (got {run.task.value})",
            hint="To train, use resume=DIR or reproduce=DIR",
        )
    try:
        parse_size(run.export.max_shard_size)
    except ValueError:
        yield Problem(
            path="export.max_shard_size",
            message=f"must be a size with its unit (got {run.export.max_shard_size})",
            hint="Write it as 4GiB, 5GB or 500MiB",
        )

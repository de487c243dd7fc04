"""What a run does, and the settings of single tasks: resume, export, generate, plan."""

from collections.abc import Iterator
from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Interval

from llama_pretrain.config.fields import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
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
        """Whether it is about a run that there is already: `run=DIR`."""
        return self in (Task.export, Task.evaluate, Task.generate)


@schema
class Export:
    """The model in Hugging Face format: at a run's end, and task=export."""

    checkpoint: str | None = None
    """Name of the checkpoint, as in step-00000100, for task=evaluate too; `null` = the newest
    complete one."""
    target: str | None = None
    """Folder to write to, for task=export; `null` = export/ in the run's directory."""
    max_shard_size: str = "4GiB"
    """Largest file of weights."""
    logit_tolerance: PositiveFloat | None = None
    """Largest difference, over the largest logit or 1, between the exported model's logits and
    those that the training engine gave; `null` = 1e-5 in fp32 and 0.02 in 16 bits."""


@schema
class Generate:
    """task=generate: continue a prompt with a finished run's model."""

    prompt: str = "The"
    """Text to continue."""
    num_tokens: PositiveInt = 100
    """Tokens to add."""
    temperature: NonNegativeFloat = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: PositiveInt | None = 50
    """Draw from so many of the likeliest tokens; `null` = from all."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that have this probability together."""


@schema
class PlanSettings:
    """What task=plan and task=probe are asked beside the run itself."""

    fit: str | None = None
    """A memory, as in 80GiB: list which stages, offloads and recomputation fit a device of it, and
    the largest micro batch of each."""
    tokens_per_s: PositiveFloat | None = None
    """Tokens a second over all ranks, as measured by task=probe or known: gives hours."""
    price_per_device_hour: NonNegativeFloat | None = None
    """Price of one device (of one machine on a CPU) for an hour, in any currency: gives a cost."""
    watts_per_device: PositiveFloat | None = None
    """Power of one device (of one machine on a CPU) in W: gives an energy."""
    probe_steps: Annotated[int, Ge(3)] = 8
    """Steps of task=probe; the first two are not counted."""


@schema
class Resume:
    """Going on with a run: `resume=DIR` on the command line."""

    run_dir: str | None = None
    """What `resume=DIR` sets: go on from the newest complete checkpoint of DIR, in DIR. `auto` = of
    the run's own directory, where it holds a run."""
    verify_steps: PositiveInt = 3
    """task=verify_resume: steps before the cut, and steps after it."""
    allow_data_change: bool = False
    """Go on although the data is not what the checkpoint was trained on."""


class DriftPolicy(str, Enum):
    warn = "warn"
    error = "error"
    off = "off"


def validate_resume(run: "Run") -> Iterator[Problem]:
    if run.resume.allow_data_change and run.resume.run_dir is None:
        yield Problem(
            path="resume.allow_data_change",
            message="is read with resume=DIR alone (got true)",
            hint="add resume=DIR, or leave it out",
        )
    if run.drift is not DriftPolicy.warn and (
        run.reproduce_of is None or run.task is not Task.pretrain
    ):
        yield Problem(
            path="drift",
            message="is read with reproduce=DIR and task=pretrain alone"
            f" (got {run.drift.value} with task={run.task.value})",
            hint="leave it out",
        )


def validate_finished(run: "Run") -> Iterator[Problem]:
    """Tasks about a run that there is, and their settings."""
    if run.task.reads_a_run and run.of_run is None:
        message = f"task={run.task.value} is about a run that there is"
        yield Problem(path="run", message=message, hint="add run=DIR, the run's directory")
    if run.of_run is not None and not run.task.reads_a_run:
        yield Problem(
            path="task",
            message=f"run=DIR is for task=export, evaluate or generate (got {run.task.value})",
            hint="add one of them; to train: resume=DIR goes on, reproduce=DIR starts anew",
        )
    try:
        parse_size(run.export.max_shard_size)
    except ValueError:
        message = f"should be a size with its unit (got {run.export.max_shard_size})"
        hint = "write it as 4GiB, 5GB or 500MiB"
        yield Problem(path="export.max_shard_size", message=message, hint=hint)
    readers = {
        "export.checkpoint": (Task.export, Task.evaluate),
        "export.target": (Task.export,),
        **{f"generate.{item.name}": (Task.generate,) for item in fields(Generate)},
    }
    default = {"export": Export(), "generate": Generate()}
    for path, tasks in readers.items():
        section, _, name = path.partition(".")
        value = getattr(getattr(run, section), name)
        if value != getattr(default[section], name) and run.task not in tasks:
            named = " and ".join(f"task={task.value}" for task in tasks)
            yield Problem(
                path=path,
                message=f"is read by {named} alone (got task={run.task.value})",
                hint=f"add {named.split()[-1]}, or leave it out",
            )
    if run.generate.temperature == 0:
        for name in ("top_k", "top_p"):
            value = getattr(run.generate, name)
            if value not in (None, getattr(Generate(), name)):
                yield Problem(
                    path=f"generate.{name}",
                    message="is not used with generate.temperature=0, which takes the likeliest"
                    f" (got {value})",
                    hint="leave it out, or raise generate.temperature",
                )


def validate_plan_settings(run: "Run") -> Iterator[Problem]:
    """What the plan is asked where there is none, or where it could not answer."""
    asked, default = run.plan, PlanSettings()
    if asked.fit is not None and run.task is not Task.plan:
        yield Problem(
            path="plan.fit",
            message=f"is read by task=plan alone (got task={run.task.value})",
            hint="add task=plan, or leave it out",
        )
    if asked.probe_steps != default.probe_steps and run.task is not Task.probe:
        yield Problem(
            path="plan.probe_steps",
            message=f"is read by task=probe alone (got task={run.task.value})",
            hint="add task=probe, or leave it out",
        )
    for name in ("price_per_device_hour", "watts_per_device"):
        value = getattr(asked, name)
        if value is not None and asked.tokens_per_s is None and run.task is not Task.probe:
            yield Problem(
                path=f"plan.{name}",
                message=f"needs the hours of the run, and no speed is known (got {value})",
                hint="add task=probe, or plan.tokens_per_s=1e6, say",
            )

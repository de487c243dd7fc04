"""What a config may not say: ranges of single fields, and rules across fields.

Each rule is a generator of problems that looks at the config alone; what depends on the machine is
in plan/feasible.py.
"""

import bisect
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from llama_pretrain.config.data_rules import check_data, check_tokenizer
from llama_pretrain.config.deepspeed_rules import OWNED_KEYS, check_deepspeed
from llama_pretrain.config.fields import parse_size
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.schema import (
    DriftPolicy,
    Export,
    Generate,
    Model,
    PlanSettings,
    RopeType,
    Run,
    Schedule,
    ScheduleName,
    Spike,
    Task,
    Train,
)

OTHER_NAMES = {
    "context_length": "data.sequence_length",
    "epochs": "train.max_steps",
    "grad_clip": "train.gradient_clipping",
    "layers": "model.num_hidden_layers",
    "lr": "optim.learning_rate",
    "max_grad_norm": "train.gradient_clipping",
    "max_seq_length": "data.sequence_length",
    "max_train_steps": "train.max_steps",
    "min_lr": "schedule.min_learning_rate_ratio",
    "num_gpus": "launch.num_processes",
    "num_layers": "model.num_hidden_layers",
    "num_train_epochs": "train.max_steps",
    "per_device_train_batch_size": "batch.micro_batch_size",
    "seq_length": "data.sequence_length",
    "steps": "train.max_steps",
    "warmup_ratio": "schedule.warmup_steps",
}
"""What transformers, Megatron and others call it."""


def parse_values(values: Mapping[str, Any]) -> Run:
    """Check plain resolved values against the schema: missing, unknown, types and ranges.

    Raises:
        UserError: with all mistakes at once.
    """
    missing = [
        Problem(path=path, message="a value is missing", hint=f"add {path}=...")
        for path, value in flatten(values)
        if value == "???"
    ]
    from pydantic import ValidationError  # 0.1 s that --help need not pay

    try:
        run: Run = _run_adapter().validate_python(dict(values))
    except ValidationError as error:
        found = [_explain_field(dict(item)) for item in error.errors() if item["input"] != "???"]
        raise UserError(missing + found) from error
    refuse(missing)  # a field of text would take "???" as its value
    return run


@cache
def _run_adapter() -> Any:
    """pydantic's reader of the schema: 20 ms to make, for each point of a sweep."""
    from pydantic import TypeAdapter

    return TypeAdapter(Run)


def _explain_field(found: dict[str, Any]) -> Problem:
    """One pydantic error as a problem."""
    path = ".".join(str(part) for part in found["loc"])
    if found["type"] == "unexpected_keyword_argument":
        return unknown_key(path, seen=f"{found['input']!r}")
    message = re.sub("^(Input|Value|List) ", "", str(found["msg"]))
    return Problem(path=path, message=f"{message} (got {found['input']!r})")


def unknown_key(path: str, *, seen: str) -> Problem:
    """The problem of a setting that doesn't exist, with the nearest ones that do."""
    for mapping in ("zero.extra", "deepspeed.extra"):
        if path.startswith(mapping):
            hint = f"a key is added to it with a plus: +{mapping}.KEY=VALUE"
            return Problem(path=path, message=f"cannot be set so (got {seen})", hint=hint)
    if path.startswith("data.sources"):
        hint = "a source is added with a plus: '+data.sources={NAME:{name:text,paths:[FILES]}}'"
        return Problem(path=path, message=f"names no source that is there (got {seen})", hint=hint)
    close = _nearest_setting(path)
    hint = f"did you mean {close}?" if close else "docs/configuration.md lists all settings"
    return Problem(path=path, message=f"there is no such setting (got {seen})", hint=hint)


def _nearest_setting(path: str) -> str | None:
    known = [known_path for known_path, _ in schema_paths()]
    first, _, rest = path.partition(".")
    name = path.rpartition(".")[2]
    owner = OWNED_KEYS.get(first)
    if owner is not None:  # in DeepSpeed's words
        inside = [f"{group}.{rest}" for group in (owner, owner.partition(".")[0])]
        return next((setting for setting in inside if setting in known), owner)
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    if any(candidate.startswith(f"deepspeed.{path}.") for candidate in known):
        return f"deepspeed.{path}"
    # The right name in the wrong group, then a slip of the fingers.
    same = [candidate for candidate in known if candidate.endswith(f".{path}")]
    others = [candidate for candidate in known if candidate.endswith(f".{name}")]
    same += difflib.get_close_matches(path, others, n=1, cutoff=0.6)
    same += difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    return same[0] if same else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings with their dotted paths."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def schema_paths(cls: type[Any] = Run, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and dataclass field of every setting."""
    for item in fields(cls):
        path = f"{prefix}{item.name}"
        if is_dataclass(item.type) and isinstance(item.type, type):
            yield from schema_paths(item.type, f"{path}.")
        else:
            yield path, item


def check_run(run: Run) -> Iterator[Problem]:
    """Every rule across fields."""
    for rule in (
        _check_model,
        check_data,
        check_tokenizer,
        _check_resume,
        _check_finished,
        _check_schedule,
        _check_train,
        _check_spikes,
        _check_checkpoints,
        _check_questions,
        check_deepspeed,
    ):
        yield from rule(run)


def _check_model(run: Run) -> Iterator[Problem]:
    model = run.model
    if model.name == "pretrained" and model.path is None:
        yield Problem(path="model.path", message="a value is missing", hint="add model.path=DIR")
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        yield Problem(
            path="model.num_attention_heads",
            message=f"does not divide model.hidden_size={model.hidden_size}"
            f" (got {model.num_attention_heads})",
            hint=f"nearest that do: {_name_near(model.hidden_size, model.num_attention_heads)},"
            " or set model.head_dim",
        )
    elif (model.head_dim or model.hidden_size // model.num_attention_heads) % 2:
        yield Problem(
            path="model.head_dim",
            message="rotary embeddings need an even width of each head"
            f" (got {model.head_dim or model.hidden_size // model.num_attention_heads})",
            hint="choose another model.num_attention_heads or an even model.head_dim",
        )
    groups = model.num_key_value_heads
    if groups is not None and model.num_attention_heads % groups:
        yield Problem(
            path="model.num_key_value_heads",
            message=f"does not divide model.num_attention_heads={model.num_attention_heads}"
            f" (got {groups})",
            hint=f"nearest that do: {_name_near(model.num_attention_heads, groups)}",
        )
    rope = model.rope_parameters
    needed = {
        RopeType.default: [],
        RopeType.linear: ["factor"],
        RopeType.llama3: [
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ],
    }[rope.rope_type]
    for name in (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ):
        given = getattr(rope, name) is not None
        if given != (name in needed):
            what = "needs a value" if not given else f"is not used (got {getattr(rope, name)})"
            yield Problem(
                path=f"model.rope_parameters.{name}",
                message=f"{what} with rope_type={rope.rope_type.value}",
                hint="set it" if not given else "set it to null, or change rope_type",
            )
    multiple = model.pad_embeddings_to_multiple_of
    if multiple != Model().pad_embeddings_to_multiple_of and not model.resize_embeddings:
        yield Problem(
            path="model.pad_embeddings_to_multiple_of",
            message="is read where embeddings grow, and model.resize_embeddings is false"
            f" (got {multiple})",
            hint="set model.resize_embeddings=true, or leave it out",
        )
    if run.data.sequence_length > model.max_position_embeddings:
        yield Problem(
            path="data.sequence_length",
            message=f"is longer than model.max_position_embeddings={model.max_position_embeddings}"
            f" (got {run.data.sequence_length})",
            hint=f"set it to {model.max_position_embeddings} at most, or set"
            f" model.max_position_embeddings={run.data.sequence_length}",
        )


def divisors_near(number: int, wanted: int) -> list[int]:
    """The largest divisor up to `wanted` and the smallest above it, as far as there are any.

    Above 10^12, where not every divisor is looked for, a nearer one may be missed.
    """
    small = [d for d in range(1, min(math.isqrt(number), 1_000_000) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    split = bisect.bisect_right(divisors, wanted)
    return divisors[max(0, split - 1) : split + 1]


def _name_near(number: int, wanted: int) -> str:
    """The divisors near a number that is none."""
    return ", ".join(str(divisor) for divisor in divisors_near(number, wanted))


def _check_schedule(run: Run) -> Iterator[Problem]:
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


def _check_train(run: Run) -> Iterator[Problem]:
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


def _check_spikes(run: Run) -> Iterator[Problem]:
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


def _check_checkpoints(run: Run) -> Iterator[Problem]:
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


def _check_resume(run: Run) -> Iterator[Problem]:
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


def _check_finished(run: Run) -> Iterator[Problem]:
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


def _check_questions(run: Run) -> Iterator[Problem]:
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

"""What a config may not say: ranges of single fields, and rules across fields.

Each rule is a generator of problems that looks at the config alone; what depends on the machine is
in plan/feasible.py.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.schema import (
    DataName,
    OffloadDevice,
    OptimName,
    Precision,
    PrecisionName,
    RopeType,
    Run,
    ScheduleName,
    Task,
    TokenizerName,
)


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
    from pydantic import TypeAdapter, ValidationError  # 0.1 s that --help need not pay

    try:
        run = TypeAdapter(Run).validate_python(dict(values))
    except ValidationError as error:
        found = [_explain_field(dict(item)) for item in error.errors() if item["input"] != "???"]
        raise UserError(missing + found) from error
    refuse(missing)  # a field of text would take "???" as its value
    return run


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
    known = [known_path for known_path, _ in schema_paths()]
    name = path.rsplit(".", 1)[-1]
    # The right name in the wrong group first, then a slip of the fingers.
    close = [candidate for candidate in known if candidate.rsplit(".", 1)[-1] == name][:1]
    close = close or difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else "docs/configuration.md lists all settings"
    return Problem(path=path, message=f"there is no such setting (got {seen})", hint=hint)


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
        _check_data,
        _check_tokenizer,
        _check_optim,
        _check_schedule,
        _check_zero,
        _check_precision,
        _check_train,
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
            hint=f"nearest that do: {_divisors_near(model.hidden_size, model.num_attention_heads)},"
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
            hint=f"nearest that do: {_divisors_near(model.num_attention_heads, groups)}",
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
    if run.data.sequence_length > model.max_position_embeddings:
        yield Problem(
            path="data.sequence_length",
            message=f"is longer than model.max_position_embeddings={model.max_position_embeddings}"
            f" (got {run.data.sequence_length})",
            hint="shorten the rows, or raise model.max_position_embeddings",
        )


def _divisors_near(number: int, wanted: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    return ", ".join(str(d) for d in below + [d for d in divisors if d > wanted][:1])


def _check_data(run: Run) -> Iterator[Problem]:
    data = run.data
    if data.name is DataName.text and not data.paths and run.task is not Task.plan:
        yield Problem(
            path="data.paths",
            message="data=text needs files",
            hint="add data.paths=[corpus/*.txt]",
        )
    if data.name is not DataName.text and data.paths:
        yield Problem(
            path="data.paths",
            message=f"is not read with data={data.name.value} (got {data.paths})",
            hint="add data=text",
        )


def _check_tokenizer(run: Run) -> Iterator[Problem]:
    tokenizer, model = run.tokenizer, run.model
    pretrained = tokenizer.name is TokenizerName.pretrained
    if pretrained and tokenizer.path is None and run.task is not Task.plan:
        yield Problem(
            path="tokenizer.path",
            message="tokenizer=pretrained needs a directory",
            hint="add tokenizer.path=DIR",
        )
    if tokenizer.name is TokenizerName.train and tokenizer.path is not None:
        yield Problem(
            path="tokenizer.path",
            message=f"is not read with tokenizer=train (got {tokenizer.path})",
            hint="add tokenizer=pretrained",
        )
    too_large = tokenizer.vocab_size > model.vocab_size and not model.resize_embeddings
    if tokenizer.name is TokenizerName.train and model.path is None and too_large:
        yield Problem(
            path="tokenizer.vocab_size",
            message=f"is larger than model.vocab_size={model.vocab_size}"
            f" (got {tokenizer.vocab_size})",
            hint=f"set model.vocab_size={tokenizer.vocab_size}, or model.resize_embeddings=true",
        )


def _check_optim(run: Run) -> Iterator[Problem]:
    for index, beta in enumerate(run.optim.betas):
        if not 0 <= beta < 1:
            yield Problem(
                path=f"optim.betas.{index}",
                message=f"should be at least 0 and less than 1 (got {beta})",
            )
    offloaded = run.zero.offload_optimizer.device is not OffloadDevice.none
    if offloaded and run.optim.name not in (OptimName.adamw, OptimName.cpu_adam):
        device = run.zero.offload_optimizer.device.value
        yield Problem(
            path="zero.offload_optimizer.device",
            message=f"{device} needs optim=cpu_adam (got optim={run.optim.name.value})",
            hint="add optim=cpu_adam, or set zero.offload_optimizer.device=none",
        )


def _check_schedule(run: Run) -> Iterator[Problem]:
    schedule = run.schedule
    for what in ("warmup", "decay"):
        steps, tokens = getattr(schedule, f"{what}_steps"), getattr(schedule, f"{what}_tokens")
        if steps is not None and tokens is not None:
            yield Problem(
                path=f"schedule.{what}_tokens",
                message=f"is given as well as schedule.{what}_steps={steps} (got {tokens})",
                hint=f"set one of them to null, say schedule.{what}_steps=null",
            )
        if what == "decay" and schedule.name is not ScheduleName.wsd:
            for name, value in (("decay_steps", steps), ("decay_tokens", tokens)):
                if value is not None:
                    yield Problem(
                        path=f"schedule.{name}",
                        message=f"is not used with schedule={schedule.name.value} (got {value})",
                        hint="add schedule=wsd",
                    )


def _check_zero(run: Run) -> Iterator[Problem]:
    zero = run.zero
    for name in ("offload_optimizer", "offload_param"):
        section = getattr(zero, name)
        least = 3 if name == "offload_param" or section.device is OffloadDevice.nvme else 1
        if section.device is not OffloadDevice.none and zero.stage < least:
            yield Problem(
                path=f"zero.{name}.device",
                message=f"{section.device.value} needs zero.stage={least}"
                f"{'' if least == 3 else ' or higher'} (got stage {zero.stage})",
                hint=f"add zero=stage{least}_offload" if least == 3 else "add zero=stage2_offload",
            )
        on_disk = section.device is OffloadDevice.nvme
        if on_disk and section.nvme_path is None and run.task is not Task.plan:
            yield Problem(
                path=f"zero.{name}.nvme_path",
                message="nvme needs a folder on a local disk",
                hint=f"add zero.{name}.nvme_path=DIR",
            )
    if zero.stage < 3:
        for name, off in (
            ("zero_hpz_partition_size", 1),
            ("zero_quantized_weights", False),
            ("zero_quantized_gradients", False),
        ):
            if getattr(zero, name) != off:
                yield Problem(
                    path=f"zero.{name}",
                    message=f"ZeRO++ needs zero.stage=3 (got stage {zero.stage})",
                    hint="add zero=zeropp",
                )
    owned = {item.name for item in fields(zero)}
    for key in sorted(owned & set(zero.extra)):
        yield Problem(
            path=f"zero.extra.{key}",
            message="there is a setting of that name",
            hint=f"set zero.{key} instead",
        )


def _check_precision(run: Run) -> Iterator[Problem]:
    precision = run.precision
    if precision.name is not PrecisionName.fp16:
        default = Precision()
        for name in (
            "loss_scale",
            "initial_scale_power",
            "loss_scale_window",
            "hysteresis",
            "min_loss_scale",
        ):
            if getattr(precision, name) != getattr(default, name):
                yield Problem(
                    path=f"precision.{name}",
                    message=f"is used by fp16 alone (got precision={precision.name.value})",
                    hint="add precision=fp16, or leave it out",
                )
    if precision.grad_accum_dtype is not None and run.zero.stage == 0:
        yield Problem(
            path="precision.grad_accum_dtype",
            message="DeepSpeed has it from stage 1 on (got stage 0)",
            hint="add zero=stage1, or leave it out",
        )


def _check_train(run: Run) -> Iterator[Problem]:
    if run.train.max_steps is None and run.train.max_tokens is None:
        yield Problem(
            path="train.max_steps",
            message="the run has no end",
            hint="set train.max_steps or train.max_tokens",
        )

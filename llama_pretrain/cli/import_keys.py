"""DeepSpeed's keys, values and defaults, and what each is called here.

A table of parameters holds our setting and DeepSpeed's default, `None` where it has none.
"""

import difflib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from llama_pretrain.config.deepspeed import DeepSpeed
from llama_pretrain.config.fields import plain_value, type_of, walk_fields
from llama_pretrain.config.precision import TorchAutocast
from llama_pretrain.config.run import Run
from llama_pretrain.config.secrets import find_secrets, redact_values
from llama_pretrain.config.zero import Zero
from llama_pretrain.plan.ds_config import BF16_KEYS, FP16_KEYS, SOURCES

Parameters = Mapping[str, tuple[str, Any]]

ZERO = "zero_optimization"

FORMER = {
    "allgather_size": f"{ZERO}.allgather_bucket_size",
    f"{ZERO}.cpu_offload": f"{ZERO}.offload_optimizer.device",
    f"{ZERO}.cpu_offload_param": f"{ZERO}.offload_param.device",
    f"{ZERO}.cpu_offload_params": f"{ZERO}.offload_param.device",
    f"{ZERO}.stage3_gather_fp16_weights_on_model_save": (
        f"{ZERO}.stage3_gather_16bit_weights_on_model_save"
    ),
}
"""Former names of keys; `bfloat16` and names without their `stage3_` are understood as well."""

DTYPES = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}

OLD_SWITCHES = ("cpu_offload", "cpu_offload_param", "cpu_offload_params")
"""Keys that DeepSpeed had in place of a device; they are true or false."""

READ_AS_TRUTH = ("activation_checkpointing", "aio", "flops_profiler", "torch_autocast", "")
"""Sections, and the top level, where DeepSpeed takes any text for true."""

SPELLINGS: Mapping[str, Mapping[str, Any]] = {
    "precision.grad_accum_dtype": DTYPES,
    "precision.buffer_dtype": DTYPES,
    "precision.torch_autocast.dtype": {
        **dict.fromkeys(("bf16", "bfloat16"), "bfloat16"),
        **dict.fromkeys(("fp16", "float16", "half"), "float16"),
    },
    "deepspeed.checkpoint.tag_validation": {"ignore": "Ignore", "warn": "Warn", "fail": "Fail"},
    "deepspeed.tensor_parallel.autotp_size": {"0": 1},
    "deepspeed.tensorboard.output_path": {"": None},
    "deepspeed.csv_monitor.output_path": {"": None},
    "zero.stage3_model_persistence_threshold": {str(sys.maxsize): None},
}
"""Other ways to write a value, in lower case and without `torch.`."""

DEFAULTS: Mapping[str, Any] = {
    "gradient_clipping": 1.0,
    f"{ZERO}.reduce_scatter": True,
    f"{ZERO}.reduce_bucket_size": 500_000_000,
    f"{ZERO}.stage3_prefetch_bucket_size": 50_000_000,
    f"{ZERO}.stage3_param_persistence_threshold": 100_000,
    f"{ZERO}.offload_optimizer.pin_memory": True,
    f"{ZERO}.offload_param.pin_memory": True,
    "torch_autocast.dtype": "float16",  # torch's own, on CUDA
    "flops_profiler.profile_step": 1,
    "tensorboard.job_name": "DeepSpeedJobName",
    "csv_monitor.job_name": "DeepSpeedJobName",
    "wandb.project": "deepspeed",
}
"""What DeepSpeed takes for an absent key where we take something else."""

ADAM: Parameters = {
    "lr": ("optim.learning_rate", 1e-3),
    "betas": ("optim.betas", [0.9, 0.999]),
    "eps": ("optim.eps", 1e-8),
    "weight_decay": ("optim.weight_decay", 0.0),
}

LION: Parameters = {key: ADAM[key] for key in ("lr", "betas", "weight_decay")}

ADAGRAD: Parameters = {
    "lr": ("optim.learning_rate", 1e-2),
    "eps": ("optim.eps", 1e-10),
    "weight_decay": ("optim.weight_decay", 0.0),
}

MUON: Parameters = {
    "adam_lr": ("optim.learning_rate", 3e-4),
    "muon_lr": ("optim.muon_learning_rate", 0.02),
    "momentum": ("optim.muon_momentum", 0.95),
    "betas": ("optim.betas", [0.9, 0.95]),
    "eps": ("optim.eps", 1e-10),
    "weight_decay": ("optim.weight_decay", 0.0),
}

OPTIMIZERS: Mapping[str, tuple[str, Parameters]] = {
    "adam": ("adamw", ADAM),
    "adamw": ("adamw", ADAM),
    "lamb": ("lamb", ADAM),
    "lion": ("lion", LION),
    "adagrad": ("cpu_adagrad", ADAGRAD),
    "muon": ("muon", MUON),
}
"""DeepSpeed's type in lower case -> our option and its parameters."""

REMOVED_OPTIMIZERS = ("onebitadam", "zerooneadam", "onebitlamb")
"""Types whose last release is DeepSpeed 0.19.6."""

TORCH_WEIGHT_DECAY = 0.01
"""Default of torch.optim.AdamW."""

WARMUP: Parameters = {"warmup_num_steps": ("schedule.warmup_steps", 1000)}

TOTAL: Parameters = {"total_num_steps": ("train.max_steps", None)}

LEAST = "schedule.min_learning_rate_ratio"

SCHEDULERS: Mapping[str, tuple[str, Parameters]] = {
    "WarmupLR": ("constant", {**WARMUP, "warmup_max_lr": ("optim.learning_rate", None)}),
    "WarmupDecayLR": (
        "linear",
        {**WARMUP, **TOTAL, "warmup_max_lr": ("optim.learning_rate", 1e-3)},
    ),
    "WarmupCosineLR": ("cosine", {**WARMUP, **TOTAL, "cos_min_ratio": (LEAST, 1e-4)}),
}
"""DeepSpeed's type -> our option and its parameters."""

NO_SETTING = "has no setting here"

FIXED: Mapping[str, tuple[Any, str]] = {
    "adam_w_mode": (True, "is L2 regularization; weight decay is decoupled here"),
    "amsgrad": (False, NO_SETTING),
    "bias_correction": (True, NO_SETTING),
    "eps_inside_sqrt": (False, NO_SETTING),
    "fp32_optimizer_states": (True, "set precision.bf16_optimizer_states instead"),
    "max_coeff": (10.0, NO_SETTING),
    "max_grad_norm": (0, "is rejected by DeepSpeed 0.19.8; set train.gradient_clipping instead"),
    "min_coeff": (0.01, NO_SETTING),
    "ns_method": ("gram", NO_SETTING),
    "set_grad_none": (True, NO_SETTING),
    "torch_adam": (False, "has no effect: DeepSpeed's CPUAdam updates offloaded state"),
    "warmup_min_lr": (0, "has no setting here: warm-up starts at 0"),
    "warmup_min_ratio": (0, "has no setting here: warm-up starts at 0"),
    "warmup_type": ("linear", "has no setting here: warm-up is linear"),
}
"""Parameters that have one value here, and the message for any other."""

REASONS = {
    "aio.thread_count": "is not read; set deepspeed.aio.intra_op_parallelism instead",
    "data_types.param_dtype": "has no setting here: precision sets the type of weights",
    f"{ZERO}.cpu_offload_use_pin_memory": (
        "is ignored by DeepSpeed 0.19.8; set zero.offload_optimizer.pin_memory or"
        " zero.offload_param.pin_memory instead"
    ),
}
"""Keys that DeepSpeed knows and that have no setting here, with the reason."""

NEUTRAL = {
    "compute_grad_norm": True,
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
}
"""Values of refused keys that ask for nothing, where that is not `false`."""

AUTO = {
    "zero.reduce_bucket_size": "is hidden_size^2 at stage 3, as in transformers, else 5e8",
    "zero.stage3_prefetch_bucket_size": "is 0.9 * hidden_size^2, as in transformers",
    "zero.stage3_param_persistence_threshold": "is 10 * hidden_size, as in transformers",
}
"""Messages for an "auto" that transformers derives from the model, as we do."""

KEY = re.compile(r"(?!(?:null|true|false|inf|nan)$)[A-Za-z_][A-Za-z0-9_.-]*")
"""Keys of a mapping that Hydra's grammar can express as text."""

MAX_DEPTH = 20
"""Levels of a value; Hydra's parser is recursive."""

MAX_SHOWN = 70
"""Characters of a value that are shown."""


@cache
def known_paths() -> frozenset[str]:
    """Every path of the JSON that a setting of ours stands for."""
    paths = [path for path in SOURCES if path != "zero_force_ds_cpu_optimizer"]
    paths += [f"{ZERO}.{path}" for path, _ in walk_fields(Zero) if path != "extra"]
    paths += [path for path, _ in walk_fields(DeepSpeed) if path != "extra"]
    paths += [f"torch_autocast.{path}" for path, _ in walk_fields(TorchAutocast)]
    paths += [f"data_types.{key}" for key in ("grad_accum_dtype", "buffer_dtype")]
    return frozenset([*paths, *(f"bf16.{k}" for k in BF16_KEYS), *(f"fp16.{k}" for k in FP16_KEYS)])


def read_switch(value: Any) -> bool | None:
    """True or false as DeepSpeed reads it; `None` for what it rejects."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return None


def parse_setting(setting: str, value: Any, path: str) -> Any:
    """A value of the JSON as a plain value of a setting.

    Args:
        path: the key that holds it.

    Raises:
        ValueError: if the setting cannot have this value; the text is a message.
    """
    section, _, key = path.rpartition(".")
    if key in OLD_SWITCHES:
        switch = read_switch(value)
        if switch is None:
            raise ValueError("must be true or false")
        return "cpu" if switch else "none"
    _check_texts(value)
    if any(find_secrets(value, setting)):
        raise ValueError("looks like a secret, and would be written to the run's files")
    if setting == "zero.stage" and isinstance(value, bool):
        return int(value)
    value = SPELLINGS.get(setting, {}).get(str(value).lower().removeprefix("torch."), value)
    if setting not in _types():
        return value
    kind, adapter = _types()[setting]
    kinds = get_args(kind) or (kind,)
    if isinstance(value, bool) and {int, float} & set(kinds):
        raise ValueError("must be a number")
    try:
        parsed = plain_value(adapter.validate_python(value))
    except ValidationError as error:
        message = str(error.errors()[0]["msg"])
        raise ValueError(re.sub("^(Input|Value|List) should", "must", message)) from None
    if parsed is False and isinstance(value, str) and section in READ_AS_TRUTH:
        raise ValueError("is read as true by DeepSpeed 0.19.8, as any text is")
    return parsed


@cache
def _types() -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    types: list[tuple[str, Any, Any]] = [
        (path, type_of(item), item.type)
        for path, item in walk_fields(Run)
        if not path.endswith("extra")
    ]
    config = ConfigDict(allow_inf_nan=False)
    return {path: (kind, TypeAdapter(marked, config=config)) for path, kind, marked in types}


def _check_texts(value: Any, depth: int = 0) -> None:
    """Refuse what the grammar of overrides or a snapshot cannot hold."""
    if depth > MAX_DEPTH:
        raise ValueError("is nested too deeply")
    if isinstance(value, Mapping):
        wrong = [key for key in value if not KEY.fullmatch(key)]
        if wrong:
            raise ValueError(f"has a key that an override cannot express ({json.dumps(wrong[0])})")
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_texts(item, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be finite")
    elif isinstance(value, str) and ("${" in value or value == "???"):
        raise ValueError("would be an interpolation here")
    elif isinstance(value, str) and not value.isprintable():
        raise ValueError("contains a character that cannot be printed")


def walk_config(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values with their paths; a section that we do not know is one value."""
    for key, value in config.items():
        path = f"{prefix}{json.dumps(key) if '.' in key else key}"
        section = path if path == ZERO else present_name(path)
        if isinstance(value, Mapping) and any(n.startswith(f"{section}.") for n in known_paths()):
            yield from walk_config(value, f"{path}.")
        else:
            yield path, value


def present_name(path: str) -> str:
    """What DeepSpeed 0.19.8 calls a key that has, or had, another name."""
    section, _, key = path.rpartition(".")
    stage3 = f"{ZERO}.stage3_{key}"
    if section == ZERO and stage3 in known_paths():
        return stage3
    return FORMER.get(path, re.sub(r"^bfloat16\b", "bf16", path))


def explain_key(path: str) -> tuple[str, str]:
    """Why a key has no setting, and the nearest key of its section, or its name in another."""
    if path in REASONS:
        return REASONS[path], ""
    section, _, key = path.rpartition(".")
    prefix = f"{section}." if section else ""
    inside = [name.removeprefix(prefix) for name in known_paths() if name.startswith(prefix)]
    near = {name.partition(".")[0] for name in inside} | {"optimizer", "scheduler"}
    close = difflib.get_close_matches(key, sorted(near), n=1, cutoff=0.8)
    names = [prefix + name for name in close]
    names += [name for name in sorted(known_paths()) if name.endswith(f".{key}")]
    return NO_SETTING, f"Did you mean {names[0]}?" if names else ""


def show_key(path: str, value: Any, *, given: bool = True) -> str:
    """A key with its value, in one printable line."""
    path = path if path.isprintable() else json.dumps(path)
    text = json.dumps(redact_values({path: value}, known=())[path])
    text = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
    return f"{path} = {text}" if given else f"{path} (absent: {text})"

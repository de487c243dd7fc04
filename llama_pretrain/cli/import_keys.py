"""DeepSpeed's keys, values and defaults, and what each is called here.

A table of parameters holds our setting and DeepSpeed's default, `None` where it has none.
"""

import difflib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llama_pretrain.config.deepspeed import DeepSpeed
from llama_pretrain.config.fields import walk_fields
from llama_pretrain.config.precision import TorchAutocast
from llama_pretrain.config.zero import Zero
from llama_pretrain.plan.ds_config import BF16_KEYS, FP16_KEYS, SOURCES

Parameters = Mapping[str, tuple[str, Any]]


ZERO = "zero_optimization"


FORMER = {
    ZERO: f"{ZERO}.stage",  # true or false, before there were stages
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


SWITCHED = {"true": "cpu", "false": "none"}


SPELLINGS: Mapping[str, Mapping[str, Any]] = {
    "zero.stage": {"true": 1, "false": 0},
    "zero.offload_optimizer.device": SWITCHED,
    "zero.offload_param.device": SWITCHED,
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
"""Types that DeepSpeed 0.19.6 is the last to have."""


TORCH_WEIGHT_DECAY = 0.01
"""torch.optim.AdamW decays where it is told nothing."""


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
    "adam_w_mode": (True, "this is L2; weight decay is AdamW's here"),
    "amsgrad": (False, NO_SETTING),
    "bias_correction": (True, NO_SETTING),
    "eps_inside_sqrt": (False, NO_SETTING),
    "fp32_optimizer_states": (True, "precision.bf16_optimizer_states is the setting for it"),
    "max_coeff": (10.0, NO_SETTING),
    "max_grad_norm": (0, "DeepSpeed 0.19.8 refuses it here; train.gradient_clipping is for it"),
    "min_coeff": (0.01, NO_SETTING),
    "ns_method": ("gram", NO_SETTING),
    "set_grad_none": (True, NO_SETTING),
    "torch_adam": (False, "DeepSpeed's CPUAdam updates what is offloaded"),
    "warmup_min_lr": (0, "the warm-up starts at 0 here"),
    "warmup_min_ratio": (0, "the warm-up starts at 0 here"),
    "warmup_type": ("linear", "the warm-up is linear here"),
}
"""Parameters that have one value here, and what to say of another."""


REASONS = {
    "aio.thread_count": "DeepSpeed 0.19.8 reads deepspeed.aio.intra_op_parallelism instead",
    "data_types.param_dtype": "precision decides the type of weights",
    f"{ZERO}.cpu_offload_use_pin_memory": (
        "DeepSpeed 0.19.8 ignores it; zero.offload_optimizer.pin_memory and"
        " zero.offload_param.pin_memory are for it"
    ),
}
"""Why a key that a setting could stand for has none."""


NEUTRAL = {
    "compute_grad_norm": True,
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
}
"""Values of refused keys that ask for nothing, where that is not `false`."""


AUTO = {
    "zero.reduce_bucket_size": "transformers' hidden_size^2 is our null at stage 3, else it is 5e8",
    "zero.stage3_prefetch_bucket_size": "our null is transformers' 0.9 * hidden_size^2 too",
    "zero.stage3_param_persistence_threshold": "our null is transformers' 10 * hidden_size too",
}
"""What to say of an "auto" that transformers derives from the model, as we do."""


SECRET = re.compile(r"(api_?key|token|secret|password)$", re.IGNORECASE)
"""Keys whose values are not shown."""


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


def read_switch(value: Any) -> Any:
    """True or false as DeepSpeed reads it, "auto", or `None` for what it refuses."""
    try:
        return value if value == "auto" else TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return None


def walk_config(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values with their paths; a section that we do not know is one value."""
    for key, value in config.items():
        path = f"{prefix}{key}"
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


def suggest_key(path: str) -> str:
    """The nearest key of the section, or the same name in another."""
    section, _, key = path.rpartition(".")
    prefix = f"{section}." if section else ""
    inside = [name.removeprefix(prefix) for name in known_paths() if name.startswith(prefix)]
    near = {name.partition(".")[0] for name in inside} | {"optimizer", "scheduler"}
    close = difflib.get_close_matches(key, sorted(near), n=1, cutoff=0.8)
    names = [prefix + name for name in close]
    names += [name for name in sorted(known_paths()) if name.endswith(f".{key}")]
    return f"did you mean {names[0]}?" if names else ""


def show_key(path: str, value: Any, *, given: bool = True) -> str:
    """A key with its value, in one printable line."""
    path = path if path.isprintable() else json.dumps(path)
    text = json.dumps(_mask(path, value))
    text = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
    return f"{path} = {text}" if given else f"{path} (absent: {text})"


def _mask(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _mask(name, item) for name, item in value.items()}
    if isinstance(value, list):
        return [_mask(key, item) for item in value]
    return "***" if SECRET.search(key) else value

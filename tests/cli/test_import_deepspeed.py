"""A DeepSpeed JSON becomes a command that gives the same run, and a list of what it cannot."""

import inspect
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.cli import import_keys
from llama_pretrain.cli.import_deepspeed import describe_import, import_ds_config
from llama_pretrain.cli.overrides import default_settings, render_overrides, render_value
from llama_pretrain.config.compose import PROJECT_ROOT
from llama_pretrain.config.optim import OptimName
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.config.validate import validate_run
from llama_pretrain.plan.batch import solve_batch
from llama_pretrain.plan.ds_config import get_train_ds_config
from llama_pretrain.plan.resolve import resolve
from tests.conftest import ROOT, compose_run
from tests.machines import CLUSTER

TYPES = {
    "adamw": "AdamW",
    "torch_adamw": "AdamW",
    "fused_adam": "AdamW",
    "cpu_adam": "AdamW",
    "lion": "Lion",
    "fused_lion": "Lion",
    "cpu_lion": "Lion",
    "cpu_adagrad": "Adagrad",
    "lamb": "Lamb",
    "muon": "Muon",
}
"""What DeepSpeed calls each of our optimizers."""

NEEDS = {
    "zero=stage3_nvme": ["zero.offload_param.nvme_path='/disk one/swap'"],
    "optim=cpu_adam": ["zero=stage2_offload"],
    "optim=cpu_lion": ["zero=stage3_offload"],
    "optim=cpu_adagrad": ["zero=stage1", "zero.offload_optimizer.device=cpu"],
    "optim=lamb": ["zero=stage0", "precision=fp16"],
    "optim=muon": ["zero=stage3"],
}
"""What an option wants beside itself."""

BESIDE = [
    ["zero=stage2", "zero.reduce_bucket_size=200_000_000", "zero.overlap_comm=false"],
    ["zero=stage3", "zero.sub_group_size=7", "zero.stage3_max_live_parameters=30_000_000"],
    ["zero=stage3", "zero.reduce_bucket_size=5", "zero.stage3_prefetch_bucket_size=0"],
    ["zero=stage2_offload", "zero.offload_optimizer.pin_memory=false"],
    ["zero=stage3_offload", "zero.offload_optimizer.ratio=0.3"],
    ["zero=stage0", "train.gradient_clipping=0", "deepspeed.prescale_gradients=true"],
    ["+zero.extra.load_from_fp32_weights=false", "+deepspeed.extra.log_level=info"],
    ["+zero.extra.leaf_module={names:[gate]}", "precision.grad_accum_dtype=fp32"],
    ["precision=fp16", "precision.loss_scale_window=100", "precision.initial_scale_power=12"],
    ["precision=bf16", "precision.communication_data_type=fp32", "precision.buffer_dtype=bf16"],
    ["deepspeed.tensorboard.enabled=true", "deepspeed.tensorboard.output_path='my logs'"],
    ["deepspeed.flops_profiler.enabled=true", "deepspeed.comms_logger.enabled=true"],
    ["deepspeed.hybrid_engine.enabled=true", "deepspeed.steps_per_print=7"],
    ["batch.global_batch_size=64", "batch.micro_batch_size=2", "deepspeed.memory_breakdown=true"],
]


def options(*groups: str) -> list[str]:
    files = [path for group in groups for path in (PROJECT_ROOT / "conf" / group).glob("*.yaml")]
    return sorted(f"{path.parent.name}={path.stem}" for path in files)


def emit(overrides: list[str]) -> tuple[Run, dict[str, Any]]:
    """A run on the cluster, and its JSON as a file would hold it."""
    run = resolve(compose_run(overrides), CLUSTER)
    assert list(validate_run(run)) == []
    batch = solve_batch(
        run.batch, sequence_length=run.data.sequence_length, world_size=run.num_ranks
    )
    return run, json.loads(json.dumps(get_train_ds_config(run, batch, run_dir=None)))


def optimizer_section(run: Run) -> dict[str, Any]:
    """The optimizer of a run as DeepSpeed would be told."""
    optim, kind = run.optim, TYPES[run.optim.name.value]
    params: dict[str, Any] = {"lr": optim.learning_rate, "weight_decay": optim.weight_decay}
    if kind != "Adagrad":
        params["betas"] = optim.betas
    if kind != "Lion":
        params["eps"] = optim.eps
    if kind == "Muon":
        params |= {"muon_lr": optim.muon_learning_rate, "momentum": optim.muon_momentum}
        params["adam_lr"] = params.pop("lr")
    if optim.name.value == "torch_adamw":
        params["torch_adam"] = True
    return {"type": kind, "params": params}


@pytest.mark.parametrize(
    "overrides",
    [
        *([option, *NEEDS.get(option, [])] for option in options("zero", "precision", "optim")),
        *BESIDE,
    ],
    ids=" ".join,
)
def test_round_trip(overrides: list[str]) -> None:
    """JSON -> command -> JSON is the identity, and nothing of ours is lost."""
    run, config = emit(overrides)
    found = import_ds_config(config | {"optimizer": optimizer_section(run)})
    assert found.lost == []
    again, emitted = emit(render_overrides(found.wanted))
    assert emitted == config
    # DeepSpeed's AdamW is the rule to us, whichever kernel we choose for it.
    rule = OptimName.torch_adamw if run.optim.name is OptimName.fused_adam else run.optim.name
    assert again.optim == replace(run.optim, name=rule)


@pytest.mark.parametrize(
    "config",
    [
        *({"zero_optimization": {"stage": stage}} for stage in range(4)),
        {},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        {
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "nvme", "nvme_path": "/d", "buffer_size": 3e8},
                "offload_optimizer": {"device": "nvme", "nvme_path": "/d", "pin_memory": False},
            },
            "aio": {"queue_depth": 32},
        },
        {"zero_optimization": {"stage": 1, "cpu_offload": True}, "bfloat16": {"enabled": True}},
        {"zero_optimization": True, "allgather_size": 2e8},
        {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 0}, "fp16": {"enabled": True}},
        {"fp16": {"enabled": True, "initial_scale_power": 12}, "gradient_clipping": 0.5},
        {"flops_profiler": {"enabled": True}, "data_types": {"buffer_dtype": "bfloat16"}},
        {"wandb": {"enabled": True}, "tensorboard": {"enabled": True}},
    ],
    ids=lambda config: json.dumps(config),
)
def test_deepspeed_reads_the_same(config: dict[str, Any]) -> None:
    """DeepSpeed's own classes get the same values from the file and from what our run emits.

    So a default of DeepSpeed that is not ours is asked for.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.swap_tensor.constants import AIO

    config = config | {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1}
    found = import_ds_config(config)
    assert found.lost == []
    _, emitted = emit(render_overrides(found.wanted))
    former, latter = (
        DeepSpeedConfig({**values, "train_batch_size": 1}) for values in (config, emitted)
    )
    for name in ("zero_config", "bfloat16_config", "float16_config", "monitor_config"):
        meant, got = (getattr(config, name).model_dump() for config in (former, latter))
        got.pop("cpu_offload", None)  # its value has gone to offload_optimizer
        assert got == {key: meant[key] for key in got}, name
    assert latter.gradient_clipping == former.gradient_clipping
    assert latter.flops_profiler_config.profile_step == former.flops_profiler_config.profile_step
    assert getattr(latter, f"{AIO}_config") == getattr(former, f"{AIO}_config")


def test_defaults_of_optimizers_and_schedulers_are_deepspeeds() -> None:
    import torch
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
    from deepspeed.runtime import lr_schedules

    builders = [
        ("adam", FusedAdam),
        ("adamw", DeepSpeedCPUAdam),
        ("lamb", FusedLamb),
        ("lion", FusedLion),
        ("lion", DeepSpeedCPULion),
        ("adagrad", DeepSpeedCPUAdagrad),
    ]
    tables = [(import_keys.OPTIMIZERS[name][1], builder) for name, builder in builders]
    tables += [
        (parameters, getattr(lr_schedules, name))
        for name, (_, parameters) in import_keys.SCHEDULERS.items()
    ]
    for table, builder in tables:
        signature = inspect.signature(builder).parameters
        for key, (_, default) in table.items():
            theirs = signature[key].default
            theirs = None if theirs is inspect.Parameter.empty else theirs
            assert default == (list(theirs) if isinstance(theirs, tuple) else theirs), key
        for key in signature.keys() & import_keys.FIXED.keys():
            assert signature[key].default == import_keys.FIXED[key][0] or key == "warmup_type", key
    decay = inspect.signature(torch.optim.AdamW).parameters["weight_decay"].default
    assert decay == import_keys.TORCH_WEIGHT_DECAY


def test_default_settings_are_hydras() -> None:
    from llama_pretrain.config.validate import flatten

    composed = dict(flatten(to_plain(compose_run([]))))
    ours = default_settings()
    assert ours.pop("data.cache_dir").startswith("${oc.env:")
    assert ours == {path: value for path, value in composed.items() if path != "data.cache_dir"}


HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_fp16_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": 4,
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
    "zero_force_ds_cpu_optimizer": False,
}
HUGGING_FACE_TEXT = """\
python run.py zero=stage3_offload schedule=constant zero.overlap_comm=true \
zero.stage3_gather_16bit_weights_on_model_save=true deepspeed.steps_per_print=2000
not carried over:
  fp16.enabled = "auto": was filled in elsewhere; precision.name decides here (chosen: bf16 if \
the device supports it natively)
  bf16.enabled = "auto": was filled in elsewhere; precision.name decides here (chosen: bf16 if \
the device supports it natively)
  zero_optimization.reduce_bucket_size = "auto": transformers' hidden_size^2 is our null at stage \
3, else it is 5e8
  zero_optimization.stage3_prefetch_bucket_size = "auto": our null is transformers' 0.9 * \
hidden_size^2 too
  zero_optimization.stage3_param_persistence_threshold = "auto": our null is transformers' 10 * \
hidden_size too
  gradient_clipping = "auto": was filled in elsewhere; train.gradient_clipping decides here \
(chosen: 1.0, but 0 with Muon)
  train_batch_size = "auto": was filled in elsewhere; batch.global_batch_size decides here \
(chosen: 16 sequences, or the next multiple of the ranks)
  train_micro_batch_size_per_gpu = "auto": was filled in elsewhere; batch.micro_batch_size \
decides here
  scheduler.type = "WarmupLR": DeepSpeed's takes its first two steps at a learning rate of 0, \
schedule=constant none
  scheduler.params.warmup_type (absent: "log"): the warm-up is linear here
  scheduler.params.warmup_num_steps = "auto": was filled in elsewhere; schedule.warmup_steps \
decides here
  scheduler.params.warmup_max_lr = "auto": was filled in elsewhere; optim.learning_rate decides \
here (derived: optim.scale_by_batch of the global batch)
  optimizer.params.lr = "auto": was filled in elsewhere; optim.learning_rate decides here \
(derived: optim.scale_by_batch of the global batch)
  optimizer.params.betas = "auto": was filled in elsewhere; optim.betas decides here
  optimizer.params.eps = "auto": was filled in elsewhere; optim.eps decides here
  optimizer.params.weight_decay = "auto": was filled in elsewhere; optim.weight_decay decides here
  zero_force_ds_cpu_optimizer = false: what is offloaded is updated by DeepSpeed's own optimizers \
here
  gradient_accumulation_steps = 4: says nothing without a batch size. Set batch.micro_batch_size \
too.
"""

DEEPSPEED_CHAT = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "steps_per_print": 10,
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "offload_param": {"device": "none"},
        "offload_optimizer": {"device": "none"},
        "stage3_param_persistence_threshold": 1e4,
        "stage3_max_live_parameters": 3e7,
        "stage3_prefetch_bucket_size": 3e7,
        "memory_efficient_linear": False,
    },
    "fp16": {"enabled": True, "loss_scale_window": 100},
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "wall_clock_breakdown": False,
    "hybrid_engine": {
        "enabled": False,
        "max_out_tokens": 512,
        "inference_tp_size": 1,
        "release_inference_cache": False,
        "pin_parameters": True,
        "tp_gather_partition_size": 8,
    },
    "tensorboard": {"enabled": False, "output_path": "out/ds_tensorboard_logs/", "job_name": "sft"},
}
DEEPSPEED_CHAT_TEXT = """\
python run.py zero=stage2 precision=fp16 batch.global_batch_size=32 batch.micro_batch_size=4 \
zero.overlap_comm=true precision.loss_scale_window=100 deepspeed.steps_per_print=10
not carried over:
  zero_optimization.stage3_prefetch_bucket_size = 30000000.0: ignored because zero.stage=2
  zero_optimization.stage3_param_persistence_threshold = 10000.0: ignored because zero.stage=2
  zero_optimization.stage3_max_live_parameters = 30000000.0: ignored because zero.stage=2
  zero_optimization.memory_efficient_linear = false: ignored because zero.stage=2 (got false)
  tensorboard.output_path = "out/ds_tensorboard_logs/": ignored because \
deepspeed.tensorboard.enabled=false
  tensorboard.job_name = "sft": ignored because deepspeed.tensorboard.enabled=false
"""

NEOX = {
    "train_batch_size": 1024,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
    "optimizer": {
        "type": "Adam",
        "params": {"lr": 0.0006, "betas": [0.9, 0.95], "eps": 1e-08, "max_grad_norm": 1.0},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": 1e-7,
            "warmup_max_lr": 0.00059,
            "warmup_num_steps": 3200,
            "total_num_steps": 320000,
            "warmup_type": "linear",
        },
    },
    "fp16": {"fp16": True, "enabled": True, "loss_scale": 0, "initial_scale_power": 12},
    "zero_optimization": {
        "stage": 1,
        "allgather_partitions": True,
        "allgather_bucket_size": 1260000000,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 1260000000,
        "contiguous_gradients": True,
        "cpu_offload": False,
    },
    "activation_checkpointing": {"cpu_checkpointing": True, "profile": False},
    "zero_allow_untested_optimizer": True,
    "wall_clock_breakdown": True,
}
NEOX_TEXT = """\
python run.py precision=fp16 schedule=linear optim.learning_rate=0.00059 optim.weight_decay=0.0 \
schedule.warmup_steps=3200 schedule.min_learning_rate_ratio=0.0 batch.global_batch_size=1024 \
batch.micro_batch_size=4 batch.gradient_accumulation_steps=8 zero.overlap_comm=true \
zero.reduce_bucket_size=1260000000 zero.allgather_bucket_size=1260000000 \
precision.initial_scale_power=12 train.max_steps=320000 deepspeed.wall_clock_breakdown=true
not carried over:
  fp16.fp16 = true: has no setting here
  zero_allow_untested_optimizer = true: is not supported: each optimizer declares its stages
  scheduler.type = "WarmupDecayLR": DeepSpeed's takes its first two steps at a learning rate of \
0, schedule=linear none
  scheduler.params.warmup_min_lr = 1e-07: the warm-up starts at 0 here
  optimizer.params.lr = 0.0006: scheduler.params.warmup_max_lr = 0.00059 goes before it
  optimizer.params.max_grad_norm = 1.0: DeepSpeed 0.19.8 refuses it here; train.gradient_clipping \
is for it
  activation_checkpointing.cpu_checkpointing = true: ignored because \
train.gradient_checkpointing=false (got true)
"""

NVME = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 1e-05, "betas": [0.9, 0.95], "torch_adam": True, "weight_decay": 0.1},
    },
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 1e4, "warmup_num_steps": 100, "cos_min_ratio": 0.05},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {
            "device": "nvme",
            "nvme_path": "/local nvme",
            "pin_memory": True,
            "buffer_count": 5,
            "pipeline_read": True,
            "fast_init": False,
        },
        "offload_param": {
            "device": "nvme",
            "nvme_path": "/local nvme",
            "buffer_count": 5,
            "buffer_size": 1e8,
            "max_in_cpu": 1e9,
        },
        "stage3_prefetch_bucket_size": 1e7,
    },
    "aio": {"block_size": 262144, "queue_depth": 32, "thread_count": 1, "single_submit": False},
}
NVME_TEXT = """\
python run.py zero=stage3_nvme precision=bf16 optim.learning_rate=1e-05 schedule.warmup_steps=100 \
schedule.min_learning_rate_ratio=0.05 batch.micro_batch_size=1 \
zero.offload_optimizer.buffer_count=5 zero.offload_optimizer.pipeline_read=true \
'zero.offload_param.nvme_path='"'"'/local nvme'"'"'' zero.reduce_bucket_size=500000000 \
zero.stage3_prefetch_bucket_size=10000000 zero.stage3_param_persistence_threshold=100000 \
train.max_steps=10000 deepspeed.aio.block_size=262144 deepspeed.aio.queue_depth=32
not carried over:
  aio.thread_count = 1: DeepSpeed 0.19.8 reads deepspeed.aio.intra_op_parallelism instead
  scheduler.type = "WarmupCosineLR": DeepSpeed's takes its first two steps at a learning rate of \
0, schedule=cosine none
  scheduler.params.warmup_type (absent: "log"): the warm-up is linear here
  optimizer.params.torch_adam = true: DeepSpeed's CPUAdam updates what is offloaded
"""

TYPOS = {
    "train_batch_size": 16,
    "gradient_cliping": 1.0,
    "overlap_comm": True,
    "bf16": True,
    "amp": {"enabled": False, "opt_level": "O1"},
    "elasticity": {"enabled": True},
    "autotuning": {"enabled": False},
    "data_efficiency": {"enabled": True},
    "dataloader_drop_last": False,
    "gradient_allreduce_op": "mean",
    "comet": {"enabled": True, "api_key": "s3cr3t", "project": "${oc.env:HOME}"},
    "monitor": {"kind": "neptune", "api_token": "s3cr3t"},
    "optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-4, "freeze_step": 400}},
    "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5}},
    "zero_optimization": {
        "stage": 1,
        "mics_shard_size": 8,
        "elastic_checkpoint": False,
        "stage3_max_live_params": 1,
        "reduce_bucket_size": "a lot",
        "load_from_fp32_weights": False,
        "offload_param": {"device": "cpu"},
        "cpu_offload": True,
        "cpu_offload_use_pin_memory": True,
    },
}
TYPOS_TEXT = """\
python run.py precision=fp32 batch.global_batch_size=16 zero.offload_optimizer.device=cpu \
zero.offload_optimizer.pin_memory=true +zero.extra.load_from_fp32_weights=false
not carried over:
  gradient_cliping = 1.0: has no setting here. Did you mean gradient_clipping?
  overlap_comm = true: has no setting here. Did you mean zero_optimization.overlap_comm?
  bf16 = true: should be an object
  amp = {"enabled": false, "opt_level": "O1"}: was removed from DeepSpeed (last release with it: \
0.19.7)
  elasticity = {"enabled": true}: was removed from DeepSpeed (last release with it: 0.19.7)
  data_efficiency = {"enabled": true}: is not supported: the sample order is fixed by data.*
  comet = {"enabled": true, "api_key": "***", "project": "${oc.env:HOME}"}: would be interpolated \
here. Set deepspeed.extra.comet.
  monitor = {"kind": "neptune", "api_token": "***"}: has no setting here
  zero_optimization.mics_shard_size = 8: was removed from DeepSpeed (last release with it: 0.19.6)
  zero_optimization.stage3_max_live_params = 1: has no setting here. Did you mean \
zero_optimization.stage3_max_live_parameters?
  zero_optimization.cpu_offload_use_pin_memory = true: DeepSpeed 0.19.8 ignores it; \
zero.offload_optimizer.pin_memory and zero.offload_param.pin_memory are for it
  scheduler.type = "OneCycle": has no equivalent here
  scheduler.params = {"cycle_min_lr": 1e-05}: belongs to OneCycle
  optimizer.type = "OneBitAdam": DeepSpeed 0.19.7 has removed it (the last with it is 0.19.6)
  optimizer.params = {"lr": 0.0001, "freeze_step": 400}: belongs to OneBitAdam
  zero_optimization.reduce_bucket_size = "a lot": must be a valid integer, unable to parse string \
as an integer
  zero_optimization.offload_param.device = "cpu": cpu requires stage 3 (got stage 1). Set \
zero.stage=3.
"""


def read(tmp_path: Path, config: dict[str, Any]) -> str:
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(config))
    return describe_import([f"import_deepspeed={file}"])


SAMPLES = [
    pytest.param(HUGGING_FACE, HUGGING_FACE_TEXT, id="hugging-face"),
    pytest.param(DEEPSPEED_CHAT, DEEPSPEED_CHAT_TEXT, id="deepspeed-chat"),
    pytest.param(NEOX, NEOX_TEXT, id="neox"),
    pytest.param(NVME, NVME_TEXT, id="nvme"),
    pytest.param(TYPOS, TYPOS_TEXT, id="typos"),
]


@pytest.mark.parametrize(("config", "text"), SAMPLES)
def test_sample(config: dict[str, Any], text: str, tmp_path: Path) -> None:
    printed = read(tmp_path, config)
    assert printed == text.rstrip("\n")
    words = shlex.split(printed.splitlines()[0])
    assert words[:2] == ["python", "run.py"]
    assert list(validate_run(compose_run(words[2:]))) == []


FUSED = {"train_batch_size": 8, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
OFFLOADED = FUSED | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
RATE = "optim.learning_rate=0.0003"
LAMB = (
    'optimizer.type = "Lamb": lamb scales each weight by its norm, but ZeRO gives it flat shards'
    " (got stage 1). Set zero.stage=0, or choose another optimizer."
)
MUON = (
    "gradient_clipping (absent: 1.0): is not supported with optim=muon: DeepSpeed would clip the"
    " orthogonalised update, dividing it by about 30. Remove it, or set it to 0."
)
ZERO_ONE = (
    'optimizer.type = "ZeroOneAdam": DeepSpeed 0.19.7 has removed it (the last with it is 0.19.6)'
)

OPTIMIZERS = [
    pytest.param(
        FUSED,
        {"type": "AdamW", "params": {"lr": 0.0003}},
        [RATE, "optim.betas=[0.9,0.999]", "optim.weight_decay=0.0"],
        [],
        id="absent-params-are-deepspeeds",
    ),
    pytest.param(
        FUSED,
        {"type": "Adam", "params": {"lr": 0.0003, "adam_w_mode": True, "torch_adam": True}},
        ["optim=torch_adamw", RATE, "optim.betas=[0.9,0.999]", "optim.weight_decay=0.01"],
        [],
        id="torch-decays-by-default",
    ),
    pytest.param(
        FUSED,
        {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.01}},
        ["optim.betas=[0.9,0.999]", "optim.weight_decay=0.01"],
        ["optimizer.params.adam_w_mode = false: this is L2; weight decay is AdamW's here"],
        id="l2",
    ),
    pytest.param(
        FUSED,
        {"type": "Adam", "params": {"adam_w_mode": False, "eps": 1e-6}},
        ["optim.betas=[0.9,0.999]", "optim.eps=1e-06", "optim.weight_decay=0.0"],
        [],
        id="l2-without-decay",
    ),
    pytest.param(
        FUSED,
        {"type": "AdamW", "params": {"adam_w_mode": False, "weight_decay": 0.1}},
        ["optim.betas=[0.9,0.999]"],
        [],
        id="adamw-is-adamw",
    ),
    pytest.param(
        OFFLOADED,
        {"type": "AdamW", "params": {"betas": [0.9, 0.95], "weight_decay": 0.1, "foreach": True}},
        [],
        ["optimizer.params.foreach = true: has no setting here"],
        id="offloaded",
    ),
    pytest.param(
        OFFLOADED,
        {"type": "Adagrad", "params": {}},
        ["optim=cpu_adagrad", "optim.learning_rate=0.01", "optim.weight_decay=0.0"],
        [],
        id="adagrad",
    ),
    pytest.param(
        FUSED,
        {"type": "Adagrad", "params": {"lr": 0.1}},
        [],
        [
            'optimizer.type = "Adagrad": has no equivalent here without offload',
            'optimizer.params = {"lr": 0.1}: belongs to Adagrad',
        ],
        id="adagrad-without-offload",
    ),
    pytest.param(
        FUSED,
        {"type": "Lion", "params": {"lr": 0.0003, "eps": 1e-8}, "legacy_fusion": True},
        ["optim=lion", RATE, "optim.betas=[0.9,0.999]", "optim.weight_decay=0.0"],
        [
            "optimizer.params.eps = 1e-08: has no setting here",
            "optimizer.legacy_fusion = true: has no setting here",
        ],
        id="lion",
    ),
    pytest.param(
        FUSED,
        {"type": "Lamb", "params": {"betas": [0.9, 0.95], "weight_decay": 0.1, "max_coeff": 0.5}},
        [],
        ["optimizer.params.max_coeff = 0.5: has no setting here", LAMB],
        id="lamb-sharded",
    ),
    pytest.param(
        FUSED,
        {"type": "Muon", "params": {"lr": 0.0003, "muon_lr": 0.01, "momentum": 0.9}},
        [
            "optim=muon",
            RATE,
            "optim.eps=1e-10",
            "optim.weight_decay=0.0",
            "optim.muon_learning_rate=0.01",
            "optim.muon_momentum=0.9",
        ],
        [MUON],
        id="muon",
    ),
    pytest.param(
        FUSED,
        {"type": "SGD", "params": {}},
        [],
        ['optimizer.type = "SGD": has no equivalent here'],
        id="sgd",
    ),
    pytest.param(FUSED, {"type": "ZeroOneAdam"}, [], [ZERO_ONE], id="removed"),
    pytest.param(
        FUSED,
        "AdamW",
        [],
        ['optimizer = "AdamW": should be an object with type and params'],
        id="no-object",
    ),
]


@pytest.mark.parametrize(("config", "section", "words", "lost"), OPTIMIZERS)
def test_optimizer(config: dict[str, Any], section: Any, words: list[str], lost: list[str]) -> None:
    found = import_ds_config(config | {"optimizer": section})
    assert [word for word in render_overrides(found.wanted) if word.startswith("optim")] == words
    assert [str(problem) for problem in found.lost] == lost


def test_schedule_sets_the_peak_of_every_parameter() -> None:
    """DeepSpeed's schedule writes its own peak over the optimizer's, whatever the group."""
    optimizer = {"type": "Muon", "params": {"lr": 0.0003}}
    scheduler = {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": 50, "warmup_type": "linear"},
    }
    config = FUSED | {"gradient_clipping": 0, "optimizer": optimizer, "scheduler": scheduler}
    found = import_ds_config(config)
    assert found.wanted["optim.learning_rate"] == found.wanted["optim.muon_learning_rate"] == 1e-3
    assert [str(problem) for problem in found.lost][1:] == [
        f"optimizer.params.{key} = 0.0003: scheduler.params.warmup_max_lr (absent: 0.001) goes"
        " before it"
        for key in ("adam_lr", "muon_lr")
    ]


@pytest.mark.parametrize(
    "value",
    [
        "it's",
        "a\\",
        "a\\'b",
        "null",
        "True",
        "1e5",
        "",
        "a b",
        "[x]",
        "/data/x-1.y",
        "~/x",
        "a=b,c",
    ],
)
def test_texts_reach_hydra_whole(value: str) -> None:
    run = compose_run([f"model.name={render_value(value)}", f"data.paths={render_value([value])}"])
    assert (run.model.name, run.data.paths) == (value, [value])


REFUSED = [
    pytest.param(
        '{"zero_optimization": {"stage": 1, "stage": 2}}',
        "FILE: stage: stands twice in one section, which DeepSpeed refuses. Keep one.",
        id="twice",
    ),
    pytest.param("[1, 2]", "FILE: should hold an object (got a list)", id="no-object"),
    pytest.param("{", "FILE: cannot be read as JSON: ", id="no-json"),
    pytest.param('{"a": 1, // x\n a: 2}', "FILE: a: stands twice in one section", id="hjson"),
    pytest.param(
        '{"bf16": {"enabled": true}, "fp16": {"enabled": true}}',
        "bf16, fp16: bf16 and fp16 exclude each other, and both are enabled. Enable one of them.",
        id="both-precisions",
    ),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "ds_config.json"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        describe_import([f"import_deepspeed={file}"])
    assert str(error.value).replace(str(file), "FILE").startswith(message)


def test_hjson_is_read_as_deepspeed_does(tmp_path: Path) -> None:
    file = tmp_path / "ds_config.json"
    file.write_text("{\n  # rows\n  train_batch_size: 8,\n  bf16: {enabled: true}\n}")
    assert describe_import([f"import_deepspeed={file}"]) == (
        "python run.py zero=stage0 precision=bf16 batch.global_batch_size=8"
    )


def test_command_line(tmp_path: Path) -> None:
    """A person's own words: the command on standard output, a mistake on standard error."""

    def call(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(ROOT / "run.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)

    (tmp_path / "ds.json").write_text(json.dumps(DEEPSPEED_CHAT))
    done = call("import_deepspeed=ds.json")
    assert (done.returncode, done.stdout, done.stderr) == (0, DEEPSPEED_CHAT_TEXT, "")
    done = call("import_deepspeed=none.json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "1 problem, nothing was started:\n  none.json: there is no file here."
        " Give a DeepSpeed JSON: import_deepspeed=ds_config.json.\n"
    )
    done = call("zero=stage2", "import_deepspeed=ds.json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "1 problem, nothing was started:\n  import_deepspeed: must be the only word"
        " (got zero=stage2). Add other words to the command that it prints.\n"
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "ds.json"]

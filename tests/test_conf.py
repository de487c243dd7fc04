"""Every shipped YAML composes, plans, and reaches DeepSpeed whole."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.config.compose import PROJECT_ROOT
from llama_pretrain.config.rules import check_run
from llama_pretrain.config.schema import Zero
from llama_pretrain.config.snapshot import load_snapshot, render_snapshot
from llama_pretrain.plan.choices import resolve_choices
from llama_pretrain.plan.ds_config import (
    EXTRA_KEYS,
    ZERO_EXTRA_KEYS,
    get_eval_ds_config,
    get_train_ds_config,
)
from llama_pretrain.plan.machine import Machine
from llama_pretrain.plan.plan import build_plan, check_plan
from tests.conftest import compose_run

CLUSTER = Machine(
    cores=64,
    memory_bytes=1 << 40,
    num_gpus=8,
    gpu_name="NVIDIA H100 80GB HBM3",
    gpu_memory_bytes=80 << 30,
    gpu_capability=(9, 0),
    cpu_bf16=True,
    has_compiler=True,
    has_libaio=True,
)


def options() -> list[str]:
    """`group=option` for every YAML of every group."""
    conf = PROJECT_ROOT / "conf"
    files = [path for path in sorted(conf.glob("*/*.yaml")) if path.parent.name != "hydra"]
    files += sorted((PROJECT_ROOT / "sweeps").glob("sweep/*.yaml"))
    return [f"{path.parent.name}={path.stem}" for path in files]


def needed_by(option: str, pretrained: Path) -> list[str]:
    """What an option wants beside itself."""
    if option == "model=pretrained":
        return [f"model.path={pretrained}"]
    return []


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a Hugging Face LLaMA."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    config |= {"num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 512}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize("option", options())
def test_option_composes_and_plans(option: str, pretrained: Path, tmp_path: Path) -> None:
    run = compose_run(["task=plan", option, *needed_by(option, pretrained)])
    assert list(check_run(run)) == []
    run = resolve_choices(run, CLUSTER)
    assert list(check_run(run)) == []
    assert list(check_plan(run)) == []
    plan = build_plan(run, None)
    assert plan.world_size == 8
    assert plan.parameters.total > 0
    # What is written is what was meant.
    path = tmp_path / "snapshot.yaml"
    path.write_text(render_snapshot(run))
    assert load_snapshot(path) == run


def leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


@pytest.mark.parametrize("option", options())
def test_deepspeed_reads_what_was_meant(option: str, pretrained: Path) -> None:
    """DeepSpeed's own classes read the JSON: no key is lost, no value is another."""
    from deepspeed.runtime.config import DeepSpeedConfig

    run = compose_run(["task=plan", option, *needed_by(option, pretrained)])
    run = resolve_choices(run, CLUSTER)
    plan = build_plan(run, None)
    config = get_train_ds_config(run, plan.batch, run_dir=None)
    emitted = json.loads(json.dumps(config))
    assert "auto" not in [value for _, value in leaves(emitted)]
    emitted["train_batch_size"] = plan.batch.global_batch_size // plan.world_size  # one rank here
    read = DeepSpeedConfig(dict(emitted))
    for path, meant in leaves(emitted):
        section, _, key = path.rpartition(".")
        got = read_back(read, section, key)
        assert got == meant, path
        assert type(got) is type(meant), path


TOP_LEVEL = {
    "train_micro_batch_size_per_gpu": "train_micro_batch_size_per_gpu",
    "prescale_gradients": "prescale_gradients",
}
"""Where DeepSpeedConfig keeps top-level keys, where not under their own name."""


def read_back(read: Any, section: str, key: str) -> Any:
    """A value as DeepSpeedConfig holds it after parsing."""
    if not section:
        return getattr(read, TOP_LEVEL.get(key, key))
    holder = {
        "zero_optimization": "zero_config",
        "zero_optimization.offload_optimizer": "zero_config.offload_optimizer",
        "zero_optimization.offload_param": "zero_config.offload_param",
        "bf16": "bfloat16_config",
        "fp16": "float16_config",
    }[section]
    for name in holder.split("."):
        read = getattr(read, name)
    short = key.removeprefix("stage3_")  # its fields have aliases
    value = getattr(read, key) if hasattr(read, key) else getattr(read, short)
    value = getattr(value, "value", value)  # an enum
    return str(value) if isinstance(value, Path) else value


def test_train_and_eval_configs_by_hand() -> None:
    overrides = ["zero=stage3_offload", "optim=cpu_adam", "precision=bf16", "task=plan"]
    overrides += ["batch.global_batch_size=64", "batch.micro_batch_size=2", "zero.sub_group_size=7"]
    run = resolve_choices(compose_run(overrides), CLUSTER)
    train = get_train_ds_config(run, build_plan(run, None).batch, run_dir=None)
    assert train["train_batch_size"] == 64
    assert train["train_micro_batch_size_per_gpu"] == 2
    assert train["gradient_accumulation_steps"] == 4
    assert train["bf16"] == {"enabled": True}
    assert train["gradient_clipping"] == 1.0
    zero = train["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["sub_group_size"] == 7
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True, "ratio": 1.0}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert "hybrid_engine" not in train
    evaluation = get_eval_ds_config(run, micro_batch_size=3, world_size=8)
    assert evaluation["train_batch_size"] == 24
    assert evaluation["zero_optimization"] == {
        "stage": 3,
        "stage3_param_persistence_threshold": 100_000,
        "offload_param": {"device": "cpu", "pin_memory": True},
    }
    assert "offload_optimizer" not in json.dumps(evaluation)


def test_hybrid_engine_and_tensorboard_reach_the_config(tmp_path: Path) -> None:
    overrides = ["task=plan", "deepspeed.hybrid_engine.enabled=true"]
    overrides += ["monitor.deepspeed_tensorboard=true"]
    run = resolve_choices(compose_run(overrides), CLUSTER)
    config = get_train_ds_config(run, build_plan(run, None).batch, run_dir=tmp_path)
    assert config["hybrid_engine"] == {
        "enabled": True,
        "max_out_tokens": 512,
        "inference_tp_size": 1,
        "release_inference_cache": False,
        "pin_parameters": True,
        "tp_gather_partition_size": 8,
    }
    assert config["tensorboard"]["output_path"] == str(tmp_path / "tensorboard")


def test_extra_keys_are_known_to_deepspeed() -> None:
    """A key that we let through is named in DeepSpeed's source."""
    import deepspeed

    assert deepspeed.__file__ is not None
    root = Path(deepspeed.__file__).parent
    texts = [path.read_text() for path in root.glob("**/c*onfig*.py")]
    texts += [path.read_text() for path in root.glob("**/constants.py")]
    source = "\n".join(texts)
    unknown = [key for key in EXTRA_KEYS if not re.search(rf"\b{key}\b", source)]
    assert unknown == []


def test_zero_keys_are_those_of_deepspeed() -> None:
    """Every key of its zero section is a setting of ours, or may pass, or is left out knowingly."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = {item.alias or name for name, item in DeepSpeedZeroConfig.model_fields.items()}
    assert set(ZERO_EXTRA_KEYS) <= known
    ours = {item.name for item in fields(Zero)} - {"extra"}
    assert ours <= known
    left_out = {
        "cpu_offload",  # these four are old names of keys that we have
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "stage3_gather_fp16_weights_on_model_save",
        "legacy_stage1",  # removed
        "zenflow",  # its first loss was wrong
    }
    assert known - ours - set(ZERO_EXTRA_KEYS) == left_out


def test_choices_follow_the_machine() -> None:
    run = resolve_choices(compose_run([]), CLUSTER)
    assert (run.launch.device.value, run.launch.num_processes) == ("cuda", 8)
    assert (run.precision.name.value, run.optim.name.value) == ("bf16", "fused_adam")
    laptop = Machine(
        cores=8,
        memory_bytes=16 << 30,
        num_gpus=0,
        gpu_name=None,
        gpu_memory_bytes=None,
        gpu_capability=None,
        cpu_bf16=False,
        has_compiler=False,
        has_libaio=False,
    )
    run = resolve_choices(compose_run([]), laptop)
    assert (run.launch.device.value, run.launch.num_processes) == ("cpu", 2)
    assert run.launch.threads_per_process == 4
    assert (run.precision.name.value, run.optim.name.value) == ("fp32", "torch_adamw")
    offloaded = resolve_choices(compose_run(["zero=stage2_offload"]), CLUSTER)
    assert offloaded.optim.name.value == "cpu_adam"
    assert resolve_choices(compose_run(["zero=zeropp"]), CLUSTER).zero.zero_hpz_partition_size == 8

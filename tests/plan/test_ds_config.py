"""Every shipped YAML composes, plans, and reaches DeepSpeed whole."""

import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_pretrain.config.batch import Batch
from llama_pretrain.config.compose import PROJECT_ROOT
from llama_pretrain.config.deepspeed_keys import EXTRA_KEYS, REFUSED_ZERO_KEYS, ZERO_EXTRA_KEYS
from llama_pretrain.config.fields import walk_fields
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import load_snapshot, render_snapshot, to_plain
from llama_pretrain.config.validate import validate_run
from llama_pretrain.config.zero import Zero
from llama_pretrain.plan.ds_config import get_eval_ds_config, get_train_ds_config, setting_of
from llama_pretrain.plan.plan import build_plan, validate_plan
from llama_pretrain.plan.resolve import resolve
from tests.conftest import compose_run
from tests.machines import CLUSTER, LAPTOP, list_options


def needed_by(option: str, pretrained: Path) -> list[str]:
    """What an option wants beside itself."""
    if option == "model=pretrained":
        return [f"model.path={pretrained}"]
    if option == "data=mixture":
        return ["+data.sources={code:{name:stdlib}}"]
    return ["zero=stage0"] if option == "optim=lamb" else []


def ranks_of(option: str) -> int:
    """Ranks that an option plans for: those of its own file, or the cluster's."""
    group, _, name = option.partition("=")
    if group != "experiment":
        return 8
    launch = yaml.safe_load((PROJECT_ROOT / "conf" / group / f"{name}.yaml").read_text())["launch"]
    return int(launch["nodes"] * launch["num_processes"])


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a Hugging Face LLaMA."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    config |= {"num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 512}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize("option", list_options())
def test_option_composes_and_plans(option: str, pretrained: Path, tmp_path: Path) -> None:
    run = compose_run(["task=plan", option, *needed_by(option, pretrained)])
    assert list(validate_run(run)) == []
    run = resolve(run, CLUSTER)
    assert list(validate_run(run)) == []
    assert list(validate_plan(run)) == []
    plan = build_plan(run)
    assert plan.world_size == ranks_of(option)
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


@cache
def emit(*overrides: str) -> tuple[dict[str, Any], str]:
    """The settings of a run on the cluster by path, and its DeepSpeed JSON as the file holds it."""
    run = resolve(compose_run(["task=plan", *overrides]), CLUSTER)
    batch = build_plan(run).batch
    settings = dict(leaves(to_plain(replace(run, batch=Batch(**vars(batch))))))
    return settings, json.dumps(get_train_ds_config(run, batch, run_dir=Path("/run")))


def check_read_back(overrides: Sequence[str]) -> set[str]:
    """DeepSpeed's own classes read what the settings say: no key is lost, no value or type another.

    Returns the paths whose value is not the one that DeepSpeed has without the key: those alone
    show that the key was read.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    settings, text = emit(*overrides)
    emitted = json.loads(text)
    assert '"auto"' not in text
    for path, value in leaves(emitted):
        meant = settings.get(setting_of(path))
        assert meant in (None, value) or setting_of(path) in CHOSEN_BY_NAME, path
    micro, accumulated = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    emitted["train_batch_size"] = emitted[micro] * emitted[accumulated]  # there is one rank here
    read, silent = DeepSpeedConfig(dict(emitted)), DeepSpeedConfig(dict(SILENT))
    moved = set(KEPT_NOWHERE)
    for path, value in leaves(emitted):
        if path not in KEPT_NOWHERE:
            got, default = read_back(read, path), read_back(silent, path)
            assert (got, type(got)) == (value, type(value)), path
            assert default is None or path in LOOSE_DEFAULTS or type(got) is type(default), path
            if got != default:
                moved.add(path)
    return moved & {path for path, _ in leaves(emitted)}


@pytest.mark.parametrize("option", list_options())
def test_deepspeed_reads_what_was_meant(option: str, pretrained: Path) -> None:
    check_read_back([option, *needed_by(option, pretrained)])


CHOSEN_BY_NAME = ("precision.name", "optim.name")
"""Settings that decide which section or flag is on, whose own value stands in no JSON."""


EVERYTHING = yaml.safe_load((Path(__file__).parent / "every_key.yaml").read_text())
"""Overrides that turn on every section and set every key to what is not DeepSpeed's default."""


def test_every_setting_reaches_deepspeed() -> None:
    """Each field of Zero, Precision and DeepSpeed is read from one of those JSONs at least."""
    moved = {path for overrides in EVERYTHING.values() for path in check_read_back(overrides)}
    reached = {setting_of(path) for path in moved}
    reached |= {f"deepspeed.{path.split('.')[0]}" for path in moved}
    groups = ("zero.", "precision.", "deepspeed.")
    wanted = {path for path, _ in walk_fields(Run) if path.startswith(groups)}
    wanted -= {"zero.extra", "deepspeed.extra"}
    wanted |= {"batch.global_batch_size", "batch.micro_batch_size", "train.gradient_clipping"}
    wanted |= {"batch.gradient_accumulation_steps"}
    wanted |= {f"zero.{key}" for key in ZERO_EXTRA_KEYS} - {"zero.leaf_module"}
    wanted |= {f"deepspeed.{key}" for key in EXTRA_KEYS} | {"zero.leaf_module.names"}
    assert wanted - reached == set(REFUSED_HERE)


SILENT = {
    "train_batch_size": 5,
    "comms_logger": {},  # DeepSpeedConfig has no section where the JSON has none
    "zero_optimization": {"offload_optimizer": {}, "offload_param": {}},
}
"""A JSON that says as little as DeepSpeedConfig takes: what it reads from it are its defaults."""

LOOSE_DEFAULTS = ("fp16.loss_scale", "communication_data_type", "log_level")
"""Keys whose default in DeepSpeed has another type than a value that is given."""

REFUSED_HERE = {"deepspeed.aio.use_gds": "GDS currently only supported for CUDA accelerator"}
"""What DeepSpeedConfig reads and refuses on a machine without CUDA, and its words."""


@pytest.mark.parametrize("setting", REFUSED_HERE)
def test_what_needs_cuda_is_read(setting: str) -> None:
    with pytest.raises(AssertionError, match=REFUSED_HERE[setting]):
        check_read_back(["zero=stage3_nvme", f"{setting}=true"])


READ_BACK = yaml.safe_load((Path(__file__).parent / "read_back.yaml").read_text())

KEPT_NOWHERE = {"sequence_parallel_size": 'if "sequence_parallel_size" in config:'}
"""What DeepSpeedConfig uses while it is built and keeps nowhere, and the line that reads it."""


def read_back(read: Any, path: str) -> Any:
    """A value as DeepSpeedConfig holds it after parsing, by its path in the JSON."""
    place = path
    for known, holder in READ_BACK["holders"].items():
        if path == known or path.startswith(f"{known}."):
            place = holder + path.removeprefix(known)
    for name in place.split("."):
        if isinstance(read, dict):
            read = read[name]
        else:  # fields of its zero section have aliases
            read = getattr(read, name if hasattr(read, name) else name.removeprefix("stage3_"))
    if path in READ_BACK["words"]:
        return READ_BACK["words"][path].get(str(read))
    value = getattr(read, "value", read)  # an enum
    return str(value) if isinstance(value, Path) else value


def test_what_is_kept_nowhere_is_read() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    source = inspect.getsource(DeepSpeedConfig.__init__)
    assert [line for line in KEPT_NOWHERE.values() if line not in source] == []


def test_train_and_eval_configs_by_hand() -> None:
    overrides = ["zero=stage3_offload", "optim=cpu_adam", "precision=bf16", "task=plan"]
    overrides += ["batch.global_batch_size=64", "batch.micro_batch_size=2", "zero.sub_group_size=7"]
    run = resolve(compose_run(overrides), CLUSTER)
    train = get_train_ds_config(run, build_plan(run).batch, run_dir=None)
    assert train["train_batch_size"] == 64
    assert train["train_micro_batch_size_per_gpu"] == 2
    assert train["gradient_accumulation_steps"] == 4
    assert train["bf16"] == {
        "enabled": True,
        "immediate_grad_update": False,
        "check_grad_overflow": True,
        "bf16_master_weights_and_grads": False,
        "bf16_optimizer_states": False,
    }
    assert train["gradient_clipping"] == 1.0
    zero = train["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["sub_group_size"] == 7
    assert zero["offload_optimizer"] == {
        "device": "cpu",
        "pin_memory": True,
        "ratio": 1.0,
        "super_offload": False,
    }
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert "hybrid_engine" not in train
    evaluation = get_eval_ds_config(run, micro_batch_size=3)
    assert evaluation["train_batch_size"] == 24
    assert evaluation["zero_optimization"] == {
        "stage": 3,
        "stage3_param_persistence_threshold": 2560,  # 10 x hidden_size
        "offload_param": {"device": "cpu", "pin_memory": True},
    }
    assert "offload_optimizer" not in json.dumps(evaluation)


def test_tensorboard_writes_into_the_run(tmp_path: Path) -> None:
    run = resolve(compose_run(["task=plan", "deepspeed.tensorboard.enabled=true"]), CLUSTER)
    config = get_train_ds_config(run, build_plan(run).batch, run_dir=tmp_path)
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
    } | set(REFUSED_ZERO_KEYS)
    assert known - ours - set(ZERO_EXTRA_KEYS) == left_out


def test_choices_follow_the_machine() -> None:
    run = resolve(compose_run([]), CLUSTER)
    assert (run.launch.device.value, run.launch.num_processes) == ("cuda", 8)
    assert (run.precision.name.value, run.optim.name.value) == ("bf16", "torch_adamw")
    run = resolve(compose_run([]), LAPTOP)
    assert (run.launch.device.value, run.launch.num_processes) == ("cpu", 2)
    assert (run.launch.threads_per_process, run.launch.bind_cores) == (4, True)
    for words in (("launch.threads_per_process=3",), ("launch.num_processes=1",)):
        assert resolve(compose_run(words), LAPTOP).launch.bind_cores is False
    assert resolve(compose_run([]), CLUSTER).launch.bind_cores is False
    assert (run.precision.name.value, run.optim.name.value) == ("fp32", "torch_adamw")
    for precision, intel, fast, chosen in (
        ("fp32", True, False, ("sdpa", "plain")),
        ("bf16", True, False, ("sdpa", "fp32")),
        ("bf16", True, True, ("sdpa", "plain")),
        ("bf16", False, True, ("blocked", "plain")),
        ("bf16", False, False, ("blocked", "fp32")),
        ("bf16_autocast", True, False, ("sdpa", "plain")),
    ):
        machine = replace(LAPTOP, cpu_intel=intel, cpu_fast_bf16=fast)
        kernels = resolve(compose_run([f"precision={precision}"]), machine).kernels
        assert (kernels.attention.value, kernels.matmul.value) == chosen
    offloaded = resolve(compose_run(["zero=stage2_offload"]), CLUSTER)
    assert offloaded.optim.name.value == "cpu_adam"
    assert resolve(compose_run(["zero=zeropp"]), CLUSTER).zero.zero_hpz_partition_size == 8

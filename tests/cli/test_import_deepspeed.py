"""A DeepSpeed JSON becomes a command that gives the same run, and a list of what it cannot."""

import inspect
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

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

CASES = yaml.safe_load((Path(__file__).parent / "ds_configs.yaml").read_text())


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
        *(
            [option, *CASES["needs"].get(option, [])]
            for option in options("zero", "precision", "optim")
        ),
        *CASES["round_trips"],
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


@pytest.mark.parametrize("config", CASES["read_the_same"], ids=json.dumps)
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


SAMPLES = Path(__file__).parent / "import_deepspeed"
"""DeepSpeed JSON files as people have them, and what is printed for each."""


@pytest.mark.parametrize("name", ["hugging_face", "deepspeed_chat", "neox", "nvme", "typos"])
def test_sample(name: str) -> None:
    printed = describe_import([f"import_deepspeed={SAMPLES / name}.json"])
    assert printed + "\n" == (SAMPLES / f"{name}.txt").read_text()
    words = shlex.split(printed.splitlines()[0])
    assert words[:2] == ["python", "run.py"]
    assert list(validate_run(compose_run(words[2:]))) == []


FUSED = {"train_batch_size": 8, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
OFFLOADED = FUSED | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
OPTIMIZERS = yaml.safe_load((Path(__file__).parent / "imported_optimizers.yaml").read_text())


@pytest.mark.parametrize("case", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer(case: dict[str, Any]) -> None:
    config = OFFLOADED if case.get("offloaded") else FUSED
    found = import_ds_config(config | {"optimizer": case["optimizer"]})
    words = render_overrides(found.wanted)
    assert [word for word in words if word.startswith("optim")] == case["words"]
    assert [str(problem) for problem in found.lost] == case.get("lost", [])


PRECISIONS = yaml.safe_load((Path(__file__).parent / "imported_sections.yaml").read_text())


@pytest.mark.parametrize("case", PRECISIONS, ids=lambda case: json.dumps(case["config"]))
def test_section(case: dict[str, Any]) -> None:
    found = import_ds_config(case["config"])
    assert render_overrides(found.wanted) == case["words"]
    assert [str(problem).partition(" ")[0] for problem in found.lost] == case.get("lost", [])


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
    peak = "scheduler.params.warmup_max_lr (absent: 0.001)"
    lost = [str(problem) for problem in found.lost][1:]
    assert lost == [f"optimizer.params.lr = 0.0003: is overridden by {peak}"]


TEXTS = [
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
]


@pytest.mark.parametrize("value", TEXTS)
def test_texts_reach_hydra_whole(value: str) -> None:
    run = compose_run([f"model.name={render_value(value)}", f"data.paths={render_value([value])}"])
    assert (run.model.name, run.data.paths) == (value, [value])


REFUSED = {
    '{"zero_optimization": {"stage": 1, "stage": 2}}': (
        "FILE: stage: is a duplicate key, which DeepSpeed rejects. Keep one."
    ),
    "[1, 2]": "FILE: must be an object (got a list)",
    "{": "FILE: cannot be read as JSON: ",
    '{"a": 1, // x\n a: 2}': "FILE: a: is a duplicate key",
    '{"bf16": {"enabled": true}, "fp16": {"enabled": true}}': (
        "bf16, fp16: must not both be enabled. Enable one of them."
    ),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items())
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

    shutil.copyfile(SAMPLES / "deepspeed_chat.json", tmp_path / "ds.json")
    done = call("import_deepspeed=ds.json")
    text = (SAMPLES / "deepspeed_chat.txt").read_text()
    assert (done.returncode, done.stdout, done.stderr) == (0, text, "")
    problems = {
        "import_deepspeed=none.json": "none.json: no such file."
        " Give a DeepSpeed JSON: import_deepspeed=ds_config.json.",
        "zero=stage2 import_deepspeed=ds.json": "import_deepspeed: must be the only argument"
        " (got zero=stage2). Add other overrides to the command that it prints.",
    }
    for words, problem in problems.items():
        done = call(*words.split())
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"1 problem, nothing was started:\n  {problem}\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "ds.json"]

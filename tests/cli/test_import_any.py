"""Whatever a DeepSpeed JSON holds, the command is valid and all that is lost is named."""

import json
import random
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from llama_pretrain.cli import import_keys as keys
from llama_pretrain.cli.import_deepspeed import describe_import, import_ds_config
from llama_pretrain.cli.overrides import build_run, default_settings, render_overrides
from llama_pretrain.config import deepspeed_keys as rules
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.config.tasks import Task
from llama_pretrain.config.validate import flatten, validate_run
from llama_pretrain.plan.ds_config import setting_of
from llama_pretrain.tasks.validate import find_problems
from tests.conftest import ROOT, compose_run
from tests.machines import LAPTOP, MACHINES

DRAWN = yaml.safe_load((Path(__file__).parent / "import_values.yaml").read_text())
VALUES: list[Any] = [value for row in DRAWN["values"] for value in row] + ["\ud800"]
PARAMS = sorted({key for _, table in keys.OPTIMIZERS.values() for key in table} | {*keys.FIXED})
PARAMS += ["lr", "warmup_num_steps", "warmup_max_lr", "total_num_steps", "cos_min_ratio", "x"]
PATHS = [*sorted(keys.known_paths()), *sorted(keys.FORMER), "bfloat16.enabled", "unknown", "bf16.x"]
PATHS += [*rules.EXTRA_KEYS, *rules.REFUSED_KEYS, *rules.LAST_VERSION_WITH]
PATHS += [f"{keys.ZERO}.{key}" for key in (*rules.ZERO_EXTRA_KEYS, *rules.REFUSED_ZERO_KEYS, "x")]
FILES = [*Path(deepspeed.__file__).parent.rglob("*.json"), *ROOT.glob("tests/**/*.json")]


def draw_config(draw: random.Random) -> dict[str, Any]:
    """A file: some keys with values that fit, more with values that may not."""
    config: dict[str, Any] = {}
    for path, values in DRAWN["likely"].items():
        if draw.random() < 0.4:
            put(config, path, draw.choice(values))
    for path in draw.sample(PATHS, draw.randrange(12)):
        put(config, path, draw.choice(VALUES))
    for name in ("optimizer", "scheduler"):
        params = {key: draw.choice(VALUES) for key in draw.sample(PARAMS, draw.randrange(5))}
        params = draw.choice([params] * 200 + VALUES)
        section = {"type": draw.choice(DRAWN["types"]), "params": params}
        config |= draw.choice([{}, {name: draw.choice([section] * 200 + VALUES)}])
    for name in (keys.ZERO, "bf16", "aio", "torch_autocast", f"{keys.ZERO}.stage"):
        if draw.random() < 0.05:
            config[name] = draw.choice(VALUES)
    return config


def put(config: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        if not isinstance(config.setdefault(section, {}), dict):
            return
        config = config[section]
    config[key] = value


def check_import(config: dict[str, Any]) -> list[str]:
    """Check what is printed for a file. Returns the words of the command, if there is one."""
    try:
        found = import_ds_config(config)
    except UserError as error:
        return [] if str(error).isprintable() else ["problems of several lines"]
    words, named = render_overrides(found.wanted), [str(problem) for problem in found.lost]
    assert all(line.isprintable() for line in [*words, *named])
    run = build_run(default_settings() | found.wanted)
    check_words(words, run)
    for path, value in keys.walk_config(config):
        if path in ("optimizer", "scheduler"):
            for key, inner in list_params(value):
                shown = is_named(f"{path}.{key}" if key else path, named)
                assert shown or has_param(path, key, inner, run), (path, key, inner, named)
        else:
            assert is_named(path, named) or is_reproduced(path, value, run), (path, value, named)
    return words


def check_words(words: list[str], run: Run) -> None:
    """Hydra reads the run's values from the words, and the rules accept it on every machine."""
    settings = dict(flatten(to_plain(run)))
    for override in OverridesParser.create().parse_overrides(words):
        key, value = override.key_or_group, override.value()
        section, _, extra = key.partition(".extra.")
        if extra:
            assert getattr(run, section).extra[extra] == value
        elif "." in key:
            assert value in (settings[key], None), key
    assert list(validate_run(run)) == []
    for machine in (MACHINES["laptop"], MACHINES["v100"], MACHINES["cluster"]):
        assert find_problems(plan(run), machine)[1] == []


def plan(run: Run) -> Run:
    """The run with task=plan, on as many ranks as its batch sizes make."""
    batch, ranks = run.batch, 1
    if batch.global_batch_size and batch.micro_batch_size and batch.gradient_accumulation_steps:
        step = batch.micro_batch_size * batch.gradient_accumulation_steps
        ranks = batch.global_batch_size // step
    return replace(run, task=Task.plan, launch=replace(run.launch, num_processes=ranks))


def is_named(path: str, named: list[str]) -> bool:
    """Whether a line is about the key, or about a section that it is in."""
    parents = [path[:index] for index, char in enumerate(path) if char == "."]
    return any(line.startswith(f"{name} = ") for line in named for name in (path, *parents))


def is_reproduced(path: str, value: Any, run: Run) -> bool:
    """Whether the run has the value, or the value asks for nothing."""
    name, (section, _, key) = keys.present_name(path), path.rpartition(".")
    if value in (None, {}, {"enabled": False}) or path == "zero_force_ds_cpu_optimizer":
        return path != f"{keys.ZERO}.zenflow" or value is None
    if key in (*rules.EXTRA_KEYS, *rules.ZERO_EXTRA_KEYS) and section in ("", keys.ZERO):
        extra = (run.zero if section else run.deepspeed).extra
        return bool(extra.get(key, "absent") == value)
    if name in ("bf16.enabled", "fp16.enabled"):
        return keys.read_switch(value) is (run.precision.name.value == name[:4])
    if path == keys.ZERO:
        return run.zero.stage == int(value)
    if name not in keys.known_paths():
        return bool(value == keys.NEUTRAL.get(key, False))
    return is_same(value, dict(flatten(to_plain(run)))[setting_of(name)])


def is_same(value: Any, has: Any) -> bool:
    """Whether a value of the JSON is a spelling of a setting's value."""
    if isinstance(has, bool):
        return keys.read_switch(value) is has
    if isinstance(has, int | float):
        return bool(has in (value, float(value)))
    switch = {"cpu": True, "none": False}.get(str(has), "not a device")
    known = has in (value, value or None) or (has and keys.DTYPES.get(str(value)) == has)
    return bool(known) or keys.read_switch(value) is switch


def list_params(section: Any) -> list[tuple[str, Any]]:
    """Type and parameters of an optimizer or scheduler; without its parts if it is no object."""
    params = section.get("params") or {} if isinstance(section, dict) else None
    if not isinstance(params, dict):
        return [] if section is None else [("", section)]
    return [("type", section.get("type")), *((f"params.{key}", params[key]) for key in params)]


def has_param(section: str, path: str, value: Any, run: Run) -> bool:
    key = path.rpartition(".")[2]
    if key == "type":
        return value is None or str(value).lower() in keys.OPTIMIZERS
    if value is None or value == keys.FIXED.get(key, ["nothing"])[0] or key == "adam_w_mode":
        return True
    if key == "torch_adam" or (key, value) == ("warmup_min_lr", "auto"):
        return key != "torch_adam" or run.optim.name.value == "torch_adamw"
    tables = keys.OPTIMIZERS if section == "optimizer" else keys.SCHEDULERS
    settings, all_settings = {"optim.learning_rate"}, dict(flatten(to_plain(run)))
    settings = {table[key][0] for _, table in tables.values() if key in table} or settings
    return any(is_same(value, all_settings[setting]) for setting in settings)


def test_random_files() -> None:
    draw = random.Random(8)
    commands = [check_import(draw_config(draw)) for _ in range(300)]
    valid = [words for words in commands if words]
    assert len(valid) > 200
    for words in valid[:20]:
        assert find_problems(plan(compose_run(words)), LAPTOP)[1] == []


@pytest.mark.parametrize("bf16", ["absent", False, True, "auto"])
@pytest.mark.parametrize("fp16", ["absent", False, True, "auto"])
def test_precisions(bf16: Any, fp16: Any) -> None:
    config = {name: {"enabled": v} for name, v in (("bf16", bf16), ("fp16", fp16)) if v != "absent"}
    config.setdefault("fp16", {})["initial_scale_power"] = 12
    expected = ["bf16"] if bf16 is True else ["fp16"] if fp16 is True else ["fp32"]
    if bf16 == "auto" and fp16 is not True:  # our own choice is bf16 or fp32 too
        expected = []
    words = check_import(config)
    chosen = [word.partition("=")[2] for word in words if word.startswith("precision=")]
    assert (words, chosen) == ([], []) if bf16 is fp16 is True else chosen == expected


def test_every_json_at_hand(tmp_path: Path) -> None:
    texts = [path.read_text() for path in FILES] + [json.dumps(value) for value in VALUES]
    texts += ["[" * depth + "]" * depth for depth in (400, 100_000)]
    texts += [f'{{"wandb": {text}, "y": {text}}}' for text in texts[-2:]]
    file = tmp_path / "ds.json"
    for text in texts:
        file.write_text(text)
        try:
            printed = describe_import([f"import_deepspeed={file}"])
        except UserError:
            continue
        words = shlex.split(printed.splitlines()[0])[2:]
        assert find_problems(plan(compose_run(words)), LAPTOP)[1] == []

"""A DeepSpeed JSON from elsewhere -> the overrides that give the same run: ds_config.py inverted.

A key that is absent counts too: where DeepSpeed's default is not ours, it is asked for.
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama_pretrain import console
from llama_pretrain.cli import import_keys as ds
from llama_pretrain.cli.import_settings import Import
from llama_pretrain.cli.overrides import render_overrides
from llama_pretrain.config import deepspeed_keys as rules
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.zero import Zero, stages_of
from llama_pretrain.plan.ds_config import setting_of
from llama_pretrain.plan.resolve import REASONS

COMMAND = "import_deepspeed="


def run_import(words: Sequence[str]) -> int:
    """`python run.py import_deepspeed=FILE`: print the command. Returns the exit code."""
    try:
        print(describe_import(words))
    except UserError as error:
        console.show_problems(error.problems)
        return 1
    return 0


def describe_import(words: Sequence[str]) -> str:
    """What `python run.py import_deepspeed=FILE` prints.

    Raises:
        UserError: if there are other words, or the file is none that DeepSpeed would read.
    """
    word = next(word for word in words if word.startswith(COMMAND))
    if len(words) > 1:
        message = (
            f"must be the only argument (got {' '.join(other for other in words if other != word)})"
        )
        hint = "Add other overrides to the command that it prints"
        raise UserError([Problem(path=COMMAND.rstrip("="), message=message, hint=hint)])
    path = Path(os.path.expanduser(word.removeprefix(COMMAND)))
    try:
        found = import_ds_config(read_ds_config(path))
    except RecursionError as error:
        raise UserError([Problem(path=str(path), message="is nested too deeply")]) from error
    lines = [shlex.join(["python", "run.py", *render_overrides(found.wanted)])]
    lines += ["not carried over:"] if found.lost else []
    return "\n".join([*lines, *(f"  {problem}" for problem in found.lost)])


def read_ds_config(path: Path) -> dict[str, Any]:
    """A JSON as DeepSpeed reads it: no key twice, and hjson where that is installed.

    Raises:
        UserError: if it is not there or cannot be read.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        message = "is a duplicate key, which DeepSpeed rejects"
        refuse(Problem(path=f"{path}: {key}", message=message, hint="Keep one") for key in twice)
        return dict(pairs)

    if not path.is_file():
        hint = f"Give a DeepSpeed JSON: {COMMAND}ds_config.json"
        raise UserError([Problem(path=str(path), message="no such file", hint=hint)])
    try:
        text = path.read_text(encoding="utf-8-sig")
        try:
            values = json.loads(text, object_pairs_hook=unique)
        except ValueError:
            if find_spec("hjson") is None:
                raise
            values = import_module("hjson").loads(text, object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        message = f"cannot be read as JSON: {' '.join(str(error).split())}"
        raise UserError([Problem(path=str(path), message=message)]) from error
    if not isinstance(values, dict):
        message = f"must be an object (got a {type(values).__name__})"
        raise UserError([Problem(path=str(path), message=message)])
    return values


def import_ds_config(config: Mapping[str, Any]) -> Import:
    """Our settings for a DeepSpeed JSON.

    Raises:
        UserError: if it asks for bf16 and fp16 at once.
    """
    found = Import()
    config = {key: value for key, value in config.items() if key != "bf16" or value is not None}
    sections = {name: config.pop(name, None) for name in ("scheduler", "optimizer")}
    forced = config.pop("zero_force_ds_cpu_optimizer", True)
    if "bfloat16" in config and config.get("bf16") is not None:
        found.lose("bfloat16", config.pop("bfloat16"), "is ignored because bf16 is given")
    if "allgather_size" in config and config.get(ds.ZERO) is not True:
        message = f"is only read with {ds.ZERO} = true"
        found.lose("allgather_size", config.pop("allgather_size"), message)
    leaves = sorted(ds.walk_config(config), key=lambda leaf: ds.present_name(leaf[0]) != leaf[0])
    for path, value in leaves:
        _read(found, path, value)
    _read_precision(found, config)
    if "zero.stage" not in found.open:
        found.want("zero.stage", 0, "zero_optimization.stage", given=False)
    _read_typed(found, "scheduler", sections["scheduler"])  # its peak overrides the optimizer's
    _read_typed(found, "optimizer", sections["optimizer"])
    if forced is not True and found.wanted.get("optim.name") != "cpu_adagrad":
        message = "has no effect: offloaded state is updated by DeepSpeed's CPU optimizers here"
        found.lose("zero_force_ds_cpu_optimizer", forced, message)
    found.drop_refused()
    _add_defaults(found)
    found.drop_refused()
    return found


def _read(found: Import, path: str, value: Any) -> None:
    """One value: a setting, or a key that is passed on, refused, removed, or a mistake."""
    name = ds.present_name(path)
    section, _, key = path.rpartition(".")
    extra, passed, refused = {
        "": ("deepspeed.extra", rules.EXTRA_KEYS, rules.REFUSED_KEYS),
        ds.ZERO: ("zero.extra", rules.ZERO_EXTRA_KEYS, rules.REFUSED_ZERO_KEYS),
    }.get(section, ("", (), {}))
    is_section = any(known.startswith(f"{name}.") for known in ds.known_paths())
    if value is None and path == "steps_per_print":
        found.lose(path, value, "turns these lines off, which has no setting here")
    elif value is None and (name in ds.known_paths() or is_section or key in {*passed, *refused}):
        return  # the same as an absent key
    elif name in ("bf16.enabled", "fp16.enabled"):
        return  # _read_precision
    elif name in ds.known_paths():
        found.want(setting_of(name), value, path)
    elif path == ds.ZERO and isinstance(value, bool):  # before there were stages
        found.want("zero.stage", value, path)
    elif key in passed:
        found.want(f"{extra}.{key}", value, path)
    elif extra and key in {*refused, *rules.LAST_VERSION_WITH}:
        off = key != "zenflow" and value in ({}, {"enabled": False})
        neutral = off or value == ds.NEUTRAL.get(key, False)
        if key in rules.LAST_VERSION_WITH or not neutral:
            for problem in rules.validate_key(key, path, passed, refused, {}):
                found.lose(path, value, problem.message)
    elif is_section:
        found.lose(path, value, "must be an object")
    else:
        found.lose(path, value, *ds.explain_key(path))


def _read_precision(found: Import, config: Mapping[str, Any]) -> None:
    asked = {
        ds.present_name(name): (f"{name}.enabled", config[name].get("enabled"))
        for name in ("bf16", "bfloat16", "fp16")
        if isinstance(config.get(name), Mapping)
    }
    on = [name for name, (_, value) in asked.items() if ds.read_switch(value)]
    if len(on) == 2:
        message = "must not both be enabled"
        raise UserError([Problem(path="bf16, fp16", message=message, hint="Enable one of them")])
    # Where bf16 is left open, so is our choice, which is bf16 or fp32.
    left_open = "bf16" in asked and asked["bf16"][1] == "auto"
    name = on[0] if on else "auto" if left_open else "fp32"
    for path, value in asked.values():
        if value == "auto":
            chosen = f" ({REASONS['precision.name']})" if name == "auto" else ""
            message = f"is filled in by the training script; precision={name} here{chosen}"
            found.lose(path, value, message)
        elif value is not None and ds.read_switch(value) is None:
            found.lose(path, value, "must be true or false")
    if name == "auto":
        found.open.add("precision.name")
    else:
        found.want("precision.name", name, f"{name}.enabled", given=False)


def _read_typed(found: Import, name: str, section: Any) -> None:
    """The optimizer or the scheduler: a type and its parameters."""
    section = {} if section is None else section
    given = section.get("params") if isinstance(section, Mapping) else section
    if not isinstance(section, Mapping) or not isinstance(given, Mapping | None):
        found.lose(name, section, "must be an object with type and params")
        return
    kind = section.get("type")
    params = {key: value for key, value in (given or {}).items() if value is not None}
    read = {"scheduler": _read_scheduler, "optimizer": _read_optimizer}[name]
    reason = read(found, str(kind), dict(params)) if kind is not None else "is absent"
    if reason and kind is not None:
        found.lose(f"{name}.type", kind, reason)
    if reason and params:
        found.lose(f"{name}.params", params, f"is not read, because {name}.type {reason}")
    for key in [key for key in section if key not in ("type", "params")]:
        found.lose(f"{name}.{key}", section[key], ds.NO_SETTING)


def _read_scheduler(found: Import, kind: str, params: dict[str, Any]) -> str:
    """Ask for a schedule. Returns why there is none like it, if so."""
    if kind not in ds.SCHEDULERS:
        return "has no equivalent here"
    name, carried = ds.SCHEDULERS[kind]
    found.want("schedule.name", name, "scheduler.type", seen=kind)
    message = f"takes its first two steps at a learning rate of 0; schedule={name} does not"
    found.lose("scheduler.type", kind, message)
    if name == "linear":
        found.want(ds.LEAST, 0.0, "scheduler.type")
    if "warmup_type" not in params:
        found.lose("scheduler.params.warmup_type", "log", ds.FIXED["warmup_type"][1], given=False)
    if params.get("warmup_min_lr") == "auto":  # transformers fills in 0
        del params["warmup_min_lr"]
    _read_params(found, "scheduler.params", params, carried)
    return ""


def _read_optimizer(found: Import, kind: str, params: dict[str, Any]) -> str:
    """Ask for an optimizer. Returns why there is none like it, if so."""
    name, prefix = kind.lower(), "optimizer.params"
    offloaded = found.wanted.get("zero.offload_optimizer.device", "none") != "none"
    if name in ds.REMOVED_OPTIMIZERS:
        return "was removed from DeepSpeed (last release with it: 0.19.6)"
    if name not in ds.OPTIMIZERS or (name == "adagrad" and not offloaded):
        where = " without offload" if name == "adagrad" else ""
        return f"has no equivalent here{where}"
    option, carried = ds.OPTIMIZERS[name]
    torch_adam = name.startswith("adam") and ds.read_switch(params.get("torch_adam", False))
    if name.startswith("adam"):
        decoupled = name == "adamw" or params.get("adam_w_mode", True)
        if torch_adam and decoupled:
            carried = {**carried, "weight_decay": ("optim.weight_decay", ds.TORCH_WEIGHT_DECAY)}
        if torch_adam and not offloaded:
            option = "torch_adamw"
            del params["torch_adam"]
        if decoupled or params.get("weight_decay", 0) == 0:  # without decay both are the same
            params.pop("adam_w_mode", None)
    if name == "muon" and "optim.learning_rate" in found.wanted:
        # A schedule's peak is that of all parameters.
        for values in (found.wanted, found.origins):
            values["optim.muon_learning_rate"] = values["optim.learning_rate"]
    found.want("optim.name", option, "optimizer.type", seen=kind)
    _read_params(found, prefix, params, carried)
    return ""


def _read_params(
    found: Import, prefix: str, params: Mapping[str, Any], carried: ds.Parameters
) -> None:
    read = set()
    for key, (setting, default) in carried.items():
        # Muon takes lr for each of its two learning rates that is absent.
        name = "lr" if key in ("adam_lr", "muon_lr") and key not in params else key
        name = name if name in params else key
        read.add(name)
        if name in params or default is not None:
            given = name in params
            found.want(setting, params.get(name, default), f"{prefix}.{name}", given=given)
    for key in [key for key in params if key not in read]:
        fixed, message = ds.FIXED.get(key, (None, ds.NO_SETTING))
        if params[key] != fixed:
            found.lose(f"{prefix}.{key}", params[key], message)


def _add_defaults(found: Import) -> None:
    """Ask for DeepSpeed's defaults where a key is absent, would be read, and ours is another."""
    stages = {item.name: stages_of(item) for item in fields(Zero)}
    for path, value in ds.DEFAULTS.items():
        section, _, key = path.rpartition(".")
        switch = "device" if section.startswith(ds.ZERO) else "enabled"
        if section == ds.ZERO:
            read = found.wanted.get("zero.stage") in stages[key]
        else:
            on = found.wanted.get(setting_of(f"{section}.{switch}"))
            read = not section or on not in (None, False, "none")
        if read and setting_of(path) not in found.origins.keys() | found.open:
            found.want(setting_of(path), value, path, given=False)

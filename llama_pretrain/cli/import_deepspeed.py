"""A DeepSpeed JSON from elsewhere -> the overrides that give the same run: ds_config.py inverted.

A key that is absent counts too: where DeepSpeed's default is not ours, it is asked for.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama_pretrain import console
from llama_pretrain.cli import import_keys as ds
from llama_pretrain.cli.overrides import build_run, default_settings, render_overrides
from llama_pretrain.config import deepspeed_keys as rules
from llama_pretrain.config.ignored import find_ignored
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.validate import validate_run
from llama_pretrain.config.zero import Zero, stages_of
from llama_pretrain.plan.ds_config import setting_of
from llama_pretrain.plan.resolve import REASONS

COMMAND = "import_deepspeed="


class Import:
    """What was understood of a file: the settings that it asks for, and what is lost."""

    def __init__(self) -> None:
        self.wanted: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        """The key and value behind each setting that was ever asked for, as a person reads it."""
        self.open: set[str] = set()
        """Settings that the file leaves to something else with "auto"."""
        self.lost: list[Problem] = []

    def want(
        self, setting: str, value: Any, path: str, *, given: bool = True, seen: Any = None
    ) -> None:
        """Ask for a setting. The first to ask has it; what is not `given` asks in silence.

        Args:
            seen: the value at `path`, where that is another.
        """
        seen, text = value if seen is None else seen, str(value).lower().removeprefix("torch.")
        value = ds.SPELLINGS.get(setting, {}).get(text, value)
        if value == "auto":
            self.open.add(setting)
            chosen = f" ({REASONS[setting]})" if setting in REASONS else ""
            decides = f"was filled in elsewhere; {setting} decides here{chosen}"
            self.lose(path, value, ds.AUTO.get(setting, decides))
        elif "${" in text:
            self.lose(path, value, "would be interpolated here", f"set {setting}")
        elif setting not in self.wanted:
            self.wanted[setting], self.origins[setting] = (
                value,
                ds.show_key(path, seen, given=given),
            )
        elif given and self.wanted[setting] != value:
            self.lose(path, seen, f"{self.origins[setting]} goes before it")

    def lose(
        self, path: str, value: Any, message: str, hint: str = "", *, given: bool = True
    ) -> None:
        """Note what is not carried over."""
        where = ds.show_key(path, value, given=given)
        self.lost.append(Problem(path=where, message=message, hint=hint))

    def drop(self, setting: str, problem: Problem, *, default: Any) -> None:
        """Take a setting back that our rules refuse."""
        value = self.wanted.pop(setting)
        if value != default:
            whole = isinstance(value, float) and value.is_integer()
            texts = {str(value), repr(value), str(int(value)) if whole else str(value)}
            got = "|".join(re.escape(text) for text in texts)
            message = re.sub(rf" \(got ({got})\)$", "", problem.message)
            hint = re.sub(r"(, or )?(leave it out|set it to false)(, or .*)?$", "", problem.hint)
            self.lost.append(Problem(path=self.origins[setting], message=message, hint=hint))


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
            f"must be the only word (got {' '.join(other for other in words if other != word)})"
        )
        hint = "Add other words to the command that it prints"
        raise UserError([Problem(path=COMMAND.rstrip("="), message=message, hint=hint)])
    found = import_ds_config(read_ds_config(Path(word.removeprefix(COMMAND)).expanduser()))
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
        message = "stands twice in one section, which DeepSpeed refuses"
        refuse(Problem(path=f"{path}: {key}", message=message, hint="keep one") for key in twice)
        return dict(pairs)

    if not path.is_file():
        hint = f"give a DeepSpeed JSON: {COMMAND}ds_config.json"
        raise UserError([Problem(path=str(path), message="there is no file here", hint=hint)])
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
        message = f"should hold an object (got a {type(values).__name__})"
        raise UserError([Problem(path=str(path), message=message)])
    return values


def import_ds_config(config: Mapping[str, Any]) -> Import:
    """Our settings for a DeepSpeed JSON.

    Raises:
        UserError: if it asks for bf16 and fp16 at once.
    """
    found, config = Import(), _without_nulls(config)
    sections = {name: config.pop(name, {}) for name in ("scheduler", "optimizer")}
    forced = config.pop("zero_force_ds_cpu_optimizer", True)
    for path, value in sorted(
        ds.walk_config(config), key=lambda leaf: ds.present_name(leaf[0]) != leaf[0]
    ):
        _read(found, path, value)
    _read_precision(found, config)
    if "zero.stage" not in found.open:
        found.want("zero.stage", 0, "zero_optimization.stage", given=False)
    _read_typed(found, "scheduler", sections["scheduler"])  # its peak goes before the optimizer's
    _read_typed(found, "optimizer", sections["optimizer"])
    if not forced and found.wanted.get("optim.name") != "cpu_adagrad":
        message = "what is offloaded is updated by DeepSpeed's own optimizers here"
        found.lose("zero_force_ds_cpu_optimizer", forced, message)
    accumulation = "batch.gradient_accumulation_steps"
    sizes = {"batch.global_batch_size", "batch.micro_batch_size"} & found.wanted.keys()
    if accumulation in found.wanted and not sizes:
        message, hint = "says nothing without a batch size", "set batch.micro_batch_size too"
        found.drop(accumulation, Problem(path="", message=message, hint=hint), default=None)
    _drop_refused(found)
    _add_defaults(found)
    found.lost += _drop_refused(found)
    return found


def _without_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """To DeepSpeed a null is an absent key."""
    return {
        key: _without_nulls(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value is not None
    }


def _read(found: Import, path: str, value: Any) -> None:
    """One value: a setting, or a key that is passed on, refused, removed, or a mistake."""
    name = ds.present_name(path)
    section, _, key = path.rpartition(".")
    extra, passed, refused = {
        "": ("deepspeed.extra", rules.EXTRA_KEYS, rules.REFUSED_KEYS),
        ds.ZERO: ("zero.extra", rules.ZERO_EXTRA_KEYS, rules.REFUSED_ZERO_KEYS),
    }.get(section, ("", (), {}))
    if name in ds.known_paths():
        if name not in ("bf16.enabled", "fp16.enabled"):
            found.want(setting_of(name), value, path)
    elif key in passed:
        found.want(f"{extra}.{key}", value, path)
    elif extra and (key in refused or key in rules.LAST_VERSION_WITH):
        neutral = value == ds.NEUTRAL.get(key, False) or value in ({}, {"enabled": False})
        if key in rules.LAST_VERSION_WITH or not neutral:
            for problem in rules.validate_key(key, path, passed, refused, {}):
                found.lose(path, value, problem.message)
    elif any(known.startswith(f"{name}.") for known in ds.known_paths()):
        found.lose(path, value, "should be an object")
    elif path in ds.REASONS:
        found.lose(path, value, ds.REASONS[path])
    else:
        found.lose(path, value, ds.NO_SETTING, ds.suggest_key(path))


def _read_precision(found: Import, config: Mapping[str, Any]) -> None:
    sections = {"bf16": config.get("bf16", config.get("bfloat16")), "fp16": config.get("fp16")}
    asked = {
        name: ds.read_switch(section.get("enabled", False))
        for name, section in sections.items()
        if isinstance(section, Mapping)
    }
    on = [name for name, value in asked.items() if value is True]
    if len(on) == 2:
        message = "bf16 and fp16 exclude each other, and both are enabled"
        raise UserError([Problem(path="bf16, fp16", message=message, hint="enable one of them")])
    for name, value in asked.items():
        if value == "auto":
            chosen = asked.get("bf16") == "auto"
            decides = "precision.name decides here" if chosen else "is read as false"
            found.lose(f"{name}.enabled", value, decides, f"set precision={name} to choose it")
        elif value is None:
            found.lose(f"{name}.enabled", sections[name]["enabled"], "must be true or false")
    if on or asked.get("bf16") != "auto":  # the precision that we choose is bf16 or fp32
        name = on[0] if on else "fp32"
        found.want("precision.name", name, f"{name}.enabled", given=False)


def _read_typed(found: Import, name: str, section: Any) -> None:
    """The optimizer or the scheduler: a type and its parameters."""
    params = section.get("params", {}) if isinstance(section, Mapping) else None
    if not isinstance(params, Mapping):
        found.lose(name, section, "should be an object with type and params")
    elif section:
        kind = str(section.get("type", ""))
        read = {"scheduler": _read_scheduler, "optimizer": _read_optimizer}[name]
        reason = read(found, kind, dict(params))
        if reason:
            found.lose(f"{name}.type", kind, reason)
            if params:
                found.lose(f"{name}.params", params, f"belongs to {kind}")
        for key in [key for key in section if key not in ("type", "params")]:
            found.lose(f"{name}.{key}", section[key], ds.NO_SETTING)


def _read_scheduler(found: Import, kind: str, params: dict[str, Any]) -> str:
    """Ask for a schedule. Returns why there is none like it, if so."""
    if kind not in ds.SCHEDULERS:
        return "has no equivalent here"
    name, carried = ds.SCHEDULERS[kind]
    found.want("schedule.name", name, "scheduler.type", seen=kind)
    message = f"DeepSpeed's takes its first two steps at a learning rate of 0, schedule={name} none"
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
        return "DeepSpeed 0.19.7 has removed it (the last with it is 0.19.6)"
    if name not in ds.OPTIMIZERS or (name == "adagrad" and not offloaded):
        where = " without offload" if name == "adagrad" else ""
        return f"has no equivalent here{where}"
    option, carried = ds.OPTIMIZERS[name]
    if name.startswith("adam"):
        decoupled = name == "adamw" or params.get("adam_w_mode", True)
        if params.get("torch_adam") is True and decoupled:
            carried = {**carried, "weight_decay": ("optim.weight_decay", ds.TORCH_WEIGHT_DECAY)}
        if params.get("torch_adam") is True and not offloaded:
            option = "torch_adamw"
            del params["torch_adam"]
        if decoupled or params.get("weight_decay", 0) == 0:  # without decay both are the same
            params.pop("adam_w_mode", None)
    if name == "muon":
        if "optim.learning_rate" in found.wanted:  # a schedule's peak is that of all parameters
            peak = found.wanted["optim.learning_rate"]
            found.want("optim.muon_learning_rate", peak, "")
            found.origins["optim.muon_learning_rate"] = found.origins["optim.learning_rate"]
        if "lr" in params:
            params = dict.fromkeys(("adam_lr", "muon_lr"), params["lr"]) | params
            del params["lr"]
    found.want("optim.name", option, "optimizer.type", seen=kind)
    _read_params(found, prefix, params, carried)
    return ""


def _read_params(
    found: Import, prefix: str, params: Mapping[str, Any], carried: ds.Parameters
) -> None:
    for key, (setting, default) in carried.items():
        if key in params or default is not None:
            given = key in params
            found.want(setting, params.get(key, default), f"{prefix}.{key}", given=given)
    for key in [key for key in params if key not in carried]:
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


def _drop_refused(found: Import) -> list[Problem]:
    """Take back what our rules refuse. Returns what they miss, which no setting is to blame for."""
    defaults = default_settings()
    while True:
        problems = _check(defaults | found.wanted)
        # An optimizer that cannot be: what it asks of other settings then is no problem of theirs.
        first = [
            problem
            for problem in problems
            if problem.path == "optim.name" and "optim.name" in found.wanted
        ] or problems
        blamed = {
            setting: problem
            for problem in first
            for setting in found.wanted
            if f"{problem.path}.".startswith(f"{setting}.")
            or f"{setting}.".startswith(f"{problem.path}.")
        }
        if not blamed:
            return problems
        for setting, problem in blamed.items():
            found.drop(setting, problem, default=defaults.get(setting))


def _check(settings: Mapping[str, Any]) -> list[Problem]:
    try:
        run = build_run(settings)
        return [*validate_run(run), *find_ignored(run, {})]
    except UserError as error:
        return error.problems

"""The words of a command, interpreted once: flags, overrides, and what is wrong with them.

Keys, options and types are checked here against conf/ and the schema, before Hydra composes, so
that all mistakes are reported at once and in terms of this config.
"""

import argparse
import difflib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from llama_pretrain.config.compose import CONF, OVERLAYS, SWEEPS, list_groups
from llama_pretrain.config.data import Source, Stage
from llama_pretrain.config.fields import type_of, walk_fields, yaml_text
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.run import Run
from llama_pretrain.config.secrets import find_secret_files, find_secret_words
from llama_pretrain.config.validate import unknown_key

REFERENCES = ("resume", "reproduce", "run")
"""Words that name the directory of an existing run."""
SWITCHES = {
    "help": "h",
    "hydra-help": "",
    "version": "",
    "resolve": "",
    "run": "r",
    "multirun": "m",
    "shell-completion": "sc",
}
FLAGS_WITH_VALUES = {
    "cfg": "c",
    "package": "p",
    "config-path": "cp",
    "config-name": "cn",
    "config-dir": "cd",
    "experimental-rerun": "",
    "info": "i",
}
"""Hydra's flags and their short forms."""
CONFIG_FLAGS = ("config-path", "config-name", "config-dir")
"""Flags that name other configs than ours."""
OPEN_MAPPINGS = ("zero.extra", "deepspeed.extra", "launch.slurm.extra", "data.sources")
"""Settings that `+` may add keys to."""
PLUGINS = {
    "optuna": ("hydra_plugins.hydra_optuna_sweeper", "optuna"),
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
}
"""Launchers and sweepers that come with an extra: their package and the extra."""


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """One command."""

    argv: list[str]
    flags: dict[str, str] = field(default_factory=dict)
    """Hydra's flags with their values, by long name without dashes; "" for switches."""
    overrides: list[Override] = field(default_factory=list)
    """The overrides that could be parsed, in order."""
    problems: list[Problem] = field(default_factory=list)
    """Everything wrong with the words themselves."""

    @property
    def words(self) -> list[str]:
        """The overrides as they were written."""
        return [str(override.input_line) for override in self.overrides]

    def value(self, key: str) -> str | None:
        """The text that a key is set to; `None` if it is not set."""
        found = [word for word in self.words if word.lstrip("+").partition("=")[0] == key]
        return found[-1].partition("=")[2] if found else None

    @property
    def reference(self) -> dict[str, str]:
        """The words of REFERENCES that name a run."""
        given = {key: _unquote(self.value(key)) for key in REFERENCES}
        return {key: value for key, value in given.items() if value not in (None, "", "null")}

    @property
    def starts_from_snapshot(self) -> bool:
        """Whether the config is an existing run's. `resume=auto` in a named directory may start."""
        may_start = self.reference == {"resume": "auto"} and not self.is_multirun
        return bool(self.reference) and not (may_start and self.value("hydra.run.dir") is not None)

    @property
    def is_multirun(self) -> bool:
        """Whether it asks for several runs: `-m`, or a named sweep, whose file says so."""
        named = self.value("sweep") not in (None, "", "null")
        mode = self.value("hydra.mode") == "MULTIRUN"
        return named or mode or "multirun" in self.flags

    @property
    def only_shows(self) -> bool:
        """Whether Hydra prints something and nothing runs: --cfg, --info, --help, completion."""
        return bool(self.flags.keys() - {"multirun", "run", "experimental-rerun", *CONFIG_FLAGS})


def _unquote(text: str | None) -> str | None:
    """A directory as `hydra.run.dir` takes it: in quotes or without."""
    quoted = text is not None and len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if text is not None and quoted else text


class _FlagParser(argparse.ArgumentParser):
    """Reads flags as Hydra's parser does: abbreviated, joined, before or after overrides."""

    def error(self, message: str) -> NoReturn:
        raise UserError([Problem(path="command line", message=message)])


@cache
def _flag_parser() -> _FlagParser:
    parser = _FlagParser(add_help=False)
    for flags, action in ((SWITCHES, "store_true"), (FLAGS_WITH_VALUES, "store")):
        for name, short in flags.items():
            names = [f"--{name}", f"-{short}"] if short else [f"--{name}"]
            parser.add_argument(*names, action=action, default=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    return parser


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Interpret the words of a command; what is wrong with them is in its `problems`."""
    overrides: list[Override] = []
    problems = list(find_secret_words(argv))
    try:
        found = vars(_flag_parser().parse_intermixed_args(argv))
    except UserError as error:
        return CommandLine(argv=list(argv), problems=problems + error.problems)
    for word in found.pop("overrides"):
        try:
            overrides.append(_parse_override(word))
        except HydraException as error:
            problems.append(Problem(path="", message=str(error).split("\n")[0]))
    flags = {
        name.replace("_", "-"): "" if value is True else value for name, value in found.items()
    }
    command = CommandLine(argv=list(argv), flags=flags, overrides=overrides, problems=problems)
    if not problems:
        problems += _check(command)
    return command


def _parse_override(word: str) -> Override:
    parser = OverridesParser.create()
    try:
        return parser.parse_override(word)
    except HydraException:
        key = word.partition("=")[0]
        if key not in REFERENCES:
            raise
        override = parser.parse_override(f"{key}=DIR")  # a directory is taken as it is written
        override.input_line = word
        return override


def _check(command: CommandLine) -> Iterator[Problem]:
    if "shell-completion" in command.flags:  # its words are not overrides
        return
    if "experimental-rerun" in command.flags:
        yield Problem(
            path="--experimental-rerun",
            message="opens a pickle, which can run any code",
            hint="Reproduce a run with reproduce=DIR",
        )
    # Hydra writes multirun.yaml, with the whole config unresolved, before it calls us.
    if command.is_multirun or any(word.lstrip("+~").startswith("hydra") for word in command.words):
        folders = [command.flags.get(name) for name in ("config-dir", "config-path")]
        yield from find_secret_files([CONF, SWEEPS, *(Path(name) for name in folders if name)])
    if len(command.reference) > 1:
        names = ", ".join(command.reference)
        yield Problem(path=names, message="cannot be combined", hint="Keep one of them")
    own_config = bool({"config-path", "config-name"} & command.flags.keys())
    for override in command.overrides:
        yield from _check_override(override, command, own_config=own_config)


def _check_override(
    override: Override, command: CommandLine, *, own_config: bool
) -> Iterator[Problem]:
    key, word = override.key_or_group, str(override.input_line)
    if key in REFERENCES or override.package is not None:
        return
    if key in ("hydra/launcher", "hydra/sweeper"):
        yield from _check_plugin(key, override)
        return
    if key.split(".")[0].split("/")[0] == "hydra" or own_config:
        return
    values = list(_values_of(override))
    if override.is_sweep_override() and not (command.is_multirun or command.only_shows):
        text = word.partition("=")[2]
        hint = "To run each of them, add --multirun; to set a list, write [a,b]"
        setting = dict(walk_fields(Run)).get(key)
        if setting is not None and _allows(type_of(setting), str):
            hint = f"To set a text with a comma, quote it: \"{key}='{text}'\"; to run each of"
            hint += " them, add --multirun"
        yield Problem(path=key, message=f"has several values (got {text})", hint=hint)
        return
    if key in (*list_groups(), *OVERLAYS):
        if override.is_delete():
            return
        if command.starts_from_snapshot and key in OVERLAYS:
            hint = "Set values one by one: SETTING=VALUE"
            yield Problem(path=key, message=f"a snapshot has no options (got {word})", hint=hint)
        elif not (values and isinstance(values[0], dict)):
            folder = command.flags.get("config-dir")
            for value in values:
                yield from _check_option(key, value, folder)
        return
    if override.is_delete():
        return
    settings = dict(walk_fields(Run))
    added = override.is_add() or override.is_force_add() or command.starts_from_snapshot
    mapping = next((name for name in OPEN_MAPPINGS if key.startswith(f"{name}.")), None)
    if key in settings and (key not in OPEN_MAPPINGS or added):
        if override.is_add() and key not in OPEN_MAPPINGS:
            hint = f"Remove the plus: {word.lstrip('+')}"
            yield Problem(path=key, message=f"exists already (got {word})", hint=hint)
            return
        kind, annotated = type_of(settings[key]), settings[key].type
        # In a sweep, a job whose value is out of range is refused alone, unless all of them are.
        several = override.is_sweep_override() and any(
            not list(_check_value(key, kind, value, annotated)) for value in values
        )
        for value in values:
            yield from _check_value(key, kind, value, annotated, ranges=not several)
    elif mapping == "data.sources":
        yield from _check_source(key, word, values)
    elif mapping is not None:
        if not added:
            yield unknown_key(key, got=word)
    elif any(path.startswith(f"{key}.") for path in settings):
        if not all(isinstance(value, dict) for value in values):
            inside = next(path for path in settings if path.startswith(f"{key}."))
            message = f"is a section (got {word.partition('=')[2]})"
            yield Problem(path=key, message=message, hint=f"Set {inside}, for example")
    elif not key.startswith("data.stages."):
        yield unknown_key(key, got=word)


def _values_of(override: Override) -> Iterator[Any]:
    """Every value that an override can take; those of a range are not listed."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        for item in value.list:
            yield getattr(item, "text", item)
    elif not override.is_sweep_override():
        yield value


def _check_plugin(group: str, override: Override) -> Iterator[Problem]:
    package, extra = PLUGINS.get(str(override.value()), ("", ""))
    if package and importlib.util.find_spec(package) is None:
        yield Problem(
            path=group,
            message=f"{override.value()} is not installed",
            hint=f"Install the extra: pip install -e '.[{extra}]'",
        )


def _check_option(group: str, value: Any, config_dir: str | None) -> Iterator[Problem]:
    folders = [CONF / group, SWEEPS / group]
    folders += [Path(config_dir) / group] if config_dir else []
    names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    chosen = value if isinstance(value, list) and group in OVERLAYS else [value]
    for option in chosen:
        text = "null" if option is None else str(option)
        if text in names or "/" in text or "${" in text or (option is None and group in OVERLAYS):
            continue
        ends = [name for name in names if name.endswith(text)]
        close = difflib.get_close_matches(text.lower(), names, n=1) or ends[:1]
        hint = f"Did you mean {group}={close[0]}? " if close else ""
        hint += f"Options: {', '.join(names)}"
        yield Problem(path=group, message=f"has no option {text!r}", hint=hint)


def _check_source(key: str, word: str, values: list[Any]) -> Iterator[Problem]:
    """`data.sources.NAME.FIELD=VALUE`, or `+data.sources.NAME={...}`."""
    inner = key.split(".")[3:]
    known = {item.name: item for item in fields(Source)}
    given = inner[:1] or [name for value in values if isinstance(value, dict) for name in value]
    for name in given:
        if name not in known:
            yield _unknown_field(key, "source", name, list(known), word)
    if inner and inner[0] in known:
        for value in values:
            yield from _check_value(key, type_of(known[inner[0]]), value, known[inner[0]].type)


def _unknown_field(path: str, what: str, name: str, known: list[str], got: str) -> Problem:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"Keys: {', '.join(known)}"
    return Problem(path=path, message=f"a {what} has no key {name!r} (got {got})", hint=hint)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    config = ConfigDict(allow_inf_nan=False)
    own = isinstance(kind, type) and is_dataclass(kind)
    return TypeAdapter(kind) if own else TypeAdapter(kind, config=config)


def _check_value(
    key: str, kind: Any, value: Any, annotated: Any, *, ranges: bool = True
) -> Iterator[Problem]:
    """Whether a value has the type and range of a setting. Text may hold an interpolation."""
    if "${" in str(value) or value == "???":
        return
    elements = _elements(kind)
    if elements is not None and isinstance(value, list | dict):
        yield from _check_elements(key, elements, value)
        return
    if _allows(kind, str) and isinstance(value, int | float | bool):
        value = str(value)  # as OmegaConf does
    if isinstance(value, list):
        value = [str(item) if isinstance(item, int | float) else item for item in value]
        if key == "optim.betas":
            value = [float(item) for item in value]
    try:
        _adapter(annotated).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        found = error.errors()[0]
        message = re.sub("^(Input|Value|List) should", "must", str(found["msg"]))
        wrong_type = found["type"].endswith(("_type", "_parsing", "_from_float"))
        hint = _hint(key, kind, value) if wrong_type else ""
        if not wrong_type and not ranges:
            return
        yield Problem(path=key, message=f"{message} (got {yaml_text(value)})", hint=hint)


def _elements(kind: Any) -> Any:
    """The schema class of a mapping's or list's elements, if it has one."""
    found = [part for part in get_args(kind) if isinstance(part, type) and is_dataclass(part)]
    return found[0] if get_origin(kind) in (list, dict) and found else None


def _check_elements(key: str, cls: Any, value: Any) -> Iterator[Problem]:
    known = [item.name for item in fields(cls)]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    what = "source" if cls is Source else "stage" if cls is Stage else cls.__name__.lower()
    for name, inner in items:
        for inner_key in inner if isinstance(inner, dict) else ():
            if inner_key not in known:
                yield _unknown_field(key, what, str(inner_key), known, f"{name}: {inner}")


def _allows(kind: Any, wanted: type) -> bool:
    return kind is wanted or any(_allows(part, wanted) for part in get_args(kind))


def _hint(key: str, kind: Any, value: Any) -> str:
    if _allows(kind, int) and re.fullmatch(r"\d+(\.\d*)?(e\+?\d+)?", str(value)):
        return f"Write {int(float(value)):_}"
    if value == "auto" and _allows(kind, NoneType):
        return "Set it to null: then it is derived, and the plan shows from what"
    if get_origin(kind) is list:
        return f"Write a list: {key}=[{value}]"
    return ""

"""Where each setting of a run comes from: a YAML file, the command line, or a decision."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llama_pretrain.config.compose import CONF, OVERLAYS, SWEEPS, list_groups
from llama_pretrain.config.fields import walk_fields
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import SNAPSHOT_NAME, YAML_LOADER
from llama_pretrain.config.validate import flatten

COMMAND_LINE = "command line"


def trace_settings(overrides: Sequence[str], choices: Mapping[str, Any]) -> dict[str, str]:
    """Where each setting comes from that is not at the schema's default.

    Args:
        overrides: words of the command line.
        choices: the option of each group, as Hydra reports them; none for a snapshot.

    Returns:
        `zero/stage3.yaml`, `experiment/llama2_7b.yaml`, `config.yaml`, `snapshot.yaml` or
        `command line`, by dotted path; a path may stand for all settings below it.
    """
    origins: dict[str, str] = {}
    if not choices:
        origins = {path: f"{SNAPSHOT_NAME}.yaml" for path, _ in walk_fields(Run)}
    overlays = [group for group in OVERLAYS if choices.get(group)]
    groups = [group for group in choices if group not in OVERLAYS and "/" not in group]
    for group in (*groups, "", *overlays):
        name = f"{group}/{choices[group]}" if group else "config"
        for folder in (CONF, SWEEPS):
            prefix = f"{group}." if group in groups else ""
            origins |= dict.fromkeys(_settings_in(folder / f"{name}.yaml", prefix), f"{name}.yaml")
    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        if not choices and key in list_groups():
            origins = {path: of for path, of in origins.items() if not path.startswith(f"{key}.")}
            origins |= settings_of_option(key, value)
        elif key not in choices:
            origins[key] = COMMAND_LINE
    return origins


@cache
def default_files() -> frozenset[str]:
    """The files that the default run is composed from."""
    values = yaml.load((CONF / "config.yaml").read_text(encoding="utf-8"), Loader=YAML_LOADER)
    options = [
        item for entry in values["defaults"] if isinstance(entry, dict) for item in entry.items()
    ]
    return frozenset({"config.yaml", *(f"{group}/{option}.yaml" for group, option in options)})


def settings_of_option(group: str, option: str) -> dict[str, str]:
    """The settings that an option of a group sets, each with the file's name."""
    file = CONF / group / f"{option}.yaml"
    return dict.fromkeys(_settings_in(file, f"{group}."), f"{group}/{option}.yaml")


def origin_of(path: str, origins: Mapping[str, str]) -> str | None:
    """Where a setting comes from; a mapping given as a whole stands for everything in it."""
    while path:
        if path in origins:
            return origins[path]
        path = path.rpartition(".")[0]
    return None


@cache  # jobs of a sweep share most files
def _settings_in(file: Path, prefix: str) -> tuple[str, ...]:
    """The settings that a YAML file sets; none if it does not exist."""
    if not file.is_file():
        return ()
    values = yaml.load(file.read_text(encoding="utf-8"), Loader=YAML_LOADER) or {}
    return tuple(path for path, _ in flatten(values, prefix))

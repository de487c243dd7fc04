"""Settings that have no effect in this run: a warning each, because groups are swept."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from llama_pretrain.config.fields import UsedWhen, default_of, marks_of, plain_value, yaml_text
from llama_pretrain.config.origins import COMMAND_LINE, origin_of
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.run import Run


def find_ignored(run: Run, origins: Mapping[str, str]) -> Iterator[Problem]:
    """A problem for each setting that was changed and has no effect.

    Args:
        run: with its choices resolved, so that `auto` has been decided.
        origins: where each setting comes from (config/origins.py). Only the command line is
            reported: an option or a recipe may set more than a combination uses.
    """
    for path, value, marks in _walk(run, "", []):
        if origin_of(path, origins) not in (COMMAND_LINE, None):
            continue
        for mark in marks:
            reason = _unmet(mark, path, run)
            if reason:
                yield Problem(
                    path=path, message=f"ignored because {reason} (got {yaml_text(value)})"
                )
                break


def _walk(section: Any, path: str, marks: list[UsedWhen]) -> Iterator[tuple[str, Any, list[Any]]]:
    """Path, value and marks of every setting below a section that is not at its default."""
    for item in fields(section):
        name, value = f"{path}{item.name}", getattr(section, item.name)
        inherited = [*marks, *marks_of(item)]
        if is_dataclass(value):
            yield from _walk(value, f"{name}.", inherited)
        elif isinstance(value, dict) and any(is_dataclass(inner) for inner in value.values()):
            for key, inner in value.items():
                yield from _walk(inner, f"{name}.{key}.", inherited)
        elif value != default_of(item):
            yield name, plain_value(value), inherited


def _unmet(mark: UsedWhen, path: str, run: Run) -> str:
    """Why the mark's condition does not hold; empty if it does."""
    settings = (mark.setting,) if isinstance(mark.setting, str) else mark.setting
    parent = path.rpartition(".")[0]
    absolute = [f"{parent}{name}" if name.startswith(".") else name for name in settings]
    values = {name: plain_value(_get(run, name)) for name in absolute}
    if path in values or any(mark.allows(value) for value in values.values()):
        return ""
    return " and ".join(f"{name}={yaml_text(value)}" for name, value in values.items())


def _get(section: Any, path: str) -> Any:
    for name in path.split("."):
        section = section[name] if isinstance(section, dict) else getattr(section, name)
    return section

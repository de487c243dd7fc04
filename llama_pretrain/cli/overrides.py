"""The words of a command line that give a set of settings: options by name, then the rest."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llama_pretrain.config.optim import OptimName
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.config.validate import flatten, parse_values

CONF = Path(__file__).resolve().parents[2] / "conf"

EXTRAS = ("zero.extra", "deepspeed.extra")
"""Open mappings: keys are added to them."""

WORD = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.-]*")
"""Text that Hydra reads as text without quotes, if it is none of these:"""
LITERALS = ("null", "true", "false", "inf", "nan")

OFFLOADS = {
    (2, "cpu", "none"): "_offload",
    (3, "cpu", "cpu"): "_offload",
    (3, "nvme", "nvme"): "_nvme",
}
"""What follows the stage in the name of an option, by stage and devices of the offload."""


def default_settings(options: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Every setting of `python run.py` with these options by group, without Hydra."""
    settings = dict(flatten(to_plain(Run())))
    for group, option in (_default_options() | dict(options or {})).items():
        settings |= flatten(_load(f"{group}/{option}"), f"{group}.")
    own = {key: value for key, value in _load("config").items() if key not in ("defaults", "hydra")}
    settings |= flatten(own)
    return {  # references such as ${model.vocab_size} are followed once
        path: settings.get(value[2:-1], value) if str(value).startswith("${") else value
        for path, value in settings.items()
    }


def build_run(settings: Mapping[str, Any]) -> Run:
    """The run that dotted settings make.

    Raises:
        UserError: if they do not fit the schema.
    """
    values: dict[str, Any] = {}
    for path, value in settings.items():
        *sections, key = path.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = dict(value) if isinstance(value, dict) else value
    return parse_values(values, Run)


def render_overrides(wanted: Mapping[str, Any]) -> list[str]:
    """Overrides that turn the default run into one with these settings.

    Raises:
        UserError: if they do not fit the schema.
    """
    run = build_run(default_settings() | dict(wanted))
    options = _choose_options(run)
    given = default_settings(options)
    target = {path: v for path, v in flatten(to_plain(run)) if not path.startswith(EXTRAS)}
    target |= {path: None for path, value in _meant_by_null(run) if target[path] == value}
    pairs = [pair for pair in options.items() if _default_options()[pair[0]] != pair[1]]
    pairs += [(p, render_value(value)) for p, value in target.items() if given[p] != value]
    pairs += [(f"+zero.extra.{k}", render_value(v)) for k, v in run.zero.extra.items()]
    pairs += [(f"+deepspeed.extra.{k}", render_value(v)) for k, v in run.deepspeed.extra.items()]
    return [f"{path}={value}" for path, value in pairs]


def _choose_options(run: Run) -> dict[str, str]:
    zero, precision = run.zero, run.precision
    devices = (zero.offload_optimizer.device.value, zero.offload_param.device.value)
    autocast = precision.torch_autocast.enabled and precision.name.value == "fp32"
    return {
        "zero": f"stage{zero.stage}{OFFLOADS.get((zero.stage, *devices), '')}",
        "precision": "bf16_autocast" if autocast else precision.name.value,
        "optim": run.optim.name.value,
        "schedule": run.schedule.name.value,
    }


def _meant_by_null(run: Run) -> Iterator[tuple[str, Any]]:
    """What plan/resolve.py makes of a null, where that does not depend on the model."""
    muon, stage = run.optim.name is OptimName.muon, run.zero.stage
    yield "train.gradient_clipping", 0.0 if muon else 1.0
    yield "zero.reduce_scatter", not (muon and stage == 3)
    if stage < 3:
        yield "zero.reduce_bucket_size", 500_000_000


def _default_options() -> dict[str, str]:
    entries = [entry for entry in _load("config")["defaults"] if isinstance(entry, dict)]
    pairs = [pair for entry in entries for pair in entry.items()]
    return {
        group: option
        for group, option in pairs
        if option is not None and not group.startswith("override ")
    }


@cache
def _load(name: str) -> dict[str, Any]:
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}


def render_value(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(render_value(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{render_value(item)}' for key, item in value.items())}}}"
    if not isinstance(value, str) or (WORD.fullmatch(value) and value.lower() not in LITERALS):
        return str(value)
    # In quotes a backslash counts only before a quote.
    text = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", text) + "'"

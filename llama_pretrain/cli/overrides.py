"""The words of a command line that give a set of settings: the nearest options, then the rest."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from llama_pretrain.config.optim import OptimName
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.config.validate import flatten, parse_values

CONF = Path(__file__).resolve().parents[2] / "conf"


GROUPS = ("zero", "precision", "optim", "schedule")
"""Groups of which the nearest option is named; in the others settings are."""


WRONG = 100
"""What an option costs that is another thing altogether, in settings to write."""


EXTRAS = ("zero.extra", "deepspeed.extra")
"""Open mappings: keys are added to them."""


WORD = re.compile(r"[A-Za-z_/.][\w/.-]*")
"""Text that Hydra reads as text without quotes, if it is none of these:"""


LITERALS = ("null", "true", "false", "inf", "nan")


def default_settings() -> dict[str, Any]:
    """Every setting of plain `python run.py` with its value, without Hydra."""
    settings = dict(flatten(to_plain(Run())))
    for group, option in _default_options().items():
        settings |= _read_option(group, option)
    return _follow(settings | _own_settings())


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
    default = default_settings()
    run = build_run(default | dict(wanted))
    target = {
        path: value
        for path, value in flatten(to_plain(run))
        if not path.startswith(EXTRAS)  # written below
    }
    target |= {path: None for path, value in _meant_by_null(run) if target[path] == value}
    options, given = [], default
    for group in GROUPS:
        option, settings = _nearest(group, target)
        options += [f"{group}={option}"] if option != _default_options()[group] else []
        given = given | settings
    # A value of an option may refer to one that is set by itself.
    given = _follow(given, target)
    words = [
        f"{path}={render_value(value)}" for path, value in target.items() if given[path] != value
    ]
    added = [("zero.extra", run.zero.extra), ("deepspeed.extra", run.deepspeed.extra)]
    words += [f"+{p}.{k}={render_value(v)}" for p, extra in added for k, v in extra.items()]
    return options + words


def _meant_by_null(run: Run) -> Iterator[tuple[str, Any]]:
    """What plan/resolve.py makes of a null, where that does not depend on the model."""
    muon, stage = run.optim.name is OptimName.muon, run.zero.stage
    yield "train.gradient_clipping", 0.0 if muon else 1.0
    yield "zero.reduce_scatter", not (muon and stage == 3)
    if stage < 3:
        yield "zero.reduce_bucket_size", 500_000_000


def _nearest(group: str, target: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The option of a group that leaves the fewest settings to write, and all that it gives."""
    prefix = f"{group}."
    schema = {p: v for p, v in flatten(to_plain(Run())) if p.startswith(prefix)}
    own = {p: v for p, v in _own_settings().items() if p.startswith(prefix)}
    found: list[tuple[float, int, str, dict[str, Any]]] = []
    for file in sorted((CONF / group).glob("*.yaml")):
        says = _read_option(group, file.stem)
        given = schema | says | own
        followed = _follow(given, target)
        missed = [path for path in target if path in given and followed[path] != target[path]]
        cost = len(missed) + (0 if file.stem == _default_options()[group] else 0.5)
        cost += WRONG if {f"{group}.stage", f"{group}.name"} & set(missed) else 0
        found.append((cost, -len(says), file.stem, given))
    _, _, option, given = min(found)
    return option, given


def _follow(settings: Mapping[str, Any], target: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """References such as ${model.vocab_size}, followed once."""
    values = settings if target is None else target
    return {
        path: values.get(value[2:-1], value) if str(value).startswith("${") else value
        for path, value in settings.items()
    }


def _default_options() -> dict[str, str]:
    entries = [entry for entry in _load("config")["defaults"] if isinstance(entry, dict)]
    pairs = [pair for entry in entries for pair in entry.items()]
    return {
        group: option
        for group, option in pairs
        if option is not None and not group.startswith("override ")
    }


def _own_settings() -> dict[str, Any]:
    """What conf/config.yaml says itself."""
    own = {key: value for key, value in _load("config").items() if key not in ("defaults", "hydra")}
    return dict(flatten(own))


def _read_option(group: str, option: str) -> dict[str, Any]:
    return dict(flatten(_load(f"{group}/{option}"), f"{group}."))


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
        pairs = [f"{render_value(key)}:{render_value(item)}" for key, item in value.items()]
        return f"{{{','.join(pairs)}}}"
    if not isinstance(value, str) or (WORD.fullmatch(value) and value.lower() not in LITERALS):
        return str(value)
    # In quotes a backslash counts only before a quote.
    text = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", text) + "'"

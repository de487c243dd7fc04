"""snapshot.yaml: a run's config, every value resolved, and itself a Hydra primary config."""

import hashlib
import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.rules import parse_values
from llama_pretrain.config.schema import Run

HEADER = "# A run as it was started, every value resolved. To go on: python run.py resume=DIR\n"
DEFAULTS = ["run_schema", "_self_"]


def to_plain(section: Any) -> dict[str, Any]:
    """A run, or a section of one, as plain nested values: enums by name."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value

    return {key: plain(value) for key, value in asdict(section).items()}


def render_snapshot(run: Run) -> str:
    """The text of snapshot.yaml."""
    values = {"defaults": DEFAULTS, **to_plain(run)}
    return HEADER + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def config_hash(run: Run) -> str:
    """SHA-256 of what a run must keep to be the same run: not its length, ranks or ZeRO stage."""
    plain = to_plain(run)
    kept = {name: plain[name] for name in ("model", "optim", "seed", "precision")}
    kept["sequence_length"] = run.data.sequence_length
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def load_snapshot(path: Path) -> Run:
    """Read a snapshot without Hydra, as workers do.

    Raises:
        UserError: if it isn't there, is no snapshot, or names anything but our schema.
    """
    if not path.is_file():
        raise UserError([Problem(path=str(path), message="there is no snapshot here")])
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError([Problem(path=str(path), message=f"is not YAML: {error}")]) from error
    # A snapshot may come from elsewhere: Hydra would run what a hydra: node or a _target_ names,
    # and an interpolation could read this machine's environment.
    if not isinstance(values, dict) or values.pop("defaults", None) != DEFAULTS:
        raise UserError([Problem(path=str(path), message="is not a snapshot of a run")])
    if "hydra" in values or "${" in text or "_target_" in text:
        message = "names hydra settings, interpolations or _target_, which a snapshot never does"
        raise UserError([Problem(path=str(path), message=message)])
    return parse_values(values)

"""The contents of a run directory, for pages and comparisons that read them all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_pretrain.config.problems import UserError
from llama_pretrain.config.snapshot import read_plain_yaml
from llama_pretrain.files import read_json
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import Row, read_metrics, seconds_by_step
from llama_pretrain.runs.units import is_number

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunContents:
    """The files of a run; empty where one is missing or damaged (`verify` reports damage)."""

    dir: RunDir
    status: Values
    config: Values
    plan: Values
    provenance: Values
    rows: Sequence[Row]

    @property
    def planned_memory(self) -> dict[str, float]:
        """Bytes that the plan expects on a rank's device, by part."""
        parts = self.plan.get("memory")
        return {
            name: size
            for name, size in (parts.items() if isinstance(parts, Mapping) else ())
            if is_number(size) and name not in ("host", "disk")
        }

    @property
    def seconds_by_step(self) -> dict[int, float]:
        """Seconds of each step that counts."""
        tokens_per_step = dig(self.plan, "steps.tokens_per_step")
        return seconds_by_step(self.rows, tokens_per_step=tokens_per_step)


def read_contents(path: Path) -> RunContents:
    """Read a run directory."""
    run_dir = RunDir(path)
    try:
        rows = read_metrics(run_dir.metrics)
    except OSError:
        rows = []
    return RunContents(
        dir=run_dir,
        status=read_json(run_dir.status) or {},
        config=_read_yaml(run_dir.snapshot),
        plan=read_json(run_dir.plan) or {},
        provenance=read_json(run_dir.provenance) or {},
        rows=rows,
    )


def _read_yaml(path: Path) -> Values:
    try:
        return read_plain_yaml(path)
    except (UserError, OSError, ValueError):
        return {}


def flatten(values: Any, *, prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Leaves of nested mappings, and of lists of mappings, by path."""
    if isinstance(values, Mapping) and (values or not prefix):
        pairs = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, list) and any(isinstance(item, Mapping) for item in values):
        pairs = [(str(number), value) for number, value in enumerate(values)]
    else:
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, value in pairs:
        path = f"{prefix}{separator}{key}" if prefix else key
        found |= flatten(value, prefix=path, separator=separator)
    return found


def dig(values: Any, path: str) -> Any:
    """A nested value by dotted path; `None` if it is missing."""
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values

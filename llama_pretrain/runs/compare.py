"""Runs side by side: what differs in config and provenance, and how they trained."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.runs.chart import curve, is_number
from llama_pretrain.runs.figures import (
    format_seconds,
    format_size,
    last_number,
    median,
    seconds_of_steps,
)
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics
from llama_pretrain.runs.page import Point

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
RECENT = 20
"""Losses of the last steps, of which the mean is the training loss, as in a run's last line."""
ABSENT = "-"
NOISE = ("argv", "time")
"""Of provenance: differs between any two runs, so it is told last."""
NOT_CONFIG = ("defaults", "of_run", "resume")
"""Of a snapshot: no setting of the training."""

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run's files say; empty where one is missing."""

    path: Path
    name: str
    """As short as tells it from the others."""
    letter: str
    status: Values
    config: Values
    plan: Values
    provenance: Values
    rows: Sequence[Values]

    def dig(self, *keys: str) -> Any:
        """A nested value of the plan, or `None`."""
        found: Any = self.plan
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A setting, or a fact, that isn't the same in all runs."""

    name: str
    """Dotted path."""
    values: list[Any]
    """In each run; ABSENT where it isn't there."""

    @property
    def group(self) -> str:
        """Its section."""
        first, dot, _ = self.name.partition(".")
        if first in NOISE:
            return "command and time"
        return first if dot else "general"


@dataclass(frozen=True, kw_only=True)
class Reached:
    """When an evaluation first had a loss."""

    step: int
    tokens: int
    seconds: float | None
    """Of the steps up to there; `None` where a step's seconds aren't known."""


def load_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """Read the files of each run directory.

    Raises:
        UserError: for each path that is no run directory.
    """
    problems = [problem for path in paths for problem in [_wrong_place(path)] if problem]
    if len(paths) > len(LETTERS):
        problems.append(Problem(path="RUN", message=f"there are {len(paths)}, and 26 letters"))
    if problems:
        raise UserError(problems)
    names = _short_names(paths)
    return [
        _load_run(path, name, letter)
        for path, name, letter in zip(paths, names, LETTERS, strict=False)
    ]


def _wrong_place(path: Path) -> Problem | None:
    """Why a path is no run directory, and which one may be meant."""
    if (path / "snapshot.yaml").is_file():
        return None
    above = next((up for up in path.absolute().parents if (up / "snapshot.yaml").is_file()), None)
    if not path.exists():
        message = "there is no such folder"
    elif path.is_file():
        message = "is a file, and no run directory"
    elif (path / "export.json").is_file():
        message = "is the export of a run"
    elif (path / "manifest.json").is_file():
        message = "is a checkpoint of a run"
    else:
        message = "holds no run: it has no snapshot.yaml"
    hint = f"name the run: {above}" if above is not None and path.exists() else ""
    if path.is_dir() and (inside := sorted(path.glob("*/snapshot.yaml"))):
        hint = f"runs are in it: {', '.join(str(found.parent) for found in inside[:3])}"
    return Problem(path=str(path), message=message, hint=hint)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as tell them apart; a run that is named twice, twice."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(found[-count:]) for found in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def _load_run(path: Path, name: str, letter: str) -> RunFiles:
    run_dir = RunDir(path)
    return RunFiles(
        path=path,
        name=name,
        letter=letter,
        status=_load(run_dir.status),
        config=_load(run_dir.snapshot),
        plan=_load(run_dir.plan),
        provenance=_load(run_dir.provenance),
        rows=_read_rows(run_dir.metrics),
    )


def _load(path: Path) -> Values:
    """A JSON or YAML file's mapping; empty where it is missing or damaged, which `verify` tells."""
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(path)
    except (OSError, ValueError, KeyError, TypeError):
        return []


def flatten_all(values: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings, and of lists of mappings, by dotted path."""
    if isinstance(values, Mapping) and values:
        pairs = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, list) and any(isinstance(item, Mapping) for item in values):
        pairs = [(str(number), value) for number, value in enumerate(values)]
    else:
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, value in pairs:
        found |= flatten_all(value, f"{prefix}.{key}" if prefix else key)
    return found


def list_differences(sides: Sequence[Values]) -> list[Difference]:
    """What isn't the same everywhere, by section, in the order of the first side that has it."""
    flat = [flatten_all(side) if side else {} for side in sides]
    names = dict.fromkeys(name for side in flat for name in side)
    found = []
    for name in names:
        values = [side.get(name, ABSENT) for side in flat]
        if any(value != values[0] or type(value) is not type(values[0]) for value in values):
            found.append(Difference(name=name, values=values))
    groups = list(dict.fromkeys(difference.group for difference in found))
    return sorted(found, key=lambda difference: groups.index(difference.group))


def config_differences(runs: Sequence[RunFiles]) -> list[Difference]:
    """Settings that differ."""
    sides = [
        {key: value for key, value in run.config.items() if key not in NOT_CONFIG} for run in runs
    ]
    return list_differences(sides)


def provenance_differences(runs: Sequence[RunFiles]) -> list[Difference]:
    """Facts about code, packages and machine that differ; what always does comes last."""
    found = list_differences([run.provenance for run in runs])
    return sorted(found, key=lambda difference: difference.name.partition(".")[0] in NOISE)


def final_losses(runs: Sequence[RunFiles]) -> list[float]:
    """The last evaluation loss of each run that has one."""
    return [loss for run in runs if (loss := last_number(run.rows, "eval_loss")) is not None]


def first_at(run: RunFiles, loss: float) -> Reached | None:
    """The first evaluation at or below a loss."""
    seconds = seconds_of_steps(run.rows, tokens_per_step=run.dig("steps", "tokens_per_step"))
    for row in run.rows:
        value = row.get("eval_loss")
        if is_number(value) and value <= loss:
            step = row["step"]
            known = [seconds.get(number) for number in range(1, step + 1)]
            told = [value for value in known if value is not None]
            return Reached(
                step=step,
                tokens=row["tokens"],
                seconds=math.fsum(told) if len(told) == len(known) else None,
            )
    return None


def training_loss(run: RunFiles) -> float | None:
    """The mean of the last losses."""
    losses = [row["loss"] for row in run.rows if is_number(row.get("loss"))][-RECENT:]
    return math.fsum(losses) / len(losses) if losses else None


def peak_memory(run: RunFiles) -> float | None:
    """Of the rank with the largest, or of rank 0 where the run has not finished."""
    known = last_number(run.rows, "peak_memory_bytes")
    return last_number(run.rows, "memory_bytes") if known is None else known


def planned_memory(run: RunFiles) -> float | None:
    """What the plan says, on a rank's device."""
    parts = run.dig("memory")
    if not isinstance(parts, Mapping):
        return None
    return math.fsum(
        value for name, value in parts.items() if is_number(value) and name not in ("host", "disk")
    )


def measure(run: RunFiles, *, loss: float | None) -> dict[str, float | None]:
    """All numbers of a run that are compared: by name, with the unit in it."""
    seconds = seconds_of_steps(run.rows, tokens_per_step=run.dig("steps", "tokens_per_step"))
    reached = None if loss is None else first_at(run, loss)
    return {
        "steps": last_number(run.rows, "step"),
        "steps_planned": run.dig("steps", "total"),
        "tokens": last_number(run.rows, "tokens"),
        "training_seconds": math.fsum(seconds.values()) if seconds else None,
        "training_loss": training_loss(run),
        "evaluation_loss": last_number(run.rows, "eval_loss"),
        "bits_per_byte": last_number(run.rows, "bits_per_byte"),
        "seconds_to_loss": None if reached is None else reached.seconds,
        "tokens_to_loss": None if reached is None else reached.tokens,
        "steps_to_loss": None if reached is None else reached.step,
        "tokens_per_s": median(run.rows, "tokens_per_s"),
        "mfu": median(run.rows, "mfu"),
        "peak_memory_bytes": peak_memory(run),
        "planned_memory_bytes": planned_memory(run),
    }


FORMS: dict[str, Callable[[float], str]] = {
    "steps": "{:,}".format,
    "steps_planned": "{:,}".format,
    "tokens": "{:,}".format,
    "training_seconds": format_seconds,
    "training_loss": "{:.4f}".format,
    "evaluation_loss": "{:.4f}".format,
    "bits_per_byte": "{:.4f}".format,
    "seconds_to_loss": format_seconds,
    "tokens_to_loss": "{:,}".format,
    "steps_to_loss": "{:,}".format,
    "tokens_per_s": "{:,.0f}".format,
    "mfu": "{:.1%}".format,
    "peak_memory_bytes": format_size,
    "planned_memory_bytes": format_size,
}


def label_of(name: str, *, loss: float | None) -> str:
    """What a number of `measure` is called."""
    at = f"loss {loss:.4f}" if loss is not None else "the loss"
    special = {
        "training_seconds": "training time",
        "seconds_to_loss": f"time to {at}",
        "tokens_to_loss": f"tokens to {at}",
        "steps_to_loss": f"steps to {at}",
        "tokens_per_s": "tokens/s (median)",
        "mfu": "MFU (median)",
        "peak_memory_bytes": "peak memory",
        "planned_memory_bytes": "planned memory",
    }
    return special.get(name, name.replace("_", " "))


def number_rows(runs: Sequence[RunFiles], *, loss: float | None) -> list[tuple[str, list[str]]]:
    """A label and a text for each run; what no run has is left out."""
    measured = [measure(run, loss=loss) for run in runs]
    status = [str(run.status.get("status", ABSENT)) for run in runs]
    found = [("status", status)]
    for name, form in FORMS.items():
        values = [numbers[name] for numbers in measured]
        if any(value is not None for value in values):
            texts = [ABSENT if value is None else form(value) for value in values]
            found.append((label_of(name, loss=loss), texts))
    return found


def curves_of(runs: Sequence[RunFiles], key: str) -> list[list[Point]]:
    """A curve of each run against tokens."""
    return [curve(run.rows, key) for run in runs]


def warnings_of(runs: Sequence[RunFiles]) -> list[str]:
    """Why numbers that stand side by side may not be compared."""
    said = []
    if len({run.dig("corpus", "tokenizer_hash") for run in runs}) > 1:
        said.append("the tokenizers differ: losses are of other tokens; compare bits per byte")
    elif len({run.dig("corpus", "content_hash") for run in runs}) > 1:
        said.append("the data differs: evaluation losses are of other text")
    if len({json.dumps(run.provenance.get("cpu")) for run in runs}) > 1 or (
        len({json.dumps(run.provenance.get("machine"), sort_keys=True) for run in runs}) > 1
    ):
        said.append("the machines differ: times, tokens/s and MFU are theirs as well")
    said += [f"{run.letter} has no metrics" for run in runs if not run.rows]
    return said


def text_of(value: Any) -> str:
    """A value of a file, as one would write it on one line; of a hash its beginning."""
    if isinstance(value, list):
        return ", ".join(text_of(item) for item in value) or "[]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = " ".join(str(value).split())
    return text[:16] if re.fullmatch("[0-9a-f]{64}", text) else text

"""Runs side by side: what differs in config and provenance, and how they trained."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.runs.chart import Series, draw
from llama_pretrain.runs.contents import RunContents, Values, dig, flatten, read_contents
from llama_pretrain.runs.metrics import EvaluationRow, curve, evaluations, last_value, median_value
from llama_pretrain.runs.page import render_page
from llama_pretrain.runs.units import GIB, format_seconds, format_size, format_value, is_number

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
RECENT = 20
"""Steps whose mean is the training loss, as in a run's summary."""
ABSENT = "-"
ALWAYS_DIFFER = ("argv", "time")
"""Keys of the provenance that differ between any two runs; they come last."""
NOT_CONFIG = ("defaults", "of_run", "resume")
"""Keys of a snapshot that are no options of the training."""
CURVES = (
    ("Evaluation loss", "nats per token", "eval_loss", 1),
    ("Training loss", "nats per token", "loss", 1),
    ("Throughput", "tokens/s", "tokens_per_s", 1),
    ("Gradient norm", "before clipping", "grad_norm", 1),
    ("Learning rate", "of each step", "learning_rate", 1),
    ("Memory", "GiB, rank 0's peak so far", "memory_bytes", GIB),
)
"""Title, unit, field, and its divisor."""


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A run, and what it is called in the comparison."""

    contents: RunContents
    name: str
    """The end of its path, as short as is unambiguous."""
    letter: str


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An option or a fact that is not equal in all runs."""

    name: str
    """Dotted path."""
    values: list[Any]
    """In each run; ABSENT where it is missing."""

    @property
    def group(self) -> str:
        first, dot, _ = self.name.partition(".")
        if first in ALWAYS_DIFFER:
            return "command and time"
        return first if dot else "general"

    @property
    def texts(self) -> list[str]:
        """Name within the group, and each value on one line."""
        return [self.name.removeprefix(f"{self.group}."), *map(format_value, self.values)]


class Comparison:
    """The differences and numbers of some runs.

    Args:
        loss: the evaluation loss whose time is compared; `None` = the worst of the last ones.
        verbose: compare earlier launches of resumed runs in full.
    """

    def __init__(
        self, runs: Sequence[ComparedRun], *, loss: float | None = None, verbose: bool = False
    ):
        self.runs, self.verbose = runs, verbose
        last_losses = [last_value(run.contents.rows, "eval_loss") for run in runs]
        worst = max((value for value in last_losses if value is not None), default=None)
        self.loss = worst if loss is None else loss

    @property
    def letters(self) -> list[str]:
        return [run.letter for run in self.runs]

    @property
    def config(self) -> list[Difference]:
        """Options that differ."""
        configs = [run.contents.config for run in self.runs]
        return _differences(
            [{key: side[key] for key in side if key not in NOT_CONFIG} for side in configs]
        )

    @property
    def provenance(self) -> list[Difference]:
        """Facts about code, packages and machine that differ; of earlier launches their number."""
        sides = [dict(run.contents.provenance) for run in self.runs]
        for side in sides:
            earlier = side.get("earlier_launches")
            if isinstance(earlier, list) and not self.verbose:
                side["earlier_launches"] = len(earlier)
        found = _differences(sides)
        return sorted(found, key=lambda item: item.name.partition(".")[0] in ALWAYS_DIFFER)

    @property
    def notes(self) -> list[str]:
        """Why numbers may not be comparable."""
        runs, found = [run.contents for run in self.runs], []
        if len({dig(run.plan, "corpus.tokenizer_hash") for run in runs}) > 1:
            found.append(
                "the tokenizers differ: losses are per other tokens; compare bits per byte"
            )
        elif len({dig(run.plan, "corpus.content_hash") for run in runs}) > 1:
            found.append("the data differs: evaluation losses are of different text")
        machines = [[run.provenance.get(key) for key in ("cpu", "machine")] for run in runs]
        if len({json.dumps(machine, sort_keys=True) for machine in machines}) > 1:
            found.append("the machines differ: compare times, tokens/s and MFU with care")
        empty = [run.letter for run in self.runs if not run.contents.rows]
        return found + [f"{letter} has no metrics" for letter in empty]

    def numbers(self) -> list[tuple[str, ...]]:
        """A label, and a text for each run; what no run has is left out."""
        measured = [measure(run.contents, loss=self.loss) for run in self.runs]
        status = [str(run.contents.status.get("status", ABSENT)) for run in self.runs]
        at = "the loss" if self.loss is None else f"loss {self.loss:.4f}"
        found = [("status", *status)]
        for name, (label, form) in MEASURES.items():
            values = [numbers[name] for numbers in measured]
            if any(value is not None for value in values):
                texts = [ABSENT if value is None else form(value) for value in values]
                found.append((label.format(at=at), *texts))
        return found

    def to_json(self) -> Values:
        """Everything that is compared, unabridged."""
        return {
            "loss": self.loss,
            "runs": [
                {
                    "path": str(run.contents.dir.path),
                    "status": run.contents.status.get("status"),
                    **measure(run.contents, loss=self.loss),
                }
                for run in self.runs
            ],
            "config": [asdict(found) for found in self.config],
            "provenance": [asdict(found) for found in self.provenance],
        }

    def to_html(self) -> str:
        """The comparison as one self-contained page."""
        names = [run.name for run in self.runs]
        heading = " and ".join(names) if len(names) < 4 else f"{len(names)} runs"
        return render_page(
            "comparison",
            title=f"{heading} compared",
            heading=heading,
            letters=self.letters,
            runs=[(run.letter, run.name, str(run.contents.dir.path)) for run in self.runs],
            notes=self.notes,
            numbers=self.numbers(),
            curves=[
                draw(
                    title,
                    [
                        Series(
                            name=f"{run.letter}: {run.name}",
                            points=curve(run.contents.rows, name, unit=unit),
                        )
                        for run in self.runs
                    ],
                    unit=text,
                    wide="loss" in name,
                    from_zero="loss" not in name,
                )
                for title, text, name, unit in CURVES
            ],
            config=group(self.config),
            provenance=group(self.provenance),
        )


def load_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Read the run directories.

    Raises:
        UserError: naming each path that is no run directory.
    """
    problems = [problem for path in paths if (problem := _check(path)) is not None]
    if len(paths) > len(LETTERS):
        message = f"at most {len(LETTERS)} runs can be compared (got {len(paths)})"
        problems.append(Problem(path="RUN", message=message))
    if problems:
        raise UserError(problems)
    return [
        ComparedRun(contents=read_contents(path), name=name, letter=letter)
        for path, name, letter in zip(paths, _short_names(paths), LETTERS, strict=False)
    ]


def _check(path: Path) -> Problem | None:
    """Why a path is no run directory, and which one may be meant."""
    if (path / "snapshot.yaml").is_file():
        return None
    if not path.exists():
        return Problem(path=str(path), message="does not exist")
    near = [up for up in path.absolute().parents if (up / "snapshot.yaml").is_file()]
    near += [found.parent for found in sorted(path.glob("*/snapshot.yaml"))]
    hint = f"name a run: {', '.join(map(str, near[:3]))}" if near else ""
    return Problem(path=str(path), message="is no run directory: no snapshot.yaml", hint=hint)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as keep different paths apart."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(found[-count:]) for found in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def _differences(sides: Sequence[Values]) -> list[Difference]:
    """What is not equal everywhere, by section, in the order of the first side that has it."""
    flat = [flatten(side) for side in sides]
    found = []
    for name in dict.fromkeys(name for side in flat for name in side):
        values = [side.get(name, ABSENT) for side in flat]
        if any(value != values[0] or type(value) is not type(values[0]) for value in values):
            found.append(Difference(name=name, values=values))
    groups = list(dict.fromkeys(difference.group for difference in found))
    return sorted(found, key=lambda difference: groups.index(difference.group))


def group(found: Sequence[Difference]) -> list[tuple[str, list[list[str]]]]:
    """Differences as texts, by section."""
    groups: dict[str, list[list[str]]] = {}
    for difference in found:
        groups.setdefault(difference.group, []).append(difference.texts)
    return list(groups.items())


def first_at(run: RunContents, loss: float) -> tuple[EvaluationRow | None, float | None]:
    """The first evaluation at or below a loss, and the seconds of the steps up to it, if known."""
    row = next((row for row in evaluations(run.rows) if row.eval_loss <= loss), None)
    known = run.seconds_by_step
    if row is None or row.step > len(known) or not {*range(1, row.step + 1)} <= {*known}:
        return row, None
    return row, math.fsum(known[number] for number in range(1, row.step + 1))


def measure(run: RunContents, *, loss: float | None) -> dict[str, float | None]:
    """Every number of a run that is compared, as MEASURES names it."""
    rows, seconds, memory = run.rows, run.seconds_by_step, run.planned_memory
    reached, seconds_to_loss = (None, None) if loss is None else first_at(run, loss)
    losses = [value for _, value in curve(rows, "loss")][-RECENT:]
    steps_planned, peak = dig(run.plan, "steps.total"), last_value(rows, "peak_memory_bytes")
    return {
        "steps": rows[-1].step if rows else None,
        "steps_planned": steps_planned if is_number(steps_planned) else None,
        "tokens": rows[-1].tokens if rows else None,
        "training_seconds": math.fsum(seconds.values()) if seconds else None,
        "training_loss": math.fsum(losses) / len(losses) if losses else None,
        "evaluation_loss": last_value(rows, "eval_loss"),
        "bits_per_byte": last_value(rows, "bits_per_byte"),
        "seconds_to_loss": seconds_to_loss,
        "tokens_to_loss": None if reached is None else reached.tokens,
        "steps_to_loss": None if reached is None else reached.step,
        "tokens_per_s": median_value(rows, "tokens_per_s"),
        "mfu": median_value(rows, "mfu"),
        "peak_memory_bytes": last_value(rows, "memory_bytes") if peak is None else peak,
        "planned_memory_bytes": math.fsum(memory.values()) if memory else None,
    }


MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("steps", "{:,}".format),
    "steps_planned": ("steps planned", "{:,}".format),
    "tokens": ("tokens", "{:,}".format),
    "training_seconds": ("training time", format_seconds),
    "training_loss": ("training loss", "{:.4f}".format),
    "evaluation_loss": ("evaluation loss", "{:.4f}".format),
    "bits_per_byte": ("bits per byte", "{:.4f}".format),
    "seconds_to_loss": ("time to {at}", format_seconds),
    "tokens_to_loss": ("tokens to {at}", "{:,}".format),
    "steps_to_loss": ("steps to {at}", "{:,}".format),
    "tokens_per_s": ("tokens/s (median)", "{:,.0f}".format),
    "mfu": ("MFU (median)", "{:.1%}".format),
    "peak_memory_bytes": ("peak memory", format_size),
    "planned_memory_bytes": ("planned memory", format_size),
}
"""Label and format of each number."""

"""metrics.jsonl and samples.jsonl: typed rows, how they are written, and one reader."""

import json
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    BinaryIO,
    ClassVar,
    TextIO,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from llama_pretrain.files import open_regular, parse_json, read_regular, write_text
from llama_pretrain.runs.units import is_number

Point = tuple[float, float]
SOURCE_LOSS = "eval_loss/"
"""Prefix of a source's loss in the JSON of an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line. In JSON, `kind` names the class and fields at their default are left out."""

    kind: ClassVar[str]

    step: int
    """Optimizer steps done."""
    tokens: int
    """Training tokens so far."""

    def to_json(self) -> dict[str, Any]:
        """The line's values, flat."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        optional = {item.name: _default(item) for item in fields(self)}
        return {"kind": self.kind} | {
            name: value for name, value in values.items() if value != optional[name]
        }

    def to_line(self) -> str:
        return json.dumps(self.to_json()) + "\n"


@dataclass(frozen=True, kw_only=True)
class StepRow(Row):
    """A training step; docs/run_directory.md has the units."""

    kind = "step"

    loss: float | None = None
    """`None` where it is not finite."""
    learning_rate: float
    grad_norm: float | None
    """`None` with Muon and where the step was skipped."""
    tokens_per_s: float
    mfu: float | None
    memory_bytes: int
    skipped_steps: int
    sample_hash: str
    skipped: str = ""
    """Why the update was skipped: `loss`, `gradient` or `spike`."""
    spike_z: float | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationRow(Row):
    """An evaluation: losses in nats per token."""

    kind = "evaluation"

    eval_loss: float
    perplexity: float
    bits_per_byte: float
    by_source: dict[str, float] = field(default_factory=dict)
    """Loss of each source of a mixture; `eval_loss/NAME` in JSON."""
    checkpoint: str = ""
    """With task=evaluate, like the fields below: the checkpoint that was evaluated."""
    eval_tokens: int = 0
    finished: bool = False

    def to_json(self) -> dict[str, Any]:
        values = super().to_json()
        by_source = values.pop("by_source", {})
        return values | {f"{SOURCE_LOSS}{name}": loss for name, loss in by_source.items()}


@dataclass(frozen=True, kw_only=True)
class CheckpointRow(Row):
    """A checkpoint that was written, or the reason why it was not."""

    kind = "checkpoint"

    checkpoint: str = ""
    checkpoint_seconds: float | None = None
    checkpoint_stall_seconds: float | None = None
    """How long training waited for it."""
    checkpoint_error: str = ""


@dataclass(frozen=True, kw_only=True)
class RollbackRow(Row):
    """Training returned to a checkpoint at `step` after a loss spike."""

    kind = "rollback"

    rolled_back_from: int
    spike_loss: float
    spike_z: float
    skipped_batches: list[int]


@dataclass(frozen=True, kw_only=True)
class EventRow(Row):
    """Something that happens once per start: exactly one field is set."""

    kind = "event"

    initial_weights: str = ""
    start_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase of the start (runs/phases.py)."""
    restarted: str = ""
    resumed: str = ""
    preempted: str = ""


@dataclass(frozen=True, kw_only=True)
class SummaryRow(Row):
    """The last line of a run that completed all its steps."""

    kind = "summary"

    finished: bool
    train_loss: float | None
    train_loss_steps: int
    skipped_steps: int
    median_tokens_per_s: float
    median_mfu: float | None
    peak_memory_bytes: float
    peak_above_imports_bytes: float
    planned_memory_bytes: float


@dataclass(frozen=True, kw_only=True)
class SampleRow(Row):
    """A generation after an evaluation, in samples.jsonl."""

    kind = "sample"

    prompt: str
    text: str


KINDS: dict[str, type[Row]] = {
    row.kind: row
    for row in (
        StepRow,
        EvaluationRow,
        CheckpointRow,
        RollbackRow,
        EventRow,
        SummaryRow,
        SampleRow,
    )
}
AnyRow = TypeVar("AnyRow", bound=Row)


def _default(item: Any) -> Any:
    return {} if item.default_factory is dict else item.default


@cache
def _field_types(kind: str) -> dict[str, tuple[type, ...]]:
    """What each field accepts; JSON may hold an integer for a float."""
    found = {}
    for name, hint in get_type_hints(KINDS[kind]).items():
        union = get_origin(hint) in (Union, UnionType)
        types = {get_origin(item) or item for item in (get_args(hint) if union else (hint,))}
        if name != "kind":
            found[name] = tuple(types | ({int} if float in types else set()))
    return found


def parse_row(line: bytes | str) -> Row:
    """One line as its typed row. Unknown keys are ignored.

    Raises:
        ValueError: if it is not JSON, has no known kind, or lacks a field.
    """
    values = parse_json(line)
    kind = KINDS.get(str(values.get("kind"))) if isinstance(values, dict) else None
    if kind is None:
        raise ValueError("has no known kind")
    types = _field_types(kind.kind)
    found = {name: values[name] for name in types if name in values}
    if kind is EvaluationRow:
        found["by_source"] = {
            key.removeprefix(SOURCE_LOSS): value
            for key, value in values.items()
            if key.startswith(SOURCE_LOSS) and isinstance(value, int | float)
        }
    for name, value in found.items():
        if not isinstance(value, types[name]):
            wanted = " or ".join(item.__name__ for item in types[name])
            raise ValueError(f"{name} must be {wanted} (got {value!r:.40})")
    try:
        return kind(**found)
    except TypeError as error:  # a field is missing
        raise ValueError(str(error).rpartition("() ")[2]) from None


def read_metrics(path: Path) -> list[Row]:
    """The rows of metrics.jsonl or samples.jsonl without those that a rollback took back.

    Lines that cannot be parsed, such as a torn last one, are left out.
    """
    try:
        lines = read_regular(path).split(b"\n")
    except FileNotFoundError:
        return []
    return apply_rollbacks(_parse_all(lines[:-1]))


def apply_rollbacks(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order in which they were written, without what rollbacks took back."""
    found: list[Row] = []
    for row in rows:
        if isinstance(row, RollbackRow):
            found = [earlier for earlier in found if earlier.step <= row.step]
        found.append(row)
    return found


def truncate_metrics(path: Path, *, last_step: int) -> None:
    """Drop the rows after a checkpoint that a run resumes from."""
    rows = [row for row in read_metrics(path) if row.step <= last_step]
    kept = [row for row in rows if not isinstance(row, SummaryRow)]
    write_text(path, "".join(row.to_line() for row in kept))


def append_row(path: Path, row: Row) -> None:
    """Append one line."""
    with open_to_append(path) as file:
        file.write(row.to_line())


def open_to_append(path: Path) -> TextIO:
    """Open metrics.jsonl or samples.jsonl for more rows."""
    descriptor = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    return os.fdopen(descriptor, "a", encoding="utf-8")


TAIL_BYTES, FAR_TAIL_BYTES = 1 << 14, 1 << 20
"""How much of the end is parsed, and how much is searched for an evaluation if that has none."""


def read_tail(path: Path) -> list[Row]:
    """The last rows of metrics.jsonl, with the last evaluation, in time independent of length."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            lines = _read_end(file, TAIL_BYTES).split(b"\n")
            rows = apply_rollbacks(_parse_all(lines[:-1]))
            if file.tell() > TAIL_BYTES and not evaluations(rows):
                last_step = rows[-1].step if rows else 0
                rows = [*_last_evaluation(_read_end(file, FAR_TAIL_BYTES), last_step), *rows]
    except FileNotFoundError:
        return []
    return rows


def _read_end(file: BinaryIO, num_bytes: int) -> bytes:
    """The last bytes of a file; its first line may be incomplete."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - num_bytes))
    return file.read()


def _last_evaluation(content: bytes, last_step: int) -> list[Row]:
    """The last evaluation up to a step, without parsing other lines."""
    end = len(content)
    while (at := content.rfind(b'"kind": "evaluation"', 0, end)) >= 0:
        end = content.rfind(b"\n", 0, at) + 1
        found = _parse_all([content[end : content.find(b"\n", at)]])
        if rows := [row for row in found if row.step <= last_step]:
            return rows
    return []


def _parse_all(lines: Iterable[bytes]) -> Iterator[Row]:
    for line in lines:
        try:
            yield parse_row(line)
        except ValueError:
            continue


def select(rows: Iterable[Row], kind: type[AnyRow]) -> list[AnyRow]:
    """The rows of one kind."""
    return [row for row in rows if isinstance(row, kind)]


def steps(rows: Iterable[Row]) -> list[StepRow]:
    return select(rows, StepRow)


def evaluations(rows: Iterable[Row]) -> list[EvaluationRow]:
    return select(rows, EvaluationRow)


def last(rows: Sequence[Row], kind: type[AnyRow]) -> AnyRow | None:
    """The last row of one kind."""
    return next((row for row in reversed(rows) if isinstance(row, kind)), None)


def initial_weights(rows: Iterable[Row]) -> str | None:
    """SHA-256 of the weights that a run began with."""
    found = (event.initial_weights for event in select(rows, EventRow))
    return next(filter(None, found), None)


def curve(rows: Iterable[Row], name: str, *, unit: float = 1) -> list[Point]:
    """(tokens, value) of each row that has this field as a finite number."""
    pairs = ((row.tokens, getattr(row, name, None)) for row in rows)
    return [(tokens, value / unit) for tokens, value in pairs if is_number(value)]


def last_value(rows: Iterable[Row], name: str) -> float | None:
    """The last value of a curve."""
    points = curve(rows, name)
    return points[-1][1] if points else None


def median_value(rows: Iterable[Row], name: str) -> float | None:
    """The median of a curve."""
    values = [value for _, value in curve(rows, name)]
    return statistics.median(values) if values else None


def seconds_by_step(rows: Iterable[Row], *, tokens_per_step: Any) -> dict[int, float]:
    """Seconds of each step that counts, without evaluations and checkpoints."""
    if not is_number(tokens_per_step):
        return {}
    return {
        row.step: tokens_per_step / row.tokens_per_s for row in steps(rows) if row.tokens_per_s > 0
    }

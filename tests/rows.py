"""Rows of metrics.jsonl for tests: builders with defaults, and plain reading."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_pretrain.runs.metrics import (
    EvaluationRow,
    EventRow,
    Row,
    StepRow,
    SummaryRow,
    read_metrics,
)

MIB = 1 << 20
PER_STEP = 1000
"""Tokens of a step."""


def step_row(step: int, **values: Any) -> StepRow:
    fields: dict[str, Any] = {
        "step": step,
        "tokens": step * PER_STEP,
        "loss": 9.0 - step,
        "learning_rate": step * 1e-4,
        "grad_norm": 1.5,
        "tokens_per_s": 2000.0,
        "mfu": 0.4,
        "memory_bytes": 150 * MIB,
        "skipped_steps": 0,
        "sample_hash": f"{step:016x}",
    }
    return StepRow(**fields | values)


def evaluation_row(step: int, eval_loss: float, **values: Any) -> EvaluationRow:
    fields: dict[str, Any] = {"step": step, "tokens": step * PER_STEP, "eval_loss": eval_loss}
    return EvaluationRow(**fields | {"perplexity": 1.5, "bits_per_byte": 2.5} | values)


def event_row(step: int, **values: Any) -> EventRow:
    return EventRow(step=step, tokens=step * PER_STEP, **values)


def summary_row(step: int, **values: Any) -> SummaryRow:
    fields: dict[str, Any] = {
        "step": step,
        "tokens": step * PER_STEP,
        "finished": True,
        "train_loss": 5.4321,
        "train_loss_steps": 20,
        "skipped_steps": 0,
        "median_tokens_per_s": 12345.6,
        "median_mfu": 0.4567,
        "peak_memory_bytes": 192 * MIB,
        "peak_above_imports_bytes": 100 * MIB,
        "planned_memory_bytes": 160 * MIB,
    }
    return SummaryRow(**fields | values)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(row.to_line() for row in rows), encoding="utf-8")


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that count, as JSON has them."""
    return [row.to_json() for row in read_metrics(path)]

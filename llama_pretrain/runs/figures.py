"""What the lines of metrics.jsonl come to: seconds, medians, last losses."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llama_pretrain.runs.chart import is_number

Row = Mapping[str, Any]


def seconds_of_steps(rows: Sequence[Row], *, tokens_per_step: Any) -> dict[int, float]:
    """Seconds of each step that counted, by its number; without evaluations and checkpoints."""
    if not is_number(tokens_per_step):
        return {}
    return {
        row["step"]: tokens_per_step / row["tokens_per_s"]
        for row in rows
        if is_number(row.get("tokens_per_s")) and row["tokens_per_s"] > 0
    }


def last_number(rows: Sequence[Row], key: str) -> float | None:
    """The last value of a curve that is a number."""
    return next((row[key] for row in reversed(rows) if is_number(row.get(key))), None)


def median(rows: Sequence[Row], key: str) -> float | None:
    """The median of a curve."""
    values = [row[key] for row in rows if is_number(row.get(key))]
    return statistics.median(values) if values else None


def format_seconds(seconds: float) -> str:
    """Seconds in the unit that fits: `0.42 s`, `12.3 s`, `4 min 5 s`, `3 h 20 min`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def format_size(num_bytes: float) -> str:
    """Bytes as MiB or GiB."""
    gib = 1 << 30
    return f"{num_bytes / gib:,.1f} GiB" if num_bytes >= gib else f"{num_bytes / 2**20:.0f} MiB"

"""metrics.jsonl: the rows of steps, evaluations, checkpoints and events."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from llama_pretrain.files import write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl but for steps that a rollback has taken back.

    A last line that was cut short is left out.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return take_back(json.loads(line) for line in lines if line.endswith("\n"))


def take_back(written: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines in the order in which they were written, without those that a rollback takes back."""
    rows: list[dict[str, Any]] = []
    for row in written:
        if "rolled_back_from" in row:
            rows = [kept for kept in rows if kept["step"] <= row["step"]]
        rows.append(row)
    return rows


def cut_metrics(path: Path, *, last_step: int) -> None:
    """Forget the steps after a checkpoint that a run goes on from."""
    rows = [row for row in read_metrics(path) if row["step"] <= last_step and "finished" not in row]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


TAIL, FAR = 1 << 14, 1 << 20
"""Bytes at the end of metrics.jsonl that are read, and in which an evaluation is looked for where
the first hold none."""


def read_end(path: Path) -> list[dict[str, Any]]:
    """The last lines of metrics.jsonl, without what a rollback has taken back."""
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            lines = _lines_from(file, max(0, length - TAIL))
            rows = take_back(_parse(lines))
            if length > TAIL and not any("eval_loss" in row for row in rows):
                lines = _lines_from(file, max(0, length - FAR))
                rows = [*_evaluation_before(lines, rows), *rows]
    except FileNotFoundError:
        return []
    return rows


def _lines_from(file: BinaryIO, start: int) -> list[bytes]:
    """Whole lines from a position on: none that was cut short, at either end."""
    file.seek(start)
    lines = file.read().split(b"\n")[:-1]
    return lines[1:] if start else lines


def _evaluation_before(
    lines: Sequence[bytes], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The last evaluation of lines that aren't worth parsing all, if no rollback took it back."""
    step = last_value(rows, "step") or 0
    found = list(_parse([line for line in lines if b'"eval_loss"' in line]))
    return [row for row in found if row["step"] <= step][-1:]


def _parse(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def last_value(rows: Sequence[Mapping[str, Any]], key: str) -> Any:
    return next((row[key] for row in reversed(rows) if isinstance(row.get(key), int | float)), None)

"""The files of a run directory as `verify` reads them: strictly, each once."""

import json
import math
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from llama_pretrain.config.problems import UserError
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.snapshot import load_snapshot
from llama_pretrain.config.tasks import Task
from llama_pretrain.files import parse_json, read_regular
from llama_pretrain.plan.plan import TrainingPlan, load_plan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import Row, apply_rollbacks, parse_row
from llama_pretrain.runs.status import Status

COMPLETED = tuple(status.value for status in Status if status.is_complete)
"""Statuses of runs that have done all their steps."""


class Result(str, Enum):
    passed = "pass"
    failed = "fail"
    absent = "absent"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of `verify`."""

    name: str
    result: Result
    text: str


class BrokenError(Exception):
    """A check's reason to fail, on one line."""


class AbsentError(Exception):
    """A check has nothing to look at, and need not have."""


class Files:
    """A run directory; each file is read once, by the first check that needs it."""

    def __init__(self, path: Path):
        self.dir = RunDir(path)

    @cached_property
    def run(self) -> ResolvedRun:
        try:
            return load_snapshot(self.dir.snapshot)
        except UserError as error:
            text = [problem.message for problem in error.problems]
            raise BrokenError("; ".join(text).splitlines()[0]) from error

    @cached_property
    def plan(self) -> TrainingPlan:
        try:
            return load_plan(self.dir.plan)
        except FileNotFoundError as error:
            raise BrokenError("is missing") from error
        except ValueError as error:
            raise BrokenError(f"cannot be read: {str(error).splitlines()[0]}") from error

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of metrics.jsonl that count."""
        return apply_rollbacks(read_lines(self.dir.metrics))

    @property
    def evaluates(self) -> bool:
        return self.run.task is Task.evaluate

    @cached_property
    def status(self) -> str:
        values = read_object(self.dir.status)
        text = values.get("status")
        if text not in [status.value for status in Status]:
            raise BrokenError(f"has no known status (got {text})")
        return str(text)


def read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BrokenError("is missing")
    try:
        values = parse_json(read_regular(path))
    except ValueError as error:
        raise BrokenError(f"is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise BrokenError("is not a JSON object")
    return values


def read_lines(path: Path) -> list[Row]:
    """Every line of metrics.jsonl or samples.jsonl, strictly."""
    if not path.is_file():
        raise BrokenError("is missing")
    rows = []
    lines = read_regular(path).split(b"\n")
    if lines.pop():
        raise BrokenError(f"line {len(lines) + 1} was cut short")
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_row(line)
        except json.JSONDecodeError as error:
            raise BrokenError(f"line {number} is not JSON: {error}") from error
        except ValueError as error:
            raise BrokenError(f"line {number}: {error}") from error
        wrong = [key for key, value in row.to_json().items() if _is_no_number(value)]
        if wrong:
            raise BrokenError(f"line {number}: {wrong[0]} is not finite")
        rows.append(row)
    return rows


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_json_of(path: Path) -> dict[str, Any]:
    """A JSON object in a directory; an error names the file."""
    try:
        return read_object(path)
    except BrokenError as error:
        raise BrokenError(f"{path.name} {error}") from error


def assert_same(what: str, found: str, wanted: str) -> None:
    """Two hashes are the same.

    Raises:
        BrokenError: with the beginnings of both.
    """
    if found != wanted:
        raise BrokenError(f"the contents of {what} have changed: {found[:16]}, not {wanted[:16]}")

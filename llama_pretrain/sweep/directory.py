"""What lies in a sweep's directory: the points that were planned, and what came of each."""

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from llama_pretrain.config.sweep import Objective
from llama_pretrain.files import write_text
from llama_pretrain.runs.figures import last_number, median, seconds_of_steps
from llama_pretrain.runs.layout import RunDir, is_held
from llama_pretrain.runs.metrics import read_metrics
from llama_pretrain.runs.status import FINISHED, Status

Row = dict[str, Any]


MEASURES = (
    "objective",
    "eval_loss",
    "train_loss",
    "steps",
    "tokens",
    "tokens_per_s",
    "peak_memory_bytes",
    "planned_memory_bytes",
    "seconds",
)
"""Numbers of a row of results; losses in nats a token, seconds of training alone."""


class Verdict(str, Enum):
    """What was found of a point before the first was started."""

    runs = "runs"
    refused = "refused"
    unfit = "unfit"


@dataclass(frozen=True, kw_only=True)
class PointRecord:
    """One point of a sweep."""

    index: int
    label: str
    """What sets it apart: its own overrides."""
    settings: dict[str, str]
    """The same by setting, as they were written."""
    words: list[str]
    """All its overrides."""
    verdict: Verdict = Verdict.runs
    reason: str = ""
    """Why it was left out."""
    folder: str = ""
    """Its run directory, by name; empty where it has none."""


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """sweep.json."""

    command: list[str]
    objective: Objective
    points: list[PointRecord] = field(default_factory=list)

    @property
    def swept(self) -> list[str]:
        """The settings that differ between points."""
        return list(dict.fromkeys(key for point in self.points for key in point.settings))


@dataclass(frozen=True)
class SweepDir:
    """The folder of a sweep; its points' run directories lie in it."""

    path: Path

    @property
    def record(self) -> Path:
        return self.path / "sweep.json"

    @property
    def results(self) -> Path:
        """A JSON line a point."""
        return self.path / "results.jsonl"

    @property
    def table(self) -> Path:
        return self.path / "results.csv"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def hparams(self) -> Path:
        """What TensorBoard's HParams page reads."""
        return self.path / "hparams"

    def point(self, record: PointRecord) -> RunDir:
        """The run directory of a point that has one."""
        return RunDir(self.path / record.folder)


def write_sweep(folder: SweepDir, record: SweepRecord) -> None:
    """Write sweep.json."""
    write_text(folder.record, json.dumps(asdict(record), indent=2) + "\n")


def read_sweep(folder: SweepDir) -> SweepRecord:
    """Read sweep.json.

    Raises:
        ValueError: if it isn't ours.
        OSError: if it isn't there.
    """
    from pydantic import TypeAdapter  # 0.1 s that --help need not pay

    return TypeAdapter(SweepRecord).validate_json(folder.record.read_bytes())


@contextmanager
def change(folder: SweepDir) -> Iterator[None]:
    """Keep sweep.json to this process while it is read and written again."""
    with (folder.path / ".change").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_row(folder: SweepDir, point: PointRecord, *, objective: Objective) -> Row:
    """What has come of a point so far, from its run directory."""
    row: Row = {"index": point.index, "label": point.label, "status": point.verdict.value}
    row |= {"reason": point.reason, **dict.fromkeys(MEASURES), "run_dir": point.folder}
    row["settings"] = point.settings
    if point.verdict is not Verdict.runs:
        return row
    run_dir = folder.point(point)
    row["status"], row["reason"] = read_state(run_dir)
    rows = read_metrics(run_dir.metrics)
    steps = [line for line in rows if "loss" in line]
    if steps:
        last = steps[-1]
        row |= {"steps": last["step"], "tokens": last["tokens"], "train_loss": last["loss"]}
        row["tokens_per_s"] = median(steps, "tokens_per_s")
        row["peak_memory_bytes"] = max(line["memory_bytes"] for line in steps)
        per_step = last["tokens"] // last["step"]
        row["seconds"] = sum(seconds_of_steps(steps, tokens_per_step=per_step).values())
    row["eval_loss"] = last_number(rows, "eval_loss")
    summary = next((line for line in reversed(rows) if "finished" in line), None)
    if summary is not None:
        row["train_loss"] = summary["train_loss"]
        row["tokens_per_s"] = summary["median_tokens_per_s"]
        row["peak_memory_bytes"] = summary["peak_memory_bytes"]
        row["planned_memory_bytes"] = summary["planned_memory_bytes"]
    if row["status"] in FINISHED:
        row["objective"] = row[objective.value]
    return row


def read_state(run_dir: RunDir) -> tuple[str, str]:
    """A run's status, and the reason where it has failed.

    `waiting` has not begun; `crashed` says that it runs, and no process does.
    """
    status, reason = _read_status(run_dir)
    if status == Status.running and not is_held(run_dir):
        status, reason = _read_status(run_dir)  # it may have ended in between
        if status == Status.running:
            return "crashed", "its process is gone"
    return status, reason


def _read_status(run_dir: RunDir) -> tuple[str, str]:
    try:
        values = json.loads(run_dir.status.read_text(encoding="utf-8"))
        return Status(values["status"]).value, values.get("error") or ""
    except (OSError, ValueError, KeyError, TypeError):
        return "waiting", ""


def read_rows(folder: SweepDir, record: SweepRecord) -> list[Row]:
    """A row for each point, in their order."""
    return [read_row(folder, point, objective=record.objective) for point in record.points]


def write_results(folder: SweepDir, record: SweepRecord, rows: Sequence[Row]) -> None:
    """Write results.jsonl and results.csv: a row a point."""
    write_text(folder.results, "".join(json.dumps(row) + "\n" for row in rows))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    swept = record.swept
    table.writerow(["index", *swept, "status", "reason", *MEASURES, "run_dir"])
    for row in rows:
        settings = [row["settings"].get(key, "") for key in swept]
        measures = [row[key] for key in MEASURES]
        reason = " ".join(row["reason"].split())
        table.writerow([row["index"], *settings, row["status"], reason, *measures, row["run_dir"]])
    write_text(folder.table, text.getvalue())


def rank_rows(rows: Sequence[Row], objective: Objective) -> list[Row]:
    """Finished points, the best first."""
    done = [row for row in rows if row["objective"] is not None]
    return sorted(done, key=lambda row: row["objective"], reverse=objective.more_is_better)


def list_sweeps(folder: Path) -> list[SweepDir]:
    """The sweeps at or below a folder."""
    found = []
    for root, folders, files in os.walk(folder):
        if "sweep.json" in files:
            found.append(SweepDir(Path(root)))
            folders.clear()
    return sorted(found, key=lambda sweep: sweep.path)

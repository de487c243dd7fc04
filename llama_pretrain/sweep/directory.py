"""The directory of a sweep: the jobs that were planned, and their results."""

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

from pydantic import TypeAdapter

from llama_pretrain.config.sweep import Objective
from llama_pretrain.files import flock, read_regular, write_json, write_text
from llama_pretrain.runs import status
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import (
    SummaryRow,
    last,
    last_value,
    median_value,
    read_metrics,
    seconds_by_step,
    steps,
)
from llama_pretrain.runs.status import FINISHED

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
"""Numbers of a row of results; losses in nats a token, seconds of the training steps only."""


class Verdict(str, Enum):
    """Whether a job runs, decided before the first starts."""

    runs = "runs"
    refused = "refused"
    unfit = "unfit"


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """One job of a sweep."""

    index: int
    label: str
    """The overrides that set it apart."""
    settings: dict[str, str]
    """The same by setting, as they were written."""
    words: list[str]
    """All its overrides."""
    verdict: Verdict = Verdict.runs
    reason: str = ""
    """Why it does not run."""
    folder: str = ""
    """Name of its run directory; empty if it has none."""


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """sweep.json."""

    command: list[str]
    objective: Objective
    fixed: list[str] = field(default_factory=list)
    """Keys of overrides that all jobs share."""
    jobs: list[JobRecord] = field(default_factory=list)

    def find(self, words: Sequence[str]) -> JobRecord | None:
        """The job with these overrides."""
        return next((job for job in self.jobs if set(job.words) == set(words)), None)

    @property
    def swept(self) -> list[str]:
        """The settings that differ between jobs."""
        return list(dict.fromkeys(key for job in self.jobs for key in job.settings))


@dataclass(frozen=True)
class SweepDir:
    """The directory of a sweep; the run directories of its jobs are inside."""

    path: Path

    @property
    def record(self) -> Path:
        return self.path / "sweep.json"

    @property
    def results(self) -> Path:
        """One JSON line a job."""
        return self.path / "results.jsonl"

    @property
    def table(self) -> Path:
        return self.path / "results.csv"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def hparams(self) -> Path:
        """Event files for TensorBoard's HParams page."""
        return self.path / "hparams"

    def job(self, record: JobRecord) -> RunDir:
        """The run directory of a job that has one."""
        return RunDir(self.path / record.folder)


def write_sweep(folder: SweepDir, record: SweepRecord) -> None:
    """Write sweep.json."""
    write_json(folder.record, asdict(record))


def read_sweep(folder: SweepDir) -> SweepRecord:
    """Read sweep.json.

    Raises:
        ValueError: if it has another format.
        OSError: if it does not exist.
    """
    return TypeAdapter(SweepRecord).validate_json(read_regular(folder.record))


@contextmanager
def change(folder: SweepDir) -> Iterator[None]:
    """Lock sweep.json while it is read and written again."""
    with (folder.path / ".change").open("w") as lock:
        flock(lock.fileno(), fcntl.LOCK_EX)
        yield


def read_row(folder: SweepDir, job: JobRecord, *, objective: Objective) -> Row:
    """The results of a job so far, from its run directory."""
    row: Row = {"index": job.index, "label": job.label, "status": job.verdict.value}
    row |= {"reason": job.reason, **dict.fromkeys(MEASURES), "run_dir": job.folder}
    row["settings"] = job.settings
    if job.verdict is not Verdict.runs:
        return row
    run_dir = folder.job(job)
    row["status"], row["reason"] = read_state(run_dir)
    rows = read_metrics(run_dir.metrics)
    done = [step for step in steps(rows) if step.loss is not None]
    if done:
        final = done[-1]
        row |= {"steps": final.step, "tokens": final.tokens, "train_loss": final.loss}
        row["tokens_per_s"] = median_value(done, "tokens_per_s")
        row["peak_memory_bytes"] = max(step.memory_bytes for step in done)
        per_step = final.tokens // max(1, final.step)
        row["seconds"] = sum(seconds_by_step(done, tokens_per_step=per_step).values())
    row["eval_loss"] = last_value(rows, "eval_loss")
    summary = last(rows, SummaryRow)
    if summary is not None:
        row["train_loss"] = summary.train_loss
        row["tokens_per_s"] = summary.median_tokens_per_s
        row["peak_memory_bytes"] = summary.peak_memory_bytes
        row["planned_memory_bytes"] = summary.planned_memory_bytes
    if row["status"] in FINISHED:
        row["objective"] = row[objective.value]
    return row


def read_state(run_dir: RunDir) -> tuple[str, str]:
    """A job's status, or `waiting` or `crashed`, and the reason if it failed."""
    state, reason = status.read_state(run_dir)
    return state or "waiting", reason


def read_rows(folder: SweepDir, record: SweepRecord) -> list[Row]:
    """A row for each job, in order."""
    return [read_row(folder, job, objective=record.objective) for job in record.jobs]


def write_results(folder: SweepDir, record: SweepRecord, rows: Sequence[Row]) -> None:
    """Write results.jsonl and results.csv: one row a job."""
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
    """Finished jobs, the best first."""
    done = [row for row in rows if row["objective"] is not None]
    return sorted(done, key=lambda row: row["objective"], reverse=objective.more_is_better)


def list_sweeps(folder: Path) -> list[SweepDir]:
    """The sweeps at or below a directory."""
    found = []
    for root, folders, files in os.walk(folder):
        if "sweep.json" in files:
            found.append(SweepDir(Path(root)))
            folders.clear()
    return sorted(found, key=lambda sweep: sweep.path)

"""Find all runs below a folder, reading only the ends of their files."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama_pretrain.checkpoint.manifest import newest_of
from llama_pretrain.files import open_regular, read_json
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import Row, SummaryRow, evaluations, last, last_value, read_tail
from llama_pretrain.runs.status import CRASHED, read_state

EVALUATIONS = ("evaluations",)
"""The only folders of a run that hold others."""
HEAD_BYTES = 4096
"""Bytes at the beginning of a snapshot that hold its task and its model."""
WITHOUT_STATUS = ("evaluate", "verify_resume")
"""Tasks that write no status.json."""
SWEEP_FILES = ("sweep.json", "multirun.yaml")
"""What a sweep writes beside its jobs' folders."""
UNREADABLE, UNKNOWN = "unreadable", "unknown"


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One line of the table."""

    path: Path
    kind: Literal["run", "sweep", "evaluation"] = "run"
    """`sweep` = a job of a sweep."""
    status: str
    """As in status.json; or `crashed`, `unreadable`, `unknown`."""
    started: str | None = None
    """When it was started or last resumed, in UTC."""
    model: str | None = None
    step: int | None = None
    steps: int | None = None
    """Planned steps."""
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_s: float | None = None
    checkpoint: str | None = None
    """Where a crashed run can resume."""
    error: str | None = None


def list_runs(root: Path) -> list[Listed]:
    """All runs below a folder, the newest last."""
    found = [_try_to_describe(folder) for folder in _find_runs(root)]
    return sorted(found, key=lambda listed: (listed.started or "", str(listed.path)))


def _find_runs(root: Path) -> Iterator[Path]:
    """Folders with a snapshot, and unreadable folders. Links are not followed."""
    faults: list[OSError] = []
    for folder, names, files in os.walk(root, onerror=faults.append):
        is_run = "snapshot.yaml" in files
        if is_run:
            yield Path(folder)
        names[:] = [
            name for name in names if name in EVALUATIONS or not (is_run or name.startswith("."))
        ]
    for fault in faults:
        if not isinstance(fault, FileNotFoundError):  # deleted meanwhile
            yield Path(fault.filename)


def _try_to_describe(folder: Path) -> Listed:
    """One run; whatever is wrong with its files becomes its row."""
    try:
        return _describe(folder)
    except Exception as error:  # a damaged run must not hide the others
        return Listed(path=folder, status=UNREADABLE, error=f"{type(error).__name__}: {error}")


def _describe(folder: Path) -> Listed:
    """One run; what its files do not record is left out."""
    run_dir = RunDir(folder)
    try:
        head = _read_head(run_dir.snapshot)
        rows = read_tail(run_dir.metrics)
    except OSError as fault:
        return Listed(path=folder, status=UNREADABLE, error=fault.strerror)
    plan, provenance = read_json(run_dir.plan) or {}, read_json(run_dir.provenance) or {}
    task = head.get("task")
    evaluates = task == "evaluate"
    state, error = read_state(run_dir)
    if task in WITHOUT_STATUS:
        state = _state_of(rows)
    in_sweep = any((folder.parent / name).exists() for name in SWEEP_FILES)
    steps = plan.get("steps")
    time = provenance.get("time")
    return Listed(
        path=folder,
        kind="evaluation" if evaluates else "sweep" if in_sweep else "run",
        status=state or UNKNOWN,
        started=time if isinstance(time, str) else None,
        model=head.get("model"),
        step=rows[-1].step if rows else None,
        steps=steps.get("total") if isinstance(steps, dict) and not evaluates else None,
        loss=last_value(rows, "loss"),
        eval_loss=last_value(rows, "eval_loss"),
        tokens_per_s=last_value(rows, "median_tokens_per_s") or last_value(rows, "tokens_per_s"),
        checkpoint=_newest_checkpoint(run_dir) if state == CRASHED else None,
        error=error or None,
    )


def _read_head(path: Path) -> dict[str, str]:
    """The task and the model of a snapshot, without parsing all of its YAML."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            text = file.read(HEAD_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:  # unreadable folder, or deleted meanwhile
        os.scandir(path.parent).close()
        return {}
    found = {}
    for key, pattern in (("task", r"^task: (\S+)"), ("model", r"^model:\n  name: (.+)")):
        if match := re.search(pattern, text, re.M):
            found[key] = match.group(1).strip().strip("'\"")
    return found


def _state_of(rows: Sequence[Row]) -> str:
    """Without a status.json: whether the last line is there."""
    done = last(rows, SummaryRow) or any(row.finished for row in evaluations(rows))
    return "completed" if done else "unfinished"


def _newest_checkpoint(run_dir: RunDir) -> str | None:
    found = newest_of(run_dir.checkpoints)
    return None if found is None else found.name

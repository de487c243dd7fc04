"""status.json: the state of a run."""

import os
import socket
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from llama_pretrain.config.secrets import redact
from llama_pretrain.files import read_json, write_json
from llama_pretrain.runs.layout import RunDir, beats, is_held


class Status(str, Enum):
    running = "running"
    completed = "completed"
    completed_unsaved = "completed_unsaved"
    """All steps are done, but the last checkpoint or the export could not be written."""
    failed = "failed"
    stopped = "stopped"
    preempted = "preempted"
    reproduced = "reproduced"
    """Completed, and bitwise equal to the run that it reproduces."""
    diverged = "diverged"
    """Completed, and different from the run that it reproduces."""
    pruned = "pruned"
    """A job of a sweep that was ended because it fell behind the others."""

    @property
    def is_complete(self) -> bool:
        """Whether all work is done."""
        return self in (Status.completed, Status.reproduced, Status.diverged)


CRASHED = "crashed"
"""Not in status.json: see `read_state`."""
FINISHED = (Status.completed, Status.reproduced, Status.diverged, Status.pruned)
"""A job of a sweep with one of these is not run again."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is known of how a run went."""

    objective: float | None = None
    """The last evaluation loss."""
    error: str | None = None
    rank: int | None = None
    """The rank that failed."""
    log: Path | None = None
    """Its log."""
    restarts: int = 0


NOTHING = Outcome()


def write_status(run_dir: RunDir, status: Status, outcome: Outcome = NOTHING) -> None:
    """Write status.json. Only the parent does: before the ranks start and after all have ended."""
    values = asdict(outcome) | {
        "error": None if outcome.error is None else redact(outcome.error),
        "log": None if outcome.log is None else str(outcome.log),
    }
    values |= {"pid": os.getpid(), "host": socket.gethostname()}
    write_json(run_dir.status, {"status": status.value, **values})


def read_status(run_dir: RunDir) -> Status | None:
    """The status in status.json; `None` if it cannot be read."""
    try:
        return Status((read_json(run_dir.status) or {}).get("status"))
    except ValueError:
        return None


def read_state(run_dir: RunDir) -> tuple[str | None, str]:
    """The status now, and its error; `None` if status.json cannot be read.

    `crashed` if the status is `running` and no process holds the run. Not every shared file system
    shows the locks of other hosts: there the heartbeats of ranks count too.
    """
    values = read_json(run_dir.status) or {}
    if values.get("status") == Status.running and not is_held(run_dir):
        if values.get("host") != socket.gethostname() and beats(run_dir):
            return Status.running.value, ""
        values = read_json(run_dir.status) or {}  # it may have ended in between
        if values.get("status") == Status.running:
            return CRASHED, "its process is gone"
    known = values.get("status") in {status.value for status in Status}
    return values["status"] if known else None, str(values.get("error") or "")

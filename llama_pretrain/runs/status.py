"""status.json: how a run stands."""

import json
import os
from enum import Enum
from pathlib import Path

from llama_pretrain.config.secrets import redact
from llama_pretrain.files import write_text
from llama_pretrain.runs.layout import RunDir


class Status(str, Enum):
    running = "running"
    completed = "completed"
    failed = "failed"
    stopped = "stopped"
    preempted = "preempted"
    reproduced = "reproduced"
    """Completed, and equal to the run that it does again."""
    diverged = "diverged"
    """Completed, and not equal."""
    pruned = "pruned"
    """A point of a sweep that was ended because it fell behind the others."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self in (Status.completed, Status.reproduced, Status.diverged)


FINISHED = (Status.completed, Status.reproduced, Status.diverged, Status.pruned)
"""A point of a sweep that is one of these is not run again."""


def write_status(
    run_dir: RunDir,
    status: Status,
    *,
    objective: float | None = None,
    error: str | None = None,
    rank: int | None = None,
    log: Path | None = None,
    restarts: int = 0,
) -> None:
    """Say how a run stands. Only the parent writes it: before the ranks, and after all of them."""
    values = {
        "status": status.value,
        "objective": objective,
        "error": None if error is None else redact(error),
        "rank": rank,
        "log": None if log is None else str(log),
        "restarts": restarts,
        "pid": os.getpid(),
    }
    write_text(run_dir.status, json.dumps(values, indent=2) + "\n")


def read_status(run_dir: RunDir) -> Status | None:
    """What status.json says; `None` where it says nothing that can be read."""
    try:
        return Status(json.loads(run_dir.status.read_text(encoding="utf-8"))["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return None

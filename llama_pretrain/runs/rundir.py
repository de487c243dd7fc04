"""What lies where in a run directory, and how its files are written and read."""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from llama_pretrain.config.secrets import redact

LOOKS = 5
"""Times that a run directory is asked for before it is another process's."""


@dataclass(frozen=True)
class RunDir:
    """The folder of one run. The parent and the ranks know of each other only through it."""

    path: Path

    @property
    def snapshot(self) -> Path:
        return self.path / "snapshot.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def ds_config(self) -> Path:
        return self.path / "ds_config.json"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def changes(self) -> Path:
        """What git had not of the code that ran: a patch, and files that it doesn't track."""
        return self.path / "provenance"

    @property
    def data_files(self) -> Path:
        """SHA-256 of each file of the data, by source and path."""
        return self.changes / "data.json"

    @property
    def reproduction(self) -> Path:
        """Of a run that was done again: the drift, and how far the two are equal."""
        return self.path / "reproduction.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """A JSON line a step, an evaluation, a checkpoint; see docs/run_directory.md."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """A JSON line for each text that the model has written while it trained."""
        return self.path / "samples.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the run trains with."""
        return self.path / "tokenizer"

    @property
    def inspection(self) -> Path:
        """The page of task=inspect."""
        return self.path / "data.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def ranks(self) -> Path:
        return self.path / "ranks"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def lock(self) -> Path:
        """Held by the process that trains here."""
        return self.path / ".lock"

    @property
    def heartbeats(self) -> Path:
        """How far each rank has come, while they live."""
        return self.ranks / "heartbeats"

    def rank_log(self, rank: int) -> Path:
        """All that a rank and its libraries say."""
        return self.ranks / f"rank{rank}.log"


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


LOOKS = 5


@contextmanager
def hold(run_dir: RunDir) -> Iterator[None]:
    """Keep a run directory to this process; the system lets go of it however the process ends.

    Raises:
        BlockingIOError: if another process holds it.
    """
    run_dir.path.mkdir(parents=True, exist_ok=True)
    with run_dir.lock.open("w") as lock:
        for attempt in range(LOOKS):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # `list` asks for it too, and lets go at once
                if attempt == LOOKS - 1:
                    raise
                time.sleep(0.02)
        yield


def is_held(run_dir: RunDir, pid: Any = None) -> bool:
    """Whether a process holds the run: by its lock, which ends with the process.

    The lock is asked for as one of many readers, and let go of at once. Where there is no lock
    file, the process id has to do.
    """
    try:
        lock = os.open(run_dir.lock, os.O_RDONLY)
    except FileNotFoundError:
        return isinstance(pid, int) and Path(f"/proc/{pid}").exists()
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


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

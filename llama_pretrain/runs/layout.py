"""Which file lies where in a run directory."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

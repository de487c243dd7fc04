"""The files of a run directory, and the lock of the process that trains in it."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_pretrain.files import flock, open_regular

FRESH_S = 60.0
ATTEMPTS = 5
"""Tries to take the lock before it counts as another process's."""


class _Inside:
    """A path inside a run directory."""

    def __init__(self, name: str):
        self._name = name

    def __get__(self, run_dir: "RunDir", owner: Any = None) -> Path:
        return run_dir.path / self._name


@dataclass(frozen=True)
class RunDir:
    """The folder of one run: all that the parent and the ranks know of each other."""

    path: Path

    snapshot = _Inside("snapshot.yaml")
    plan = _Inside("plan.json")
    ds_config = _Inside("ds_config.json")
    provenance = _Inside("provenance.json")
    changes = _Inside("provenance")
    """What git lacks of the code that ran: a patch, and untracked files."""
    data_files = _Inside("provenance/data.json")
    """SHA-256 of each data file, by source and path."""
    reproduction = _Inside("reproduction.json")
    """With `reproduce`: the drift and the verdict."""
    status = _Inside("status.json")
    metrics = _Inside("metrics.jsonl")
    samples = _Inside("samples.jsonl")
    tensorboard = _Inside("tensorboard")
    tokenizer = _Inside("tokenizer")
    inspection = _Inside("data.html")
    """The page of task=inspect."""
    checkpoints = _Inside("checkpoints")
    request = _Inside("checkpoint.request")
    """Whoever creates it asks for a checkpoint; rank 0 deletes it when it saves."""
    export = _Inside("export")
    ranks = _Inside("ranks")
    report = _Inside("report.html")
    job_script = _Inside("job.sbatch")
    """With `launch=slurm` outside of an allocation: the script of the job."""
    job = _Inside("slurm.json")
    """The id of that job."""
    lock = _Inside(".lock")
    """Held by the process that trains here."""

    def heartbeats(self, node: int = 0) -> Path:
        """Progress of each rank of a node while it lives."""
        return self.ranks / (f"heartbeats.node{node}" if node else "heartbeats")

    def rank_log(self, rank: int) -> Path:
        """What a rank and its libraries print."""
        return self.ranks / f"rank{rank}.log"


@contextmanager
def hold(run_dir: RunDir) -> Iterator[None]:
    """Lock a run directory; the system releases the lock however the process ends.

    Raises:
        BlockingIOError: if another process holds it.
    """
    run_dir.path.mkdir(parents=True, exist_ok=True)
    with os.fdopen(open_regular(run_dir.lock, os.O_RDWR | os.O_CREAT), "w") as lock:
        for attempt in range(ATTEMPTS):
            try:
                flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # `list` takes it too, for a moment
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(0.02)
        yield


def beats(run_dir: RunDir) -> bool:
    """Whether the ranks of node 0 have made progress a moment ago."""
    try:
        return time.time() - run_dir.heartbeats().stat().st_mtime < FRESH_S
    except OSError:
        return False


def is_held(run_dir: RunDir) -> bool:
    """Whether a process holds the run: its lock is tried as one of many readers, for a moment.

    Without locks, whether its ranks have made progress a moment ago.
    """
    try:
        lock = open_regular(run_dir.lock)
    except PermissionError:  # it may be held
        raise
    except OSError:
        return False
    try:
        if not flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB):
            return beats(run_dir)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False

"""All runs below a folder, from the ends of their files; nothing is written."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from llama_pretrain.runs.layout import RunDir, is_held
from llama_pretrain.runs.metrics import last_value, read_end

INSIDE = {
    "checkpoints",
    "export",
    "profile",
    "ranks",
    "tensorboard",
    "tokenizer",
    "wandb",
}
"""Folders of a run in which no other run lies."""


HEAD = 4096
"""Bytes at the beginning of a snapshot in which its task and its model stand."""


WITHOUT_STATUS = ("evaluate", "verify_resume")
"""Tasks whose folders have no status.json."""


OF_A_SWEEP = ("sweep.json", "multirun.yaml")
"""In a folder of runs: what ours and Hydra's plain sweeps write."""


RUNNING, CRASHED, UNREADABLE, UNKNOWN = "running", "crashed", "unreadable", "unknown"


class Kind(str, Enum):
    run = "run"
    sweep = "sweep"
    evaluation = "evaluation"


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What a line of the table says."""

    path: Path
    kind: Kind = Kind.run
    """`sweep` = a run of a sweep."""
    status: str
    """As in status.json; or `crashed`, `unreadable`, `unknown`."""
    started: str | None = None
    """When it was started or last resumed, in UTC."""
    model: str | None = None
    step: int | None = None
    steps: int | None = None
    """Planned."""
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_s: float | None = None
    checkpoint: str | None = None
    """Of a run that has crashed: what it can go on from."""
    error: str | None = None


def list_runs(root: Path) -> list[Listed]:
    """All runs below a folder, the newest last."""
    found = [listed for folder in _find_runs(root) for listed in [_look_at(folder)]]
    return sorted(found, key=lambda listed: (listed.started or "", str(listed.path)))


def _find_runs(root: Path) -> Iterator[Path]:
    """Folders with a snapshot, and folders that can't be looked into. No link is followed."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:  # it has gone since
            continue
        except OSError:
            yield folder
            continue
        names = {entry.name for entry in entries}
        is_run = "snapshot.yaml" in names
        if is_run:
            yield folder
        waiting += [
            Path(entry.path)
            for entry in entries
            if entry.is_dir(follow_symlinks=False)
            and not entry.name.startswith(".")
            and not (is_run and entry.name in INSIDE)
        ]


def _look_at(folder: Path) -> Listed:
    """One run; what its files don't tell is left open."""
    run_dir = RunDir(folder)
    try:
        head = _read_head(run_dir.snapshot)
        status = _load(run_dir.status)
        plan, provenance = _load(run_dir.plan), _load(run_dir.provenance)
        rows = read_end(run_dir.metrics)
        evaluates = head.get("task") == "evaluate"
        bare = head.get("task") in WITHOUT_STATUS
        said = _status_of(rows) if bare else _status(run_dir, status)
    except OSError as error:
        return Listed(path=folder, status=UNREADABLE, error=error.strerror)
    kind = Kind.evaluation if evaluates else Kind.run
    if not evaluates and any((folder.parent / name).exists() for name in OF_A_SWEEP):
        kind = Kind.sweep
    steps = plan.get("steps")
    time = provenance.get("time")
    return Listed(
        path=folder,
        kind=kind,
        status=said,
        started=time if isinstance(time, str) else None,
        model=head.get("model"),
        step=last_value(rows, "step"),
        steps=steps.get("total") if isinstance(steps, dict) and not evaluates else None,
        loss=last_value(rows, "loss"),
        eval_loss=last_value(rows, "eval_loss"),
        tokens_per_s=last_value(rows, "median_tokens_per_s") or last_value(rows, "tokens_per_s"),
        checkpoint=_newest_checkpoint(run_dir) if said == CRASHED else None,
        error=status.get("error"),
    )


def _load(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty where there is none that can be parsed.

    Raises:
        OSError: if it is there and can't be read.
    """
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _read_head(path: Path) -> dict[str, str]:
    """The task and the model of a snapshot, without parsing all of its YAML."""
    try:
        with path.open("rb") as file:
            text = file.read(HEAD).decode("utf-8", errors="replace")
    except FileNotFoundError:  # a folder that could not be looked into, or a run that has gone
        os.scandir(path.parent).close()
        return {}
    found = {}
    for key, pattern in (("task", r"^task: (\S+)"), ("model", r"^model:\n  name: (.+)")):
        if match := re.search(pattern, text, re.M):
            found[key] = match.group(1).strip().strip("'\"")
    return found


def _status_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where there is no status.json: whether the last line is there."""
    return "completed" if any("finished" in row for row in rows) else "unfinished"


def _status(run_dir: RunDir, status: Mapping[str, Any]) -> str:
    """What status.json says; `crashed` where it says `running` and nobody trains there."""
    said = status.get("status")
    if not isinstance(said, str):
        return UNKNOWN
    if said == RUNNING and not is_held(run_dir, status.get("pid")):
        now = _load(run_dir.status).get("status")  # it may have ended in between
        return CRASHED if now == RUNNING else str(now)
    return said


def _newest_checkpoint(run_dir: RunDir) -> str | None:
    from llama_pretrain.checkpoint.manifest import newest_of  # pydantic: not for most lists

    found = newest_of(run_dir.checkpoints)
    return None if found is None else found.name

"""Where the seconds go from the command to the end of the first optimizer step, by phase.

The parent writes its phases into the run directory when it starts the ranks; rank 0 goes on from
there. Both read the same clock.
"""

import json
import os
import time
from pathlib import Path

from llama_pretrain.files import write_text
from llama_pretrain.runs.layout import RunDir

NAMES = {
    "compose": "process started, config composed",
    "plan": "checked, data found, planned, written down",
    "spawn": "ranks started",
    "imports": "imports",
    "process_group": "ranks have met",
    "model": "model built, weights drawn",
    "engine": "DeepSpeed engine built",
    "checkpoint": "checkpoint loaded",
    "data": "data opened",
    "compile": "kernels compiled",
    "evaluation": "evaluation before the first step",
    "first_step": "first step, with its batch",
}
"""Phases in their order; those that a start hasn't had are left out."""


class Phases:
    """A stopwatch that is read at the end of each phase."""

    def __init__(self, began: float | None = None):
        """`began`: seconds as of time.time(); `None` = now."""
        self._last = time.time() if began is None else began
        self.seconds: dict[str, float] = {}
        """By phase; together, the time from the beginning to the end of the last one."""

    def end(self, name: str, *, compiling: float = 0.0) -> None:
        """A phase has ended, or a part of one; `compiling` seconds of it count as `compile`."""
        now = time.time()
        self._add(name, now - self._last - compiling)
        if compiling:
            self._add("compile", compiling)
        self._last = now

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def write(self, run_dir: RunDir) -> None:
        """Leave them for the rank that goes on with them."""
        content = {"seconds": self.seconds, "until": self._last}
        write_text(_file(run_dir), json.dumps(content) + "\n")

    def describe(self) -> dict[str, float]:
        """In their order, to the millisecond."""
        return {name: round(self.seconds[name], 3) for name in NAMES if name in self.seconds}


def read_phases(run_dir: RunDir) -> Phases:
    """The parent's phases, to go on with; from now on where it has left none."""
    try:
        content = json.loads(_file(run_dir).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Phases()
    phases = Phases(content["until"])
    phases.seconds = content["seconds"]
    return phases


def _file(run_dir: RunDir) -> Path:
    return run_dir.ranks / "start.json"


def process_start() -> float:
    """When this process was started, as of time.time(); now where the system doesn't tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.time()
    return time.time() - age

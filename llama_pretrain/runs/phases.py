"""Seconds from the command to the end of the first optimizer step, by phase.

The parent writes its phases to the run directory when it starts the ranks; rank 0 continues from
there. Both use the same clock.
"""

import os
import time
from pathlib import Path

from llama_pretrain.files import read_json, write_json
from llama_pretrain.runs.layout import RunDir

NAMES = {
    "compose": "process started, config composed",
    "plan": "validated, data found, planned, written",
    "spawn": "ranks started",
    "imports": "imports",
    "process_group": "process group formed",
    "model": "model built, weights drawn",
    "engine": "DeepSpeed engine built",
    "checkpoint": "checkpoint loaded",
    "data": "data opened",
    "compile": "kernels compiled",
    "evaluation": "evaluation before the first step",
    "first_step": "first step, with its batch",
}
"""Phases in order; a start leaves out those that it did not have."""


class Phases:
    """A stopwatch, read at the end of each phase."""

    def __init__(self, began: float | None = None):
        """`began`: as time.time() has it; `None` = now."""
        self._last = time.time() if began is None else began
        self.seconds: dict[str, float] = {}
        """By phase; their sum is the time from the beginning to the end of the last one."""

    def end(self, name: str, *, compiling: float = 0.0) -> None:
        """End a phase, or a part of one; `compiling` seconds of it count as `compile`."""
        now = time.time()
        self._add(name, now - self._last - compiling)
        if compiling:
            self._add("compile", compiling)
        self._last = now

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def write(self, run_dir: RunDir) -> None:
        """Write them for the rank that continues them."""
        write_json(_file(run_dir), {"seconds": self.seconds, "until": self._last}, indent=None)

    def describe(self) -> dict[str, float]:
        """Seconds by phase in order, to the millisecond."""
        return {name: round(self.seconds[name], 3) for name in NAMES if name in self.seconds}


def read_phases(run_dir: RunDir) -> Phases:
    """The parent's phases, to continue; starting now if it wrote none."""
    content = read_json(_file(run_dir))
    if content is None:
        return Phases()
    phases = Phases(content["until"])
    phases.seconds = content["seconds"]
    return phases


def _file(run_dir: RunDir) -> Path:
    return run_dir.ranks / "start.json"


def process_start() -> float:
    """When this process started, as time.time() has it; now if the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.time()
    return time.time() - age

"""Arms of a benchmark that take turns: processes that are stopped and resumed, and their steps."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

POLL_S = 0.01
STEP_S = 600.0
"""Limit of one step."""
TOKENS_PER_STEP = {"cpu": 4096, "cuda": 32_768}


@dataclass(frozen=True)
class Step:
    """A step that an arm has written down."""

    number: int
    loss: float
    seen_at: float
    """On this process's clock; a step written while nobody looked was seen at the next look."""
    gpu_bytes: int | None = None
    """Peak of what torch has allocated on a GPU, where the arm is on one."""


class StepLog:
    """The steps in an arm's file, read as they come. Lines without a loss are left out."""

    def __init__(self, path: Path):
        self._path, self._rest, self._offset = path, b"", 0
        self.steps: list[Step] = []

    def look(self) -> None:
        """Read what is new."""
        if not self._path.is_file() or self._path.stat().st_size == self._offset:
            return
        now = time.perf_counter()
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        rows = [json.loads(line) for line in lines]
        self.steps += [
            Step(row["step"], row["loss"], now, row.get("memory_bytes"))
            for row in rows
            if "loss" in row
        ]


def whole_steps(steps: Sequence[Step], *, resumed_at: float) -> tuple[int, float]:
    """How many steps began after an arm was resumed, and their seconds together.

    A step begins where the one before it ends, so the first that ends in a turn does not count.
    """
    seen = [step.seen_at for step in steps if step.seen_at >= resumed_at]
    return (len(seen) - 1, seen[-1] - seen[0]) if len(seen) > 1 else (0, 0.0)


class ArmError(Exception):
    """An arm has ended, or makes no progress."""


@dataclass
class Arm:
    """A running arm: its command's processes, and the steps that they have done."""

    name: str
    command: list[str]
    steps: StepLog
    log: Path
    process: subprocess.Popen[bytes]
    began: float
    device: str
    tokens_per_s: list[float] = field(default_factory=list)
    """One a round."""
    steps_a_turn: int = 1

    def processes(self) -> list[int]:
        """Ids of the command and of all below it, the command first."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit():
                    stat = (entry / "stat").read_text().rpartition(")")[2].split()
                    children.setdefault(int(stat[1]), []).append(int(entry.name))
        found = [self.process.pid]
        for pid in found:  # it grows
            found += children.get(pid, [])
        return found

    def pause(self) -> None:
        """Stop every process, and wait until all have."""
        stopped = self._stop()
        while any(_state(pid) not in "TtZX" for pid in stopped):
            time.sleep(0.001)
        self.steps.look()

    def _stop(self) -> set[int]:
        """Tell every process to stop; again, until none is new."""
        stopped: set[int] = set()
        while new := [pid for pid in self.processes() if pid not in stopped]:
            for pid in new:
                _send(pid, signal.SIGSTOP)
                stopped.add(pid)
        return stopped

    def resume(self) -> None:
        """Let every process go on."""
        for pid in self.processes():
            _send(pid, signal.SIGCONT)

    def end(self) -> None:
        """End every process, whatever state it is in."""
        for pid in self._stop():  # so that nobody starts another meanwhile
            _send(pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, count: int, *, since: float, limit_s: float) -> None:
        """Wait for that many steps since a moment.

        Raises:
            ArmError: if its command ends, or a step takes too long.
        """
        deadline = time.perf_counter() + limit_s
        while sum(step.seen_at >= since for step in self.steps.steps) < count:
            if self.process.poll() is not None:
                self._fail(f"ended with {self.process.returncode}")
            if time.perf_counter() > deadline:
                self._fail(f"has no {count} steps after {limit_s:.0f} s")
            time.sleep(POLL_S)
            self.steps.look()

    def _fail(self, what: str) -> NoReturn:
        tail = self.log.read_text(errors="replace")[-3000:]
        raise ArmError(f"{self.name} {what}; its output ends:\n{tail}")

    def first_step_s(self) -> float:
        """Seconds from its command to the end of its first step."""
        return self.steps.steps[0].seen_at - self.began

    def peak_bytes(self) -> int:
        """Peak memory: torch's on a GPU, and on a CPU the largest process's resident one."""
        if self.device == "cuda":
            return max(step.gpu_bytes or 0 for step in self.steps.steps)
        peaks = [0]
        for pid in self.processes():
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                peaks += [int(line.split()[1]) * 1024 for line in lines if line[:6] == "VmHWM:"]
        return max(peaks)

    def take_turn(self) -> None:
        """Go on for a turn's steps, and keep their rate."""
        resumed_at = time.perf_counter()
        self.resume()
        wanted = self.steps_a_turn + 1
        self.wait(wanted, since=resumed_at, limit_s=STEP_S * wanted)
        self.pause()
        count, seconds = whole_steps(self.steps.steps, resumed_at=resumed_at)
        self.tokens_per_s.append(count * TOKENS_PER_STEP[self.device] / seconds)


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


@contextmanager
def ended(arm: Arm) -> Iterator[Arm]:
    """End an arm, however the block ends."""
    try:
        yield arm
    finally:
        arm.end()

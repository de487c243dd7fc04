"""Arms of a benchmark that take turns: processes that are stopped and continued."""

import json
import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from llama_pretrain.process import list_processes, read_process

POLL_S = 0.01
STEP_S = 600.0
"""Limit of one step."""
TOKENS_PER_STEP = {"cpu": 4096, "cuda": 32_768}


@dataclass(frozen=True)
class Step:
    """A step that an arm has logged."""

    loss: float
    seen_at: float
    """On this process's clock, when the log was polled."""
    gpu_bytes: int = 0
    """Peak of what torch has allocated on a GPU."""


class StepLog:
    """The steps in an arm's file, read as they are written. Lines without a loss are left out."""

    def __init__(self, path: Path):
        self._path, self._rest, self._offset = path, b"", 0
        self.steps: list[Step] = []

    def poll(self) -> None:
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
            Step(row["loss"], now, row.get("memory_bytes", 0)) for row in rows if "loss" in row
        ]


def whole_steps(steps: Sequence[Step], *, since: float) -> tuple[int, float]:
    """The number of steps that began after an arm continued, and their seconds together.

    A step begins where the one before it ends, so the first that ends in a turn does not count.
    """
    seen = [step.seen_at for step in steps if step.seen_at >= since]
    return (len(seen) - 1, seen[-1] - seen[0]) if len(seen) > 1 else (0, 0.0)


class ArmError(Exception):
    """An arm has exited, or makes no progress."""


@dataclass
class Arm:
    """A running arm: its command's processes, and the steps that they have done."""

    name: str
    log: StepLog
    output: Path
    process: subprocess.Popen[bytes]
    device: str
    began: float = field(default_factory=time.perf_counter)
    tokens_per_s: list[float] = field(default_factory=list)
    """One a round."""
    steps_per_turn: int = 1

    def _list_processes(self) -> list[int]:
        """Ids of the command and of its descendants."""
        children = defaultdict(list)
        for process in list_processes():
            children[process.parent].append(process.pid)
        found = [self.process.pid]
        for pid in found:  # it grows
            found += children[pid]
        return found

    def pause(self) -> None:
        """Stop every process, and wait until all have stopped."""
        for pid in self._stop():
            while (process := read_process(pid)) is not None and process.state not in "TtZX":
                time.sleep(0.001)
        self.log.poll()

    def _stop(self) -> set[int]:
        """Send SIGSTOP to every process, until there is no new one."""
        stopped: set[int] = set()
        while new := set(self._list_processes()) - stopped:
            _send(new, signal.SIGSTOP)
            stopped |= new
        return stopped

    def close(self) -> None:
        """Kill every process, whatever state it is in."""
        _send(self._stop(), signal.SIGKILL)  # stopped, none can start another meanwhile
        self.process.wait()

    def wait(self, count: int, *, since: float = 0.0, limit_s: float) -> None:
        """Wait for so many steps since a moment.

        Raises:
            ArmError: if the command exits, or a step takes too long.
        """
        deadline = time.perf_counter() + limit_s
        while sum(step.seen_at >= since for step in self.log.steps) < count:
            if self.process.poll() is not None:
                self._fail(f"exited with {self.process.returncode}")
            if time.perf_counter() > deadline:
                self._fail(f"has not done {count} steps in {limit_s:.0f} s")
            time.sleep(POLL_S)
            self.log.poll()

    def _fail(self, what: str) -> NoReturn:
        tail = self.output.read_text(errors="replace")[-3000:]
        raise ArmError(f"{self.name} {what}; its output ends:\n{tail}")

    def first_step_s(self) -> float:
        """Seconds from the command to the end of the first step."""
        return self.log.steps[0].seen_at - self.began

    def peak_bytes(self) -> int:
        """Peak memory: torch's on a GPU, the largest process's resident memory on a CPU."""
        if self.device == "cuda":
            return max(step.gpu_bytes for step in self.log.steps)
        peaks = [0]
        for pid in self._list_processes():
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                peaks += [int(line.split()[1]) * 1024 for line in lines if line[:6] == "VmHWM:"]
        return max(peaks)

    def take_turn(self) -> None:
        """Continue for a turn's steps, and record their rate."""
        began = time.perf_counter()
        _send(self._list_processes(), signal.SIGCONT)
        wanted = self.steps_per_turn + 1
        self.wait(wanted, since=began, limit_s=STEP_S * wanted)
        self.pause()
        count, seconds = whole_steps(self.log.steps, since=began)
        self.tokens_per_s.append(count * TOKENS_PER_STEP[self.device] / seconds)


def _send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

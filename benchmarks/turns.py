"""Arms of a benchmark that take turns: processes that are stopped and continued."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llama_pretrain.process import list_processes, read_process

POLL_S = 0.01
LIMIT_S = 900.0
"""An arm that starts or steps for longer has failed."""


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
        self._path, self._size, self._num_lines = path, 0, 0
        self.steps: list[Step] = []

    def poll(self) -> None:
        """Read what is new."""
        if not self._path.is_file() or self._path.stat().st_size == self._size:
            return
        now, content = time.perf_counter(), self._path.read_bytes()
        lines = content.split(b"\n")[:-1]
        for row in map(json.loads, lines[self._num_lines :]):
            if "loss" in row:
                self.steps.append(Step(row["loss"], now, row.get("memory_bytes", 0)))
        self._size, self._num_lines = len(content), len(lines)


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
    began: float = field(default_factory=time.perf_counter)
    tokens_per_s: list[float] = field(default_factory=list)
    """One a round."""
    steps_per_turn: int = 1

    def _list_processes(self) -> list[int]:
        """Ids of the command and of its descendants."""
        found, everyone = [self.process.pid], list_processes()
        for pid in found:  # it grows
            found += [process.pid for process in everyone if process.parent == pid]
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

    def wait(self, count: int, *, since: float = 0.0) -> None:
        """Wait for so many steps since a moment.

        Raises:
            ArmError: if the command exits, or a step takes too long.
        """
        began = time.perf_counter()
        while sum(step.seen_at >= since for step in self.log.steps) < count:
            last = max([began, *(step.seen_at for step in self.log.steps)])
            code = self.process.poll()
            if code is not None or time.perf_counter() - last > LIMIT_S:
                tail = self.output.read_text(errors="replace")[-3000:]
                what = f"did no step in {LIMIT_S:.0f} s" if code is None else f"exited with {code}"
                raise ArmError(f"{self.name} {what}; its output ends:\n{tail}")
            time.sleep(POLL_S)
            self.log.poll()

    def first_step_s(self) -> float:
        """Seconds from the command to the end of the first step."""
        return self.log.steps[0].seen_at - self.began

    def peak_bytes(self) -> int:
        """Peak memory: torch's on a GPU, the largest process's resident memory on a CPU."""
        if any(step.gpu_bytes for step in self.log.steps):
            return max(step.gpu_bytes for step in self.log.steps)
        peaks = [0]
        for pid in self._list_processes():
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                peaks += [int(line.split()[1]) * 1024 for line in lines if line[:6] == "VmHWM:"]
        return max(peaks)

    def take_turn(self, *, tokens_per_step: int) -> None:
        """Continue for a turn's steps, and record their rate."""
        began = time.perf_counter()
        _send(self._list_processes(), signal.SIGCONT)
        self.wait(self.steps_per_turn + 1, since=began)
        self.pause()
        count, seconds = whole_steps(self.log.steps, since=began)
        self.tokens_per_s.append(count * tokens_per_step / seconds)


def _send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

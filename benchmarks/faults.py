"""Kill runs at random moments, resume them, and compare with an uninterrupted run.

    python benchmarks/faults.py [--kills 50] [--seed 0]

Each kill is SIGKILL to a random process of a running `python run.py`: a rank, or the launching
process. A third of the kills wait for a checkpoint that is being written, a third for training, the
rest come at any time. Then the run is resumed and killed again, until it has had its share and
completes. Before each resume every `step-*` folder is checked against its manifest; after each kill
the run's processes and ports must be gone. At the end the ranks' files in the last checkpoint and
all losses must equal those of an uninterrupted run, to the bit. It prints a table, and exits with 1
if anything is wrong.
"""

import argparse
import collections
import contextlib
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.record import ROOT
from llama_pretrain.checkpoint.manifest import (
    checkpoint_name,
    find_fault,
    newest_complete,
    read_manifest,
)
from llama_pretrain.process import STARTED, Beat, list_processes, read_beats
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics, steps

STEPS = 12
RANKS = 2
GONE_WITHIN_S = 10.0
PHASES = ("a save", "training", "any time")
BASE = shlex.split(f"""
    debug=smoke model.hidden_size=256 model.intermediate_size=704 model.vocab_size=2048
    tokenizer.vocab_size=2048 data.sequence_length=128 batch.micro_batch_size=2
    batch.gradient_accumulation_steps=4 train.max_steps={STEPS} train.eval_every_steps=4
    train.eval_sequences=8 checkpoint.export=false monitor=none launch.device=cpu
    launch.num_processes={RANKS}""")
KINDS = {
    "every step": ["checkpoint.every_steps=1"],
    "every 2nd step": ["checkpoint.every_steps=2"],
    "asynchronous": ["checkpoint.every_steps=1", "checkpoint.asynchronous=true"],
}


def processes_of(run_dir: Path) -> list[int]:
    """Processes whose command line names a run directory."""
    found = []
    for process in list_processes():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            if process.state not in "ZX" and os.fsencode(run_dir) in words:
                found.append(process.pid)
    return found


def listening_sockets() -> set[str]:
    """The inodes of this node's listening TCP sockets."""
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    fields = [line.split() for table in tables for line in table]
    return {entry[9] for entry in fields if entry[3] == "0A"}  # LISTEN


def sockets_of(pid: int) -> set[str]:
    """The inodes of a process's listening sockets."""
    found = set()
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
    return found & listening_sockets()


def pieces(folder: Path) -> dict[str, list[int | str]]:
    """Sizes and SHA-256 of what the ranks wrote: weights, master weights, moments."""
    files = read_manifest(folder).files
    return {name: entry for name, entry in files.items() if name.startswith("rank")}


def numbers(run_dir: RunDir) -> list[tuple[object, ...]]:
    """What must be equal at every step."""
    rows = steps(read_metrics(run_dir.metrics))
    return [(row.step, row.loss, row.grad_norm, row.sample_hash) for row in rows]


@dataclass
class Tally:
    """What has happened, and what was wrong."""

    kills: int = 0
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    gone_s: list[float] = field(default_factory=list)
    """From each kill until no process of the run was left."""
    wrong: list[str] = field(default_factory=list)


@dataclass
class Case:
    """One run, which is killed again and again."""

    kind: str
    run_dir: RunDir
    chance: random.Random
    tally: Tally

    def start(self) -> "subprocess.Popen[bytes]":
        """Start or resume it."""
        words = [*BASE, *KINDS[self.kind], f"hydra.run.dir={self.run_dir.path}"]
        if self.run_dir.snapshot.is_file():
            complete = newest_complete(self.run_dir.checkpoints)[0] is not None
            words = [f"resume={self.run_dir.path}"] if complete else [*words, "resume=auto"]
            self.tally.counts[words[-1].replace(str(self.run_dir.path), "DIR")] += 1
        self.run_dir.heartbeats.unlink(missing_ok=True)  # it shows the killed ranks
        log = self.run_dir.path.with_suffix(".log")
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "run.py"), *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=log.parent,
            )

    def kill_once(self, *, run_s: float) -> bool:
        """Start it and kill one of its processes. Returns whether its steps are done.

        Args:
            run_s: seconds of an uninterrupted run.
        """
        unfinished = self._unfinished_saves()
        process = self.start()
        phase = self.chance.choice(PHASES)
        self._wait_for(phase, process, run_s=run_s)
        victim = self.chance.choice([process.pid, *(b.pid for b in self._beats() if b.pid)])
        sockets = set().union(*map(sockets_of, {process.pid, *processes_of(self.run_dir.path)}))
        running = process.poll() is None
        if running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        at = time.monotonic()
        code = process.wait(60)
        killed = running and code != 0  # 0: the ranks had finished
        if killed:
            self.tally.kills += 1
            self.tally.counts[f"killed: {'parent' if victim == process.pid else 'rank'}"] += 1
            self.tally.counts[f"killed in: {phase}"] += 1
            self.tally.counts["saves interrupted"] += bool(self._unfinished_saves() - unfinished)
        elif code != 0:
            self._report(f"exited with {code} before it was killed")
        self._check_gone(at, sockets)
        for folder in self.run_dir.checkpoints.glob("step-*"):
            fault = find_fault(folder)
            self.tally.counts["checkpoints checked"] += 1
            self.tally.counts["torn checkpoints"] += fault is not None
            if fault is not None:
                self._report(f"{folder.name} {fault}")
        last = self.run_dir.checkpoints / checkpoint_name(STEPS)
        return not killed or last.exists()  # with it, there is nothing left to train

    def _wait_for(self, phase: str, process: "subprocess.Popen[bytes]", *, run_s: float) -> None:
        """Wait for a random moment of a phase, or the run's end."""

        def wait_until(condition: Callable[[], bool], *, poll_s: float) -> None:
            while process.poll() is None and not condition():
                time.sleep(poll_s)

        def last_step() -> int:
            return max((row.step for row in read_metrics(self.run_dir.metrics)), default=0)

        if phase == "any time":
            end = time.monotonic() + self.chance.uniform(0, run_s)
            return wait_until(lambda: time.monotonic() >= end, poll_s=0.005)
        wait_until(lambda: max(beat.count for beat in self._beats()) > STARTED, poll_s=0.01)
        step = self.chance.randint(last_step(), STEPS - 1)
        wait_until(lambda: last_step() >= step, poll_s=0.005)
        if phase == "training":
            return time.sleep(self.chance.uniform(0, 0.2))  # a step or two
        before = self._unfinished_saves()  # an earlier kill may have left one
        wait_until(lambda: not self._unfinished_saves() <= before, poll_s=0.001)
        return time.sleep(self.chance.uniform(0, 0.03))  # about one save

    def _unfinished_saves(self) -> set[tuple[str, int]]:
        """Checkpoints that are being written, by name and inode."""
        found = set()
        for folder in self.run_dir.checkpoints.glob(".tmp-step-*"):
            with contextlib.suppress(FileNotFoundError):  # it has its final name by now
                found.add((folder.name, folder.stat().st_ino))
        return found

    def _beats(self) -> list[Beat]:
        return read_beats(self.run_dir.heartbeats, world_size=RANKS)

    def _check_gone(self, since: float, sockets: set[str]) -> None:
        """No process and no port may be left."""
        left, ports = processes_of(self.run_dir.path), sockets & listening_sockets()
        while (left or ports) and time.monotonic() - since < GONE_WITHIN_S:
            time.sleep(0.02)  # the last thread of a killed process may take a moment
            left, ports = processes_of(self.run_dir.path), sockets & listening_sockets()
        self.tally.gone_s.append(time.monotonic() - since)
        self.tally.counts["processes and ports left"] += len(left) + len(ports)
        if left or ports:
            self._report(f"processes {left} and {len(ports)} ports are left")
        for pid in left:
            os.kill(pid, signal.SIGKILL)

    def _report(self, what: str) -> None:
        self.tally.wrong.append(f"{self.run_dir.path}: {what}")

    def finish(self) -> None:
        """Let it complete."""
        code = self.start().wait(300)
        if code != 0:
            self._report(f"exited with {code} though it was not killed")
        self._check_gone(time.monotonic(), set())

    def compare(self, uninterrupted: RunDir) -> None:
        """Compare the ranks' files of the last checkpoint, and the metrics of every step."""
        name = checkpoint_name(STEPS)
        mine, other = (run.checkpoints / name for run in (self.run_dir, uninterrupted))
        if not mine.exists() or pieces(mine) != pieces(other):
            self._report(f"{name} is missing or differs")
        if numbers(self.run_dir) != numbers(uninterrupted):
            self._report("losses differ")


def run_cases(folder: Path, *, kills: int, seed: int) -> tuple[Tally, int]:
    """Run all cases. Returns what has happened, and the number of runs."""
    chance, tally, number = random.Random(seed), Tally(), 0
    uninterrupted = Case("every step", RunDir(folder / "uninterrupted"), chance, tally)
    began = time.monotonic()
    uninterrupted.finish()
    run_s = time.monotonic() - began
    print(f"an uninterrupted run: {run_s:.1f} s", flush=True)
    while tally.kills < kills and not tally.wrong:
        kind = list(KINDS)[number % len(KINDS)]
        case = Case(kind, RunDir(folder / f"run{number:02d}"), chance, tally)
        number += 1
        for _ in range(min(chance.randint(2, 5), kills - tally.kills)):
            if case.kill_once(run_s=run_s):
                break
        else:
            case.finish()
        case.compare(uninterrupted.run_dir)
        print(f"{case.run_dir.path.name} ({kind}): {tally.kills} kills so far", flush=True)
        if not tally.wrong:
            shutil.rmtree(case.run_dir.path)
    return tally, number


def main() -> int:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    tally, number = run_cases(folder, kills=options.kills, seed=options.seed)
    for name, value in (("kills", tally.kills), *sorted(tally.counts.items())):
        print(f"{name:32} {value:>5}")
    print(f"{'seconds until all were gone':32} {max(tally.gone_s):5.2f} (largest)")
    if tally.wrong:
        print("\n".join(f"WRONG: {line}" for line in tally.wrong), f"\nthe runs are in {folder}")
        return 1
    print(f"{number} runs ended with the weights and losses of the uninterrupted run, to the bit")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

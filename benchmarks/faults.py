"""Kill runs at random moments, resume them, and compare with an uninterrupted run.

    python benchmarks/faults.py [--kills 50] [--seed 0]

SIGKILL goes to a random rank or to the launching process: while a checkpoint is written, between
saves, or at any time. After each kill the run's processes and ports must be gone and every `step-*`
folder must match its manifest. Then the run is resumed, until it completes: the ranks' files in its
last checkpoint and all losses must equal those of an uninterrupted run, to the bit. It prints a
table, and exits with 1 if anything is wrong.
"""

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import ROOT
from llama_pretrain.checkpoint import manifest
from llama_pretrain.process import STARTED, Beat, list_processes, read_beats
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics, steps

STEPS = 12
RANKS = 2
GONE_WITHIN_S = 10.0
BASE = f"""debug=smoke model.hidden_size=256 model.intermediate_size=704 model.vocab_size=2048
    tokenizer.vocab_size=2048 data.sequence_length=128 batch.micro_batch_size=2
    batch.gradient_accumulation_steps=4 train.max_steps={STEPS} train.eval_every_steps=4
    train.eval_sequences=8 checkpoint.export=false monitor=none launch.device=cpu
    launch.num_processes={RANKS}""".split()
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
    files = manifest.read_manifest(folder).files
    return {name: entry for name, entry in files.items() if name.startswith("rank")}


def numbers(run_dir: RunDir) -> list[tuple[object, ...]]:
    """What must be equal at every step."""
    rows = steps(read_metrics(run_dir.metrics))
    return [(row.step, row.loss, row.grad_norm, row.sample_hash) for row in rows]


def results_of(run_dir: RunDir) -> object:
    """What must be equal to the bit; `None` without the last checkpoint."""
    last = run_dir.checkpoints / manifest.checkpoint_name(STEPS)
    return (pieces(last), numbers(run_dir)) if last.exists() else None


@dataclass
class Case:
    """One run, which is killed again and again."""

    kind: str
    run_dir: RunDir
    chance: random.Random
    counts: collections.Counter[str]
    wrong: list[str]

    def start(self) -> "subprocess.Popen[bytes]":
        """Start or resume it."""
        words = [*BASE, *KINDS[self.kind], f"hydra.run.dir={self.run_dir.path}"]
        if self.run_dir.snapshot.is_file():
            complete = manifest.newest_complete(self.run_dir.checkpoints)[0] is not None
            words = [f"resume={self.run_dir.path}"] if complete else [*words, "resume=auto"]
            self.counts[words[-1].replace(str(self.run_dir.path), "DIR")] += 1
        self.run_dir.heartbeats().unlink(missing_ok=True)  # it shows the killed ranks
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
        """Start it and kill one of its processes. Returns whether its steps are done."""
        process = self.start()
        phase = self.chance.choice(("a save", "training", "any time"))
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
            self.counts["kills"] += 1
            self.counts[f"killed: {'parent' if victim == process.pid else 'rank'}"] += 1
            self.counts[f"killed in: {phase}"] += 1
        elif code != 0:
            self._report(f"exited with {code} before it was killed")
        self._check_gone(at, sockets)
        for folder in self.run_dir.checkpoints.glob("step-*"):
            self.counts["checkpoints checked"] += 1
            if (fault := manifest.find_fault(folder)) is not None:
                self._report(f"{folder.name} {fault}")
        last = self.run_dir.checkpoints / manifest.checkpoint_name(STEPS)
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
        return read_beats(self.run_dir.heartbeats(), ranks=RANKS)

    def _check_gone(self, since: float, sockets: set[str]) -> None:
        """No process and no port may be left."""
        left, ports = processes_of(self.run_dir.path), sockets & listening_sockets()
        while (left or ports) and time.monotonic() - since < GONE_WITHIN_S:
            time.sleep(0.02)  # the last thread of a killed process may take a moment
            left, ports = processes_of(self.run_dir.path), sockets & listening_sockets()
        if left or ports:
            self._report(f"processes {left} and {len(ports)} ports are left")
        for pid in left:
            os.kill(pid, signal.SIGKILL)

    def _report(self, what: str) -> None:
        self.wrong.append(f"{self.run_dir.path}: {what}")

    def finish(self) -> None:
        """Let it complete."""
        code = self.start().wait(300)
        if code != 0:
            self._report(f"exited with {code} though it was not killed")
        self._check_gone(time.monotonic(), set())


def run_cases(folder: Path, options: argparse.Namespace) -> tuple[dict[str, int], list[str]]:
    """Run all cases. Returns how often what has happened, and what is wrong."""
    chance, counts = random.Random(options.seed), collections.Counter[str]()
    wrong: list[str] = []
    uninterrupted = Case("every step", RunDir(folder / "uninterrupted"), chance, counts, wrong)
    began = time.monotonic()
    uninterrupted.finish()
    run_s, expected = time.monotonic() - began, results_of(uninterrupted.run_dir)
    print(f"an uninterrupted run: {run_s:.1f} s", flush=True)
    while counts["kills"] < options.kills and not wrong:
        kind = list(KINDS)[counts["runs"] % len(KINDS)]
        case = Case(kind, RunDir(folder / f"run{counts['runs']:02d}"), chance, counts, wrong)
        counts["runs"] += 1
        for _ in range(min(chance.randint(2, 5), options.kills - counts["kills"])):
            if case.kill_once(run_s=run_s):
                break
        else:
            case.finish()
        if expected is None or results_of(case.run_dir) != expected:
            wrong.append(f"{case.run_dir.path}: the last checkpoint or losses differ")
        print(f"{case.run_dir.path.name} ({kind}): {counts['kills']} kills so far", flush=True)
        if not wrong:
            shutil.rmtree(case.run_dir.path)
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    counts, wrong = run_cases(folder, parser.parse_args())
    for name, value in sorted(counts.items()):
        print(f"{name:32} {value:>5}")
    if wrong:
        print("\n".join(f"WRONG: {line}" for line in wrong), f"\nthe runs are in {folder}")
        return 1
    print("all runs ended with the weights and losses of the uninterrupted run, to the bit")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

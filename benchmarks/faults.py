"""Kill runs at random moments, go on, and compare with one that was never cut:
python benchmarks/faults.py --kills 50

Each kill is SIGKILL to a random process of a running `python run.py`: a rank, or the launching
process with its agent. A third of the kills wait for a checkpoint that is being written, a third
for training, the rest come at any time from the start on. Then the run goes on, and is killed
again, until it has had its share and completes. Before each resume every `step-*` folder is checked
against its manifest; after each kill the processes and ports of the run must be gone. At the end
the last checkpoint's pieces and all losses must equal those of an uninterrupted run, to the bit.
It prints a table, and exits with 1 when anything is wrong.
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
from dataclasses import dataclass, field
from pathlib import Path

from llama_pretrain.checkpoint.manifest import (
    MANIFEST,
    checkpoint_name,
    find_fault,
    newest_complete,
    read_manifest,
)
from llama_pretrain.process import STARTED, Beat, list_processes, read_beats
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics, steps

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
RANKS = 2
GONE_WITHIN_S = 10.0
PHASES = ("a save", "training", "any time")

BASE = (
    "debug=smoke",
    "model.hidden_size=256",
    "model.intermediate_size=704",
    "model.vocab_size=2048",
    "tokenizer.vocab_size=2048",
    "data.sequence_length=128",
    "batch.micro_batch_size=2",
    "batch.gradient_accumulation_steps=4",
    f"train.max_steps={STEPS}",
    "train.eval_every_steps=4",
    "train.eval_sequences=8",
    "checkpoint.export=false",
    "monitor=none",
    "launch.device=cpu",
    f"launch.num_processes={RANKS}",
)
KINDS = {
    "each step": ("checkpoint.every_steps=1",),
    "each 2nd step": ("checkpoint.every_steps=2",),
    "asynchronous": ("checkpoint.every_steps=1", "checkpoint.asynchronous=true"),
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
    """The inodes of this machine's listening TCP sockets."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # LISTEN
                found.add(fields[9])
    return found


def sockets_of(pid: int) -> set[str]:
    """The inodes of a process's listening sockets."""
    found = set()
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(entry)
                if target.startswith("socket:["):
                    found.add(target[8:-1])
    return found & listening_sockets()


@dataclass
class Tally:
    """What has happened, and what was wrong."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    gone_s: list[float] = field(default_factory=list)
    """From each kill until no process of the run was left."""
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(self.counts[f"killed: {who}"] for who in ("a rank", "the parent"))


@dataclass
class Case:
    """One run that is killed, again and again."""

    kind: str
    run_dir: RunDir
    chance: random.Random
    tally: Tally

    def start(self) -> "subprocess.Popen[bytes]":
        """Start it, or go on with it."""
        place = f"hydra.run.dir={self.run_dir.path}"
        words = [*BASE, *KINDS[self.kind], place]
        if self.run_dir.snapshot.is_file():
            self.validate_checkpoint()
            picked, _ = newest_complete(self.run_dir.checkpoints)
            if picked is None:
                words.append("resume=auto")
                self.tally.counts["begun anew (resume=auto)"] += 1
            else:
                words = [f"resume={self.run_dir.path}"]
                self.tally.counts["gone on from a checkpoint"] += 1
        self.run_dir.heartbeats.unlink(missing_ok=True)  # else it shows the killed one's
        log = self.run_dir.path.with_suffix(".log")
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "run.py"), *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=log.parent,
            )

    def validate_checkpoint(self) -> None:
        """Every folder of the name of a checkpoint must be one."""
        for folder in self.run_dir.checkpoints.glob("step-*"):
            self.tally.counts["checkpoints checked"] += 1
            fault = find_fault(folder)
            if fault is not None:
                self.tally.counts["torn checkpoints"] += 1
                self.tally.wrong.append(f"{folder} {fault}")

    def kill_once(self, *, seconds: float) -> bool:
        """Start it and kill one of its processes. Returns whether its steps are done.

        Args:
            seconds: that an uninterrupted run takes.
        """
        unfinished = self._being_saved()
        process = self.start()
        phase = self.chance.choice(PHASES)
        self._wait(process, phase, seconds=seconds)
        ranks = [beat.pid for beat in self._beats() if beat.pid]
        who, victim = "the parent", process.pid
        if self.chance.randint(0, len(ranks)):
            who, victim = "a rank", self.chance.choice(ranks)
        everyone = {process.pid, *processes_of(self.run_dir.path)}
        sockets = set().union(*(sockets_of(pid) for pid in everyone))
        running = process.poll() is None
        if running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        at = time.monotonic()
        code = process.wait(60)
        killed = running and code != 0  # 0: it was past whatever a rank does
        if code != 0 and not running:
            self.tally.wrong.append(f"{self.run_dir.path}: left alone, it ended with {code}")
        if killed:
            self.tally.counts[f"killed: {who}"] += 1
            self.tally.counts[f"killed in: {phase}"] += 1
            if self._being_saved() - unfinished:
                self.tally.counts["saves that were cut"] += 1
        self._check_gone(at, sockets)
        picked, _ = newest_complete(self.run_dir.checkpoints)
        if killed and picked is not None and picked.name == checkpoint_name(STEPS):
            self.tally.counts["killed behind the last save"] += 1
            self.validate_checkpoint()
            return True  # there is nothing left to train
        return not killed

    def _wait(self, process: "subprocess.Popen[bytes]", phase: str, *, seconds: float) -> None:
        """Until a random moment of a phase, or the run's end."""
        if phase == "any time":
            end = time.monotonic() + self.chance.uniform(0, seconds)
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.005)
            return
        self._wait_for_steps(process)
        step = self.chance.randint(self._step(), STEPS - 1)
        while process.poll() is None and self._step() < step:
            time.sleep(0.005)
        if phase == "training":
            time.sleep(self.chance.uniform(0, 0.2))  # a step's time or two
            return
        before = self._being_saved()  # one may lie there from an earlier kill
        while process.poll() is None and self._being_saved() <= before:
            time.sleep(0.001)
        time.sleep(self.chance.uniform(0, 0.03))  # a save takes about so long

    def _step(self) -> int:
        return max((row.step for row in read_metrics(self.run_dir.metrics)), default=0)

    def _being_saved(self) -> set[tuple[str, int]]:
        """Checkpoints that are not whole, by name and inode."""
        found = set()
        for folder in self.run_dir.checkpoints.glob(".tmp-step-*"):
            with contextlib.suppress(FileNotFoundError):  # it has its name by now
                found.add((folder.name, folder.stat().st_ino))
        return found

    def _wait_for_steps(self, process: "subprocess.Popen[bytes]") -> None:
        """Until there is something to lose, or the run's end."""
        while process.poll() is None and max(beat.count for beat in self._beats()) <= STARTED:
            time.sleep(0.01)

    def _beats(self) -> list[Beat]:
        return read_beats(self.run_dir.heartbeats, world_size=RANKS)

    def _check_gone(self, since: float, sockets: set[str]) -> None:
        """No process and no port may be left."""
        left, ports = processes_of(self.run_dir.path), sockets & listening_sockets()
        while (left or ports) and time.monotonic() - since < GONE_WITHIN_S:
            time.sleep(0.02)  # the last thread of a killed process may take a moment
            left, ports = processes_of(self.run_dir.path), sockets & listening_sockets()
        self.tally.gone_s.append(time.monotonic() - since)
        if left or ports:
            self.tally.wrong.append(f"{self.run_dir.path}: left are {left} and {len(ports)} ports")
            self.tally.counts["processes left"] += len(left)
            self.tally.counts["ports left"] += len(ports)
        for pid in left:
            os.kill(pid, signal.SIGKILL)

    def finish(self) -> float:
        """Let it complete. Returns the seconds that it took."""
        started = time.monotonic()
        code = self.start().wait(300)
        if code != 0:
            self.tally.wrong.append(f"{self.run_dir.path}: left alone, it ended with {code}")
        now = time.monotonic()
        self._check_gone(now, set())
        return now - started

    def compare(self, whole: RunDir) -> None:
        """With the uninterrupted run: pieces of the last checkpoint, and every step once."""
        name = checkpoint_name(STEPS)
        folders = [run_dir.checkpoints / name for run_dir in (self.run_dir, whole)]
        if not all((folder / MANIFEST).is_file() for folder in folders):
            self.tally.wrong.append(f"{self.run_dir.path}: it has no {name}")
            return
        if pieces(folders[0]) == pieces(folders[1]):
            self.tally.counts["final weights equal"] += 1
        else:
            self.tally.wrong.append(f"{self.run_dir.path}: its last checkpoint differs")
        if numbers(self.run_dir) == numbers(whole):
            self.tally.counts["losses equal"] += 1
        else:
            self.tally.wrong.append(f"{self.run_dir.path}: its losses differ")


def pieces(folder: Path) -> dict[str, list[int | str]]:
    """Sizes and SHA-256 of what the ranks wrote: weights, master weights, moments."""
    files = read_manifest(folder).files
    return {name: told for name, told in files.items() if name.startswith("rank")}


def numbers(run_dir: RunDir) -> list[tuple[object, ...]]:
    """What must be equal, step by step."""
    keys = ("step", "loss", "grad_norm", "sample_hash")
    rows = [row.to_json() for row in steps(read_metrics(run_dir.metrics))]
    return [tuple(row[key] for key in keys) for row in rows]


def run_cases(folder: Path, *, kills: int, seed: int) -> tuple[Tally, int]:
    """All of them. Returns what has happened, and the number of runs."""
    chance, tally = random.Random(seed), Tally()
    whole = Case("each step", RunDir(folder / "whole"), chance, tally)
    seconds = whole.finish()
    print(f"an uninterrupted run: {seconds:.1f} s", flush=True)
    number = 0
    while tally.kills < kills and not tally.wrong:
        kind = list(KINDS)[number % len(KINDS)]
        case = Case(kind, RunDir(folder / f"run{number:02d}"), chance, tally)
        number += 1
        tally.counts[f"runs: {kind}"] += 1
        for _ in range(min(chance.randint(2, 5), kills - tally.kills)):
            if case.kill_once(seconds=seconds):
                break
        else:
            case.finish()
        case.compare(whole.run_dir)
        print(f"{case.run_dir.path.name} ({kind}): {tally.kills} kills so far", flush=True)
        if not tally.wrong:
            shutil.rmtree(case.run_dir.path)
    return tally, number


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    tally, number = run_cases(folder, kills=given.kills, seed=given.seed)
    rows = {
        "kills": tally.kills,
        **dict(sorted(tally.counts.items())),
        "torn checkpoints": tally.counts["torn checkpoints"],
        "processes left": tally.counts["processes left"],
        "ports left": tally.counts["ports left"],
    }
    for name, value in rows.items():
        print(f"{name:32} {value:>5}")
    slowest = max(tally.gone_s)
    print(f"{'seconds until all were gone':32} {slowest:5.2f} (largest)")
    for line in tally.wrong:
        print(f"WRONG: {line}")
    if tally.wrong or tally.counts["final weights equal"] != number:
        print(f"the runs are kept in {folder}")
        return 1
    print(f"{number} runs ended with the weights of the uninterrupted run, to the bit")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

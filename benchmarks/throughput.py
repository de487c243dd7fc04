"""Tokens a second of our runs beside what one would use instead, on the same rows and ranks.

    python benchmarks/throughput.py [--sizes 6m 35m 125m] [--rows 512 2048] [--rounds 5]
    python benchmarks/throughput.py --device cuda --ranks 1 --sizes 125m 1b --rows 2048
    python benchmarks/throughput.py --plot

Every arm trains the same first weights on the same rows in the same order: bf16 with fp32 masters,
AdamW, clipping, one micro batch a rank and step. On a CPU without instructions for bf16 all train
in fp32, as our defaults do there, unless --precision says otherwise. The loss of each step must
agree, or nothing is reported. Arms:

    ours, ours_best                 run.py on its defaults, and with BEST_SETTINGS
    trainer, trainer_compile        transformers' Trainer with our run's DeepSpeed JSON
    bare, bare_compile              a loop of plain PyTorch: DistributedDataParallel, fused AdamW
    litgpt                          named, never run: litgpt 0.5.13's pretrain takes Fabric's FSDP
                                    for more than one device, which Fabric refuses off a GPU

Trainer needs accelerate; `--site DIR` names a folder with packages that only competitors need.

Each arm is started once and warmed up; then all are stopped by SIGSTOP, and one at a time goes on
for some steps, round after round, the order rotating. A step counts only if it began and ended
within its arm's turn, by this process's clock. Arms of a block (defaults; best) take turns with
each other, and blocks follow one another: at 125M parameters six arms don't fit in memory.

MFU is flops_per_token x tokens/s over the machine's ceiling: large products, in bf16 or in fp32,
which is faster, in as many processes and threads as an arm has, or on the GPU, measured before each
round while every arm is stopped.
flops_per_token is 6N without the input embedding, which is a lookup, and for attention half of
12 x layers x width x row (arXiv 2204.02311, appendix B), for the mask is causal.
The first step is counted in seconds from the command, caches warm. Peak memory is the largest
process's resident one, or what torch has allocated on the GPU. Ratios are medians over rounds of
the ratio within a round.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
ARM_FILES = ROOT / "benchmarks" / "arms"
RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "img" / "throughput.svg"

BEST_SETTINGS: tuple[str, ...] = ("kernels=compiled",)
"""What `ours_best` is told beyond the defaults."""

BLOCKS = {
    "defaults": ("ours", "trainer", "bare"),
    "best": ("ours_best", "trainer_compile", "bare_compile"),
}
"""The arms that take turns, ours first; ratios are to the two others."""
SKIPPED = {
    "litgpt": "for 2 devices litgpt 0.5.13 takes FSDPStrategy, and Fabric refuses it on a CPU:"
    " 'FSDP is only available on GPU'"
}

TOKENS_PER_STEP = {"cpu": 4096, "cuda": 32_768}
COMPARED_STEPS = 10
TOLERANCE = 0.03
"""Largest difference of two arms' losses at a step, in nats: bf16's rounding, ten steps on."""
TURN_S = 5.0
POLL_S = 0.01
START_S, STEP_S = 900.0, 600.0
"""How long an arm may take to its warm-up's end, and to a step."""
SETTINGS = (
    "train.max_steps=100000",
    "train.eval_every_steps=null",
    # An evaluation and a sample come before the first step; competitors have neither.
    "train.eval_rows=2",
    "train.sample_prompt=''",
    "checkpoint.every_steps=null",
    # An arm that is stopped makes no progress.
    "launch.timeout_s=86400",
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model's shape."""

    base: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    warm_steps: int

    @property
    def words(self) -> list[str]:
        """Overrides that make it."""
        return [
            f"model={self.base}",
            f"model.vocab_size={self.vocab_size}",
            f"model.hidden_size={self.hidden_size}",
            f"model.intermediate_size={self.intermediate_size}",
            f"model.num_hidden_layers={self.num_layers}",
            f"model.num_attention_heads={self.num_heads}",
            "model.max_position_embeddings=2048",
        ]


SIZES = {
    "6m": Size(
        base="tiny",
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_layers=4,
        num_heads=4,
        warm_steps=5,
    ),
    "35m": Size(
        base="tiny",
        vocab_size=32_000,
        hidden_size=384,
        intermediate_size=1024,
        num_layers=6,
        num_heads=6,
        warm_steps=5,
    ),
    "125m": Size(
        base="130m",
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        warm_steps=3,
    ),
    "1b": Size(
        base="tiny",
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=16,
        num_heads=16,
        warm_steps=3,
    ),
}


def flops_per_token(size: Size, *, row: int) -> int:
    """Operations of forward and backward for one token; the module's docstring has the formula."""
    width = size.hidden_size
    layer = 4 * width**2 + 3 * width * size.intermediate_size
    products = size.num_layers * layer + size.vocab_size * width
    return 6 * products + 6 * size.num_layers * width * row


# Steps and turns.


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

    A step begins where the one before it ends, so the first that ends in a turn doesn't count.
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


# Starting arms.


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A size and a length of rows, and where its files lie."""

    size: str
    row: int
    num_ranks: int
    num_threads: int
    device: str
    precision: str
    folder: Path
    site: Path | None

    @property
    def words(self) -> list[str]:
        """Overrides of our run."""
        return [
            *SIZES[self.size].words,
            f"data.sequence_length={self.row}",
            f"batch.global_batch_size={TOKENS_PER_STEP[self.device] // self.row}",
            f"launch.num_processes={self.num_ranks}",
            f"launch.threads_per_process={self.num_threads}",
            f"launch.device={self.device}",
            f"precision={self.precision}",
            *SETTINGS,
        ]

    def command(self, name: str) -> tuple[list[str], Path]:
        """An arm's command, and the file that it writes its steps to."""
        if name.startswith("ours") or name == "given":
            best = BEST_SETTINGS if name == "ours_best" else ()
            run_dir = self.folder / name
            words = [*self.words, *best, f"hydra.run.dir={run_dir}"]
            return [sys.executable, str(ROOT / "run.py"), *words], run_dir / "metrics.jsonl"
        script, _, compiled = name.partition("_")
        steps = self.folder / f"{name}.jsonl"
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nproc-per-node", str(self.num_ranks)),
            # Its other way to meet has a keep-alive, which a stopped process misses.
            *("--master-addr", "localhost", "--master-port", str(port)),
            str(ARM_FILES / f"{script}.py"),
            *(str(self.folder / "given"), str(self.folder / "model"), str(steps)),
            *(["--compile"] if compiled else []),
        ]
        return command, steps

    def start(self, name: str) -> Arm:
        """Start an arm. Its output goes to a file."""
        command, steps = self.command(name)
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment(competes=name in ("trainer", "trainer_compile")),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes to us alone
            )
        return Arm(name, command, StepLog(steps), log, process, began, self.device)

    def environment(self, *, competes: bool) -> dict[str, str]:
        """What arms are started with; ours sets the rest for itself."""
        paths = [str(ROOT), *([str(self.site)] if competes and self.site else [])]
        hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        return (os.environ | hidden if self.device == "cpu" else os.environ) | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(self.num_threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }


def prepare(cell: Cell) -> None:
    """Write the run directory and the first weights that competitors read.

    The run of ours that does it is ended after its first step; it has warmed all caches.
    """
    with ended(cell.start("given")) as arm:
        arm.wait(1, since=0, limit_s=START_S)
    subprocess.run(
        [
            *(sys.executable, str(ARM_FILES / "given.py")),
            *(str(cell.folder / "given"), str(cell.folder / "model")),
        ],
        check=True,
        env=cell.environment(competes=False),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@contextmanager
def ended(arm: Arm) -> Iterator[Arm]:
    """End an arm, however the block ends."""
    try:
        yield arm
    finally:
        arm.end()


class Ceiling:
    """Processes that multiply large matrices when asked to, as many as an arm has ranks."""

    def __init__(self, cell: Cell):
        command = [sys.executable, str(ARM_FILES / "ceiling.py"), str(cell.num_threads)]
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=cell.environment(competes=False),
                start_new_session=True,
            )
            for _ in range(cell.num_ranks)
        ]

    def __enter__(self) -> "Ceiling":
        self._answers()
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _answers(self) -> list[str]:
        return [process.stdout.readline() for process in self._processes if process.stdout]

    def measure(self) -> float:
        """GFLOP/s of all processes together."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return sum(float(answer) for answer in self._answers())


# A block, and what it comes to.


def warm_up(cell: Cell, name: str, *, steps: int | None, stack: ExitStack) -> Arm:
    """Start an arm, wait until it has compiled and allocated what it needs, and stop it."""
    arm = stack.enter_context(ended(cell.start(name)))
    arm.wait(SIZES[cell.size].warm_steps, since=0, limit_s=START_S)
    arm.pause()
    last, before = arm.steps.steps[-1].seen_at, arm.steps.steps[-2].seen_at
    wanted = round(TURN_S / max(last - before, POLL_S))
    arm.steps_a_turn = steps if steps is not None else max(1, wanted)
    print(
        f"  {name}: first step after {arm.first_step_s():.1f} s;"
        f" {arm.steps_a_turn} steps a turn of about {last - before:.2f} s",
        flush=True,
    )
    return arm


def run_block(
    cell: Cell, names: Sequence[str], *, rounds: int, steps: int | None
) -> dict[str, Any]:
    """Let the arms of a block take turns."""
    with ExitStack() as stack:
        ceiling = stack.enter_context(Ceiling(cell))
        arms = [warm_up(cell, name, steps=steps, stack=stack) for name in names]
        ceilings = []
        for number in range(rounds):
            ceilings.append(ceiling.measure())
            first = number % len(arms)
            for arm in arms[first:] + arms[:first]:
                arm.take_turn()
            rates = ", ".join(f"{arm.name} {arm.tokens_per_s[-1]:,.0f}" for arm in arms)
            print(f"  round {number + 1}: ceiling {ceilings[-1]:,.0f} GFLOP/s; {rates}", flush=True)
        losses = {arm.name: [step.loss for step in arm.steps.steps] for arm in arms}
        return {
            "provenance": provenance(cell.site),
            "ranks": cell.num_ranks,
            "threads": cell.num_threads,
            "ceiling_gflops": ceilings,
            "tolerance": TOLERANCE,
            "largest_loss_difference": check_losses(losses),
            "arms": {
                arm.name: {
                    "words": [*cell.words, *(BEST_SETTINGS if arm.name == "ours_best" else ())]
                    if arm.name.startswith("ours")
                    else [Path(word).name for word in arm.command[1:]],
                    "tokens_per_s": arm.tokens_per_s,
                    "steps_a_turn": arm.steps_a_turn,
                    "first_step_s": arm.first_step_s(),
                    "peak_bytes": arm.peak_bytes(),
                    "losses": losses[arm.name][:COMPARED_STEPS],
                }
                for arm in arms
            },
        }


def check_losses(losses: Mapping[str, Sequence[float]]) -> float:
    """The largest difference between arms' losses at a step.

    Raises:
        ArmError: if it is above the tolerance, or there is no step to compare.
    """
    count = min(COMPARED_STEPS, *(len(values) for values in losses.values()))
    if count < 1:
        raise ArmError("an arm has no steps: its losses can't be compared")
    largest, where = 0.0, ""
    for step in range(count):
        at = {name: values[step] for name, values in losses.items()}
        finite = all(map(math.isfinite, at.values()))  # min and max may pass over a NaN
        difference = max(at.values()) - min(at.values()) if finite else math.inf
        if difference > largest:
            largest, where = difference, f"step {step + 1}: {at}"
    if largest > TOLERANCE:
        raise ArmError(
            f"losses differ by {largest:.4f} (tolerance {TOLERANCE}) at {where}; some arm trains"
            " something else, so no speed is compared"
        )
    return largest


def provenance(site: Path | None) -> dict[str, Any]:
    """What a block was measured with."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    cpu = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    versions = {"python": platform.python_version()}
    folders = [*([] if site is None else [str(site)]), *sys.path]
    for name in ("torch", "transformers", "deepspeed", "accelerate"):
        for found in importlib.metadata.distributions(name=name, path=folders):
            versions.setdefault(name, found.version)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/throughput.py", *_public(sys.argv[1:])]),
        "commit": git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "versions": versions,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_15_minutes": os.getloadavg()[2],
    }


def _public(words: Sequence[str]) -> list[str]:
    """A command line without this machine's folders."""
    return [Path(word).name if os.sep in word else word for word in words]


# Reporting.


@dataclass(frozen=True, kw_only=True)
class Line:
    """An arm in a table."""

    arm: str
    tokens_per_s: float
    mfu: float
    ratio_to_trainer: float | None
    ratio_to_bare: float | None
    peak_bytes: int
    first_step_s: float


def lines_of(result: Mapping[str, Any]) -> list[Line]:
    """The lines of a cell's table: medians, and medians of each round's ratios."""
    lines = []
    for block, found in result["blocks"].items():
        arms = found["arms"]

        def ratio(name: str, other: str, arms: Mapping[str, Any] = arms) -> float | None:
            if other not in arms:
                return None
            pairs = zip(arms[name]["tokens_per_s"], arms[other]["tokens_per_s"], strict=True)
            return float(statistics.median(mine / theirs for mine, theirs in pairs))

        _, trainer, bare = BLOCKS[block]
        for name, arm in arms.items():
            pairs = zip(arm["tokens_per_s"], found["ceiling_gflops"], strict=True)
            shares = [rate * result["flops_per_token"] / (top * 1e9) for rate, top in pairs]
            lines.append(
                Line(
                    arm=name,
                    tokens_per_s=statistics.median(arm["tokens_per_s"]),
                    mfu=statistics.median(shares),
                    ratio_to_trainer=ratio(name, trainer),
                    ratio_to_bare=ratio(name, bare),
                    peak_bytes=arm["peak_bytes"],
                    first_step_s=arm["first_step_s"],
                )
            )
    return lines


def render_table(result: Mapping[str, Any]) -> str:
    """A cell's table, as text."""

    def shown(ratio: float | None) -> str:
        return "-" if ratio is None else f"{ratio:.2f}"

    heads = ("arm", "tokens/s", "MFU", "/trainer", "/bare", "peak MiB", "1st step s")
    cells = [
        (
            line.arm,
            f"{line.tokens_per_s:,.0f}",
            f"{line.mfu:.2f}",
            shown(line.ratio_to_trainer),
            shown(line.ratio_to_bare),
            f"{line.peak_bytes / 2**20:,.0f}",
            f"{line.first_step_s:.1f}",
        )
        for line in lines_of(result)
    ]
    rows = [f"{result['size']}, rows of {result['row']}"]
    rows += [
        name.ljust(16) + "".join(f"{cell:>12}" for cell in own) for name, *own in (heads, *cells)
    ]
    for block, found in result["blocks"].items():
        rows.append(
            f"{block}: ceiling {statistics.median(found['ceiling_gflops']):,.0f} GFLOP/s (median);"
            f" losses differ by {found['largest_loss_difference']:.4f} at most"
            f" (tolerance {found['tolerance']})"
        )
    return "\n".join(rows)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a cell's file; of one that is there, the blocks that were not run stay."""
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))["blocks"]
        result = {**result, "blocks": {**old, **result["blocks"]}}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


COLOURS = {"ours": "#1f6f8b", "trainer": "#c9803a", "bare": "#8a8f98"}
PANEL_W, PANEL_H, BAR_H, LABEL_W = 430, 210, 22, 120


def render_plot(results: Sequence[Mapping[str, Any]]) -> str:
    """A panel of bars a cell, as SVG: tokens/s, and the ratio to the Trainer of the same block."""
    sizes = [size for size in SIZES if any(result["size"] == size for result in results)]
    rows = sorted({result["row"] for result in results})
    width, height = PANEL_W * len(rows), PANEL_H * len(sizes) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"',
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="#222">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for result in results:
        left, top = PANEL_W * rows.index(result["row"]), PANEL_H * sizes.index(result["size"])
        parts.append(f'<g transform="translate({left} {top})">{_panel(result)}</g>')
    note = "tokens/s, median of rounds; in brackets: times Trainer, or Trainer with torch_compile"
    parts.append(f'<text x="12" y="{height - 8}" fill="#555">{escape(note)}</text></svg>')
    return "\n".join(parts) + "\n"


def _panel(result: Mapping[str, Any]) -> str:
    lines = lines_of(result)
    scale = (PANEL_W - LABEL_W - 120) / max(line.tokens_per_s for line in lines)
    title = f"{result['size']} parameters, rows of {result['row']}"
    parts = [f'<text x="12" y="24" font-weight="bold">{escape(title)}</text>']
    for place, line in enumerate(lines):
        y, length = 38 + place * (BAR_H + 5), line.tokens_per_s * scale
        colour = COLOURS[line.arm.partition("_")[0]]
        ratio = "" if line.ratio_to_trainer is None else f" ({line.ratio_to_trainer:.2f}x)"
        parts.append(
            f'<text x="{LABEL_W - 6}" y="{y + 15}" text-anchor="end">{escape(line.arm)}</text>'
            f'<rect x="{LABEL_W}" y="{y}" width="{length:.1f}" height="{BAR_H}" fill="{colour}"/>'
            f'<text x="{LABEL_W + length + 5:.1f}" y="{y + 15}">{line.tokens_per_s:,.0f}{ratio}'
            "</text>"
        )
    return "".join(parts)


def plot() -> None:
    """Draw what lies in the results."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("throughput-*.json"))]
    if not found:
        sys.exit(f"no throughput-*.json in {RESULTS}: run the benchmark first")
    PLOT.write_text(render_plot(found), encoding="utf-8")
    print(PLOT)


def run_cell(cell: Cell, options: argparse.Namespace) -> None:
    """Measure a cell's blocks, print its table, write its file."""
    print(f"{cell.size}, rows of {cell.row}", flush=True)
    prepare(cell)
    size = SIZES[cell.size]
    result: dict[str, Any] = {
        "size": cell.size,
        "row": cell.row,
        "device": cell.device,
        "tokens_per_step": TOKENS_PER_STEP[cell.device],
        "flops_per_token": flops_per_token(size, row=cell.row),
        "blocks": {},
    }
    for block, names in BLOCKS.items():
        chosen = [name for name in names if name in options.arms]
        if chosen:
            found = run_block(cell, chosen, rounds=options.rounds, steps=options.steps)
            result["blocks"][block] = found
    print(render_table(result), flush=True)
    path = options.results / f"throughput-{cell.size}-{cell.row}.json"
    write_result(path, result)


def check_accelerate(options: argparse.Namespace) -> None:
    """Refuse Trainer's arms where it would fail after minutes."""
    found = importlib.util.find_spec("accelerate") is not None
    found = found or (options.site is not None and (options.site / "accelerate").is_dir())
    if not found and any(name.startswith("trainer") for name in options.arms):
        sys.exit(
            "transformers' Trainer needs accelerate, which isn't installed; either"
            "\n  pip install --target DIR --no-deps accelerate, and give --site DIR, or"
            "\n  leave the arms trainer and trainer_compile out (--arms)"
        )


def main() -> None:
    known = [name for names in BLOCKS.values() for name in names]
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["6m", "35m", "125m"])
    parser.add_argument("--device", choices=TOKENS_PER_STEP, default="cpu")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="whole steps a turn; about 5 s of them if absent")
    parser.add_argument("--arms", nargs="+", choices=[*known, *SKIPPED], default=known)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of a rank")
    parser.add_argument("--site", type=Path, help="packages that only competitors need")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", action="store_true", help="draw the results, run nothing")
    options = parser.parse_args()
    if options.plot:
        return plot()
    check_accelerate(options)
    for name, why in SKIPPED.items():
        print(f"{name} skipped: {why}")
    # The arms must be ended: raise, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for size in options.sizes:
        for row in options.rows:
            with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
                cell = Cell(
                    size=size,
                    row=row,
                    num_ranks=options.ranks,
                    num_threads=options.threads,
                    device=options.device,
                    precision=options.precision,
                    folder=Path(scratch),
                    site=None if options.site is None else options.site.resolve(),
                )
                try:
                    run_cell(cell, options)
                except ArmError as error:
                    sys.exit(f"{size}, rows of {row}: {error}")
    return None


if __name__ == "__main__":
    main()

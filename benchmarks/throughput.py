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
each other, and blocks follow one another: at 125M parameters six arms do not fit in memory.

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
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import describe_measurement
from benchmarks.throughput_report import (
    BLOCKS,
    RESULTS,
    SIZES,
    flops_per_token,
    plot,
    render_table,
    write_result,
)
from benchmarks.turns import POLL_S, TOKENS_PER_STEP, Arm, ArmError, StepLog, ended

ROOT = Path(__file__).resolve().parents[1]
ARM_FILES = ROOT / "benchmarks" / "arms"


BEST_SETTINGS: tuple[str, ...] = ("kernels=compiled",)
"""What `ours_best` is told beyond the defaults."""

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate")
SKIPPED = {
    "litgpt": "for 2 devices litgpt 0.5.13 takes FSDPStrategy, and Fabric refuses it on a CPU:"
    " 'FSDP is only available on GPU'"
}

COMPARED_STEPS = 10
TOLERANCE = 0.03
"""Largest difference of two arms' losses at a step, in nats: bf16's rounding, ten steps on."""
TURN_S = 5.0
START_S = 900.0
"""Limit of an arm's start and warm-up."""
SETTINGS = (
    "train.max_steps=100000",
    "train.eval_every_steps=null",
    # An evaluation and a sample come before the first step; competitors have neither.
    "train.eval_sequences=2",
    "train.sample_prompt=''",
    "checkpoint.every_steps=null",
    # An arm that is stopped makes no progress.
    "launch.timeout_s=86400",
)


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
            "provenance": describe_measurement(PACKAGES),
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
        raise ArmError("an arm has no steps: its losses cannot be compared")
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
            "transformers' Trainer needs accelerate, which is not installed; either"
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

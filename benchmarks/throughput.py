"""Tokens per second of our runs and of what one would use instead, on the same sequences and ranks.

    python benchmarks/throughput.py [--sizes 6m 35m 125m] [--sequence-lengths 512 2048] [--rounds 5]
    python benchmarks/throughput.py --device cuda --ranks 1 --sizes 125m 1b --sequence-lengths 2048

Every arm trains the same initial weights on the same sequences in the same order: bf16 with fp32
masters (fp32 on a CPU without bf16 instructions), AdamW, clipping, one micro batch a rank and step.
The losses of each step must agree, or nothing is reported. Arms:

    ours, ours_best                 run.py with its defaults, and with BEST_SETTINGS
    trainer, trainer_compile        transformers' Trainer with our run's DeepSpeed JSON
    bare, bare_compile              a loop in plain PyTorch: DistributedDataParallel, fused AdamW

Trainer needs accelerate; `--site DIR` is a directory with packages that only it needs.

Each arm of a block (defaults; best) is started and warmed up; then all are stopped by SIGSTOP, and
one at a time continues for some steps, round after round, in rotating order. A step counts only if
it began and ended within its arm's turn. MFU is Size.flops_per_token x tokens/s over the ceiling
that arms/ceiling.py measures before each round. The first step is in seconds from the command, with
warm caches. Peak memory is the largest process's resident memory, or what torch has allocated on
the GPU. Ratios are medians over rounds of the ratio within a round.
"""

import argparse
import itertools
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, ROOT, describe_measurement
from benchmarks.throughput_report import BLOCKS, SIZES, render_table, write_result
from benchmarks.turns import POLL_S, Arm, ArmError, StepLog

ARM_FILES = ROOT / "benchmarks" / "arms"
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate")
TOKENS_PER_STEP = {"cpu": 4096, "cuda": 32_768}
COMPARED_STEPS = 10
TOLERANCE = 0.03
"""Largest difference of two arms' losses at a step, in nats: bf16's rounding after ten steps."""
TURN_S = 5.0
BEST_SETTINGS = ("kernels=compiled",)
SETTINGS = (
    "train.max_steps=100000",
    "train.eval_every_steps=null",
    # Ours evaluates and generates before the first step; the others do neither.
    "train.eval_sequences=2",
    "train.sample_prompt=''",
    "checkpoint.every_steps=null",
    "launch.threads_per_process=1",
    # A stopped arm makes no progress.
    "launch.timeout_s=86400",
)


@dataclass(frozen=True)
class Cell:
    """A model size with a sequence length, and the directory of its files."""

    size: str
    sequence_length: int
    folder: Path
    options: argparse.Namespace

    @property
    def tokens_per_step(self) -> int:
        return TOKENS_PER_STEP[self.options.device]

    def overrides(self, name: str) -> list[str]:
        """Overrides of a run of ours."""
        batch_size, options = self.tokens_per_step // self.sequence_length, self.options
        words = f"""data.sequence_length={self.sequence_length} batch.global_batch_size={batch_size}
            launch.num_processes={options.ranks} launch.device={options.device}
            precision={options.precision}""".split()
        best = BEST_SETTINGS if name == "ours_best" else ()
        return [*SIZES[self.size].overrides, *words, *SETTINGS, *best]

    def command(self, name: str) -> tuple[list[str], Path]:
        """An arm's command, and the file to which it writes its steps."""
        if name.startswith("ours"):
            run_dir = self.folder / name
            words = [*self.overrides(name), f"hydra.run.dir={run_dir}"]
            return [sys.executable, str(ROOT / "run.py"), *words], run_dir / "metrics.jsonl"
        script, _, compiled = name.partition("_")
        steps = self.folder / f"{name}.jsonl"
        inputs = [str(path) for path in (self.folder / "ours_first", self.folder / "model", steps)]
        return self.torchrun(script, *inputs, *(["--compile"] if compiled else [])), steps

    def torchrun(self, script: str, *arguments: str) -> list[str]:
        """The command that starts the ranks of a script."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        return [
            *(sys.executable, "-m", "torch.distributed.run"),
            f"--nproc-per-node={self.options.ranks}",
            # The other rendezvous has a keep-alive, which a stopped process misses.
            *("--master-addr=localhost", f"--master-port={port}"),
            *(str(ARM_FILES / f"{script}.py"), *arguments),
        ]

    def start(self, name: str) -> Arm:
        """Start an arm. Its output goes to a file."""
        command, steps = self.command(name)
        output = self.folder / f"{name}.log"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment(with_site=name.startswith("trainer")),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only this process
            )
        return Arm(name, StepLog(steps), output, process)

    def environment(self, *, with_site: bool = False) -> dict[str, str]:
        """The environment of every arm; ours sets the rest for itself."""
        on_cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        site = self.options.site if with_site else None
        return (os.environ | on_cpu if self.options.device == "cpu" else dict(os.environ)) | {
            "PYTHONPATH": str(ROOT) if site is None else f"{ROOT}:{site.resolve()}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def prepare(self) -> None:
        """Write the run directory and the initial weights that the other arms read.

        The run of ours that does it is killed after its first step; it has warmed all caches.
        """
        with closing(self.start("ours_first")) as arm:
            arm.wait(1)
        paths = [str(self.folder / "ours_first"), str(self.folder / "model")]
        command = [sys.executable, str(ARM_FILES / "inputs.py"), *paths]
        subprocess.run(command, check=True, env=self.environment(), capture_output=True)

    def measure_ceiling(self) -> float:
        """GFLOP/s of large products in as many processes as an arm has ranks."""
        command = self.torchrun("ceiling")
        done = subprocess.run(command, check=True, env=self.environment(), capture_output=True)
        return float(done.stdout.split()[-1])


def warm_up(cell: Cell, name: str, stack: ExitStack) -> Arm:
    """Start an arm, wait until it has compiled and allocated what it needs, and stop it."""
    arm = stack.enter_context(closing(cell.start(name)))
    arm.wait(SIZES[cell.size].warmup_steps)
    arm.pause()
    step_s = max(arm.log.steps[-1].seen_at - arm.log.steps[-2].seen_at, POLL_S)
    arm.steps_per_turn = cell.options.steps or max(1, round(TURN_S / step_s))
    text = f"{arm.steps_per_turn} steps a turn of about {step_s:.2f} s"
    print(f"  {name}: first step after {arm.first_step_s():.1f} s; {text}", flush=True)
    return arm


def run_block(cell: Cell, names: Sequence[str]) -> dict[str, Any]:
    """Measure the arms of a block in turns."""
    with ExitStack() as stack:
        arms = [warm_up(cell, name, stack) for name in names]
        ceilings = []
        for number in range(cell.options.rounds):
            ceilings.append(cell.measure_ceiling())
            first = number % len(arms)
            for arm in arms[first:] + arms[:first]:
                arm.take_turn(tokens_per_step=cell.tokens_per_step)
            rates = ", ".join(f"{arm.name} {arm.tokens_per_s[-1]:,.0f}" for arm in arms)
            print(f"  round {number + 1}: ceiling {ceilings[-1]:,.0f} GFLOP/s; {rates}", flush=True)
        losses = {arm.name: [step.loss for step in arm.log.steps] for arm in arms}
        return {
            "provenance": describe_measurement(PACKAGES),
            "ranks": cell.options.ranks,
            "ceiling_gflops": ceilings,
            "tolerance": TOLERANCE,
            "largest_loss_difference": check_losses(losses),
            "arms": {
                arm.name: {
                    "words": cell.overrides(arm.name),
                    "tokens_per_s": arm.tokens_per_s,
                    "steps_a_turn": arm.steps_per_turn,
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
    by_step = [dict(zip(losses, at, strict=True)) for at in zip(*losses.values(), strict=False)]
    if not by_step:
        raise ArmError("an arm has no steps: its losses cannot be compared")
    differences = [
        # NaN compares as neither smaller nor larger.
        max(at.values()) - min(at.values()) if all(map(math.isfinite, at.values())) else math.inf
        for at in by_step[:COMPARED_STEPS]
    ]
    largest = max(differences)
    if largest > TOLERANCE:
        step = differences.index(largest)
        raise ArmError(
            f"losses differ by {largest:.4f} (tolerance {TOLERANCE}) at step {step + 1}:"
            f" {by_step[step]}; some arm trains something else, so no speed is compared"
        )
    return largest


def run_cell(cell: Cell) -> None:
    """Measure a cell's blocks, print its table, write its file."""
    print(f"{cell.size}, sequences of {cell.sequence_length}", flush=True)
    cell.prepare()
    chosen = {
        block: [name for name in names if name in cell.options.arms]
        for block, names in BLOCKS.items()
    }
    result = {
        "size": cell.size,
        "sequence_length": cell.sequence_length,
        "device": cell.options.device,
        "tokens_per_step": cell.tokens_per_step,
        "flops_per_token": SIZES[cell.size].flops_per_token(cell.sequence_length),
        "blocks": {block: run_block(cell, names) for block, names in chosen.items() if names},
    }
    print(render_table(result), flush=True)
    name = f"throughput-{cell.size}-{cell.sequence_length}.json"
    write_result(cell.options.results / name, result)


def main() -> None:
    arms = [name for names in BLOCKS.values() for name in names]
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["6m", "35m", "125m"])
    parser.add_argument("--device", choices=TOKENS_PER_STEP, default="cpu")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--sequence-lengths", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="whole steps a turn (default: about 5 s)")
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--site", type=Path, help="packages that only Trainer needs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    # The arms must be killed: raise, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for size, length in itertools.product(options.sizes, options.sequence_lengths):
        with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
            try:
                run_cell(Cell(size, length, Path(scratch), options))
            except ArmError as error:
                sys.exit(f"{size}, sequences of {length}: {error}")


if __name__ == "__main__":
    main()

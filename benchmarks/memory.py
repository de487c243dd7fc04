"""Predicted and measured peak memory of real runs.

    python benchmarks/memory.py [--allocator returns] [--steps 3] [--match TEXT]
    python benchmarks/memory.py --random 20 --seed 1

Each run is `python run.py` with a few steps on a CPU. Measured is the largest resident memory of
any rank above what it had after its imports; predicted is the plan's total without its framework
part. The last line says how many of the runs agree within 10%.

The allocator `returns` gives freed memory back (launch.malloc_mmap_threshold), which shows live
tensors; `keep` and `plain` are kernels.allocator's: with them memory grows for some tens of steps.

`--random` draws configurations instead, and compares the two numbers that a run ends with: the plan
and the largest rank's peak, libraries included, with the default allocator, an evaluation and a
sample before and after training, and a checkpoint. It exits with 1 if a plan is more than 5% below
the peak or more than 20% above it.
"""

import argparse
import json
import random
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.record import run_ours
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.runs.metrics import Row, last_value

TOLERANCE = 0.10
LOWEST, HIGHEST = -0.05, 0.20
"""Allowed differences of a plan from the measured peak of a random configuration."""
RANDOM_STEPS = 20
"""Steps of a random configuration: most peaks grow until the eighth, and that of stage 3 with 58M
parameters until the 17th (docs/plan.md)."""
MAX_FLOPS = 7.5e12
"""Of a random configuration: about a minute and a half on two cores."""
MIB = 1 << 20
SHORT = shlex.split("""
    schedule.warmup_steps=2 train.eval_sequences=2 checkpoint.export=false launch.device=cpu""")
BASE = SHORT + shlex.split("""
    data=stdlib tokenizer.vocab_size=2048 train.eval_every_steps=null checkpoint.at_end=false
    monitor=none launch.num_processes=2""")
ALLOCATORS = {
    "returns": "launch.malloc_mmap_threshold=262144",
    "keep": "kernels.allocator=keep",
    "plain": "kernels.allocator=plain",
}
MODELS = {
    "19M": shlex.split("""model=tiny model.hidden_size=512 model.intermediate_size=1376
        model.num_attention_heads=8 model.vocab_size=8192"""),
    "58M": ["model=60m"],
}
"""One whose activations are large, and one whose model states are."""


def list_runs() -> Iterator[tuple[str, list[str]]]:
    """Name and overrides of each run."""
    stages = ("stage0", "stage1", "stage2", "stage3", "stage2_offload", "stage3_offload")
    runs = [(model, zero, "fp32", n, 128) for model in MODELS for zero in stages for n in (1, 4)]
    runs += [("19M", zero, "bf16", 1, 64) for zero in stages]
    runs += [("19M", "stage1", "fp32", 8, 256)]
    more = dict.fromkeys(runs, "")
    for zero in ("stage0", "stage2"):
        more["19M", zero, "fp32", 16, 128] = "train.gradient_checkpointing=true"
    more["19M", "stage2", "fp32", 2, 128] = "batch.global_batch_size=8"
    for (model, zero, precision, micro, length), extra in more.items():
        name = f"{model} {zero} {precision} {micro} x {length} {extra.rpartition('.')[2]}".strip()
        sizes = f"batch.micro_batch_size={micro} batch.global_batch_size={2 * micro}"
        words = f"zero={zero} precision={precision} {sizes} data.sequence_length={length} {extra}"
        yield name, [*MODELS[model], *words.split()]


def draw_run(draw: random.Random) -> list[str]:
    """Overrides of a random configuration with 5M to 60M parameters."""
    steps, parameters, flops = RANDOM_STEPS, 0, 0.0
    while not 5e6 <= parameters <= 60e6 or flops > MAX_FLOPS:
        heads, layers = draw.choice((2, 4, 6, 8, 12)), draw.randint(1, 12)
        hidden = heads * draw.choice((32, 64, 128))
        inner = round(draw.uniform(2, 4) * hidden / 32) * 32
        vocab = draw.choice((512, 2048, 4096, 8192, 16384, 32000))
        length, micro = draw.choice((64, 128, 256, 512, 1024)), draw.randint(1, 8)
        accumulated, ranks = draw.randint(1, 4), draw.randint(1, 2)
        parameters = 2 * vocab * hidden + layers * (4 * hidden**2 + 3 * hidden * inner)
        flops = 6.0 * parameters * length * micro * accumulated * ranks * steps
    stage = draw.randint(0, 3)
    offload = stage > 0 and draw.random() < 0.3
    optimizers = ["adamw", "lion", *["muon"] * (stage > 0)]
    values = {
        "model": "tiny",
        "model.hidden_size": hidden,
        "model.intermediate_size": inner,
        "model.num_hidden_layers": layers,
        "model.num_attention_heads": heads,
        "model.vocab_size": vocab,
        "tokenizer.vocab_size": vocab,
        "data": "stdlib",
        "data.sequence_length": length,
        "batch.micro_batch_size": micro,
        "batch.gradient_accumulation_steps": accumulated,
        "launch.num_processes": ranks,
        "zero": f"stage{stage}",
        "zero.offload_optimizer.device": "cpu" if offload else "none",
        "optim": "cpu_adam" if offload else draw.choice(optimizers),
        "precision": draw.choice(("fp32", "bf16")),
        "train.gradient_checkpointing": str(draw.random() < 0.5).lower(),
        "kernels": draw.choice(("auto", "plain")),
        "train.max_steps": steps,
    }
    return [*SHORT, *(f"{name}={value}" for name, value in values.items())]


def compare_random(count: int, seed: int, target: Path | None) -> int:
    """Plan and measure random configurations; the exit code."""
    draw, errors, runs = random.Random(seed), [], []
    cpu = {name: value for name, value in asdict(detect_machine()).items() if "cpu_" in name}
    print(f"{'planned':>8} {'measured':>9} {'difference':>10}  configuration", flush=True)
    for number in range(count):
        words = draw_run(draw)
        rows = run_once(words)[0]
        planned = last_value(rows, "planned_memory_bytes") or 0
        measured = last_value(rows, "peak_memory_bytes") or 1
        errors.append(planned / measured - 1)
        name = f"{seed}-{number:02d}"
        runs.append({"name": name, "words": words, "peak_bytes": int(measured), "cpu": cpu})
        shown = " ".join(word.rpartition(".")[2] for word in words[len(SHORT) :])
        sizes = f"{planned / MIB:>8,.0f} {measured / MIB:>9,.0f}"
        print(f"{sizes} {errors[-1]:>+10.1%}  {shown}", flush=True)
    if target is not None:
        target.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    good = sum(LOWEST <= error <= HIGHEST for error in errors)
    print(f"worst {min(errors):+.1%} and {max(errors):+.1%}; {good} of {count} within limits")
    return 0 if good == count else 1


def run_once(words: list[str]) -> tuple[list[Row], dict[str, Any]]:
    """Metrics and planned memory of a run."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        rows = run_ours(run_dir, *words)
        return rows, json.loads((run_dir / "plan.json").read_text())["memory"]


def measure(
    overrides: list[str], *, allocator: str = "returns", steps: int = 3
) -> tuple[int, int, str]:
    """Predicted and measured bytes of one run, and the phase of the predicted peak."""
    words = [*BASE, ALLOCATORS[allocator], f"train.max_steps={steps}", *overrides]
    rows, memory = run_once(words)
    beside = ("phase", "framework", "host", "disk")
    predicted = sum(value for part, value in memory.items() if part not in beside)
    measured = last_value(rows, "peak_above_imports_bytes")
    return predicted, int(measured or 0), memory["phase"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--allocator", choices=ALLOCATORS, default="returns")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--match", default="", help="only runs whose name has this text")
    parser.add_argument("--json", type=Path, help="with --random: write the runs here")
    parser.add_argument("--random", type=int, default=0, help="number of random configurations")
    parser.add_argument("--seed", type=int, default=1, help="what --random draws with")
    options = parser.parse_args()
    if options.random:
        return compare_random(options.random, options.seed, options.json)
    errors = []
    print(f"{'run':<52} {'predicted':>10} {'measured':>10} {'error':>7}  peak in")
    for name, overrides in list_runs():
        if options.match in name:
            predicted, measured, phase = measure(
                overrides, allocator=options.allocator, steps=options.steps
            )
            errors.append(predicted / measured - 1)
            sizes = f"{predicted / MIB:>6,.0f} MiB {measured / MIB:>6,.0f} MiB"
            print(f"{name:<52} {sizes} {errors[-1]:>+7.1%}  {phase}", flush=True)
    good = sum(abs(error) <= TOLERANCE for error in errors)
    print(f"{good} of {len(errors)} runs within {TOLERANCE:.0%}")
    return 0 if good == len(errors) else 1


if __name__ == "__main__":
    sys.exit(main())

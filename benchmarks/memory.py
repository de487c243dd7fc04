"""Predicted and measured peak memory of real runs.

    python benchmarks/memory.py [--allocator returns] [--steps 3] [--match TEXT]

Each run is `python run.py` with a few steps on a CPU. Measured is the largest resident memory of
any rank above what it had after its imports; predicted is the plan's total without its framework
part. The last line says how many of the runs agree within 10%.

The allocator `returns` gives freed memory back (launch.malloc_mmap_threshold), which shows live
tensors; `keep` and `plain` are kernels.allocator's: with them memory grows for some tens of steps.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.record import run_ours
from llama_pretrain.runs.metrics import last_value

TOLERANCE = 0.10
MIB = 1 << 20
BASE = shlex.split("""
    data=stdlib tokenizer.vocab_size=2048 schedule.warmup_steps=2 train.eval_sequences=2
    train.eval_every_steps=null checkpoint.at_end=false checkpoint.export=false monitor=none
    launch.device=cpu launch.num_processes=2""")
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


def measure(
    overrides: list[str], *, allocator: str = "returns", steps: int = 3
) -> tuple[int, int, str]:
    """Predicted and measured bytes of one run, and the phase of the predicted peak."""
    words = [*BASE, ALLOCATORS[allocator], f"train.max_steps={steps}", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        rows = run_ours(run_dir, *words)
        memory = json.loads((run_dir / "plan.json").read_text())["memory"]
    excluded = ("phase", "framework", "host", "disk")
    predicted = sum(value for part, value in memory.items() if part not in excluded)
    return predicted, int(last_value(rows, "peak_above_imports_bytes") or 0), memory["phase"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--allocator", choices=ALLOCATORS, default="returns")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--match", default="", help="only runs whose name contains this text")
    options = parser.parse_args()
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

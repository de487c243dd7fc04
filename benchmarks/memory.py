"""Predicted against measured peak memory, over real runs.

    python benchmarks/memory.py [--allocator returns] [--steps 3] [--match TEXT]

Each run is `python run.py` with a few steps on a CPU, in processes of its own. Measured is the
largest resident memory of any rank above what it had after its imports; predicted is the plan's
total without its framework part. The last line says how many of the runs agree within 10%.

The allocator that `returns` all that is freed (launch.malloc_mmap_threshold) shows live tensors;
`keep` and `plain` are kernels.allocator's, and with them memory grows for some tens of steps.
"""

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llama_pretrain.runs.metrics import last_value, read_metrics

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 0.10
MIB = 1 << 20

BASE = (
    "data=stdlib",
    "tokenizer.vocab_size=2048",
    "schedule.warmup_steps=2",
    "train.eval_sequences=2",
    "train.eval_every_steps=null",
    "checkpoint.at_end=false",
    "checkpoint.export=false",
    "monitor=none",
    "launch.device=cpu",
    "launch.num_processes=2",
)

ALLOCATORS = {
    "returns": "launch.malloc_mmap_threshold=262144",
    "keep": "kernels.allocator=keep",
    "plain": "kernels.allocator=plain",
}

MODELS = {
    "19M": (
        "model=tiny",
        "model.hidden_size=512",
        "model.intermediate_size=1376",
        "model.num_attention_heads=8",
        "model.vocab_size=8192",
    ),
    "58M": ("model=60m",),
}
"""Two shapes: one whose activations weigh, one whose states do."""


def list_runs() -> Iterator[tuple[str, list[str]]]:
    """Name and overrides of each run of the matrix."""
    stages = ("stage0", "stage1", "stage2", "stage3", "stage2_offload", "stage3_offload")
    for model, zero in itertools.product(MODELS, stages):
        for micro in (1, 4):
            yield _run(model, zero, "fp32", micro, length=128)
    for zero in stages:
        yield _run("19M", zero, "bf16", 1, length=64)
    for zero in ("stage0", "stage2"):
        yield _run("19M", zero, "fp32", 16, length=128, more=("train.gradient_checkpointing=true",))
    yield _run("19M", "stage1", "fp32", 8, length=256)
    yield _run("19M", "stage2", "fp32", 2, length=128, more=("batch.global_batch_size=8",))


def _run(
    model: str, zero: str, precision: str, micro: int, *, length: int, more: tuple[str, ...] = ()
) -> tuple[str, list[str]]:
    name = f"{model} {zero} {precision} {micro} x {length}"
    extra = " ".join(word.rpartition(".")[2] for word in more)
    words = [
        *MODELS[model],
        f"zero={zero}",
        f"precision={precision}",
        f"batch.micro_batch_size={micro}",
        f"batch.global_batch_size={2 * micro}",
        f"data.sequence_length={length}",
    ]
    return f"{name} {extra}".strip(), [*words, *more]


def measure(
    overrides: list[str], *, allocator: str = "returns", steps: int = 3
) -> tuple[int, int, str]:
    """Predicted and measured bytes of one run, and the phase of the predicted peak.

    Raises:
        RuntimeError: if the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        words = [*BASE, ALLOCATORS[allocator], f"train.max_steps={steps}", *overrides]
        words.append(f"hydra.run.dir={run_dir}")
        done = subprocess.run(
            [sys.executable, str(ROOT / "run.py"), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(words)}\n{done.stdout[-2000:]}")
        memory = json.loads((run_dir / "plan.json").read_text())["memory"]
        beside = ("phase", "framework", "host", "disk")
        predicted = sum(value for part, value in memory.items() if part not in beside)
        measured = last_value(read_metrics(run_dir / "metrics.jsonl"), "peak_above_imports_bytes")
        return predicted, int(measured or 0), memory["phase"]


def main() -> int:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--allocator", choices=ALLOCATORS, default="returns")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--match", default="", help="only runs whose name has this text")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    rows, good = [], 0
    print(f"{'run':<52} {'predicted':>10} {'measured':>10} {'error':>7}  peak in")
    for name, overrides in list_runs():
        if arguments.match not in name:
            continue
        predicted, measured, phase = measure(
            overrides, allocator=arguments.allocator, steps=arguments.steps
        )
        error = predicted / measured - 1
        row = {"run": name, "predicted": predicted, "measured": measured, "phase": phase}
        rows.append({**row, "error": error, "overrides": overrides})
        good += abs(error) <= TOLERANCE
        sizes = f"{predicted / MIB:>6,.0f} MiB {measured / MIB:>6,.0f} MiB"
        print(f"{name:<52} {sizes} {error:>+7.1%}  {phase}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"{good} of {len(rows)} runs within {TOLERANCE:.0%}")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())

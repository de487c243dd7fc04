"""Losses and gradient norms of ranks that share sequences, against one rank that has them whole.

    python benchmarks/parallel.py [--steps 5] [--results FILE]

Every combination of sequence parallelism, data-parallel groups, ZeRO stage, document mask and
recomputation, in fp32 on the CPU. Exit code 1 if a loss differs by more than 1e-6 or a norm by more
than 1e-5, relatively, or a batch has other samples.
"""

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from llama_pretrain.runs.metrics import evaluations, read_metrics, steps

ROOT = Path(__file__).resolve().parents[1]
COMMON = shlex.split("""debug=smoke precision=fp32 model.num_attention_heads=4
    model.num_key_value_heads=2 batch.global_batch_size=8 batch.micro_batch_size=2
    train.eval_every_steps=null monitor=none checkpoint.export=false checkpoint.at_end=false
    launch.threads_per_process=1""")
LOSS, NORM = 1e-6, 1e-5


def train(folder: Path, *words: str) -> list[tuple[float, float, str]]:
    """Loss, gradient norm and hash of the samples of each step and evaluation of a run."""
    command = [sys.executable, str(ROOT / "run.py"), *COMMON, f"hydra.run.dir={folder}", *words]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    rows = read_metrics(folder / "metrics.jsonl")
    trained = [(row.loss or 0.0, row.grad_norm or 0.0, row.sample_hash) for row in steps(rows)]
    return [*trained, *((row.eval_loss, 1.0, "") for row in evaluations(rows))]


def difference(ours: list[tuple[float, float, str]], expected: Any) -> dict[str, Any]:
    """The largest relative differences, and whether all batches have the same samples."""
    pairs = list(zip(ours, expected, strict=True))
    return {
        "loss": max(abs(a[0] / b[0] - 1) for a, b in pairs),
        "norm": max(abs(a[1] / b[1] - 1) for a, b in pairs),
        "samples": all(a[2] == b[2] for a, b in pairs),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        length = f"train.max_steps={arguments.steps}"
        masks = {
            mask: train(
                Path(place) / f"whole-{mask}",
                length,
                f"data.document_mask={mask}",
                "launch.num_processes=1",
            )
            for mask in ("false", "true")
        }
        names = ("sequence", "groups", "stage", "mask", "recomputed")
        choices = itertools.product((1, 2, 4), (1, 2), range(4), masks, ("false", "true"))
        for number, (shared, groups, stage, mask, recomputed) in enumerate(choices):
            ours = train(
                Path(place) / str(number),
                length,
                f"launch.sequence_parallel_size={shared}",
                f"launch.num_processes={shared * groups}",
                f"zero=stage{stage}",
                f"data.document_mask={mask}",
                f"train.gradient_checkpointing={recomputed}",
            )
            values = (shared, groups, stage, mask, recomputed)
            row = dict(zip(names, values, strict=True)) | difference(ours, masks[mask])
            found.append(row)
            print(json.dumps(row), flush=True)
    worst = {name: max(row[name] for row in found) for name in ("loss", "norm")}
    print(f"{len(found)} combinations: loss within {worst['loss']:.1e}, norm {worst['norm']:.1e}")
    if arguments.results:
        arguments.results.write_text(json.dumps(found, indent=1) + "\n")
    samples = all(row["samples"] for row in found)
    return 0 if samples and worst["loss"] <= LOSS and worst["norm"] <= NORM else 1


if __name__ == "__main__":
    sys.exit(main())

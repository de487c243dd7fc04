"""Seconds from the command to the end of the first optimizer step, beside a Trainer script:
python benchmarks/start.py --rounds 5 [--site DIR]

Ours is the default run, its data cached; the other is benchmarks/arms/start_trainer.py under
torchrun, with as many ranks, the same model, the same DeepSpeed JSON and the same tokens. They take
turns, after one start of each that fills caches. Ours evaluates before the first step, and lets the
model write; Trainer does not: ours is told with and without that phase. Trainer needs `accelerate`;
`--site DIR` names a folder that has it for Trainer alone. Where the environment has more than the
README's first command installs, both import more: transformers takes in what it finds, as scipy.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, ROOT, write_record
from llama_pretrain.config.precision import PrecisionName
from llama_pretrain.config.snapshot import load_snapshot
from llama_pretrain.plan.plan import load_plan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import EventRow, read_metrics, select

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "hydra-core", "pydantic")
SHORT = ("train.max_steps=1", "checkpoint.at_end=false", "checkpoint.export=false")
"""The default run, but for what comes after its first step."""
OURS = {"ours": (), "ours, fresh interpreters": ("launch.fork=false",)}
TRAINER = "Trainer"


def start_ours(words: Sequence[str], folder: Path) -> dict[str, float]:
    """Seconds by phase of a run."""
    subprocess.run(
        [sys.executable, "run.py", *SHORT, *words, f"hydra.run.dir={folder}"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    rows = read_metrics(RunDir(folder).metrics)
    return next(row.start_seconds for row in select(rows, EventRow) if row.start_seconds)


def write_recipe(run_dir: RunDir, recipe: Path) -> int:
    """Tell the other script what to train, from a run of ours. Returns the number of ranks."""
    run, plan = load_snapshot(run_dir.snapshot), load_plan(run_dir.plan)
    assert plan.corpus is not None
    model = {
        "vocab_size": plan.vocab_size,
        "hidden_size": run.model.hidden_size,
        "intermediate_size": run.model.intermediate_size,
        "num_hidden_layers": run.model.num_hidden_layers,
        "num_attention_heads": run.model.num_attention_heads,
        "num_key_value_heads": run.model.num_key_value_heads or run.model.num_attention_heads,
        "max_position_embeddings": run.model.max_position_embeddings,
        "use_cache": False,
    }
    content = {
        "model": model,
        "seed": run.seed,
        "bf16": run.precision.name == PrecisionName.bf16,
        "learning_rate": run.optim.learning_rate,
        "micro_batch_size": plan.batch.micro_batch_size,
        "sequence_length": run.data.sequence_length,
        "tokens": str(Path(plan.corpus.sources[0].tokens_dir) / "train-00000.bin"),
        "ds_config": str(run_dir.ds_config),
    }
    recipe.write_text(json.dumps(content))
    return plan.world_size


def start_trainer(recipe: Path, done: Path, *, world_size: int, site: Path | None) -> float:
    """Seconds to the end of the first step."""
    began = time.time()
    log = done.with_suffix(".log")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    script = str(ROOT / "benchmarks" / "arms" / "start_trainer.py")
    paths = [str(site or ""), os.environ.get("PYTHONPATH", "")]
    variables = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    with log.open("w") as output:
        subprocess.run(
            [sys.executable, *torchrun, script, str(recipe), str(done)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | variables,
        )
    if not done.exists():  # gloo aborts some processes when they leave, after all is done
        sys.exit(f"the Trainer script has failed:\n{log.read_text()[-3000:]}")
    return float(done.read_text()) - began


def measure(
    rounds: int, folder: Path, site: Path | None
) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
    """Our phases and everyone's seconds, by arm."""
    phases: dict[str, list[Any]] = {name: [] for name in OURS}
    seconds: dict[str, list[float]] = {name: [] for name in (*OURS, TRAINER)}
    start_ours((), folder / "warm")
    recipe = folder / "recipe.json"
    world_size = write_recipe(RunDir(folder / "warm"), recipe)
    start_trainer(recipe, folder / "warm-trainer", world_size=world_size, site=site)
    for number in range(rounds):
        for place, (name, words) in enumerate(OURS.items()):
            run_dir = folder / f"{number}-{place}"
            phases[name].append(start_ours(words, run_dir))
            seconds[name].append(sum(phases[name][-1].values()))
        done = folder / f"{number}-trainer"
        took = start_trainer(recipe, done, world_size=world_size, site=site)
        seconds[TRAINER].append(took)
        told = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items())
        print(f"round {number + 1}: {told}", flush=True)
    for name in OURS:
        seconds[f"{name}, without its evaluation"] = [
            sum(parts.values()) - parts.get("evaluation", 0.0) for parts in phases[name]
        ]
    return phases, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--site", type=Path, help="packages that only Trainer needs")
    options = parser.parse_args()
    site = None if options.site is None else options.site.resolve()
    if site is not None:
        sys.path.append(str(site))  # for the record
    with tempfile.TemporaryDirectory() as scratch:
        phases, seconds = measure(options.rounds, Path(scratch), site)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name in OURS:
        print(f"\n{name}, by phase:")
        for phase in phases[name][0]:
            median = statistics.median(parts.get(phase, 0.0) for parts in phases[name])
            print(f"  {phase:14}{median:6.2f} s")
    print()
    for name, median in medians.items():
        print(f"{name}: median {median:.2f} s, {median / medians[TRAINER]:.2f} of Trainer's")
    results = {
        "seconds": seconds,
        "phases": phases,
        "medians": medians,
        "of_trainer": {name: median / medians[TRAINER] for name, median in medians.items()},
    }
    write_record("start", results, packages=PACKAGES, folder=options.results)


if __name__ == "__main__":
    main()

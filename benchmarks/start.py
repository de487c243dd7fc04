"""Seconds from the command to the end of the first optimizer step, against a Trainer script.

    python benchmarks/start.py [--rounds 5] [--site DIR]

Ours is the default run; the other is arms/start_trainer.py, with as many ranks, the same model,
DeepSpeed JSON and tokens. They take turns with warm caches. Ours evaluates before the first step,
and is reported with and without that. Trainer needs `accelerate`; `--site DIR` is a directory that
has it for Trainer only. Other installed packages count: transformers imports some that it finds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from operator import sub
from pathlib import Path

from benchmarks.record import RESULTS, ROOT, run_ours, write_record
from llama_pretrain.config.model import SHAPE
from llama_pretrain.config.precision import PrecisionName
from llama_pretrain.config.snapshot import load_snapshot
from llama_pretrain.plan.plan import load_plan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import EventRow, select

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "hydra-core", "pydantic")
SHORT = ("train.max_steps=1", "checkpoint.at_end=false", "checkpoint.export=false")
"""The default run, without what follows its first step."""
OURS = {"ours": (), "ours, fresh interpreters": ("launch.fork=false",)}
TRAINER = "Trainer"


def start_ours(run_dir: Path, *overrides: str) -> dict[str, float]:
    """Seconds by phase of a run's startup."""
    rows = select(run_ours(run_dir, *SHORT, *overrides), EventRow)
    return next(row.start_seconds for row in rows if row.start_seconds)


def write_recipe(run_dir: RunDir, recipe: Path) -> int:
    """Write what the Trainer script is to train, from a run of ours. Returns the world size."""
    run, plan = load_snapshot(run_dir.snapshot), load_plan(run_dir.plan)
    assert plan.corpus is not None
    content = {
        "model": {name: getattr(run.model, name) for name in SHAPE}
        | {"vocab_size": plan.vocab_size, "use_cache": False},
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
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    script = str(ROOT / "benchmarks" / "arms" / "start_trainer.py")
    paths = os.pathsep.join(filter(None, [str(site or ""), os.environ.get("PYTHONPATH", "")]))
    began = time.time()
    run = subprocess.run(
        [sys.executable, *torchrun, script, str(recipe), str(done)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths},
    )
    if not done.exists():  # the exit code is no sign: gloo aborts some processes as they exit
        sys.exit(f"the Trainer script failed:\n{run.stdout.decode()[-3000:]}")
    return float(done.read_text()) - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--site", type=Path, help="packages that only Trainer needs")
    options = parser.parse_args()
    site = None if options.site is None else options.site.resolve()
    if site is not None:
        sys.path.append(str(site))  # for the versions in the record
    phases: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        folder, recipe = Path(scratch), Path(scratch) / "recipe.json"
        start_ours(folder / "warm")
        ranks = write_recipe(RunDir(folder / "warm"), recipe)
        start_trainer(recipe, folder / "warm-trainer", world_size=ranks, site=site)
        for number in range(options.rounds):
            for place, (name, overrides) in enumerate(OURS.items()):
                phases[name].append(start_ours(folder / f"{number}-{place}", *overrides))
                seconds[name].append(sum(phases[name][-1].values()))
            done = folder / f"{number}-trainer"
            took = start_trainer(recipe, done, world_size=ranks, site=site)
            seconds[TRAINER].append(took)
            text = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items())
            print(f"round {number + 1}: {text}", flush=True)
    for name in OURS:
        evaluations = [parts.get("evaluation", 0.0) for parts in phases[name]]
        seconds[f"{name}, without its evaluation"] = list(map(sub, seconds[name], evaluations))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: median / medians[TRAINER] for name, median in medians.items()}
    for name, median in medians.items():
        print(f"\n{name}: median {median:.2f} s, {ratios[name]:.2f} of Trainer's", end="")
    results = {"seconds": seconds, "phases": phases, "medians": medians, "of_trainer": ratios}
    write_record("start", results, packages=PACKAGES, folder=options.results)


if __name__ == "__main__":
    main()

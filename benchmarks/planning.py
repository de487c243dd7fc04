"""What planning costs by the number of points, and the data order by the size of a corpus:
python benchmarks/planning.py --rounds 3

Beside `python run.py -m task=plan ...` stands a process that composes the same points with Hydra
and does nothing else; the two take turns. Ours less that, by points, is what checking, planning and
showing a point costs; of few points it is the imports of the command. Seconds are the processor's:
both have one thread and wait for nothing, and what else runs here counts less.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, ROOT, write_record
from llama_pretrain.data.order import SampleOrder
from llama_pretrain.plan.sampling import SamplingPlan, StagePlan

PACKAGES = ("hydra-core", "omegaconf", "pydantic", "numpy")
COMPOSE = """
import json, sys
import hydra
from llama_pretrain.config.compose import PROJECT_ROOT, register
register()
with hydra.initialize_config_dir(str(PROJECT_ROOT / "conf"), version_base="1.3"):
    for words in json.load(sys.stdin):
        hydra.compose("config", overrides=words, return_hydra_config=True)
"""
GRID = {
    "zero": ["stage0", "stage1", "stage2", "stage3"],
    "optim.learning_rate": ["1e-4", "2e-4", "5e-4", "1e-3", "2e-3"],
    "batch.micro_batch_size": ["1", "2", "4", "8", "null"],
}
ROWS = [10**power for power in range(3, 13)]
IDS_AT_ONCE = (16, 4096)
"""A small global batch, and as many as a rank computes at once."""


def list_sweeps(sizes: Sequence[int]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Name, words of the command, and words of each of its points."""
    sweeps = []
    for size in sizes:
        points = [["task=plan", f"seed={seed}"] for seed in range(size)]
        sweeps.append((f"{size} seeds", [f"seed=range(0,{size})"], points))
    words = [f"{key}={','.join(values)}" for key, values in GRID.items()]
    pairs = [[f"{key}={value}" for value in values] for key, values in GRID.items()]
    grid = [["task=plan", *point] for point in itertools.product(*pairs)]
    return [*sweeps, (f"a grid of {len(grid)}", words, grid)]


def time_process(words: Sequence[str], *, given: str = "") -> float:
    """Seconds of the processor that a process takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *words],
        check=True,
        input=given.encode(),
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_planning(sizes: Sequence[int], *, rounds: int) -> list[dict[str, Any]]:
    """Seconds of both ways, and their difference a point."""
    rows = []
    for name, words, points in list_sweeps(sizes):
        ours, hydras = [], []
        with tempfile.TemporaryDirectory() as folder:
            place = f"hydra.sweep.dir={folder}/sweep"
            for _ in range(rounds):
                ours.append(time_process(["run.py", "-m", "task=plan", *words, place]))
                hydras.append(time_process(["-c", COMPOSE], given=json.dumps(points)))
        beyond = statistics.median(ours) - statistics.median(hydras)
        row = {
            "sweep": name,
            "points": len(points),
            "ours_s": ours,
            "hydra_s": hydras,
            "beyond_ms_a_point": 1000 * beyond / len(points),
            "hydra_ms_a_point": 1000 * statistics.median(hydras) / len(points),
        }
        rows.append(row)
        print(
            f"{name:16} {statistics.median(ours):8.2f} s, Hydra's composing"
            f" {statistics.median(hydras):8.2f} s: {row['hydra_ms_a_point']:7.1f} ms a point,"
            f" ours beyond it {row['beyond_ms_a_point']:7.1f} ms",
            flush=True,
        )
    return rows


def measure_order(*, rounds: int) -> list[dict[str, Any]]:
    """Nanoseconds an id, at places all over an epoch."""
    rows = []
    for num_sequences, count in itertools.product(ROWS, IDS_AT_ONCE):
        stage = StagePlan(first_sample=0, quotas=[1], sequence_length=512)
        order = SampleOrder(
            SamplingPlan(names=["text"], block=1, stages=[stage]),
            num_sequences=[num_sequences],
            seed=1,
        )
        firsts = np.random.default_rng(0).integers(0, num_sequences, size=200).tolist()
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            for first in firsts:
                order.ids(first, count)
            times.append((time.perf_counter() - began) / len(firsts) / count * 1e9)
        rows.append({"rows": num_sequences, "at_once": count, "ns_an_id": statistics.median(times)})
        print(
            f"{num_sequences:>16,} rows, {count:>5} at once: {rows[-1]['ns_an_id']:8.0f} ns an id"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = {
        "planning": measure_planning(options.points, rounds=options.rounds),
        "order": measure_order(rounds=options.rounds),
    }
    write_record("planning", results, packages=PACKAGES, folder=options.results)


if __name__ == "__main__":
    main()

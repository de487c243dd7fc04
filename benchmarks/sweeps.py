"""Overhead of a sweep beside the training of its jobs: ours, and Hydra's basic launcher.

    python benchmarks/sweeps.py [--points 8] [--rounds 3]

Three ways take turns: forked ranks; a fresh interpreter for each rank (`launch.fork=false`); and
`@hydra.main` with its basic launcher around the same task. The overhead of a job is its share of
the wall time without the seconds of steps; one-time costs and evaluation are in it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from benchmarks.record import ROOT
from llama_pretrain.runs.metrics import read_metrics, steps

BASIC_LAUNCHER = f"""
import sys
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from llama_pretrain.config.compose import read_config, register
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.tasks.context import TaskContext
from llama_pretrain.tasks.run import run_task

@hydra.main(config_path={str(ROOT / "conf")!r}, config_name="config", version_base="1.3")
def run(config):
    run_dir = RunDir(Path(HydraConfig.get().runtime.output_dir))
    context = TaskContext(run_dir=run_dir, argv=sys.argv, origins={{}}, machine=detect_machine())
    return run_task(read_config(config), context)

register()
run()
"""
WAYS = {"forked": (), "fresh": ("launch.fork=false",), "basic launcher": ()}
BASE = f"""debug=smoke batch.global_batch_size=4 batch.micro_batch_size=null data=text
    data.paths=['{sysconfig.get_path("stdlib")}/email/*.py'] data.heldout_fraction=0.1
    train.max_steps=20 train.eval_every_steps=null checkpoint.export=false
    checkpoint.at_end=false""".split()


def run_sweep(way: str, folder: Path, *, num_jobs: int) -> tuple[float, float]:
    """Seconds of a sweep, and those of all its steps."""
    folder.mkdir(parents=True)
    program = ROOT / "run.py"
    if way == "basic launcher":
        program = folder / "basic_launcher.py"
        program.write_text(BASIC_LAUNCHER)
    seeds = ",".join(map(str, range(num_jobs)))
    paths = [f"hydra.sweep.dir={folder / 'sweep'}", f"data.cache_dir={folder.parent / 'cache'}"]
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, str(program), "-m", *BASE, *WAYS[way], f"seed={seeds}", *paths],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    wall = time.perf_counter() - began
    files = list((folder / "sweep").glob("*/metrics.jsonl"))
    assert len(files) == num_jobs, files
    rows = [row for file in files for row in steps(read_metrics(file))]
    return wall, sum(row.tokens / row.step / row.tokens_per_s for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=8, help="jobs of a sweep")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    overheads: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        run_sweep("forked", Path(scratch) / "warm", num_jobs=1)  # prepares the data
        for number in range(options.rounds):
            for way in WAYS:
                folder = Path(scratch) / f"{number}-{way.replace(' ', '-')}"
                wall, training = run_sweep(way, folder, num_jobs=options.points)
                overheads[way].append((wall - training) / options.points)
                print(f"{way}: {wall:.1f} s, steps {training:.1f} s: {overheads[way][-1]:.2f} each")
    medians = {way: statistics.median(values) for way, values in overheads.items()}
    for way, median in medians.items():
        ratio = median / medians["basic launcher"]
        print(f"{way}: median {median:.2f} s a job, {ratio:.2f} of the basic launcher")


if __name__ == "__main__":
    main()

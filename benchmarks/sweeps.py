"""What a sweep costs beside the training of its points: ours, and Hydra's basic launcher.

    python benchmarks/sweeps.py --points 8 --rounds 3

Three ways take turns: ranks forked from a process that has imported everything; a fresh interpreter
for each rank (`launch.fork=false`); and `@hydra.main` with its basic launcher around the same task,
which is what one would write. Of each the wall time less the seconds of all steps, by points: what
is paid once (imports of the command, planning, the report of the sweep) is in it, evaluation too.
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

from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics, steps

ROOT = Path(__file__).resolve().parents[1]
PLAIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from llama_pretrain.config.compose import read_config, register
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.tasks import run_task

@hydra.main(config_path={str(ROOT / "conf")!r}, config_name="config", version_base="1.3")
def run(config):
    folder = RunDir(Path(HydraConfig.get().runtime.output_dir))
    return run_task(read_config(config), run_dir=folder, argv=sys.argv, origins={{}})

register()
run()
"""
WORDS = (
    "debug=smoke",
    "batch.global_batch_size=4",
    "batch.micro_batch_size=null",
    "data=text",
    f"data.paths=['{sysconfig.get_path('stdlib')}/email/*.py']",
    "data.heldout_fraction=0.1",
    "train.max_steps=20",
    "train.eval_every_steps=null",
    "checkpoint.export=false",
    "checkpoint.at_end=false",
)


def run_way(way: str, folder: Path, *, points: int) -> tuple[float, float]:
    """Seconds of a sweep, and those of all its steps."""
    folder.mkdir(parents=True)
    plain = folder / "plain.py"
    plain.write_text(PLAIN)
    program = plain if way == "basic launcher" else ROOT / "run.py"
    seeds = ",".join(str(number) for number in range(points))
    words = ["-m", *WORDS, f"seed={seeds}", f"hydra.sweep.dir={folder / 'sweep'}"]
    if way == "fresh":
        words.append("launch.fork=false")
    cache = f"data.cache_dir={folder.parent / 'cache'}"
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, str(program), *words, cache],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    wall = time.perf_counter() - began
    runs = [RunDir(path.parent) for path in (folder / "sweep").glob("*/metrics.jsonl")]
    assert len(runs) == points, runs
    return wall, sum(seconds_of_steps(run_dir) for run_dir in runs)


def seconds_of_steps(run_dir: RunDir) -> float:
    """Seconds that a run's steps took."""
    rows = steps(read_metrics(run_dir.metrics))
    return sum(row.tokens / row.step / row.tokens_per_s for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ways = ("forked", "fresh", "basic launcher")
    overheads: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as scratch:
        run_way("forked", Path(scratch) / "warm", points=1)  # prepares the data
        for number in range(options.rounds):
            for way in ways:
                folder = Path(scratch) / f"{number}-{way.replace(' ', '-')}"
                wall, steps = run_way(way, folder, points=options.points)
                overhead = (wall - steps) / options.points
                overheads[way].append(overhead)
                print(f"{way}: {wall:.1f} s, {steps:.1f} s of steps: {overhead:.2f} s a point")
    base = statistics.median(overheads["basic launcher"])
    for way in ways:
        median = statistics.median(overheads[way])
        print(f"{way}: median {median:.2f} s a point, {median / base:.2f} of the basic launcher")


if __name__ == "__main__":
    main()

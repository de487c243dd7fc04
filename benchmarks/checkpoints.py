"""The cost of a checkpoint: the stall of synchronous and of asynchronous saves.

    python benchmarks/checkpoints.py [--rounds 3] [--model 60m]

Runs take turns: without checkpoints, with synchronous and with asynchronous ones, which save every
few steps, far more often than in practice. The stall is the time that training waits for a save; an
asynchronous save also slows down the steps beside it. Shares are of the seconds of steps and saves.
"""

import argparse
import shlex
import statistics
import tempfile
from pathlib import Path

from benchmarks.record import run_ours, write_record
from llama_pretrain.runs.metrics import curve, seconds_by_step

STEPS, EVERY = 13, 4
BASE = shlex.split("""
    model.vocab_size=8192 zero=stage2 data.sequence_length=128 batch.global_batch_size=4
    batch.micro_batch_size=2 train.eval_every_steps=null train.eval_sequences=2
    checkpoint.at_end=false checkpoint.export=false monitor=none""")
ARMS = {
    "none": ["checkpoint.every_steps=null"],
    "synchronous": [f"checkpoint.every_steps={EVERY}", "checkpoint.asynchronous=false"],
    "asynchronous": [f"checkpoint.every_steps={EVERY}", "checkpoint.asynchronous=true"],
}


def train(run_dir: Path, overrides: list[str]) -> tuple[list[float], float, float]:
    """Seconds of each stall, seconds of all steps and saves, and bytes of a checkpoint."""
    rows = run_ours(run_dir, *BASE, f"train.max_steps={STEPS}", *overrides)
    stalls = [value for _, value in curve(rows, "checkpoint_stall_seconds")]
    # The first step warms up.
    steps = list(seconds_by_step(rows, tokens_per_step=4 * 128).values())[1:]
    sizes = [path.stat().st_size for path in run_dir.glob("checkpoints/step-*/*")]
    num_saves = max(1, len(list(run_dir.glob("checkpoints/step-*"))))
    return stalls, sum(steps) + sum(stalls), sum(sizes) / num_saves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="60m")
    options = parser.parse_args()
    stalls: dict[str, list[float]] = {arm: [] for arm in ARMS}
    totals: dict[str, list[float]] = {arm: [] for arm in ARMS}
    size = 0.0
    for number in range(options.rounds):
        for arm, overrides in ARMS.items():
            with tempfile.TemporaryDirectory() as scratch:
                words = [f"model={options.model}", *overrides]
                found, total, num_bytes = train(Path(scratch) / "run", words)
            stalls[arm] += found
            totals[arm].append(total)
            size = max(size, num_bytes)
            print(f"round {number + 1}, {arm}: {total:.1f} s of steps and saves", flush=True)
    print(f"a checkpoint of {options.model} has {size / 2**20:,.0f} MiB")
    shares = {}
    for arm in ("synchronous", "asynchronous"):
        stall, total = statistics.median(stalls[arm]), statistics.median(totals[arm])
        longer, num_saves = total - statistics.median(totals["none"]), len(stalls[arm])
        shares[arm] = num_saves / options.rounds * stall / total
        print(
            f"{arm}: median stall {stall:.3f} s a save, {shares[arm]:.1%} of the run; the run is"
            f" {longer / num_saves * options.rounds:.3f} s a save longer, {longer / total:.1%}"
        )
    record = {"model": options.model, "every_steps": EVERY, "bytes": size, "stalls_s": stalls}
    record |= {"steps_and_saves_s": totals, "stall_shares": shares}
    write_record("checkpoints", record, packages=("torch", "deepspeed"))


if __name__ == "__main__":
    main()

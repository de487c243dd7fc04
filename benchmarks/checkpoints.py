"""What a checkpoint costs: the stall of synchronous and asynchronous saves, side by side.

    python benchmarks/checkpoints.py [--rounds 3] [--model 60m]

Runs take turns: without checkpoints, with synchronous and with asynchronous ones. The stall is the
time that training waits for a save; the whole is what a run takes longer than one without saves,
for an asynchronous save also slows down the steps that it runs beside. Both are told as shares of
the seconds of all steps and saves, with a save every few steps, far more often than one would.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.record import ROOT, write_record
from llama_pretrain.runs.metrics import curve, read_metrics, seconds_by_step

STEPS, EVERY = 13, 4
ARMS = {
    "none": ["checkpoint.every_steps=null"],
    "synchronous": [f"checkpoint.every_steps={EVERY}", "checkpoint.asynchronous=false"],
    "asynchronous": [f"checkpoint.every_steps={EVERY}", "checkpoint.asynchronous=true"],
}


def train(folder: Path, model: str, words: list[str]) -> tuple[list[float], float, float]:
    """Seconds of stall a save, seconds of all steps and saves, and bytes of a checkpoint."""
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        f"model={model}",
        "model.vocab_size=8192",
        "zero=stage2",
        "data.sequence_length=128",
        "batch.global_batch_size=4",
        "batch.micro_batch_size=2",
        f"train.max_steps={STEPS}",
        "train.eval_every_steps=null",
        "train.eval_sequences=2",
        "checkpoint.at_end=false",
        "checkpoint.export=false",
        "monitor=none",
        f"hydra.run.dir={folder}",
        *words,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = read_metrics(folder / "metrics.jsonl")
    stalls = [value for _, value in curve(rows, "checkpoint_stall_seconds")]
    # The first step warms up.
    steps = list(seconds_by_step(rows, tokens_per_step=4 * 128).values())[1:]
    sizes = [path.stat().st_size for path in folder.glob("checkpoints/step-*/*")]
    saves = max(1, len(list(folder.glob("checkpoints/step-*"))))
    return stalls, sum(steps) + sum(stalls), sum(sizes) / saves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="60m")
    given = parser.parse_args()
    stalls: dict[str, list[float]] = {arm: [] for arm in ARMS}
    wholes: dict[str, list[float]] = {arm: [] for arm in ARMS}
    size = 0.0
    for round_number in range(given.rounds):
        for arm, words in ARMS.items():
            with tempfile.TemporaryDirectory() as scratch:
                found, whole, size_now = train(Path(scratch) / "run", given.model, words)
            stalls[arm] += found
            wholes[arm].append(whole)
            size = max(size, size_now)
            told = f"{statistics.median(found):.3f} s a save" if found else "no saves"
            print(f"round {round_number + 1} {arm}: {told}, {whole:.1f} s of steps and saves")
    print(f"a checkpoint of {given.model} has {size / 2**20:,.0f} MiB")
    medians = {arm: statistics.median(values) for arm, values in stalls.items() if values}
    shares = {}
    for arm, value in medians.items():
        whole = statistics.median(wholes[arm])
        longer = whole - statistics.median(wholes["none"])
        saves = len(stalls[arm]) // given.rounds
        shares[arm] = saves * value / whole
        print(
            f"{arm}: {value:.3f} s of stall a save (median), {shares[arm]:.1%} of the run;"
            f" {longer / saves:.3f} s in all, {longer / whole:.1%}"
        )
    ratio = medians["asynchronous"] / medians["synchronous"]
    print(f"the asynchronous stall is {ratio:.2f} of the synchronous one (bar: 0.25)")
    measured = {"stalls_s": stalls, "steps_and_saves_s": wholes, "stall_shares": shares}
    write_record(
        "checkpoints",
        {"model": given.model, "every_steps": EVERY, "bytes": size, **measured},
        packages=("torch", "deepspeed"),
    )


if __name__ == "__main__":
    main()

"""The cost of a checkpoint: the stall of synchronous and of asynchronous saves.

    python benchmarks/checkpoints.py [--rounds 3] [--model 60m]
    python benchmarks/checkpoints.py --ranks 1024

Runs take turns: without checkpoints, with synchronous and with asynchronous ones, which save every
few steps, far more often than in practice. The stall is the time that training waits for a save; an
asynchronous save also slows down the steps beside it. Shares are of the seconds of steps and saves.

With `--ranks`, the files that so many ranks of stage 3 would write, with tiny pieces, by the
functions that ranks use: the seconds of writing, verifying and reading, and how many files a rank
opens.
"""

import argparse
import json
import shlex
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import run_ours, write_record
from llama_pretrain.checkpoint.manifest import (
    INDEX,
    STATE,
    Manifest,
    checkpoint_name,
    newest_complete,
    rank_file,
    write_manifest,
)
from llama_pretrain.checkpoint.tensors import (
    WEIGHT,
    StoredState,
    build_index,
    fragment_key,
    write_and_hash,
    write_tensors,
)
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


def write_and_open(folder: Path, ranks: int, *, parameters: int = 300, numel: int = 4096) -> None:
    """Write, verify and read a checkpoint of many ranks, in this process alone."""
    names = [f"model.layers.{number}.weight" for number in range(parameters)]
    step, share = folder / checkpoint_name(1), -(-numel // ranks)
    step.mkdir(parents=True)
    began = time.perf_counter()
    sizes: list[dict[str, int]] = []
    files: dict[str, list[int | str]] = {}
    for rank in range(ranks):
        tensors = {
            fragment_key(name, kind, rank * share): torch.full((share,), float(rank))
            for name in names
            for kind in (WEIGHT, "exp_avg", "exp_avg_sq")
            if rank * share < numel
        }
        sizes.append({key: tensor.numel() for key, tensor in tensors.items()})
        files[rank_file(rank)] = list(write_tensors(step / rank_file(rank), tensors))
    state: dict[str, Any] = {"parameters": {name: [numel] for name in names}}
    for name, values in ((STATE, state), (INDEX, build_index(sizes))):
        files[name] = list(write_and_hash(step / name, [json.dumps(values).encode()]))
    write_manifest(
        step,
        Manifest(
            step=1,
            consumed_samples=0,
            global_batch_size=ranks,
            world_size=ranks,
            zero_stage=3,
            precision="fp32",
            config_hash="",
            data={},
            sample_hash="",
            files=files,
        ),
    )
    written = time.perf_counter()
    assert newest_complete(folder) == (step, [])
    verified = time.perf_counter()
    opened = []
    for rank in range(ranks):  # a resume with as many ranks
        with StoredState(step, rank=rank) as stored:
            for name in names:
                assert stored.read(name, WEIGHT, rank * share, share)[0] == rank
            opened.append(len(stored.files))
    resumed = time.perf_counter()
    with StoredState(step, rank=1) as stored:  # one with half as many
        for name in names:
            assert stored.read(name, WEIGHT, 2 * share, 2 * share).tolist()[::share] == [2, 3]
        other = len(stored.files)
    halved = time.perf_counter()
    with StoredState(step) as stored:  # an export
        for name in names:
            assert stored.weight(name)[-1] == (numel - 1) // share
    exported = time.perf_counter()
    print(f"{ranks} ranks, {len(files)} files: written in {written - began:.1f} s, verified in"
          f" {verified - written:.1f} s")  # fmt: skip
    print(f"all {ranks} resumed in {resumed - verified:.1f} s, opening {max(opened)} file each;"
          f" one of half as many in {halved - resumed:.1f} s, opening {other}")  # fmt: skip
    print(f"exported in {exported - halved:.1f} s; {exported - began:.1f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="60m")
    options = parser.parse_args()
    if options.ranks:
        with tempfile.TemporaryDirectory() as scratch:
            write_and_open(Path(scratch), options.ranks)
        return
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

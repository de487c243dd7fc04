"""Saving and loading a rank's part of a checkpoint.

A save goes to a temporary folder; when all ranks are done, rank 0 writes the manifest, renames the
folder and only then names it in `latest`. DeepSpeed itself would name it before its peers are done.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from llama_pretrain.config.schema import Run
from llama_pretrain.plan.plan import Plan
from llama_pretrain.runs.checkpoints import (
    LATEST,
    Manifest,
    checkpoint_name,
    hash_files,
    prune,
    read_manifest,
    write_manifest,
)
from llama_pretrain.runs.rundir import write_text
from llama_pretrain.train.distributed import Rank


def save_checkpoint(
    engine: Any, run: Run, plan: Plan, rank: Rank, checkpoints: Path, *, step: int, sample_hash: str
) -> str:
    """Write the checkpoint of a step; every rank calls it. Returns its name."""
    name = checkpoint_name(step)
    temporary = checkpoints / f".tmp-{name}"
    if rank.is_first and temporary.exists():  # a save that was cut short
        shutil.rmtree(temporary)
    dist.barrier()  # nobody writes before the old folder is gone
    engine.save_checkpoint(str(checkpoints), tag=temporary.name, save_latest=False)
    _save_rng(temporary, rank)
    dist.barrier()  # all files of all ranks are there
    if rank.is_first:
        assert plan.corpus is not None
        manifest = Manifest(
            step=step,
            consumed_samples=step * plan.batch.global_batch_size,
            world_size=rank.world_size,
            zero_stage=run.zero.stage,
            precision=run.precision.name.value,
            data=plan.corpus.fingerprint,
            sample_hash=sample_hash,
            files=hash_files(temporary),
        )
        write_manifest(temporary, manifest)
        final = checkpoints / name
        if final.exists():  # left by a run that was resumed before it
            shutil.rmtree(final)
        os.rename(temporary, final)
        write_text(checkpoints / LATEST, name + "\n")
        prune(checkpoints, keep_last=run.checkpoint.keep_last)
    dist.barrier()  # nobody goes on, or ends, while rank 0 may still fail
    return name


def load_checkpoint(engine: Any, folder: Path, rank: Rank) -> int:
    """Restore a checkpoint whose files the parent has verified. Returns its step."""
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:  # DeepSpeed returns None and would train from the start
        raise RuntimeError(f"DeepSpeed found nothing to load in {folder}")
    _load_rng(folder, rank)
    # The optimizer has the rate that the old schedule gave this step; a run that was made longer
    # has another one.
    scheduler = engine.lr_scheduler
    groups = zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    )
    for group, peak, factor in groups:
        group["lr"] = peak * factor(scheduler.last_epoch)
    return read_manifest(folder).step


def _rng_file(folder: Path, rank: Rank) -> Path:
    return folder / f"rng_rank{rank.index:05d}.safetensors"


def _save_rng(folder: Path, rank: Rank) -> None:
    states = {"cpu": torch.get_rng_state()}
    if rank.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(rank.device)
    save_file(states, _rng_file(folder, rank))


def _load_rng(folder: Path, rank: Rank) -> None:
    states = load_file(_rng_file(folder, rank))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and rank.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], rank.device)

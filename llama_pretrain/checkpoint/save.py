"""Save a checkpoint, all ranks together, in the background where asked."""

import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama_pretrain.checkpoint.engine_state import collect_tensors, collect_values
from llama_pretrain.checkpoint.load import CheckpointError
from llama_pretrain.checkpoint.manifest import (
    LATEST,
    Manifest,
    checkpoint_name,
    discard,
    prune,
    write_manifest,
)
from llama_pretrain.checkpoint.tensors import STATE, rank_file, write_bytes, write_tensors
from llama_pretrain.config.checkpoint import OnError
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import config_hash
from llama_pretrain.distributed import Rank, sum_over_ranks
from llama_pretrain.files import write_text
from llama_pretrain.plan.plan import Plan

Hashes = dict[str, list[int | str]]


@dataclass
class Save:
    """A checkpoint that is being written."""

    step: int
    manifest: dict[str, Any]
    started: float
    stall: float = 0.0
    """Seconds that training has waited for it."""
    files: Hashes = field(default_factory=dict)
    """What this rank has written."""
    fault: str = ""
    """Why this rank could not."""
    thread: threading.Thread | None = None

    @property
    def written(self) -> bool:
        """Whether this rank is done with it."""
        return self.thread is None or not self.thread.is_alive()


class Saver:
    """Writes checkpoints of one engine. Every rank calls each method at the same step."""

    def __init__(self, engine: Any, run: Run, plan: Plan, rank: Rank, checkpoints: Path):
        self._engine, self._run, self._plan, self._rank = engine, run, plan, rank
        self._folder = checkpoints
        self._pending: Save | None = None
        self._copies: dict[str, torch.Tensor] = {}

    @property
    def written(self) -> bool:
        """Whether this rank has written its part of a checkpoint that is not concluded yet."""
        return self._pending is not None and self._pending.written

    def begin(
        self,
        step: int,
        *,
        consumed_samples: int,
        sample_hash: str,
        progress: Mapping[str, Any],
        files: Mapping[str, bytes],
    ) -> list[dict[str, Any]]:
        """Write the checkpoint of a step. Returns lines for the metrics: of what is concluded.

        Args:
            files: more files, from rank 0.
        """
        assert self._pending is None, "the checkpoint before has to be finished first"
        started = time.perf_counter()
        assert self._plan.corpus is not None
        manifest = {
            "step": step,
            "consumed_samples": consumed_samples,
            "global_batch_size": self._plan.batch.global_batch_size,
            "world_size": self._rank.world_size,
            "zero_stage": self._run.zero.stage,
            "precision": self._run.precision.name.value,
            "config_hash": config_hash(self._run),
            "data": self._plan.corpus.fingerprint,
            "sample_hash": sample_hash,
        }
        save = Save(step=step, manifest=manifest, started=started)
        self._pending = save
        tensors = collect_tensors(self._engine, self._rank)
        values = {**collect_values(self._engine), "progress": progress}
        more = dict(files) if self._rank.is_first else {}
        more |= {STATE: json.dumps(values).encode()} if self._rank.is_first else {}
        save.fault = self._make_room(step, tensors, more)
        if save.fault:
            return self.finish()
        temporary = self._temporary(step)
        if self._run.checkpoint.asynchronous:
            self._copies = {
                key: _copy(tensor, self._copies.get(key)) for key, tensor in tensors.items()
            }
            save.thread = threading.Thread(
                target=_write, args=(save, temporary, self._rank, self._copies, more), daemon=True
            )
            save.thread.start()
            save.stall += time.perf_counter() - started
            return []
        _write(save, temporary, self._rank, tensors, more)
        return self.finish()

    def finish(self) -> list[dict[str, Any]]:
        """Wait for the checkpoint that is being written, and make it whole."""
        save = self._pending
        if save is None:
            return []
        began = time.perf_counter() if save.thread is not None else save.started
        if save.thread is not None:
            save.thread.join()
        fault = self._agree_on_faults(save)
        if fault is None:
            files: list[Any] = [None] * self._rank.world_size
            dist.all_gather_object(files, save.files)
            fault = self._conclude(
                save, {key: value for part in files for key, value in part.items()}
            )
        self._pending = None
        now = time.perf_counter()
        row: dict[str, Any] = {
            "step": save.step,
            "tokens": save.step * self._plan.steps.tokens_per_step,
        }
        if fault is None:
            row |= {
                "checkpoint": checkpoint_name(save.step),
                "checkpoint_seconds": now - save.started,
                "checkpoint_stall_seconds": save.stall + now - began,
            }
        else:
            row |= {"checkpoint_error": fault}
            if self._run.checkpoint.on_error is OnError.stop:
                raise CheckpointError(fault)
        return [row]

    def _temporary(self, step: int) -> Path:
        return self._folder / f".tmp-{checkpoint_name(step)}"

    def _make_room(
        self, step: int, tensors: Mapping[str, torch.Tensor], more: Mapping[str, bytes]
    ) -> str:
        """Make the folder, if its disk has room. Returns what is wrong; empty if nothing is."""
        mine = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        mine += sum(len(content) for content in more.values())
        (total,) = sum_over_ranks([mine], self._rank)
        fault = ""
        if self._rank.is_first:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                for torn in self._folder.glob(".tmp-*"):
                    shutil.rmtree(torn)
                free = shutil.disk_usage(self._folder).free
                if free < 1.02 * total + (1 << 14):
                    fault = (
                        f"it takes {total / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free"
                    )
                else:
                    self._temporary(step).mkdir()
            except OSError as error:
                fault = _describe(error)
        (bad,) = sum_over_ranks([float(bool(fault))], self._rank)
        return fault or ("rank 0 could not begin" if bad else "")

    def _agree_on_faults(self, save: Save) -> str | None:
        """What is wrong on any rank, told to all; `None` if nothing is."""
        (bad,) = sum_over_ranks([float(bool(save.fault))], self._rank)
        if not bad:
            return None
        faults: list[Any] = [None] * self._rank.world_size
        dist.all_gather_object(faults, save.fault)
        if self._rank.is_first:
            shutil.rmtree(self._temporary(save.step), ignore_errors=True)
        first = next(number for number, text in enumerate(faults) if text)
        return f"{checkpoint_name(save.step)} was not written: {faults[first]} (rank {first})"

    def _conclude(self, save: Save, files: Hashes) -> str | None:
        """Rank 0: manifest, rename, `latest`, and old ones away."""
        if self._rank.is_first:
            temporary, final = self._temporary(save.step), self._folder / checkpoint_name(save.step)
            try:
                write_manifest(temporary, Manifest(**save.manifest, files=files))
                if final.exists():  # left by a run that was resumed before it
                    discard(final)
                os.rename(temporary, final)
                write_text(self._folder / LATEST, final.name + "\n")
                prune(
                    self._folder,
                    keep_last=self._run.checkpoint.keep_last,
                    keep_every_steps=self._run.checkpoint.keep_every_steps,
                )
            except OSError as error:
                save.fault = _describe(error)
        return self._agree_on_faults(save)


def _copy(tensor: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    """A copy in host memory that training doesn't change.

    Args:
        into: the copy of an earlier save: new memory costs more than the copying.
    """
    if into is None:
        on_gpu = tensor.device.type == "cuda"
        into = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
    return into.copy_(tensor)


def _write(
    save: Save,
    folder: Path,
    rank: Rank,
    tensors: Mapping[str, torch.Tensor],
    more: Mapping[str, bytes],
) -> None:
    """One rank's files. What goes wrong with the disk is kept for the others."""
    try:
        save.files[rank_file(rank.index)] = list(
            write_tensors(folder / rank_file(rank.index), tensors)
        )
        for name, content in more.items():
            save.files[name] = list(write_bytes(folder / name, [content]))
    except OSError as error:
        save.fault = _describe(error)


def _describe(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"

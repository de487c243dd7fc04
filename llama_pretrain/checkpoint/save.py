"""Saves a checkpoint, all ranks together, in the background if configured."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_pretrain.checkpoint.engine_state import collect_tensors, collect_values
from llama_pretrain.checkpoint.manifest import (
    INDEX,
    LATEST,
    STATE,
    Manifest,
    checkpoint_name,
    delete_temporary,
    find_damaged_file,
    make_way,
    prune,
    rank_file,
    read_manifest,
    temporary_folder,
    write_manifest,
)
from llama_pretrain.checkpoint.tensors import build_index, write_and_hash, write_tensors
from llama_pretrain.config.checkpoint import OnError
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.snapshot import config_hash
from llama_pretrain.distributed import Rank, sum_over_ranks
from llama_pretrain.files import sync_folder, write_text
from llama_pretrain.plan.plan import TrainingPlan
from llama_pretrain.runs.metrics import CheckpointRow

Hashes = dict[str, list[int | str]]


class CheckpointError(Exception):
    """A checkpoint could not be written, and `checkpoint.on_error` is `stop`."""


@dataclass
class _Save:
    """A checkpoint that is being written."""

    step: int
    manifest: dict[str, Any]
    started: float
    stall: float = 0.0
    """Seconds that training has waited for it."""
    files: Hashes = field(default_factory=dict)
    """What this rank has written."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Numbers of elements of its tensors, by name."""
    fault: str = ""
    """Why this rank could not write."""
    thread: threading.Thread | None = None

    @property
    def written(self) -> bool:
        """Whether this rank has written its files, or failed to."""
        return self.thread is None or not self.thread.is_alive()

    @contextmanager
    def noting_faults(self) -> Iterator[None]:
        """Record whatever goes wrong in the block, for all ranks to act on."""
        try:
            yield
        except BaseException as error:  # in a thread, nothing else would notice
            self.fault = _describe(error)


class Saver:
    """Writes checkpoints of one engine. Every rank calls each method at the same step."""

    def __init__(
        self, engine: Any, run: ResolvedRun, plan: TrainingPlan, rank: Rank, checkpoints: Path
    ):
        self._engine, self._run, self._plan, self._rank = engine, run, plan, rank
        self._folder = checkpoints
        self._pending: _Save | None = None
        self._copies: dict[str, Tensor] = {}

    @property
    def written(self) -> bool:
        """Whether this rank has written its files of a checkpoint that is not finished yet."""
        return self._pending is not None and self._pending.written

    def begin(
        self,
        step: int,
        *,
        consumed_samples: int,
        sample_hash: str,
        progress: Mapping[str, Any],
        files: Mapping[str, bytes],
    ) -> list[CheckpointRow]:
        """Start the checkpoint of a step; a synchronous one is also finished.

        Args:
            files: additional files, written by rank 0.

        Returns:
            What `finish` returns, or nothing while the checkpoint is written in the background.
        """
        assert self._pending is None, "finish() the previous checkpoint first"
        started = time.perf_counter()
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
        save = self._pending = _Save(step=step, manifest=manifest, started=started)
        tensors: dict[str, Tensor] = {}
        contents: dict[str, bytes] = {}
        with save.noting_faults():
            tensors = collect_tensors(self._engine, self._rank)
            save.sizes = {key: tensor.numel() for key, tensor in tensors.items()}
            values = {**collect_values(self._engine), "progress": progress}
            if self._rank.is_first:
                contents = {**files, STATE: json.dumps(values).encode()}
        if not self._make_folder(save, tensors, contents):
            return self.finish()
        if not self._run.checkpoint.asynchronous:
            self._write(save, tensors, contents)
            return self.finish()
        with save.noting_faults():
            self._copies = {
                key: _copy(tensor, self._copies.get(key)) for key, tensor in tensors.items()
            }
            arguments = (save, self._copies, contents)
            save.thread = threading.Thread(target=self._write, args=arguments, daemon=True)
            save.thread.start()
        save.stall += time.perf_counter() - started
        return []

    def finish(self) -> list[CheckpointRow]:
        """Wait for the checkpoint that is being written and complete it, if there is one.

        Returns:
            A row for the metrics: the checkpoint, or why it was not written.

        Raises:
            CheckpointError: if it could not be written and `checkpoint.on_error` is `stop`.
        """
        save = self._pending
        if save is None:
            return []
        waited_since = save.started
        if save.thread is not None:
            waited_since = time.perf_counter()
            save.thread.join()
        fault = self._first_fault(save)
        if fault is None:
            written: list[Any] = [None] * self._rank.world_size
            everything = written if self._rank.is_first else None
            dist.gather_object((save.files, save.sizes), everything)
            fault = self._complete(save, written)
        self._pending = None
        now = time.perf_counter()
        tokens = save.step * self._plan.steps.tokens_per_step
        if fault is not None:
            if self._run.checkpoint.on_error is OnError.stop:
                raise CheckpointError(fault)
            return [CheckpointRow(step=save.step, tokens=tokens, checkpoint_error=fault)]
        return [
            CheckpointRow(
                step=save.step,
                tokens=tokens,
                checkpoint=checkpoint_name(save.step),
                checkpoint_seconds=now - save.started,
                checkpoint_stall_seconds=save.stall + now - waited_since,
            )
        ]

    def _make_folder(
        self, save: _Save, tensors: Mapping[str, Tensor], contents: Mapping[str, bytes]
    ) -> bool:
        """Create the temporary folder if its disk has room. Returns whether no rank has a fault."""
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        num_bytes += sum(len(content) for content in contents.values())
        (total,) = sum_over_ranks([num_bytes], self._rank)
        if self._rank.is_first and not save.fault:
            with save.noting_faults():
                self._folder.mkdir(parents=True, exist_ok=True)
                delete_temporary(self._folder)
                free = shutil.disk_usage(self._folder).free
                if free < 1.02 * total + (1 << 14):
                    needed = f"{total / 2**20:,.1f} MiB"
                    save.fault = f"it needs {needed} (got {free / 2**20:,.1f} MiB free)"
                else:
                    temporary_folder(self._folder, save.step).mkdir()
        (num_faults,) = sum_over_ranks([float(bool(save.fault))], self._rank)
        return not num_faults

    def _write(
        self, save: _Save, tensors: Mapping[str, Tensor], contents: Mapping[str, bytes]
    ) -> None:
        """Write this rank's files."""
        folder, name = temporary_folder(self._folder, save.step), rank_file(self._rank.index)
        with save.noting_faults():
            save.files[name] = list(write_tensors(folder / name, tensors))
            for name, content in contents.items():
                save.files[name] = list(write_and_hash(folder / name, [content]))

    def _first_fault(self, save: _Save) -> str | None:
        """The first fault of any rank, on all ranks; `None` if there is none."""
        (num_faults,) = sum_over_ranks([float(bool(save.fault))], self._rank)
        if not num_faults:
            return None
        faults: list[Any] = [None] * self._rank.world_size
        dist.all_gather_object(faults, save.fault)
        if self._rank.is_first:
            shutil.rmtree(temporary_folder(self._folder, save.step), ignore_errors=True)
        first = next(number for number, text in enumerate(faults) if text)
        return f"{checkpoint_name(save.step)} was not written: {faults[first]} (rank {first})"

    def _complete(
        self, save: _Save, written: Sequence[tuple[Hashes, dict[str, int]]]
    ) -> str | None:
        """On rank 0: write index and manifest, rename, update `latest`, delete old checkpoints.

        Nothing is deleted before the manifest and the files that it names are seen on the disk;
        each rank has flushed its own.

        Args:
            written: files and sizes of every rank's tensors, known to rank 0.
        """
        settings = self._run.checkpoint
        if self._rank.is_first:
            temporary = temporary_folder(self._folder, save.step)
            final = self._folder / checkpoint_name(save.step)
            with save.noting_faults():
                files = {key: value for hashes, _ in written for key, value in hashes.items()}
                index = json.dumps(build_index([sizes for _, sizes in written]))
                files[INDEX] = list(write_and_hash(temporary / INDEX, [index.encode()]))
                write_manifest(temporary, Manifest(**save.manifest, files=files))
                save.fault = (
                    find_damaged_file(temporary, read_manifest(temporary), hashes=False) or ""
                )
            if not save.fault:
                with save.noting_faults():
                    if final.exists():  # from before the run was resumed at an earlier step
                        make_way(final)
                    os.rename(temporary, final)
                    sync_folder(self._folder)
                    write_text(self._folder / LATEST, final.name + "\n")
                    every = settings.keep_every_steps
                    prune(self._folder, keep_last=settings.keep_last, keep_every_steps=every)
        return self._first_fault(save)


def _copy(tensor: Tensor, into: Tensor | None) -> Tensor:
    """A copy in host memory that training does not change.

    Args:
        into: the copy of an earlier save: allocating memory costs more than copying.
    """
    if into is None:
        on_gpu = tensor.device.type == "cuda"
        into = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
    return into.copy_(tensor)


def _describe(error: BaseException) -> str:
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}".rstrip(": ")
    file = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{file}"

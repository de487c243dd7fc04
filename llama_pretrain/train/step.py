"""One optimizer step: micro batches, one collective for loss and flags, and the update or skip."""

import bisect
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from llama_pretrain.checkpoint.save import Saver
from llama_pretrain.checkpoint.tensors import TRAINED_DTYPES
from llama_pretrain.config.kernels import Matmul
from llama_pretrain.config.optim import OptimName
from llama_pretrain.config.precision import AutocastDtype, PrecisionName
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.train import Spike
from llama_pretrain.data.dataset import IGNORED, PretrainDataset
from llama_pretrain.data.order import SampleOrder, hash_samples
from llama_pretrain.distributed import Rank
from llama_pretrain.plan.plan import TrainingPlan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.train.device import peak_flops
from llama_pretrain.train.engine import apply_update
from llama_pretrain.train.generation import Prompt
from llama_pretrain.train.loss import sum_of_losses
from llama_pretrain.train.progress import Progress, spike_score
from llama_pretrain.train.sequence import SequenceGroup


class Position(TypedDict):
    step: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a rank trains with."""

    run: ResolvedRun
    plan: TrainingPlan
    run_dir: RunDir
    rank: Rank
    engine: Any
    sequence: SequenceGroup | None
    """The ranks that share each sequence, if several do."""
    train_set: PretrainDataset
    heldout_set: PretrainDataset
    imports_bytes: int
    """Memory of this rank before the model was built; `framework` in the plan."""
    prompt: Prompt | None
    """The prompt of the generation after each evaluation."""

    def split(self, batch: dict[str, Tensor]) -> AbstractContextManager[dict[str, Tensor]]:
        """The part of a micro batch that this rank computes, while it does."""
        return nullcontext(batch) if self.sequence is None else self.sequence.split(batch)

    @cached_property
    def peak_flops(self) -> float | None:
        """Peak FLOP/s of this rank's device, for MFU; a CPU's is measured at the first call."""
        if self.run.train.peak_tflops is not None:
            return self.run.train.peak_tflops * 1e12
        wide = self.run.kernels.matmul is Matmul.fp32
        dtype = torch.float32 if wide else TRAINED_DTYPES[self.run.precision.name.value]
        return peak_flops(self.rank.device, dtype)

    def position(self, progress: Progress) -> Position:
        """Fields of every row of the metrics."""
        tokens = progress.step * self.plan.steps.tokens_per_step
        return {"step": progress.step, "tokens": tokens}

    def mfu(self, tokens_per_s: float) -> float | None:
        """Model FLOPs utilization (arXiv 2204.02311, appendix B)."""
        if self.peak_flops is None:
            return None
        used = self.plan.flops_per_token * tokens_per_s
        return used / (self.peak_flops * self.rank.world_size)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What ranks share once per step, so that all act on it at the same step."""

    stop: int
    """The largest signal number of any rank; 0 for none."""
    written: bool
    """Whether every rank has written its files of the pending checkpoint."""
    minutes: float
    """Time since the last checkpoint, by rank 0's clock."""
    requested: bool
    """Whether somebody has asked for a checkpoint, as rank 0 sees it."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of one optimizer step."""

    loss: float
    """Mean over the targets of the global batch, in nats."""
    grad_norm: float | None
    """Before clipping; `None` with Muon and if the step was skipped."""
    sample_hash: str
    batch: int
    """Index of its global batch."""
    skipped: str
    """Why its update was skipped: `loss`, `gradient` or `spike`; empty if it was applied."""
    spike_z: float | None
    """Of a spike: standard deviations above the mean of the window."""
    flags: Flags

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)


class NonFiniteError(ArithmeticError):
    """Losses or gradients were not finite in too many consecutive steps."""


def train_step(
    training: Training,
    batches: Iterator[dict[str, Tensor]],
    progress: Progress,
    saver: Saver,
    *,
    saved_at: float,
) -> StepResult:
    """Take one optimizer step; all ranks agree to apply or to skip it.

    Raises:
        NonFiniteError: after `train.max_nonfinite_steps` consecutive steps whose loss or gradient
            is not finite.
    """
    run, engine, rank = training.run, training.engine, training.rank
    num_micro = training.plan.batch.gradient_accumulation_steps
    loss_sum = torch.zeros((), dtype=torch.float64, device=rank.device)
    sample_hash = 0
    loss_decides = _loss_decides(engine, run)
    micro_batches = [next(batches) for _ in range(num_micro)]
    num_targets = _targets_per_micro_batch(training, micro_batches)
    index = progress.take_batch()
    first_sample = index * training.plan.batch.global_batch_size
    length = training.plan.sampling.stage_at(first_sample).sequence_length
    skipped, spike_z = "", None
    for micro, cpu_batch in enumerate(micro_batches):
        if rank.sequence_index == 0:
            sample_hash += hash_samples(cpu_batch["sample_id"].numpy())
        batch = {
            key: value.to(rank.device, non_blocking=True)
            for key, value in split_sequences(cpu_batch, length).items()
        }
        with training.split(batch) as part:
            # DeepSpeed averages gradients over micro batches and ranks. All losses are divided by
            # the same number of targets, so the result is the mean over those of the global batch.
            loss = sum_of_losses(engine, part) / num_targets
            loss_sum += loss.detach().double()
            rank.beat()
            if micro == num_micro - 1:
                # Before the last gradient: all ranks must agree on whether to skip the step.
                shared = _share(
                    training, loss_sum, sample_hash, written=saver.written, saved_at=saved_at
                )
                if loss_decides:  # reading waits for the device
                    mean, hashed, flags = _read(training, shared)
                    skipped, spike_z = _skip_reason(run, progress, mean)
                # A loss that is not finite makes the gradient NaN: DeepSpeed skips the step.
                finite = torch.isfinite(shared[0])
                loss = loss * torch.where(finite, 1.0, torch.nan).to(loss.dtype)
                if skipped:
                    loss = loss * math.nan
            engine.backward(loss)
        if micro < num_micro - 1:
            engine.step()  # counts the micro batch
        rank.beat()
    norm = apply_update(engine, skip=bool(skipped))
    if not loss_decides:
        mean, hashed, flags = _read(training, shared)
        skipped, spike_z = _skip_reason(run, progress, mean)
    if norm is None and not skipped:
        skipped = "gradient"
    progress.step += 1
    result = StepResult(
        loss=mean,
        # Muon's update has replaced the gradient by now.
        grad_norm=None if run.optim.name is OptimName.muon else norm,
        sample_hash=f"{hashed:016x}",
        batch=index,
        skipped=skipped,
        spike_z=spike_z,
        flags=flags,
    )
    _record(training, progress, result)
    return result


def _loss_decides(engine: Any, run: ResolvedRun) -> bool:
    """Whether the loss must be read before the update: for spikes, or without overflow check."""
    checked = getattr(engine.optimizer, "check_grad_overflow", True)
    return run.train.spike is not Spike.none or not checked


def _share(
    training: Training, loss_sum: Tensor, sample_hash: int, *, written: bool, saved_at: float
) -> Tensor:
    """Sum loss, hash and flags over ranks, and leave them on the device.

    In float64, so that hashes below 2^53 stay exact.
    """
    rank = training.rank
    minutes = (time.monotonic() - saved_at) / 60 if rank.is_first else 0.0
    requested = rank.is_first and training.run_dir.request.is_file()
    signals = [0.0] * rank.world_size
    signals[rank.index] = rank.stop.number
    values = [sample_hash, written, minutes, requested, *signals]
    flags = torch.tensor(values, dtype=torch.float64)
    shared = torch.cat([loss_sum[None], flags.to(rank.device, non_blocking=True)])
    dist.all_reduce(shared)
    return shared


def _read(training: Training, shared: Tensor) -> tuple[float, int, Flags]:
    """The mean loss, the hash of the global batch, and the flags of all ranks."""
    size = training.rank.world_size
    loss, sample_hash, written, minutes, requested, *signals = shared.tolist()
    mean = loss / (training.plan.batch.gradient_accumulation_steps * size)
    flags = Flags(
        stop=int(max(signals)),
        written=written == size,
        minutes=minutes,
        requested=requested > 0,
    )
    return mean, int(sample_hash), flags


def _skip_reason(run: ResolvedRun, progress: Progress, loss: float) -> tuple[str, float | None]:
    """Why a step's loss requires to skip it (empty if it does not), and the score of a spike."""
    if not math.isfinite(loss):
        return "loss", None
    if run.train.spike is Spike.none:
        return "", None
    score = spike_score(loss, progress.window, size=run.train.spike_window)
    return ("spike", score) if score > run.train.spike_z else ("", None)


def _record(training: Training, progress: Progress, result: StepResult) -> None:
    run, reason = training.run, result.skipped
    # fp16 finds its loss scale by overflows.
    autocast = run.precision.torch_autocast
    fp16 = run.precision.name is PrecisionName.fp16 or (
        autocast.enabled and autocast.dtype is AutocastDtype.float16
    )
    nonfinite = reason == "loss" or (reason == "gradient" and not fp16)
    progress.nonfinite_in_a_row = progress.nonfinite_in_a_row + 1 if nonfinite else 0
    if result.finite:
        progress.add_loss(result.loss, applied=not reason, window=run.train.spike_window)
    if progress.nonfinite_in_a_row >= run.train.max_nonfinite_steps:
        raise NonFiniteError(
            f"the {reason} of step {progress.step} is not finite (got"
            f" {progress.nonfinite_in_a_row} consecutive steps). No weight was changed."
            f" Its batch: {name_samples(training, result.batch)}"
        )


def name_samples(training: Training, batch: int, *, limit: int = 16) -> str:
    """The sequences of a global batch, by source and number."""
    size, dataset = training.plan.batch.global_batch_size, training.train_set
    order = SampleOrder(
        training.plan.sampling, num_sequences=dataset.num_sequences, seed=training.run.seed
    )
    ids = order.ids(batch * size, size).tolist()
    names, ends = training.plan.sampling.names, dataset.ends
    sequences = []
    for sample in ids[:limit]:
        source = bisect.bisect_right(ends, sample)
        number = sample - (ends[source - 1] if source else 0)
        sequences.append(f"{names[source]} sequence {number}")
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return f"samples {batch * size} to {(batch + 1) * size - 1}: {', '.join(sequences)}{more}"


def _targets_per_micro_batch(
    training: Training, micro_batches: list[dict[str, Tensor]]
) -> float | Tensor:
    """Mean number of targets of a rank's part of a micro batch; on the device if masked."""
    if not training.train_set.masked:
        return micro_batches[0]["shift_labels"].numel() / training.rank.sequence_size
    rank = training.rank
    count = sum(int((batch["shift_labels"] != IGNORED).sum()) for batch in micro_batches)
    total = torch.tensor(count, dtype=torch.float64).to(rank.device, non_blocking=True)
    dist.all_reduce(total)
    # ranks that share a sequence have all counted it
    return (total / (len(micro_batches) * rank.world_size * rank.sequence_size)).float()


def split_sequences(batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Split sequences of T tokens into shorter ones: (B, T) -> (B * T / length, length)."""
    return {
        key: value.reshape(-1, length) if value.dim() == 2 and value.shape[1] != length else value
        for key, value in batch.items()
    }

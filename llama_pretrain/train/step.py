"""One optimizer step: the micro batches, what all ranks agree on, and the update or its skip."""

import bisect
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from llama_pretrain.checkpoint.save import Saver
from llama_pretrain.config.kernels import Matmul
from llama_pretrain.config.optim import OptimName
from llama_pretrain.config.precision import AutocastDtype, PrecisionName
from llama_pretrain.config.run import Run
from llama_pretrain.config.train import Spike
from llama_pretrain.data.dataset import IGNORED, PretrainDataset
from llama_pretrain.data.order import SampleOrder, hash_samples
from llama_pretrain.distributed import Rank
from llama_pretrain.plan.plan import Plan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.train.engine import apply_update
from llama_pretrain.train.loss import sum_of_losses
from llama_pretrain.train.metrics import peak_flops
from llama_pretrain.train.progress import Progress, spike_score
from llama_pretrain.train.sample import Prompt

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a rank trains with."""

    run: Run
    plan: Plan
    run_dir: RunDir
    rank: Rank
    engine: Any
    train_set: PretrainDataset
    heldout_set: PretrainDataset
    imports_bytes: int
    """Memory of this rank before it had a model: what the plan calls framework."""
    prompt: Prompt | None
    """What the model continues after each evaluation."""

    @cached_property
    def peak_flops(self) -> float | None:
        """Of this rank's device, for MFU. A CPU is measured when it is asked for first."""
        if self.run.train.peak_tflops is not None:
            return self.run.train.peak_tflops * 1e12
        wide = self.run.kernels.matmul is Matmul.fp32
        products = torch.float32 if wide else DTYPES[self.run.precision.name.value]
        return peak_flops(self.rank.device, products)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What ranks tell each other once a step: together, they must act on it at the same one."""

    stop: int
    """A signal: the largest number of all ranks."""
    written: bool
    """Whether every rank has written the checkpoint that is under way."""
    minutes: float
    """Since the last checkpoint, on rank 0's clock."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step has come to."""

    loss: float
    """Mean over the targets of the global batch, in nats."""
    grad_norm: float | None
    """Before clipping; `None` with Muon, and where the step was skipped."""
    sample_hash: str
    batch: int
    """The number of its global batch."""
    skipped: dict[str, str | float]
    """Why its update was left out, for the metrics; empty where it was applied."""
    flags: Flags

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)

    @property
    def spiked(self) -> bool:
        return self.skipped.get("skipped") == "spike"


def train_step(
    training: Training,
    batches: Iterator[dict[str, torch.Tensor]],
    progress: Progress,
    saver: Saver,
    *,
    saved_at: float,
) -> StepResult:
    """One optimizer step, or the decision of all ranks to skip it.

    Raises:
        NonFiniteError: after too many steps in a row whose loss or gradient isn't finite.
    """
    engine, rank, batch_plan = training.engine, training.rank, training.plan.batch
    run = training.run
    loss_sum = torch.zeros((), dtype=torch.float64, device=rank.device)
    sample_hash = 0
    num_micro = batch_plan.gradient_accumulation_steps
    early = _is_judged_before(engine, run)
    micro_batches = [next(batches) for _ in range(num_micro)]
    targets = _targets_of_a_micro_batch(training, micro_batches)
    number = progress.take_batch()
    length = training.plan.sampling.stage_at(number * batch_plan.global_batch_size).sequence_length
    skipped: dict[str, str | float] = {}
    for micro, cpu_batch in enumerate(micro_batches):
        sample_hash += hash_samples(cpu_batch["sample_id"].numpy())
        batch = {
            key: value.to(rank.device, non_blocking=True)
            for key, value in cut_rows(cpu_batch, length).items()
        }
        # DeepSpeed takes the mean of the gradients over micro batches and ranks. Each is divided by
        # the same number of targets, so that is the mean over the targets of the global batch.
        loss = sum_of_losses(engine, batch) / targets
        loss_sum += loss.detach().double()
        rank.beat()
        if micro == num_micro - 1:
            # Before the last gradient: all ranks must agree on whether the step is to be skipped.
            sums = _sum_up(
                training, loss_sum, sample_hash, written=saver.written, saved_at=saved_at
            )
            if early:  # reading waits for the device
                mean, hashed, flags = _read(training, sums)
                skipped = _judge(run, progress, mean)
            # Of a loss that isn't finite the gradient never is, so that DeepSpeed skips the step.
            loss = loss * torch.where(torch.isfinite(sums[0]), 1.0, torch.nan).to(loss.dtype)
            if skipped:
                loss = loss * math.nan
        engine.backward(loss)
        if micro < num_micro - 1:
            engine.step()  # counts the micro batch
        rank.beat()
    norm = apply_update(engine, skip=bool(skipped))
    if not early:
        mean, hashed, flags = _read(training, sums)
        skipped = _judge(run, progress, mean)
    if norm is None and not skipped:
        skipped = {"skipped": "gradient"}
    progress.step += 1
    result = StepResult(
        loss=mean,
        # With Muon the gradient holds its update by then.
        grad_norm=None if run.optim.name is OptimName.muon else norm,
        sample_hash=f"{hashed:016x}",
        batch=number,
        skipped=skipped,
        flags=flags,
    )
    _count(training, progress, result)
    return result


def _is_judged_before(engine: Any, run: Run) -> bool:
    """Whether the loss decides on the step beyond being finite, or DeepSpeed wouldn't skip it."""
    return run.train.spike is not Spike.none or not getattr(
        engine.optimizer, "check_grad_overflow", True
    )


def _sum_up(
    training: Training, loss_sum: torch.Tensor, sample_hash: int, *, written: bool, saved_at: float
) -> torch.Tensor:
    """What ranks tell each other, summed and left on the device: float64, so that hashes below
    2^53 stay exact."""
    rank = training.rank
    minutes = (time.monotonic() - saved_at) / 60 if rank.is_first else 0.0
    signals = [0.0] * rank.world_size
    signals[rank.index] = rank.stop.number
    told = torch.tensor([sample_hash, float(written), minutes, *signals], dtype=torch.float64)
    sums = torch.cat([loss_sum[None], told.to(rank.device, non_blocking=True)])
    dist.all_reduce(sums)
    return sums


def _read(training: Training, sums: torch.Tensor) -> tuple[float, int, Flags]:
    """The mean loss, the hash of the global batch, and what the ranks' flags come to."""
    size = training.rank.world_size
    loss, sample_hash, written, minutes, *signals = sums.tolist()
    mean = loss / (training.plan.batch.gradient_accumulation_steps * size)
    flags = Flags(stop=int(max(signals)), written=written == size, minutes=minutes)
    return mean, int(sample_hash), flags


def _judge(run: Run, progress: Progress, loss: float) -> dict[str, str | float]:
    """Why a step must not be applied, from its loss; empty if it may."""
    if not math.isfinite(loss):
        return {"skipped": "loss"}
    if run.train.spike is Spike.none:
        return {}
    score = spike_score(loss, progress.window, size=run.train.spike_window)
    return {"skipped": "spike", "spike_z": score} if score > run.train.spike_z else {}


def _count(training: Training, progress: Progress, result: StepResult) -> None:
    run = training.run
    why = result.skipped.get("skipped")
    # fp16 finds its loss scale by overflows.
    fp16 = run.precision.name is PrecisionName.fp16 or (
        run.precision.torch_autocast.enabled
        and run.precision.torch_autocast.dtype is AutocastDtype.float16
    )
    nonfinite = why == "loss" or (why == "gradient" and not fp16)
    progress.nonfinite_in_a_row = progress.nonfinite_in_a_row + 1 if nonfinite else 0
    if result.finite:
        window = run.train.spike_window
        progress.add_loss(result.loss, applied=why is None, window=window)
    if progress.nonfinite_in_a_row >= run.train.max_nonfinite_steps:
        what = "loss" if why == "loss" else "gradient"
        raise NonFiniteError(
            f"the {what} of step {progress.step} is not finite, the {progress.nonfinite_in_a_row}."
            f" in a row; no weight was touched. Its batch: {name_samples(training, result.batch)}"
        )


class NonFiniteError(ArithmeticError):
    """Losses or gradients that aren't finite, too often for chance."""


def name_samples(training: Training, batch: int, *, limit: int = 16) -> str:
    """The rows of a global batch, by source and number."""
    size, rows_of = training.plan.batch.global_batch_size, training.train_set
    order = SampleOrder(training.plan.sampling, num_rows=rows_of.num_rows, seed=training.run.seed)
    ids = order.ids(batch * size, size).tolist()
    names, ends = training.plan.sampling.names, rows_of.ends
    said = []
    for sample in ids[:limit]:
        source = bisect.bisect_right(ends, sample)
        said.append(f"{names[source]} row {sample - (ends[source - 1] if source else 0)}")
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return f"samples {batch * size} to {(batch + 1) * size - 1}: {', '.join(said)}{more}"


def _targets_of_a_micro_batch(
    training: Training, micro_batches: list[dict[str, torch.Tensor]]
) -> float | torch.Tensor:
    """Targets of the global batch over its micro batches, on all ranks; counted, on the device."""
    if not training.train_set.masked:
        return micro_batches[0]["shift_labels"].numel()
    rank = training.rank
    count = sum(int((batch["shift_labels"] != IGNORED).sum()) for batch in micro_batches)
    total = torch.tensor(count, dtype=torch.float64).to(rank.device, non_blocking=True)
    dist.all_reduce(total)
    return (total / (len(micro_batches) * rank.world_size)).float()


def cut_rows(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Rows of T tokens as rows of `length`: (B, T) -> (B * T / length, length)."""
    return {
        key: value.reshape(-1, length) if value.dim() == 2 and value.shape[1] != length else value
        for key, value in batch.items()
    }

"""The training loop of one rank, from a step to the last."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from llama_pretrain.config.schema import OptimName, Run
from llama_pretrain.data.dataset import (
    IGNORED,
    EvalSampler,
    PretrainDataset,
    TrainSampler,
    build_loader,
    create_pretrain_dataset,
)
from llama_pretrain.data.order import SampleOrder, hash_samples
from llama_pretrain.plan.plan import Plan
from llama_pretrain.runs.rundir import RunDir
from llama_pretrain.train.checkpoint import save_checkpoint
from llama_pretrain.train.distributed import Rank, largest_over_ranks, sum_over_ranks
from llama_pretrain.train.evaluate import evaluate
from llama_pretrain.train.loss import token_losses
from llama_pretrain.train.metrics import MetricsWriter, peak_flops, peak_memory_bytes

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
    peak_flops: float | None
    """Of this rank's device, for MFU."""
    imports_bytes: int
    """Memory of this rank before it had a model: what the plan calls framework."""


def prepare_training(
    run: Run, plan: Plan, run_dir: RunDir, rank: Rank, engine: Any, *, imports_bytes: int
) -> Training:
    """Open the data and find the device's peak."""
    assert plan.corpus is not None
    assert plan.steps.eval_rows_of is not None
    corpus, peak = plan.corpus, run.train.peak_tflops
    limit = run.data.limit_train_rows

    def open_split(split: str, limits: Sequence[int | None]) -> PretrainDataset:
        return create_pretrain_dataset(
            corpus,
            split,
            sequence_length=run.data.sequence_length,
            limits=limits,
            document_mask=run.data.document_mask,
        )

    return Training(
        run=run,
        plan=plan,
        run_dir=run_dir,
        rank=rank,
        engine=engine,
        train_set=open_split("train", [limit] * len(corpus.sources)),
        heldout_set=open_split("heldout", plan.steps.eval_rows_of),
        peak_flops=peak * 1e12
        if peak is not None
        else peak_flops(rank.device, DTYPES[run.precision.name.value]),
        imports_bytes=imports_bytes,
    )


def train(training: Training, writer: MetricsWriter, *, first_step: int) -> None:
    """Train from `first_step` (steps done already) to the plan's last step."""
    run, plan, rank, engine = training.run, training.plan, training.rank, training.engine
    batches = _train_batches(training, first_step=first_step)
    if first_step == 0:
        _evaluate(training, writer, step=0)
    rates: list[float] = []
    losses: list[float] = []
    with _profiler(training) as profiler:
        for step in range(first_step + 1, plan.steps.total + 1):
            started = time.perf_counter()
            learning_rate = engine.get_lr()[0]
            loss, grad_norm, sample_hash = train_step(training, batches, step=step)
            seconds = time.perf_counter() - started
            tokens_per_s = plan.steps.tokens_per_step / seconds
            row = {
                "step": step,
                "tokens": step * plan.steps.tokens_per_step,
                "loss": loss,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "tokens_per_s": tokens_per_s,
                "mfu": _mfu(training, tokens_per_s),
                "memory_bytes": peak_memory_bytes(rank.device),
                "skipped_steps": engine.skipped_steps,
                "sample_hash": sample_hash,
            }
            writer.write(row)
            rates.append(tokens_per_s)
            losses.append(loss)
            if profiler is not None:
                profiler.step()
            last = step == plan.steps.total
            every = run.train.eval_every_steps
            if last or (every is not None and step % every == 0):
                _evaluate(training, writer, step=step)
            every = run.checkpoint.every_steps
            if run.checkpoint.at_end if last else (every is not None and step % every == 0):
                _save(training, writer, step=step, sample_hash=sample_hash)
    rate = sorted(rates)[len(rates) // 2] if rates else 0.0
    peak_bytes = peak_memory_bytes(rank.device)
    summary = {
        "step": plan.steps.total,
        "tokens": plan.steps.tokens,
        "finished": True,
        "train_loss": sum(losses[-20:]) / len(losses[-20:]) if losses else None,
        "train_loss_steps": len(losses[-20:]),
        "median_tokens_per_s": rate,
        "median_mfu": _mfu(training, rate),
        "peak_memory_bytes": largest_over_ranks(peak_bytes, rank),
        "peak_above_imports_bytes": largest_over_ranks(peak_bytes - training.imports_bytes, rank),
        "planned_memory_bytes": plan.memory.total,
    }
    writer.write(summary)


def train_step(
    training: Training, batches: Iterator[dict[str, torch.Tensor]], *, step: int
) -> tuple[float, float | None, str]:
    """One optimizer step.

    Returns the loss averaged over the global batch, the norm of its gradient before clipping
    (`None` with Muon), and a hash of the samples in it.
    """
    engine, rank, batch_plan = training.engine, training.rank, training.plan.batch
    loss_sum = torch.zeros((), dtype=torch.float64, device=rank.device)
    sample_hash = 0
    num_micro = batch_plan.gradient_accumulation_steps
    micro_batches = [next(batches) for _ in range(num_micro)]
    targets = _targets_of_a_micro_batch(training, micro_batches)
    first_sample = (step - 1) * batch_plan.global_batch_size
    length = training.plan.sampling.stage_at(first_sample).sequence_length
    for micro, cpu_batch in enumerate(micro_batches):
        sample_hash += hash_samples(cpu_batch["sample_id"].numpy())
        batch = {
            key: value.to(rank.device, non_blocking=True)
            for key, value in cut_rows(cpu_batch, length).items()
        }
        # DeepSpeed takes the mean of the gradients over micro batches and ranks. Each is divided by
        # the same number of targets, so that is the mean over the targets of the global batch.
        losses = token_losses(engine, batch)
        loss_sum += losses.detach().double().sum() / targets
        engine.backward(losses.sum() / targets)
        if micro == num_micro - 1:
            # Before the update: a loss that is no number must not touch a weight, and all ranks
            # must agree on that. Reading it waits for the device, once a step.
            total, hashed = sum_over_ranks([loss_sum.item(), sample_hash], rank)
            mean = total / (num_micro * rank.world_size)
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"the loss of step {step} is {mean}; no weight was touched"
                )
            own_norm = None if training.run.zero.stage else _plain_grad_norm(engine)
        engine.step()
    norm = engine.get_global_grad_norm()
    if norm is None:  # DeepSpeed keeps none at stage 0 in fp32
        norm = own_norm
    if training.run.optim.name is OptimName.muon:  # the gradient holds its update by then
        norm = None
    return mean, None if norm is None else float(norm), f"{int(hashed):016x}"


def _targets_of_a_micro_batch(
    training: Training, micro_batches: list[dict[str, torch.Tensor]]
) -> float:
    """Targets of the global batch over its micro batches, on all ranks."""
    if not training.train_set.masked:
        return micro_batches[0]["shift_labels"].numel()
    rank = training.rank
    count = sum(int((batch["shift_labels"] != IGNORED).sum()) for batch in micro_batches)
    (total,) = sum_over_ranks([count], rank)
    return total / (len(micro_batches) * rank.world_size)


def cut_rows(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Rows of T tokens as rows of `length`: (B, T) -> (B * T / length, length)."""
    return {
        key: value.reshape(-1, length) if value.dim() == 2 and value.shape[1] != length else value
        for key, value in batch.items()
    }


def _plain_grad_norm(engine: Any) -> float | None:
    """Norm of the gradients that stage 0 has reduced, where they are the parameters' own."""
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if not gradients:
        return None
    scaler = engine.torch_autocast_z0_gradscaler  # autocast to float16: they are scaled until step
    scale = 1.0 if scaler is None else scaler.get_scale()
    return float(torch.nn.utils.get_total_norm(gradients)) / scale


def _train_batches(training: Training, *, first_step: int) -> Iterator[dict[str, torch.Tensor]]:
    run, plan, rank = training.run, training.plan, training.rank
    order = SampleOrder(plan.sampling, num_rows=training.train_set.num_rows, seed=run.seed)
    sampler = TrainSampler(
        order=order,
        first_step=first_step,
        num_steps=plan.steps.total,
        global_batch_size=plan.batch.global_batch_size,
        rank=rank.index,
        world_size=rank.world_size,
    )
    loader = build_loader(
        training.train_set,
        sampler,
        micro_batch_size=plan.batch.micro_batch_size,
        num_workers=run.data.num_workers,
    )
    return iter(loader)


def _evaluate(training: Training, writer: MetricsWriter, *, step: int) -> None:
    plan, rank = training.plan, training.rank
    assert plan.corpus is not None
    sampler = EvalSampler(
        num_rows=len(training.heldout_set),
        micro_batch_size=plan.batch.micro_batch_size,
        rank=rank.index,
        world_size=rank.world_size,
    )
    loader = build_loader(
        training.heldout_set,
        sampler,
        micro_batch_size=plan.batch.micro_batch_size,
        num_workers=0,
    )
    result = evaluate(
        training.engine,
        loader,
        rank,
        sources=plan.corpus.sources,
        ends=training.heldout_set.ends,
    )
    writer.write({"step": step, "tokens": step * plan.steps.tokens_per_step, **result})


def _save(training: Training, writer: MetricsWriter, *, step: int, sample_hash: str) -> None:
    started = time.perf_counter()
    name = save_checkpoint(
        training.engine,
        training.run,
        training.plan,
        training.rank,
        training.run_dir.checkpoints,
        step=step,
        sample_hash=sample_hash,
    )
    row = {
        "step": step,
        "tokens": step * training.plan.steps.tokens_per_step,
        "checkpoint": name,
        "checkpoint_seconds": time.perf_counter() - started,
    }
    writer.write(row)


def _mfu(training: Training, tokens_per_s: float) -> float | None:
    if training.peak_flops is None:
        return None
    used = training.plan.flops_per_token * tokens_per_s
    return used / (training.peak_flops * training.rank.world_size)


def _profiler(training: Training) -> AbstractContextManager[Any]:
    """torch's profiler on rank 0 for `train.profile_steps` steps after two."""
    steps = training.run.train.profile_steps
    if steps == 0 or not training.rank.is_first:
        return nullcontext()
    target = training.run_dir.path / "profile"
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(target)),
    )

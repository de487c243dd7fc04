"""The training loop of one rank, from a step to the last."""

import bisect
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from llama_pretrain.config.schema import AutocastDtype, OptimName, PrecisionName, Run, Spike
from llama_pretrain.data.dataset import (
    IGNORED,
    PretrainDataset,
    TrainSampler,
    build_loader,
    create_pretrain_dataset,
)
from llama_pretrain.data.order import SampleOrder, hash_samples, stretches
from llama_pretrain.plan.plan import Plan
from llama_pretrain.runs.checkpoints import METRICS, newest_of
from llama_pretrain.runs.rundir import RunDir
from llama_pretrain.train.checkpoint import Saver, load_checkpoint
from llama_pretrain.train.distributed import Rank, largest_over_ranks, sum_over_ranks
from llama_pretrain.train.engine import apply_update
from llama_pretrain.train.evaluate import evaluate, probe_logits
from llama_pretrain.train.loss import token_losses
from llama_pretrain.train.metrics import MetricsWriter, peak_flops, peak_memory_bytes
from llama_pretrain.train.progress import Progress, spike_score

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


def train(training: Training, writer: MetricsWriter, progress: Progress) -> bool:
    """Train from where `progress` is to the plan's last step. Returns whether it got there.

    It ends before that when a signal asks it to: after the step, with a checkpoint.
    """
    run, plan, rank, engine = training.run, training.plan, training.rank, training.engine
    saver = Saver(engine, run, plan, rank, training.run_dir.checkpoints)
    batches = _train_batches(training, progress)
    rates: list[float] = []
    saved_at = time.monotonic()
    stopping = _any_rank(rank.stop.number, rank)
    if progress.evaluated < progress.step and not stopping and _evaluates(training, progress.step):
        stopping = _evaluate(training, writer, progress)
    with _profiler(training) as profiler:
        while progress.step < plan.steps.last and not stopping:
            started = time.perf_counter()
            learning_rate = engine.get_lr()[0]
            done = train_step(training, batches, progress, saver, saved_at=saved_at)
            seconds = time.perf_counter() - started
            tokens_per_s = plan.steps.tokens_per_step / seconds
            row = {
                "step": progress.step,
                "tokens": progress.step * plan.steps.tokens_per_step,
                "loss": done.loss,
                "learning_rate": learning_rate,
                "grad_norm": done.grad_norm,
                "tokens_per_s": tokens_per_s,
                "mfu": _mfu(training, tokens_per_s),
                "memory_bytes": peak_memory_bytes(rank.device),
                "skipped_steps": engine.skipped_steps,
                "sample_hash": done.sample_hash,
                **done.skipped,
            }
            if done.spiked and (line := _roll_back(training, saver, progress, done, writer)):
                batches = _train_batches(training, progress)
                writer.write(line)
                continue
            writer.write({key: value for key, value in row.items() if key != "loss" or done.finite})
            rates.append(tokens_per_s)
            if profiler is not None:
                profiler.step()
            stopping = done.flags.stop > 0
            if done.flags.written:
                writer.write_all(saver.finish())
            if _evaluates(training, progress.step) and not stopping:
                stopping = _evaluate(training, writer, progress)
            if stopping or _saves(training, progress.step, minutes=done.flags.minutes):
                _save(saver, training, progress, writer, sample_hash=done.sample_hash)
                saved_at = time.monotonic()
    writer.write_all(saver.finish())
    finished = progress.step >= plan.steps.last
    if not finished:
        number = _any_rank(rank.stop.number, rank)
        writer.write({**_place(training, progress), "preempted": signal.Signals(number).name})
        return False
    rate = sorted(rates)[len(rates) // 2] if rates else 0.0
    peak_bytes = peak_memory_bytes(rank.device)
    summary = {
        **_place(training, progress),
        "finished": True,
        "train_loss": sum(progress.recent) / len(progress.recent) if progress.recent else None,
        "train_loss_steps": len(progress.recent),
        "skipped_steps": engine.skipped_steps,
        "median_tokens_per_s": rate,
        "median_mfu": _mfu(training, rate),
        "peak_memory_bytes": largest_over_ranks(peak_bytes, rank),
        "peak_above_imports_bytes": largest_over_ranks(peak_bytes - training.imports_bytes, rank),
        "planned_memory_bytes": plan.memory.total,
    }
    writer.write(summary)
    return True


def _place(training: Training, progress: Progress) -> dict[str, int]:
    tokens = progress.step * training.plan.steps.tokens_per_step
    return {"step": progress.step, "tokens": tokens}


def _evaluates(training: Training, step: int) -> bool:
    """Whether a step is followed by an evaluation; before the first step there is one too."""
    every = training.run.train.eval_every_steps
    due = every is not None and step % every == 0
    return due or step in (0, training.plan.steps.last)


def _saves(training: Training, step: int, *, minutes: float) -> bool:
    """Whether a step is followed by a checkpoint."""
    settings = training.run.checkpoint
    if step == training.plan.steps.last:
        return settings.at_end or settings.export  # an export is made of a checkpoint
    by_steps = settings.every_steps is not None and step % settings.every_steps == 0
    return by_steps or (settings.every_minutes is not None and minutes >= settings.every_minutes)


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
        loss = token_losses(engine, batch).sum() / targets
        loss_sum += loss.detach().double()
        rank.beat()
        if micro == num_micro - 1:
            # Before the last gradient: all ranks must agree on whether the step is to be skipped.
            # Reading the loss waits for the device, once a step.
            mean, hashed, flags = _agree(
                training, loss_sum.item(), sample_hash, written=saver.written, saved_at=saved_at
            )
            skipped = _judge(run, progress, mean)
            if skipped:
                loss = loss * math.nan
        engine.backward(loss)
        if micro < num_micro - 1:
            engine.step()  # counts the micro batch
        rank.beat()
    norm = apply_update(engine, skip=bool(skipped))
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


def _agree(
    training: Training, loss_sum: float, sample_hash: int, *, written: bool, saved_at: float
) -> tuple[float, int, Flags]:
    """The mean loss, the hash of the global batch, and what the ranks' flags come to."""
    rank = training.rank
    minutes = (time.monotonic() - saved_at) / 60 if rank.is_first else 0.0
    signals = [0.0] * rank.world_size
    signals[rank.index] = rank.stop.number
    sums = sum_over_ranks([loss_sum, sample_hash, float(written), minutes, *signals], rank)
    mean = sums[0] / (training.plan.batch.gradient_accumulation_steps * rank.world_size)
    every = sums[2] == rank.world_size
    return mean, int(sums[1]), Flags(stop=int(max(sums[4:])), written=every, minutes=sums[3])


def _any_rank(number: int, rank: Rank) -> int:
    """The largest of one signal number a rank."""
    return int(largest_over_ranks(number, rank))


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


def _roll_back(
    training: Training, saver: Saver, progress: Progress, done: StepResult, writer: MetricsWriter
) -> dict[str, Any] | None:
    """Go back to the newest checkpoint and leave out the batches of a spike.

    Returns a line for the metrics; `None` where the step was only skipped, for want of a
    checkpoint or of another policy.
    """
    run, rank = training.run, training.rank
    if run.train.spike is not Spike.rollback:
        return None
    writer.write_all(saver.finish())
    folder = newest_of(training.run_dir.checkpoints)
    if folder is None:
        return None
    spiked, step = done.batch, progress.step
    restored = Progress(**load_checkpoint(training.engine, folder, rank))
    first = max(restored.next_batch, spiked - run.train.spike_batches + 1)
    out = [number for number in range(first, spiked + 1) if number not in progress.left_out]
    for name in vars(restored):
        setattr(progress, name, getattr(restored, name))
    progress.left_out = sorted({*progress.left_out, *out})
    progress.rollbacks += 1
    return {
        **_place(training, progress),
        "rolled_back_from": step,
        "spike_loss": done.loss,
        "spike_z": done.skipped["spike_z"],
        "left_out_batches": out,
    }


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


def _train_batches(training: Training, progress: Progress) -> Iterator[dict[str, torch.Tensor]]:
    run, plan, rank = training.run, training.plan, training.rank
    order = SampleOrder(plan.sampling, num_rows=training.train_set.num_rows, seed=run.seed)
    todo = plan.steps.last - progress.step
    sampler = TrainSampler(
        order=order,
        batches=stretches(progress.next_batch, todo, left_out=progress.left_out),
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


def _evaluate(training: Training, writer: MetricsWriter, progress: Progress) -> bool:
    """Evaluate a step. Returns whether a signal has cut it short."""
    plan, rank = training.plan, training.rank
    assert plan.corpus is not None
    result = evaluate(
        training.engine,
        training.heldout_set,
        rank,
        micro_batch_size=plan.batch.micro_batch_size,
        sources=plan.corpus.sources,
    )
    if result is None:
        return True
    progress.evaluated = progress.step
    writer.write({**_place(training, progress), **result})
    return False


def _save(
    saver: Saver,
    training: Training,
    progress: Progress,
    writer: MetricsWriter,
    *,
    sample_hash: str,
) -> None:
    writer.write_all(saver.finish())  # of the checkpoint before this one
    metrics = training.run_dir.metrics
    files = {
        METRICS: metrics.read_bytes() if training.rank.is_first else b"",
        "config.json": training.engine.module.config.to_json_string(use_diff=False).encode(),
        **probe_logits(training.engine, training.heldout_set, training.rank),
    }
    rows = saver.begin(
        progress.step,
        consumed_samples=progress.next_batch * training.plan.batch.global_batch_size,
        sample_hash=sample_hash,
        progress=progress.to_json(),
        files=files,
    )
    writer.write_all(rows)


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

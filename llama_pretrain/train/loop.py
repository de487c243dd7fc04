"""The training loop of one rank."""

import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch

from llama_pretrain.checkpoint.engine_state import load_checkpoint
from llama_pretrain.checkpoint.manifest import METRICS, newest_of, read_manifest
from llama_pretrain.checkpoint.save import Saver
from llama_pretrain.config.train import Spike
from llama_pretrain.data.loader import TrainSampler, build_loader
from llama_pretrain.data.order import SampleOrder, stretches
from llama_pretrain.distributed import largest_over_ranks, signal_of_any
from llama_pretrain.runs.metrics import (
    EventRow,
    RollbackRow,
    SampleRow,
    StepRow,
    SummaryRow,
    read_metrics,
    steps,
)
from llama_pretrain.train.device import compile_seconds, peak_memory_bytes
from llama_pretrain.train.evaluate import probe_logits, sum_losses
from llama_pretrain.train.generation import generate_with_engine
from llama_pretrain.train.metrics import MetricsWriter
from llama_pretrain.train.progress import MAX_ROLLBACKS, Progress
from llama_pretrain.train.step import Flags, NonFiniteError, StepResult, Training, train_step

UNTRAINED_TOKENS = 8
"""Maximum length of the generation before the first step, in tokens."""


def train(training: Training, writer: MetricsWriter, progress: Progress) -> bool:
    """Train from `progress` to the plan's last step. Returns whether it was reached.

    A signal ends training after the current step, with a checkpoint.
    """
    run, plan, rank, engine = training.run, training.plan, training.rank, training.engine
    saver = Saver(engine, run, plan, rank, training.run_dir.checkpoints)
    batches = _train_batches(training, progress)
    first = True
    saved_at = time.monotonic()

    # Before the first step, and after a resume if the evaluation was interrupted.
    stopping = signal_of_any(rank) > 0
    if progress.evaluated < progress.step and not stopping and _evaluates(training, progress.step):
        stopping = not _evaluate(training, writer, progress)
        rank.phases.end("evaluation", compiling=compile_seconds())
    compiled = compile_seconds()

    with _profiler(training) as profiler:
        while progress.step < plan.steps.last and not stopping:
            started = time.perf_counter()
            learning_rate = engine.get_lr()[0]
            try:
                result = train_step(training, batches, progress, saver, saved_at=saved_at)
            except NonFiniteError:  # on all ranks, at the same step
                writer.write_all(saver.finish())
                raise
            seconds = time.perf_counter() - started
            if first:
                rank.phases.end("first_step", compiling=compile_seconds() - compiled)

            # Metrics, or a rollback, which takes the step back.
            tokens_per_s = plan.steps.tokens_per_step / seconds
            row = StepRow(
                **training.position(progress),
                loss=result.loss if result.finite else None,
                learning_rate=learning_rate,
                grad_norm=result.grad_norm,
                tokens_per_s=tokens_per_s,
                mfu=training.mfu(tokens_per_s),
                memory_bytes=peak_memory_bytes(rank.device),
                skipped_steps=engine.skipped_steps,
                sample_hash=result.sample_hash,
                skipped=result.skipped,
                spike_z=result.spike_z,
            )
            if result.skipped == "spike":
                rollback = _roll_back(training, saver, progress, result, writer)
                if rollback is not None:
                    batches = _train_batches(training, progress)
                    writer.write(rollback)
                    continue
            writer.write(row)
            if first:
                seconds_of = rank.phases.describe()
                writer.write(EventRow(**training.position(progress), start_seconds=seconds_of))
                first = False
            if profiler is not None:
                profiler.step()

            # Evaluation and checkpoint.
            stopping = result.flags.stop > 0
            if result.flags.written:
                writer.write_all(saver.finish())
            if _evaluates(training, progress.step) and not stopping:
                stopping = not _evaluate(training, writer, progress)
            if stopping or _saves(training, progress.step, result.flags):
                _save(saver, training, progress, writer, sample_hash=result.sample_hash)
                saved_at = time.monotonic()

    writer.write_all(saver.finish())
    finished = progress.step >= plan.steps.last and progress.evaluated == progress.step
    if not finished:  # a signal may interrupt the last evaluation too
        name = signal.Signals(signal_of_any(rank)).name
        writer.write(EventRow(**training.position(progress), preempted=name))
        return False
    writer.write(_summarize(training, progress))
    return True


def _summarize(training: Training, progress: Progress) -> SummaryRow:
    """The last row of a complete run, over all its launches."""
    rank = training.rank
    done = steps(read_metrics(training.run_dir.metrics)) if rank.is_first else []
    rates = sorted(step.tokens_per_s for step in done)
    rate = rates[len(rates) // 2] if rates else 0.0
    # Of earlier launches only rank 0's peak is known.
    peak_bytes = max([peak_memory_bytes(rank.device), *(step.memory_bytes for step in done)])
    return SummaryRow(
        **training.position(progress),
        finished=True,
        train_loss=sum(progress.recent) / len(progress.recent) if progress.recent else None,
        train_loss_steps=len(progress.recent),
        skipped_steps=training.engine.skipped_steps,
        median_tokens_per_s=rate,
        median_mfu=training.mfu(rate),
        peak_memory_bytes=largest_over_ranks(peak_bytes, rank),
        peak_above_imports_bytes=largest_over_ranks(peak_bytes - training.imports_bytes, rank),
        planned_memory_bytes=training.plan.memory.total,
    )


def _evaluates(training: Training, step: int) -> bool:
    """Whether an evaluation follows a step; one also precedes the first step."""
    every = training.run.train.eval_every_steps
    due = every is not None and step % every == 0
    return due or step in (0, training.plan.steps.last)


def _saves(training: Training, step: int, flags: Flags) -> bool:
    """Whether a checkpoint follows a step."""
    settings, minutes = training.run.checkpoint, flags.minutes
    if flags.requested:
        return True
    if step == training.plan.steps.last:
        return settings.at_end or settings.export  # an export requires a checkpoint
    by_steps = settings.every_steps is not None and step % settings.every_steps == 0
    return by_steps or (settings.every_minutes is not None and minutes >= settings.every_minutes)


def _roll_back(
    training: Training, saver: Saver, progress: Progress, spike: StepResult, writer: MetricsWriter
) -> RollbackRow | None:
    """Return to the newest checkpoint and exclude the batches of a spike.

    `None` if the step is only skipped: because of `train.spike`, because there is no checkpoint, or
    because too many rollbacks to the same checkpoint have not helped.
    """
    run, rank = training.run, training.rank
    if run.train.spike is not Spike.rollback:
        return None
    writer.write_all(saver.finish())
    folder = newest_of(training.run_dir.checkpoints)
    if folder is None or progress.rollbacks.count(read_manifest(folder).step) >= MAX_ROLLBACKS:
        return None
    step = progress.step
    restored = Progress(**load_checkpoint(training.engine, folder, rank))
    excluded = progress.roll_back(
        restored, spike_batch=spike.batch, num_batches=run.train.spike_batches
    )
    return RollbackRow(
        **training.position(progress),
        rolled_back_from=step,
        spike_loss=spike.loss,
        spike_z=spike.spike_z or 0.0,
        skipped_batches=excluded,
    )


def _train_batches(training: Training, progress: Progress) -> Iterator[dict[str, torch.Tensor]]:
    run, plan, rank = training.run, training.plan, training.rank
    num_steps = plan.steps.last - progress.step
    sampler = TrainSampler(
        order=SampleOrder(
            plan.sampling, num_sequences=training.train_set.num_sequences, seed=run.seed
        ),
        batches=stretches(progress.next_batch, num_steps, left_out=progress.left_out),
        global_batch_size=plan.batch.global_batch_size,
        rank=rank.data_index,
        world_size=rank.data_size,
    )
    size, workers = plan.batch.micro_batch_size, run.data.num_workers
    return iter(
        build_loader(training.train_set, sampler, micro_batch_size=size, num_workers=workers)
    )


def _evaluate(training: Training, writer: MetricsWriter, progress: Progress) -> bool:
    """Evaluate and generate text. Returns false if a signal has interrupted it.

    Both results are written or neither: a resumed run repeats both.
    """
    rank, prompt = training.rank, training.prompt
    if prompt is not None and progress.step == 0:
        prompt = replace(prompt, num_tokens=min(prompt.num_tokens, UNTRAINED_TOKENS))
    losses = sum_losses(
        training.engine, training.heldout_set, training.plan, rank, training.sequence
    )
    text = None
    if losses is not None and prompt is not None:
        text = generate_with_engine(training.engine, prompt, rank)
    if losses is None or (prompt is not None and text is None):
        return False
    progress.evaluated = progress.step
    position = training.position(progress)
    writer.write(losses.to_row(**position))
    if prompt is not None and text is not None:
        writer.write_sample(SampleRow(**position, prompt=prompt.text, text=text))
    return True


def _save(
    saver: Saver, training: Training, progress: Progress, writer: MetricsWriter, *, sample_hash: str
) -> None:
    writer.write_all(saver.finish())  # the previous checkpoint
    if training.rank.is_first:
        with suppress(OSError):
            training.run_dir.request.unlink()
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


def _profiler(training: Training) -> AbstractContextManager[Any]:
    """torch's profiler on rank 0, for `train.profile_steps` steps after the first two."""
    steps = training.run.train.profile_steps
    if steps == 0 or not training.rank.is_first:
        return nullcontext()
    target = training.run_dir.path / "profile"
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(target)),
    )

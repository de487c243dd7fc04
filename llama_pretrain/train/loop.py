"""The training loop of one rank, from a step to the last."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from llama_pretrain.checkpoint.load import load_checkpoint
from llama_pretrain.checkpoint.manifest import METRICS, newest_of, read_manifest
from llama_pretrain.checkpoint.save import Saver
from llama_pretrain.config.run import Run
from llama_pretrain.config.train import Spike
from llama_pretrain.data.dataset import (
    PretrainDataset,
    TrainSampler,
    build_loader,
    create_pretrain_dataset,
)
from llama_pretrain.data.order import SampleOrder, stretches
from llama_pretrain.distributed import Rank, largest_over_ranks, signal_of_any
from llama_pretrain.plan.plan import Plan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.train.evaluate import evaluate, probe_logits
from llama_pretrain.train.metrics import (
    MetricsWriter,
    compile_seconds,
    peak_memory_bytes,
)
from llama_pretrain.train.progress import MAX_ROLLBACKS, Progress
from llama_pretrain.train.sample import continue_with_engine, open_prompt
from llama_pretrain.train.step import NonFiniteError, StepResult, Training, train_step

UNTRAINED_TOKENS = 8
"""Tokens of the sample before the first step, at most: it shows that there will be others."""


def prepare_training(
    run: Run, plan: Plan, run_dir: RunDir, rank: Rank, engine: Any, *, imports_bytes: int
) -> Training:
    """Open the data and the prompt."""
    assert plan.corpus is not None
    assert plan.steps.eval_rows_of is not None
    corpus = plan.corpus
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
        imports_bytes=imports_bytes,
        prompt=open_prompt(run, plan, run_dir),
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
    stopping = signal_of_any(rank)
    if progress.evaluated < progress.step and not stopping and _evaluates(training, progress.step):
        stopping = _evaluate(training, writer, progress)
        rank.phases.end("evaluation", compiling=compile_seconds())
    compiled = compile_seconds()
    with _profiler(training) as profiler:
        while progress.step < plan.steps.last and not stopping:
            started = time.perf_counter()
            learning_rate = engine.get_lr()[0]
            try:
                done = train_step(training, batches, progress, saver, saved_at=saved_at)
            except NonFiniteError:  # on all ranks, at the same step
                writer.write_all(saver.finish())
                raise
            seconds = time.perf_counter() - started
            if not rates:
                rank.phases.end("first_step", compiling=compile_seconds() - compiled)
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
            if not rates:
                start = rank.phases.describe()
                writer.write({**_place(training, progress), "start_seconds": start})
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
    finished = progress.step >= plan.steps.last and progress.evaluated == progress.step
    if not finished:  # a signal may also cut the last evaluation
        number = signal_of_any(rank)
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


def _roll_back(
    training: Training, saver: Saver, progress: Progress, done: StepResult, writer: MetricsWriter
) -> dict[str, Any] | None:
    """Go back to the newest checkpoint and leave out the batches of a spike.

    Returns a line for the metrics; `None` where the step was only skipped: by the policy, for want
    of a checkpoint, or because the same one has not helped before.
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
    out = progress.go_back(restored, spiked=done.batch, batches=run.train.spike_batches)
    return {
        **_place(training, progress),
        "rolled_back_from": step,
        "spike_loss": done.loss,
        "spike_z": done.skipped["spike_z"],
        "left_out_batches": out,
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
    """Evaluate a step, and let the model write. Returns whether a signal has cut it short.

    Neither is kept without the other: a resumed run does both again.
    """
    plan, rank, prompt = training.plan, training.rank, training.prompt
    assert plan.corpus is not None
    if prompt is not None and progress.step == 0:
        prompt = replace(prompt, num_tokens=min(prompt.num_tokens, UNTRAINED_TOKENS))
    result = evaluate(
        training.engine,
        training.heldout_set,
        rank,
        micro_batch_size=plan.batch.micro_batch_size,
        sources=plan.corpus.sources,
    )
    text = None
    if result is not None and prompt is not None:
        text = continue_with_engine(training.engine, prompt, rank)
    if result is None or (prompt is not None and text is None):
        return True
    progress.evaluated = progress.step
    place = _place(training, progress)
    writer.write({**place, **result})
    if prompt is not None and text is not None:
        writer.write_sample({**place, "prompt": prompt.text, "text": text})
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

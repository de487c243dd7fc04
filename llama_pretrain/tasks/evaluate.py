"""task=evaluate: the loss of a checkpoint on the eval set."""

import os
from dataclasses import replace

from llama_pretrain import console
from llama_pretrain.config.data import DataName
from llama_pretrain.config.deepspeed import DeepSpeed
from llama_pretrain.config.monitor import Monitor
from llama_pretrain.config.optim import Optim, OptimName
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import render_snapshot
from llama_pretrain.config.zero import OffloadOptimizer
from llama_pretrain.files import write_json, write_text
from llama_pretrain.launch.local import launch, preload
from llama_pretrain.launch.signals import Preempted
from llama_pretrain.launch.spec import LaunchSpec
from llama_pretrain.plan.ds_config import get_eval_ds_config
from llama_pretrain.plan.feasible import validate_machine
from llama_pretrain.plan.plan import TrainingPlan, build_training_plan, render_plan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import evaluations, read_metrics
from llama_pretrain.tasks.context import TaskContext
from llama_pretrain.tasks.export import pick_checkpoint
from llama_pretrain.tasks.prepare import prepare_data

SPLIT = (DataName.text, DataName.megatron, DataName.tokens)
"""Data in files, of which a run holds out a part."""


def evaluate(run: ResolvedRun, before: Run, source: RunDir, context: TaskContext) -> float:
    """Evaluate a checkpoint of `source` with all ranks. Returns the loss in nats a token.

    Files named with `data.paths`, in place of the run's own, are the eval set as a whole.

    Args:
        before: the config that the run was trained with.

    Raises:
        UserError: for what can be known before a worker starts.
        RankError: if a rank failed.
    """
    refuse(validate_machine(_without_training(run), context.machine))
    checkpoint = pick_checkpoint(run, source)
    data, was = run.data, before.data
    if data.paths != was.paths and data.name in SPLIT and not data.heldout_paths:
        run = replace(run, data=replace(data, heldout_paths=data.paths))
    preload(run)
    run_dir = context.run_dir
    corpus = prepare_data(run, run_dir)
    if run.data.hash not in (None, corpus.content_hash):
        message = f"the data and its tokenizer are now {corpus.content_hash[:16]}"
        message += f" (got {str(run.data.hash)[:16]})"
        hint = "To evaluate on them anyway, set data.hash=null"
        raise UserError([Problem(path="data.hash", message=message, hint=hint)])
    plan = build_training_plan(run, corpus)
    _write_run_dir(run, plan, run_dir)
    ranks = f"{plan.world_size} rank{'s' if plan.world_size > 1 else ''}"
    console.say(
        f"evaluating {checkpoint.name} on {plan.steps.eval_sequences:,} sequences with {ranks}"
    )
    late_signal = launch(LaunchSpec(run, plan, run_dir, checkpoint), report=console.say)
    (row,) = evaluations(read_metrics(run_dir.metrics))
    console.show_evaluation(row, run_dir)
    if late_signal:  # a sweep must not continue
        raise Preempted(late_signal)
    return row.eval_loss


def _without_training(run: ResolvedRun) -> ResolvedRun:
    """What an evaluation needs of a machine."""
    return replace(
        run,
        optim=Optim(name=OptimName.torch_adamw),
        zero=replace(run.zero, offload_optimizer=OffloadOptimizer()),
        monitor=Monitor(tensorboard=False),
        deepspeed=DeepSpeed(),
    )


def _write_run_dir(run: ResolvedRun, plan: TrainingPlan, run_dir: RunDir) -> None:
    """Write everything that the workers of an evaluation read.

    Raises:
        UserError: if the directory is used.
    """
    if run_dir.snapshot.exists():
        message = f"{run_dir.path} is already used"
        hint = "Remove it, or name a directory that does not exist"
        raise UserError([Problem(path="hydra.run.dir", message=message, hint=hint)])
    config = get_eval_ds_config(run, micro_batch_size=plan.batch.micro_batch_size)
    write_json(run_dir.ds_config, config)
    write_text(run_dir.plan, render_plan(plan))
    write_text(run_dir.snapshot, render_snapshot(run))
    os.makedirs(run_dir.ranks, exist_ok=True)

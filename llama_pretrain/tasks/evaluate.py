"""task=evaluate: the loss of a checkpoint on held-out text."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_pretrain import console
from llama_pretrain.config.data import DataName
from llama_pretrain.config.deepspeed import DeepSpeed
from llama_pretrain.config.monitor import Monitor
from llama_pretrain.config.optim import Optim, OptimName
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import render_snapshot
from llama_pretrain.config.zero import Zero
from llama_pretrain.files import write_text
from llama_pretrain.launch.forks import ForkServers
from llama_pretrain.launch.local import launch
from llama_pretrain.launch.signals import Preempted
from llama_pretrain.plan.ds_config import get_eval_ds_config
from llama_pretrain.plan.feasible import check_machine
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.plan import Plan, build_plan, render_plan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics
from llama_pretrain.tasks.export import pick_checkpoint

SPLIT = (DataName.text, DataName.megatron, DataName.tokens)
"""Data in files, of which a run holds a part out."""


def evaluate(run: Run, before: Run, source: RunDir, run_dir: RunDir) -> float:
    """Evaluate a checkpoint on held-out text with ranks. Returns the loss in nats a token.

    Files named with `data.paths`, in place of the run's own, are held out whole.

    Raises:
        UserError: for what can be known before a rank starts.
        RankError: if a rank failed.
    """
    refuse(check_machine(_without_training(run), detect_machine()))
    checkpoint = pick_checkpoint(run, source)
    data, was = run.data, before.data
    if data.paths != was.paths and data.name in SPLIT and not data.heldout_paths:
        run = replace(run, data=replace(data, heldout_paths=data.paths))
    with ForkServers(label=str(run_dir.path)) as forks:
        forks.warm_up(run)
        return _evaluate(run, checkpoint, run_dir, forks=forks)


def _evaluate(run: Run, checkpoint: Path, run_dir: RunDir, *, forks: ForkServers) -> float:
    corpus = _prepare(run)
    if run.data.hash not in (None, corpus.content_hash):
        message = f"the data and its tokenizer are {corpus.content_hash[:16]} now"
        message += f" (got {str(run.data.hash)[:16]})"
        hint = "to evaluate on them all the same, set data.hash=null"
        raise UserError([Problem(path="data.hash", message=message, hint=hint)])
    plan = build_plan(run, corpus)
    write_evaluation(run, plan, run_dir)
    rows = plan.steps.eval_rows
    ranks = f"{plan.world_size} rank{'s' if plan.world_size > 1 else ''}"
    console.say(f"evaluating {checkpoint.name} on {rows:,} rows with {ranks}")
    late = launch(run, plan, run_dir, checkpoint=checkpoint, report=console.say, forks=forks)
    row = read_metrics(run_dir.metrics)[-1]
    console.show_evaluation(row, run_dir)
    if late:  # a sweep must not go on
        raise Preempted(late)
    return float(row["eval_loss"])


def _without_training(run: Run) -> Run:
    """What of a run its evaluation asks of a machine."""
    return replace(
        run,
        optim=Optim(name=OptimName.torch_adamw),
        zero=Zero(stage=run.zero.stage, offload_param=run.zero.offload_param),
        monitor=Monitor(tensorboard=False),
        deepspeed=DeepSpeed(),
    )


def _prepare(run: Run) -> Any:
    """The tokens to evaluate on, made or found."""
    from llama_pretrain.data.cache import disk_problems
    from llama_pretrain.data.corpus import prepare_corpus  # tokenizers

    with disk_problems(run.data.cache_dir):
        return prepare_corpus(run, report=console.DataReport())


def write_evaluation(run: Run, plan: Plan, run_dir: RunDir) -> None:
    """Write everything that the ranks of an evaluation read.

    Raises:
        UserError: if the folder has been used.
    """
    if run_dir.snapshot.exists():
        message = f"{run_dir.path} has been used already"
        hint = "leave it out, or name a folder that isn't there"
        raise UserError([Problem(path="hydra.run.dir", message=message, hint=hint)])
    config = get_eval_ds_config(
        run, micro_batch_size=plan.batch.micro_batch_size, world_size=plan.world_size
    )
    write_text(run_dir.ds_config, json.dumps(config, indent=2) + "\n")
    write_text(run_dir.plan, render_plan(plan))
    write_text(run_dir.snapshot, render_snapshot(run))
    os.makedirs(run_dir.ranks, exist_ok=True)

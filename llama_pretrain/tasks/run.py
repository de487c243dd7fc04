"""Run the task that the config names."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from llama_pretrain import console
from llama_pretrain.config.ignored import find_ignored
from llama_pretrain.config.problems import Problem, refuse
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import load_snapshot, to_plain
from llama_pretrain.config.tasks import Task
from llama_pretrain.config.validate import flatten
from llama_pretrain.launch.local import preload, quiet_torch
from llama_pretrain.plan.ds_config import get_train_ds_config, trace_ds_config
from llama_pretrain.plan.nodes import master_of, node_rank, submits_job
from llama_pretrain.plan.plan import (
    Corpus,
    build_plan,
    build_training_plan,
    validate_corpus,
    validate_memory,
)
from llama_pretrain.plan.resolve import describe_choices
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.tasks.context import TaskContext
from llama_pretrain.tasks.evaluate import evaluate
from llama_pretrain.tasks.export import export, pick_checkpoint
from llama_pretrain.tasks.generate import generate
from llama_pretrain.tasks.plan import show_plan
from llama_pretrain.tasks.prepare import prepare_data
from llama_pretrain.tasks.pretrain import pretrain
from llama_pretrain.tasks.probe import probe
from llama_pretrain.tasks.reproduce import find_reproduction
from llama_pretrain.tasks.submit import submit_run
from llama_pretrain.tasks.validate import resolve_valid
from llama_pretrain.tasks.verify_resume import verify_resume

READ_BY = {
    Task.export: ("export",),
    Task.generate: ("generate", "seed", "launch.device"),
    Task.evaluate: (
        "export.checkpoint",
        "train.eval_sequences",
        "data",
        "tokenizer",
        "batch",
        "zero",
        "precision",
        "launch",
    ),
}
"""Settings that each task on an existing run reads; all others are as in its snapshot."""
FOLLOWS = (
    "task",
    "of_run",
    "launch.threads_per_process",
    "launch.bind_cores",
    "launch.device_memory",
)
"""Settings that differ from the run's snapshot although nobody set them."""


def run_task(run: Run, context: TaskContext) -> float | None:
    """Do what `task` says. Returns the last evaluation loss.

    Raises:
        UserError: for everything that can be known before a worker starts.
        RankError: if a rank failed.
    """
    if run.task.trains and submits_job(run.launch):
        submit_run(run, context)
        return None
    resolved = resolve_valid(run, context.machine)
    origins = {**context.origins, **describe_choices(run, resolved)}
    context = replace(context, origins=origins)
    console.show_warnings(find_ignored(resolved, origins))
    if resolved.task is Task.plan:
        show_plan(resolved, context)
        return None
    if resolved.task.reads_a_run:
        return _work_on_existing(resolved, context)
    refuse(validate_memory(resolved, build_plan(resolved)))
    if resolved.task.trains:
        preload(resolved)
        if node := node_rank(resolved.launch):
            join(resolved, node)
    corpus = prepare_data(resolved, context.run_dir)
    if not resolved.task.trains:
        console.show_corpus(resolved, build_training_plan(resolved, corpus))
        return None
    return train(resolved, corpus, context)


def join(run: ResolvedRun, node: int) -> NoReturn:
    """Be a node other than node 0 of a run that is started by the same command on every node.

    Raises:
        SystemExit: with the code of node 0.
    """
    with quiet_torch():
        from llama_pretrain.launch.agent import serve

    host, port = master_of(run.launch)
    if host is None:
        raise ValueError("the rules of launch.master let this pass")
    sys.exit(serve(node, (host, port), run.launch, report=console.say))


def train(run: ResolvedRun, corpus: Corpus, context: TaskContext) -> float | None:
    """Plan a run on its data and train it: as a whole, a few steps, or to verify a resume.

    Raises:
        UserError: if it may not train on this data.
        RankError: if a rank failed.
    """
    plan = build_training_plan(run, corpus)
    # Before other data is refused: in a reproduction that is drift.
    pretrains = run.task is Task.pretrain
    reproduction = find_reproduction(run, plan, context) if pretrains else None
    refuse(validate_corpus(run, plan))
    config = get_train_ds_config(run, plan.batch, run_dir=context.run_dir.path)
    plan = replace(plan, deepspeed_sources=trace_ds_config(config, context.origins))
    if run.task is Task.verify_resume:
        verify_resume(run, plan, context)
        return None
    if run.task is Task.probe:
        return probe(run, plan, context)
    return pretrain(run, plan, context, reproduction=reproduction)


def _work_on_existing(run: ResolvedRun, context: TaskContext) -> float | None:
    """task=export, evaluate or generate. Returns the evaluation loss.

    Raises:
        UserError: if the run has no such checkpoint, or a setting is given that is not read.
        RankError: if a rank failed.
    """
    source = RunDir(Path(str(run.of_run)))
    before = load_snapshot(source.snapshot)
    refuse(_find_unread(before, run))
    if run.task is Task.evaluate:
        return evaluate(run, before, source, context)
    if run.task is Task.export:
        target = source.export if run.export.target is None else Path(run.export.target)
        checkpoint = pick_checkpoint(run, source)
        export(run, source, checkpoint, target.expanduser().absolute(), say=console.say)
    else:
        generate(run, source)
    return None


def _find_unread(before: Run, run: Run) -> Iterator[Problem]:
    """Settings that differ from the run's own and that the task does not read."""
    read = (*READ_BY[run.task], *FOLLOWS)
    values = dict(flatten(to_plain(before)))
    for path, value in flatten(to_plain(run)):
        known = any(path == name or path.startswith(f"{name}.") for name in read)
        if not known and values.get(path) != value:
            yield Problem(
                path=path,
                message=f"is not read by task={run.task.value} (got {value})",
                hint="Remove it",
            )

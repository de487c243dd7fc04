"""Write what workers read to the run directory, and where the run comes from."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llama_pretrain.config.compose import PROJECT_ROOT
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.snapshot import render_snapshot, without_command
from llama_pretrain.data.meta import META
from llama_pretrain.files import write_bytes, write_json, write_text
from llama_pretrain.plan.ds_config import get_train_ds_config
from llama_pretrain.plan.plan import Corpus, TrainingPlan, build_training_plan, render_plan
from llama_pretrain.plan.resolve import with_nodes
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import initial_weights, read_metrics
from llama_pretrain.runs.provenance import (
    collect_provenance,
    earlier_launches,
    list_data_files,
    write_changes,
)
from llama_pretrain.tasks.context import TaskContext


def refuse_used(run_dir: RunDir) -> None:
    """Refuse a directory that holds another run.

    Raises:
        UserError: with the two ways out.
    """
    if run_dir.snapshot.exists():
        message = f"{run_dir.path} already holds a run"
        hint = f"Resume it with resume={run_dir.path}, or choose another directory"
        raise UserError([Problem(path="hydra.run.dir", message=message, hint=hint)])


def snapshot_of(run: ResolvedRun, corpus: Corpus) -> str:
    """The snapshot of a run on a corpus, with the corpus's hash."""
    data = replace(run.data, hash=corpus.content_hash)
    return render_snapshot(without_command(replace(run, data=data)))


def write_run_dir(run: ResolvedRun, plan: TrainingPlan, context: TaskContext) -> None:
    """Write everything that workers read, and where the run comes from."""
    run_dir = context.run_dir
    provenance = describe_launch(run, plan, context)
    earlier, weights = earlier_launches(run_dir), initial_weights(read_metrics(run_dir.metrics))
    provenance |= {"earlier_launches": earlier, "initial_weights": weights}
    provenance["changes"] = write_changes(
        PROJECT_ROOT, run_dir.changes, include_untracked=run.provenance.include_untracked
    )
    write_json(run_dir.provenance, provenance)
    write_json(run_dir.data_files, hash_data_files(plan), indent=1)
    _write_for_workers(run, plan, run_dir)
    for file in Path(plan.corpus.tokenizer_dir).iterdir():
        write_bytes(run_dir.tokenizer / file.name, file.read_bytes())
    for folder in (run_dir.ranks, run_dir.checkpoints):
        os.makedirs(folder, exist_ok=True)


def _write_for_workers(run: ResolvedRun, plan: TrainingPlan, run_dir: RunDir) -> None:
    config = get_train_ds_config(run, plan.batch, run_dir=run_dir.path)
    write_json(run_dir.ds_config, config)
    write_text(run_dir.plan, render_plan(plan))
    write_text(run_dir.snapshot, snapshot_of(run, plan.corpus))


def write_for_nodes(
    run: ResolvedRun, plan: TrainingPlan, run_dir: RunDir, *, nodes: int
) -> tuple[ResolvedRun, TrainingPlan]:
    """Plan a run for another number of nodes, with the same steps, and write it for workers."""
    if nodes != run.launch.nodes:
        run = with_nodes(run, nodes)
        sources = plan.deepspeed_sources
        plan = replace(build_training_plan(run, plan.corpus), deepspeed_sources=sources)
    _write_for_workers(run, plan, run_dir)
    return run, plan


def describe_launch(run: ResolvedRun, plan: TrainingPlan, context: TaskContext) -> dict[str, Any]:
    """What a run is made with, as provenance.json has it before workers start."""
    machine = asdict(context.machine)
    values = collect_provenance(argv=context.argv, root=PROJECT_ROOT, machine=machine)
    return values | {
        "threads": {"ranks": plan.world_size, "of_a_rank": run.launch.threads_per_process},
        "seeds": {"seed": run.seed, "data.shuffle_seed": run.data.shuffle_seed},
        "data": {
            "hash": plan.corpus.content_hash,
            "tokenizer": plan.corpus.tokenizer_hash,
            "sources": {source.name: source.data_hash for source in plan.corpus.sources},
        },
    }


def hash_data_files(plan: TrainingPlan) -> dict[str, dict[str, str]]:
    """SHA-256 of every file of the data, by source and path."""
    return list_data_files(
        {source.name: Path(source.tokens_dir) / META for source in plan.corpus.sources}
    )

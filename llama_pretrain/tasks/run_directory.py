"""Write what workers read to the run directory, and where the run comes from."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llama_pretrain.config.compose import PROJECT_ROOT
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import as_written, render_snapshot
from llama_pretrain.files import write_text
from llama_pretrain.plan.ds_config import get_train_ds_config
from llama_pretrain.plan.machine import Machine
from llama_pretrain.plan.plan import Corpus, Plan, render_plan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.provenance import (
    collect_provenance,
    earlier_launches,
    initial_weights,
    list_data_files,
    render_provenance,
    write_changes,
)


def check_unused(run_dir: RunDir) -> None:
    """Refuse a directory that another run has written.

    Raises:
        UserError: with the two ways out.
    """
    if run_dir.snapshot.exists():
        message = f"{run_dir.path} holds a run already"
        hint = f"go on with it: resume={run_dir.path}, or choose another directory"
        raise UserError([Problem(path="hydra.run.dir", message=message, hint=hint)])


def snapshot_of(run: Run, corpus: Corpus) -> str:
    """The snapshot of a run on a corpus, which it names by its hash."""
    data = replace(run.data, hash=corpus.content_hash)
    return render_snapshot(as_written(replace(run, data=data)))


def write_run_dir(
    run: Run, plan: Plan, run_dir: RunDir, *, argv: Sequence[str], machine: Machine
) -> None:
    """Write everything that ranks read, and where the run comes from."""
    provenance = describe_launch(run, plan, argv=argv, machine=machine)
    earlier, weights = earlier_launches(run_dir), initial_weights(run_dir)
    provenance |= {"earlier_launches": earlier, "initial_weights": weights}
    provenance["changes"] = write_changes(PROJECT_ROOT, run_dir.changes)
    write_text(run_dir.provenance, render_provenance(provenance))
    write_text(run_dir.data_files, json.dumps(data_files_of(plan), indent=1) + "\n")
    config = get_train_ds_config(run, plan.batch, run_dir=run_dir.path)
    write_text(run_dir.ds_config, json.dumps(config, indent=2) + "\n")
    write_text(run_dir.plan, render_plan(plan))
    assert plan.corpus is not None
    write_text(run_dir.snapshot, snapshot_of(run, plan.corpus))
    shutil.copytree(plan.corpus.tokenizer_dir, run_dir.tokenizer, dirs_exist_ok=True)
    for folder in (run_dir.ranks, run_dir.checkpoints):
        os.makedirs(folder, exist_ok=True)


def describe_launch(
    run: Run, plan: Plan, *, argv: Sequence[str], machine: Machine
) -> dict[str, Any]:
    """What a run is made with, as provenance.json has it before the ranks start."""
    assert plan.corpus is not None
    values = collect_provenance(argv=argv, root=PROJECT_ROOT, machine=asdict(machine))
    return values | {
        "threads": {"ranks": plan.world_size, "of_a_rank": run.launch.threads_per_process},
        "seeds": {"seed": run.seed, "data.shuffle_seed": run.data.shuffle_seed},
        "data": {
            "hash": plan.corpus.content_hash,
            "tokenizer": plan.corpus.tokenizer_hash,
            "sources": {source.name: source.data_hash for source in plan.corpus.sources},
        },
    }


def data_files_of(plan: Plan) -> dict[str, dict[str, str]]:
    from llama_pretrain.data.meta import META  # pydantic

    assert plan.corpus is not None
    return list_data_files(
        {source.name: Path(source.tokens_dir) / META for source in plan.corpus.sources}
    )

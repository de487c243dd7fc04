"""What is done with a run that has been trained: export it, evaluate it, let it write."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_pretrain import console
from llama_pretrain.config.data import DataName
from llama_pretrain.config.deepspeed import DeepSpeed, Zero
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.rules import flatten
from llama_pretrain.config.schema import Device, Generate, Monitor, Optim, OptimName, Run, Task
from llama_pretrain.config.snapshot import load_snapshot, render_snapshot, to_plain
from llama_pretrain.launch.forks import ForkServers
from llama_pretrain.launch.local import launch
from llama_pretrain.launch.signals import Preempted
from llama_pretrain.plan.ds_config import get_eval_ds_config
from llama_pretrain.plan.feasible import check_machine
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.plan import Plan, build_plan, load_plan, render_plan
from llama_pretrain.runs.checkpoints import (
    LATEST,
    checkpoint_name,
    discard,
    find_fault,
    newest_complete,
    newest_of,
)
from llama_pretrain.runs.rundir import RunDir, read_metrics, write_text

READ_BY = {
    Task.export: ("export",),
    Task.generate: ("generate", "seed", "launch.device"),
    Task.evaluate: (
        "export.checkpoint",
        "train.eval_rows",
        "data",
        "tokenizer",
        "batch",
        "zero",
        "precision",
        "launch",
    ),
}
"""What each task reads of the command line; all else is as the run was."""
FOLLOWS = (
    "task",
    "of_run",
    "launch.threads_per_process",
    "launch.bind_cores",
    "launch.device_memory",
)
"""What differs from the run's snapshot though nobody set it."""
SAMPLE = Generate()
SPLIT = (DataName.text, DataName.megatron, DataName.tokens)
"""Data in files, of which a run holds a part out."""


def do_with_run(run: Run, run_dir: RunDir, *, argv: Sequence[str]) -> float | None:
    """task=export, evaluate or generate. Returns the evaluation loss.

    Args:
        run_dir: where an evaluation is written; the run that it is about is `of_run`.

    Raises:
        UserError: if the run has no such checkpoint, or a setting is given that isn't read.
        RankError: if a rank failed.
    """
    assert run.of_run is not None
    source = RunDir(Path(run.of_run))
    before = load_snapshot(source.snapshot)
    refuse(_unread(before, run))
    if run.task is Task.export:
        target = source.export if run.export.target is None else Path(run.export.target)
        checkpoint = pick_checkpoint(run, source)
        export(run, source, checkpoint, target.expanduser().absolute(), say=console.say)
        return None
    if run.task is Task.generate:
        generate(run, source)
        return None
    return evaluate(run, before, source, run_dir)


def _quiet_transformers() -> None:
    """No progress bars, and no advice of transformers on standard error."""
    from transformers.utils import logging

    messages: Any = logging  # it has no types
    messages.disable_progress_bar()
    messages.set_verbosity_error()


def _unread(before: Run, run: Run) -> Iterator[Problem]:
    """Settings that differ from the run's own and that the task doesn't read."""
    read = (*READ_BY[run.task], *FOLLOWS)
    values = dict(flatten(to_plain(before)))
    for path, value in flatten(to_plain(run)):
        known = any(path == name or path.startswith(f"{name}.") for name in read)
        if not known and values.get(path) != value:
            yield Problem(
                path=path,
                message=f"is not read by task={run.task.value} (got {value})",
                hint="leave it out",
            )


def pick_checkpoint(run: Run, source: RunDir) -> Path:
    """The checkpoint that `export.checkpoint` names, or the newest complete one.

    Raises:
        UserError: if it isn't there, or is not as it was written.
    """
    name = run.export.checkpoint
    if name is None:
        folder, passed_over = newest_complete(source.checkpoints)
        for line in passed_over:
            console.note(line)
        if folder is None:
            message = f"no complete checkpoint in {source.checkpoints}"
            raise UserError([Problem(path="run", message=message)])
        return folder
    folder = source.checkpoints / name
    fault = find_fault(folder) if folder.is_dir() and Path(name).name == name else "is not there"
    if fault is not None:
        there = sorted(path.name for path in source.checkpoints.glob("step-*"))
        hint = f"there are: {', '.join(there)}" if there else "the run has none"
        problem = Problem(path="export.checkpoint", message=f"{fault} (got {name})", hint=hint)
        raise UserError([problem])
    return folder


def export(
    run: Run, source: RunDir, checkpoint: Path, target: Path, *, say: Callable[[str], None]
) -> None:
    """Export a checkpoint of `source`, and say how near it is to what was trained.

    Raises:
        UserError: if it isn't near enough, or can't be written.
    """
    from llama_pretrain.export import export_checkpoint  # torch and transformers

    _quiet_transformers()
    try:
        proof = export_checkpoint(checkpoint, target, run=run, run_dir=source)
    except OSError as error:
        message = f"{error.strerror or error}: {error.filename or target}"
        raise UserError([Problem(path="export", message=message)]) from error
    say(
        f"export: {checkpoint.name} in {proof.precision}, largest difference of logits"
        f" {proof.logit_difference:.1e} (tolerance {proof.logit_tolerance:g}): {target}"
    )


def export_at_end(run: Run, run_dir: RunDir) -> None:
    """Export the newest checkpoint, prove it, and let it write its sample.

    A last checkpoint that the settings ask for only to be exported is deleted then.
    """
    checkpoint = newest_of(run_dir.checkpoints)
    if checkpoint is None:
        console.say("export: the run has written no checkpoint, so there is nothing to export")
        return
    export(run, run_dir, checkpoint, run_dir.export, say=console.say)
    if run.train.sample_prompt:
        prompt, length = run.train.sample_prompt, run.train.sample_tokens
        settings = replace(SAMPLE, prompt=prompt, num_tokens=length)
        # On the CPU: a sweep's next run wants the whole GPU.
        text = _continue(run_dir.export, settings, seed=run.seed, device=Device.cpu)
        write_text(run_dir.path / "sample.txt", text + "\n")
    last = load_plan(run_dir.plan).steps.last
    if not run.checkpoint.at_end and checkpoint.name == checkpoint_name(last):
        _forget(run_dir, checkpoint)


def _forget(run_dir: RunDir, checkpoint: Path) -> None:
    """Delete the newest checkpoint; `latest` names the one before it, if there is one."""
    discard(checkpoint)
    before = newest_of(run_dir.checkpoints)
    latest = run_dir.checkpoints / LATEST
    if before is None:
        latest.unlink(missing_ok=True)
    else:
        write_text(latest, before.name + "\n")


def generate(run: Run, source: RunDir) -> None:
    """Print the prompt and its continuation, and nothing else, on standard output."""
    if not (source.export / "config.json").is_file():
        checkpoint = pick_checkpoint(run, source)
        export(run, source, checkpoint, source.export, say=console.note)
    device = run.launch.device
    if device is Device.cuda and not detect_machine().num_gpus:
        console.note("no GPU is here: on the CPU")
        device = Device.cpu
    print(_continue(source.export, run.generate, seed=run.seed, device=device), flush=True)


def _continue(model: Path, settings: Generate, *, seed: int, device: Device) -> str:
    from llama_pretrain.generate import continue_prompt  # torch and transformers

    _quiet_transformers()
    return continue_prompt(model, settings, seed=seed, device=device.value)


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

"""Where a run goes on: which checkpoint, and what may not have changed since."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llama_pretrain import console
from llama_pretrain.checkpoint.manifest import (
    METRICS,
    Manifest,
    forget_after,
    newest_complete,
    read_manifest,
)
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.rewrite import AUTO
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import config_hash, load_snapshot
from llama_pretrain.config.zero import OffloadDevice
from llama_pretrain.plan.plan import Plan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import cut_metrics, read_metrics
from llama_pretrain.runs.status import read_status


@dataclass(frozen=True)
class Start:
    """Where training begins."""

    checkpoint: Path | None = None
    """`None` = at the beginning."""
    step: int = 0
    """Steps done by then."""


def find_start(run: Run, plan: Plan, run_dir: RunDir) -> Start:
    """The checkpoint that `resume` goes on from. With `auto`, a run without one begins anew.

    Raises:
        UserError: if there is none, or the run that it is of was another.
    """
    auto = run.resume.run_dir == AUTO
    if auto and not run_dir.snapshot.exists():
        return Start()
    before = load_snapshot(run_dir.snapshot)
    problems = [
        Problem(
            path=path,
            message="differs from what the run was started with",
            hint="leave it out, or start a new run",
        )
        for path, was, wanted in _fixed(before, run)
        if was != wanted
    ]
    devices = (run.zero.offload_optimizer.device, run.zero.offload_param.device)
    if OffloadDevice.nvme in devices:
        message = "DeepSpeed 0.19 goes on with other losses where state lies on nvme"
        problems.append(Problem(path="resume", message=message, hint="start a new run"))
    folder = pick_checkpoint(run_dir, run_hash=config_hash(before))
    if folder is None:
        if auto:
            refuse(problems)
            console.say(f"no complete checkpoint in {run_dir.checkpoints}: from the beginning")
            return Start()
        message = f"no complete checkpoint in {run_dir.checkpoints}"
        hint = f"start anew: reproduce={run_dir.path}"
        problems.append(Problem(path="resume", message=message, hint=hint))
        raise UserError(problems)
    manifest = read_manifest(folder)
    problems += _check_manifest(manifest, run, plan, run_dir, name=folder.name)
    if has_finished(run_dir, manifest.step, plan) and not auto:
        message = f"the run has done its {plan.steps.total} steps"
        hint = "raise train.max_steps or train.max_tokens"
        problems.append(Problem(path="resume", message=message, hint=hint))
    refuse(problems)
    return Start(folder, manifest.step)


def has_finished(run_dir: RunDir, step: int, plan: Plan) -> bool:
    """Whether a run has done all its steps, and all that comes after them: evaluation, export."""
    status = read_status(run_dir)
    return step >= plan.steps.total and status is not None and status.is_complete


def pick_checkpoint(run_dir: RunDir, *, run_hash: str | None = None) -> Path | None:
    """The newest complete checkpoint; says of each newer one why it is passed over."""
    folder, passed_over = newest_complete(run_dir.checkpoints, config_hash=run_hash)
    for line in passed_over:
        console.say(line)
    return folder


def start_again(run_dir: RunDir) -> Start:
    """Where a run goes on whose rank has failed: the config and the data are what they were."""
    folder = pick_checkpoint(run_dir)
    return Start() if folder is None else Start(folder, read_manifest(folder).step)


def note_start(run_dir: RunDir, start: Start, **why: str) -> None:
    """A line of the metrics for why a run goes on from here: what was `restarted` or `resumed`."""
    rows = read_metrics(run_dir.metrics)
    tokens = next((row["tokens"] for row in reversed(rows) if row["step"] == start.step), 0)
    line = {"step": start.step, "tokens": tokens, **why}
    with run_dir.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def rewind(run_dir: RunDir, start: Start) -> None:
    """Forget what a run has written of the steps that are about to be done again."""
    if start.checkpoint is not None and not run_dir.metrics.is_file():
        run_dir.metrics.write_bytes((start.checkpoint / METRICS).read_bytes())
    cut_metrics(run_dir.metrics, last_step=start.step if start.checkpoint is not None else -1)
    if run_dir.samples.is_file():
        cut_metrics(run_dir.samples, last_step=start.step if start.checkpoint is not None else -1)
    forget_after(run_dir.checkpoints, step=start.step)
    where = "the beginning" if start.checkpoint is None else start.checkpoint.name
    console.say(f"going on from {where}")


def _fixed(before: Run, run: Run) -> Iterator[tuple[str, object, object]]:
    """What a resumed run must have as it was: with another, it would be another run."""
    for name in ("model", "optim", "seed", "precision"):
        yield name, getattr(before, name), getattr(run, name)
    if before.data.sequence_length != run.data.sequence_length:  # positions are counted in rows
        yield "data.sequence_length", before.data.sequence_length, run.data.sequence_length


def _check_manifest(
    manifest: Manifest, run: Run, plan: Plan, run_dir: RunDir, *, name: str
) -> Iterator[Problem]:
    """What a checkpoint says of its run that isn't so any more."""
    assert plan.corpus is not None
    size = plan.batch.global_batch_size
    if manifest.global_batch_size != size:
        message = f"the run has had {manifest.global_batch_size} rows a step (got {size})"
        hint = f"set batch.global_batch_size={manifest.global_batch_size}"
        yield Problem(path="batch.global_batch_size", message=message, hint=hint)
    for field, was, now in _data_changes(manifest.data, plan.corpus.fingerprint):
        told = f"was {was} when {name} was trained (got {now})"
        own = f"tokenizer.name=pretrained tokenizer.path={run_dir.tokenizer}"
        hint = "start a new run, or go on all the same: resume.allow_data_change=true"
        if field == "tokenizer":  # its embeddings would mean other tokens
            hint = f"go on with the run's own: {own}"
        elif run.resume.allow_data_change:
            console.say(f"the data is another: {field} {told}")
            continue
        yield Problem(path=field, message=told, hint=hint)


def _data_changes(
    before: Mapping[str, str], now: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """What differs between two fingerprints of data: setting, then and now."""
    for field in dict.fromkeys([*before, *now]):
        was, wanted = (side.get(field, "nothing") for side in (before, now))
        if was != wanted and field != "data.sequence_length":
            hashes = len(was) == len(wanted) == 64
            yield field, was[:16] if hashes else was, wanted[:16] if hashes else wanted

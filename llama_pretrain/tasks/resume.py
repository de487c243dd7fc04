"""Where a run resumes: from which checkpoint, and what must not have changed since."""

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
from llama_pretrain.config.from_snapshot import AUTO
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import config_hash, load_snapshot
from llama_pretrain.config.zero import OffloadDevice
from llama_pretrain.files import write_bytes
from llama_pretrain.plan.plan import TrainingPlan, load_plan
from llama_pretrain.plan.schedule import learning_rate_factor
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import EventRow, append_row, read_metrics, truncate_metrics
from llama_pretrain.runs.status import read_status


@dataclass(frozen=True)
class Start:
    """Where training starts."""

    checkpoint: Path | None = None
    """`None` = from the beginning."""
    step: int = 0
    """Steps completed by then."""


def find_start(run: ResolvedRun, plan: TrainingPlan, run_dir: RunDir) -> Start:
    """The checkpoint that `resume` continues from. With `auto`, a run without one starts anew.

    Raises:
        UserError: if there is none, or the run has changed.
    """
    auto = run.resume.run_dir == AUTO
    if auto and not run_dir.snapshot.exists():
        return Start()
    before = load_snapshot(run_dir.snapshot)
    problems = [
        Problem(
            path=path,
            message="differs from what the run was started with",
            hint="Remove it, or start a new run",
        )
        for path, was, wanted in _fixed(before, run)
        if was != wanted
    ]
    devices = (run.zero.offload_optimizer.device, run.zero.offload_param.device)
    if OffloadDevice.nvme in devices:
        message = "is not supported with state on nvme: DeepSpeed 0.19 resumes with other losses"
        problems.append(Problem(path="resume", message=message, hint="Start a new run"))
    folder = pick_checkpoint(run_dir, run_hash=config_hash(before))
    if folder is None:
        if auto:
            refuse(problems)
            console.say(f"no complete checkpoint in {run_dir.checkpoints}: starting from scratch")
            return Start()
        message = f"no complete checkpoint in {run_dir.checkpoints}"
        hint = f"Start a new run with reproduce={run_dir.path}"
        problems.append(Problem(path="resume", message=message, hint=hint))
        raise UserError(problems)
    manifest = read_manifest(folder)
    problems += _check_manifest(manifest, run, plan, run_dir, name=folder.name)
    if manifest.step > plan.steps.total:
        message = f"the run has already done {manifest.step:,} steps (got {plan.steps.total:,})"
        hint = "Raise train.max_steps or train.max_tokens"
        problems.append(Problem(path="train.max_steps", message=message, hint=hint))
        raise UserError(problems)
    if has_finished(run_dir, manifest.step, plan) and not auto:
        message = f"the run has completed its {plan.steps.total} steps"
        hint = "Raise train.max_steps or train.max_tokens"
        problems.append(Problem(path="resume", message=message, hint=hint))
    refuse(problems)
    _report_jump(run, before, plan, run_dir, step=manifest.step)
    return Start(folder, manifest.step)


def _report_jump(
    run: ResolvedRun, before: ResolvedRun, plan: TrainingPlan, run_dir: RunDir, *, step: int
) -> None:
    """Warn of a learning rate that changes at once, as when a cosine is made longer."""
    try:
        planned = load_plan(run_dir.plan).steps
    except (OSError, ValueError):
        return
    rates = []
    for one, steps in ((before, planned), (run, plan.steps)):
        factor = learning_rate_factor(one.schedule, steps)
        rates.append(one.optim.learning_rate * factor(min(step, steps.total) - 1))
    was, now = rates
    if step and abs(was - now) > 1e-6 * max(was, now):
        text = f"warning: the learning rate jumps from {was:g} to {now:g} after step {step:,}"
        console.say(f"{text}: the schedule is now that of {plan.steps.total:,} steps")


def has_finished(run_dir: RunDir, step: int, plan: TrainingPlan) -> bool:
    """Whether a run has completed all its steps and what follows them: evaluation, export."""
    status = read_status(run_dir)
    return step >= plan.steps.total and status is not None and status.is_complete


def pick_checkpoint(run_dir: RunDir, *, run_hash: str | None = None) -> Path | None:
    """The newest complete checkpoint; prints why each newer one is skipped."""
    folder, passed_over = newest_complete(run_dir.checkpoints, config_hash=run_hash)
    for line in passed_over:
        console.say(line)
    return folder


def restart(run_dir: RunDir) -> Start:
    """Where a run restarts after a rank failed: config and data have not changed."""
    folder = pick_checkpoint(run_dir)
    return Start() if folder is None else Start(folder, read_manifest(folder).step)


def note_start(run_dir: RunDir, start: Start, *, restarted: str = "", resumed: str = "") -> None:
    """Append an event to the metrics: the error before a restart, or the time of a resume."""
    rows = read_metrics(run_dir.metrics)
    tokens = next((row.tokens for row in reversed(rows) if row.step == start.step), 0)
    row = EventRow(step=start.step, tokens=tokens, restarted=restarted, resumed=resumed)
    append_row(run_dir.metrics, row)


def rewind(run_dir: RunDir, start: Start) -> None:
    """Remove what a run has written about steps that it is about to repeat."""
    if start.checkpoint is not None and not run_dir.metrics.is_file():
        write_bytes(run_dir.metrics, (start.checkpoint / METRICS).read_bytes())
    last_step = start.step if start.checkpoint is not None else -1
    truncate_metrics(run_dir.metrics, last_step=last_step)
    if run_dir.samples.is_file():
        truncate_metrics(run_dir.samples, last_step=last_step)
    forget_after(run_dir.checkpoints, step=start.step)
    where = "the beginning" if start.checkpoint is None else start.checkpoint.name
    console.say(f"resuming from {where}")


def _fixed(before: Run, run: Run) -> Iterator[tuple[str, object, object]]:
    """What must not change in a resumed run."""
    for name in ("model", "optim", "seed", "precision"):
        yield name, getattr(before, name), getattr(run, name)
    if before.data.sequence_length != run.data.sequence_length:  # positions count sequences
        yield "data.sequence_length", before.data.sequence_length, run.data.sequence_length


def _check_manifest(
    manifest: Manifest, run: ResolvedRun, plan: TrainingPlan, run_dir: RunDir, *, name: str
) -> Iterator[Problem]:
    """What has changed since a checkpoint was saved."""
    size = plan.batch.global_batch_size
    if manifest.global_batch_size != size:
        message = f"the run was started with {manifest.global_batch_size} (got {size})"
        hint = f"Set batch.global_batch_size={manifest.global_batch_size}"
        yield Problem(path="batch.global_batch_size", message=message, hint=hint)
    for field, was, now in _data_changes(manifest.data, plan.corpus.fingerprint):
        message = f"was {was} when {name} was trained (got {now})"
        own = f"tokenizer.name=pretrained tokenizer.path={run_dir.tokenizer}"
        hint = "Start a new run, or resume anyway with resume.allow_data_change=true"
        if field == "tokenizer":  # its embeddings would mean other tokens
            hint = f"Use the run's own: {own}"
        elif run.resume.allow_data_change:
            console.say(f"the data has changed: {field} {message}")
            continue
        yield Problem(path=field, message=message, hint=hint)


def _data_changes(
    before: Mapping[str, str], now: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """The differences between two fingerprints of data: setting, before and now."""
    for field in dict.fromkeys([*before, *now]):
        was, wanted = (side.get(field, "nothing") for side in (before, now))
        if was != wanted and field != "data.sequence_length":
            hashes = len(was) == len(wanted) == 64
            yield field, was[:16] if hashes else was, wanted[:16] if hashes else wanted

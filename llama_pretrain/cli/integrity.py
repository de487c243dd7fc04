"""Whether a run directory is complete and consistent, from snapshot to export.

Every check reads; none writes, and none needs torch.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from llama_pretrain.checkpoint.manifest import LATEST, list_folders
from llama_pretrain.cli.artifacts import check_checkpoint, check_export, check_tokens
from llama_pretrain.cli.listing import WITHOUT_STATUS
from llama_pretrain.cli.run_files import (
    COMPLETED,
    AbsentError,
    BrokenError,
    Check,
    Files,
    Result,
    assert_same,
    read_json_of,
    read_lines,
    read_object,
)
from llama_pretrain.config.data import DataName
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.tasks import Task
from llama_pretrain.config.validate import flatten, validate_run
from llama_pretrain.files import hash_file, hash_text
from llama_pretrain.plan.ds_config import get_eval_ds_config, get_train_ds_config
from llama_pretrain.plan.plan import TrainingPlan, build_training_plan
from llama_pretrain.runs.layout import is_held
from llama_pretrain.runs.metrics import (
    SampleRow,
    SummaryRow,
    apply_rollbacks,
    evaluations,
    last,
    select,
    steps,
)

PLANNED = ("device", "world_size", "batch", "steps", "sampling", "parameters", "vocab_size")
"""Of a plan: what follows from the snapshot alone, in any version. Estimates may change."""


def verify_run(path: Path, *, deep: bool = False) -> list[Check]:
    """All checks of a run directory, in the order in which a run writes its files.

    Args:
        deep: read all tokens too, where they are still here.
    """
    files = Files(path)
    looks: list[tuple[str, Callable[[], str]]] = [
        ("snapshot.yaml", lambda: _check_snapshot(files)),
        ("plan.json", lambda: _check_plan(files)),
        ("ds_config.json", lambda: _check_ds_config(files)),
        ("provenance.json", lambda: _check_provenance(files)),
        ("tokenizer", lambda: _check_tokenizer(files)),
        ("data", lambda: _check_data(files)),
        ("tokens", lambda: check_tokens(files, deep=deep)),
        ("status.json", lambda: _check_status(files)),
        ("metrics.jsonl", lambda: _check_metrics(files)),
        ("samples.jsonl", lambda: _check_samples(files)),
        ("checkpoints", lambda: _check_latest(files)),
    ]
    looks += [
        (f"checkpoints/{folder.name}", partial(check_checkpoint, files, folder))
        for folder in list_folders(files.dir.checkpoints)
    ]
    looks.append(("export", lambda: check_export(files)))
    return [_look(name, check) for name, check in looks]


def _look(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name=name, result=Result.passed, text=check())
    except AbsentError as error:
        return Check(name=name, result=Result.absent, text=str(error))
    except BrokenError as error:
        return Check(name=name, result=Result.failed, text=str(error))
    except OSError as error:
        text = f"cannot be read: {error.strerror} ({error.filename})"
        return Check(name=name, result=Result.failed, text=text)
    except Exception as error:  # other checks may still say something
        text = f"cannot be checked: {type(error).__name__}: {error}"
        return Check(name=name, result=Result.failed, text=text.splitlines()[0])


def _check_snapshot(files: Files) -> str:
    problems = list(validate_run(files.run))
    if problems:
        raise BrokenError(f"breaks a rule: {problems[0]}")
    return f"{len(list(flatten(asdict(files.run))))} settings, within all rules"


def _check_plan(files: Files) -> str:
    """The plan is what the snapshot comes to, as far as that is no estimate."""
    plan, run = files.plan, files.run
    names = [name for name in PLANNED if name != "steps" or run.task is Task.pretrain]
    try:
        again = build_training_plan(run, plan.corpus)
    except UserError as error:
        raise BrokenError(f"the snapshot has none: {error.problems[0]}") from error
    for name in names:
        written, derived = getattr(plan, name), getattr(again, name)
        if written != derived:
            raise BrokenError(f"{name} differs from the snapshot: {_first_difference(plan, again)}")
    batch, steps = plan.batch, plan.steps
    return f"{steps.total:,} steps of {batch.global_batch_size:,} sequences, as in the snapshot"


def _first_difference(written: TrainingPlan, derived: TrainingPlan) -> str:
    before, after = (
        {path: value for path, value in flatten(asdict(side)) if path.partition(".")[0] in PLANNED}
        for side in (written, derived)
    )
    path = next(path for path in before if before[path] != after.get(path))
    return f"{path} is {before[path]}, not {after.get(path)}"


def _check_ds_config(files: Files) -> str:
    """It is what the snapshot and the plan come to; where monitors write may have moved."""
    written = dict(flatten(read_object(files.dir.ds_config)))
    run, plan = files.run, files.plan
    if files.evaluates:
        size = plan.batch.micro_batch_size
        config = get_eval_ds_config(run, micro_batch_size=size)
    else:
        config = get_train_ds_config(run, plan.batch, run_dir=files.dir.path)
    derived = dict(flatten(json.loads(json.dumps(config))))
    for path in dict.fromkeys([*written, *derived]):
        if written.get(path) != derived.get(path) and not path.endswith(".output_path"):
            text = f"{path} is {written.get(path)}, not {derived.get(path)}"
            raise BrokenError(f"differs from the snapshot: {text}")
    return f"{len(written)} values, as the snapshot says"


def _check_provenance(files: Files) -> str:
    if files.evaluates:
        raise AbsentError("an evaluation has none")
    values = read_object(files.dir.provenance)
    commit = values.get("git_commit")
    return f"commit {commit[:12]}" if isinstance(commit, str) else "no commit"


def _check_tokenizer(files: Files) -> str:
    if files.evaluates:
        raise AbsentError("an evaluation uses its run's")
    path = files.dir.tokenizer / "tokenizer.json"
    if not path.is_file():
        raise BrokenError("tokenizer.json is missing")
    assert_same("tokenizer.json", hash_file(path), files.plan.corpus.tokenizer_hash)
    read_json_of(files.dir.tokenizer / "tokenizer_config.json")
    return f"{files.plan.corpus.tokenizer_size:,} tokens, with the plan's hash"


def _check_data(files: Files) -> str:
    """Snapshot and plan name the same data, and the plan's hash is of its sources."""
    corpus, data = files.plan.corpus, files.run.data
    mixed = data.name is DataName.mixture
    content = {"tokenizer": corpus.tokenizer_hash}
    for source in corpus.sources:
        content[f"data.sources.{source.name}" if mixed else "data"] = source.data_hash
    digest = hash_text(json.dumps(content))
    if digest != corpus.content_hash:
        raise BrokenError("plan.json: corpus.content_hash is not that of its sources and tokenizer")
    if data.hash is None and files.evaluates:
        return "other data than the run's"
    if data.hash != corpus.content_hash:
        text = f"{str(data.hash)[:16]} in the snapshot, {digest[:16]} in the plan"
        raise BrokenError(f"the hashes differ: {text}")
    return f"{len(corpus.sources)} source{'s' if len(corpus.sources) > 1 else ''}, {digest[:16]}"


def _check_status(files: Files) -> str:
    """It agrees with the metrics, and a run that is running is held by a process."""
    if files.run.task.value in WITHOUT_STATUS:
        raise AbsentError(f"task={files.run.task.value} writes none")
    status = files.status
    if status == "running":
        if not is_held(files.dir):
            raise BrokenError("is running, but no process trains here: the run has crashed")
        return "running"
    if status not in COMPLETED:
        return status
    planned = files.plan.steps.last
    summary = last(files.rows, SummaryRow)
    if summary is None:
        raise BrokenError(f"is {status}, but metrics.jsonl has no summary")
    if summary.step != planned:
        raise BrokenError(f"is {status}, but the last step is {summary.step:,}, not {planned:,}")
    losses = [row.eval_loss for row in evaluations(files.rows)]
    objective = read_object(files.dir.status).get("objective")
    if losses and objective != losses[-1]:
        raise BrokenError(f"its objective is {objective}, and the last loss {losses[-1]}")
    return f"{status} after {planned:,} steps"


def _check_metrics(files: Files) -> str:
    """Each step stands there once and in its order, with its tokens, numbers and batch."""
    if not files.dir.metrics.exists() and files.status not in (*COMPLETED, "running"):
        raise AbsentError("the run ended before its first step")
    rows = files.rows
    if files.evaluates:
        if len(rows) != 1 or not evaluations(rows):
            raise BrokenError("has no evaluation")
        return f"loss {evaluations(rows)[0].eval_loss:.4f}"
    size = files.plan.steps.tokens_per_step
    done = steps(rows)
    for number, step in enumerate(done, start=1):
        if step.step != number:
            raise BrokenError(f"step {number:,} is missing or repeated")
        if not re.fullmatch("[0-9a-f]{16}", step.sample_hash):
            raise BrokenError(f"step {number:,} has no hash of its batch")
        if step.loss is None and step.skipped != "loss":
            raise BrokenError(f"step {number:,} has no loss")
    for row in rows:
        if row.tokens != row.step * size:
            text = f"{row.tokens} tokens, not {row.step * size:,}"
            raise BrokenError(f"a line of step {row.step:,} has {text}")
        if row.step > len(done):
            raise BrokenError(f"a line is of step {row.step:,}, and steps end at {len(done):,}")
    return f"{len(done):,} steps without a gap, {len(evaluations(rows))} evaluations"


def _check_samples(files: Files) -> str:
    """Each text is of an evaluation."""
    if not files.dir.samples.is_file():
        raise AbsentError("the run wrote none")
    rows = select(apply_rollbacks(read_lines(files.dir.samples)), SampleRow)
    evaluated = {row.step for row in evaluations(files.rows)}
    for row in rows:
        if row.step not in evaluated:
            raise BrokenError(f"has a text of step {row.step:,}, which was not evaluated")
    return f"{len(rows):,} texts"


def _check_latest(files: Files) -> str:
    """`latest` names a checkpoint that is there."""
    folders = [path.name for path in list_folders(files.dir.checkpoints)]
    latest = files.dir.checkpoints / LATEST
    if not folders and not latest.exists():
        raise AbsentError("the run has none")
    if not latest.is_file():
        raise BrokenError(f"{LATEST} is missing")
    named = latest.read_text(encoding="utf-8", errors="replace").strip()
    if named != (folders[-1] if folders else None):
        raise BrokenError(
            f"{LATEST} names {named[:40]}, and the newest is {(folders or ['none'])[-1]}"
        )
    return f"{len(folders)} kept, {LATEST} is {named}"


def iter_failures(checks: Sequence[Check]) -> Iterator[Check]:
    """The checks that have failed."""
    return (check for check in checks if check.result is Result.failed)

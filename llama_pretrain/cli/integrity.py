"""Whether a run directory is whole, from snapshot to export: each file, and their agreement.

Every check reads; none writes, and none needs torch.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from llama_pretrain.checkpoint.manifest import LATEST, find_fault, read_manifest
from llama_pretrain.cli.listing import WITHOUT_STATUS
from llama_pretrain.config.data import DataName
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import config_hash, load_snapshot
from llama_pretrain.config.tasks import Task
from llama_pretrain.config.validate import flatten, validate_run
from llama_pretrain.plan.ds_config import get_eval_ds_config, get_train_ds_config
from llama_pretrain.plan.plan import Plan, build_plan, load_plan
from llama_pretrain.runs.layout import RunDir, is_held
from llama_pretrain.runs.metrics import read_metrics, take_back
from llama_pretrain.runs.status import Status

PROOF = "export.json"


PLANNED = ("device", "world_size", "batch", "steps", "sampling", "parameters", "vocab_size")
"""Of a plan: what follows from the snapshot alone, in any version. Estimates may change."""


COMPLETED = ("completed", "reproduced", "diverged")
"""Statuses of runs that have done all their steps."""


STATUSES = (*COMPLETED, *(status.value for status in Status))


CHUNK = 1 << 22
"""Tokens that are read at a time."""


class Result(str, Enum):
    passed = "pass"
    failed = "fail"
    absent = "absent"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of `verify`."""

    name: str
    result: Result
    told: str


class BrokenError(Exception):
    """A check's reason to fail, on one line."""


class AbsentError(Exception):
    """A check has nothing to look at, and need not have."""


class Files:
    """A run directory; each file is read once, by the first check that needs it."""

    def __init__(self, path: Path):
        self.dir = RunDir(path)

    @cached_property
    def run(self) -> Run:
        try:
            return load_snapshot(self.dir.snapshot)
        except UserError as error:
            told = [problem.message for problem in error.problems]
            raise BrokenError("; ".join(told).splitlines()[0]) from error

    @cached_property
    def plan(self) -> Plan:
        try:
            return load_plan(self.dir.plan)
        except FileNotFoundError as error:
            raise BrokenError("is missing") from error
        except ValueError as error:
            raise BrokenError(f"can't be read: {str(error).splitlines()[0]}") from error

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl that count."""
        return take_back(_read_lines(self.dir.metrics))

    @property
    def evaluates(self) -> bool:
        return self.run.task is Task.evaluate

    @cached_property
    def status(self) -> str:
        values = _read_json(self.dir.status)
        said = values.get("status")
        if said not in STATUSES:
            raise BrokenError(f"names no status (got {said})")
        return str(said)


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
        ("tokens", lambda: _check_tokens(files, deep=deep)),
        ("status.json", lambda: _check_status(files)),
        ("metrics.jsonl", lambda: _check_metrics(files)),
        ("samples.jsonl", lambda: _check_samples(files)),
        ("checkpoints", lambda: _check_latest(files)),
    ]
    looks += [
        (f"checkpoints/{folder.name}", partial(_check_checkpoint, files, folder))
        for folder in sorted(files.dir.checkpoints.glob("step-*"))
    ]
    looks.append(("export", lambda: _check_export(files)))
    return [_look(name, check) for name, check in looks]


def _look(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name=name, result=Result.passed, told=check())
    except AbsentError as error:
        return Check(name=name, result=Result.absent, told=str(error))
    except BrokenError as error:
        return Check(name=name, result=Result.failed, told=str(error))
    except OSError as error:
        told = f"can't be read: {error.strerror} ({error.filename})"
        return Check(name=name, result=Result.failed, told=told)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BrokenError("is missing")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise BrokenError(f"is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise BrokenError("is no JSON object")
    return values


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a .jsonl file."""
    if not path.is_file():
        raise BrokenError("is missing")
    rows = []
    lines = path.read_bytes().split(b"\n")
    if lines.pop():
        raise BrokenError(f"line {len(lines) + 1} was cut short")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BrokenError(f"line {number} is no JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise BrokenError(f"line {number} has no step")
        wrong = [key for key, value in row.items() if _is_no_number(value)]
        if wrong:
            raise BrokenError(f"line {number}: {wrong[0]} is not finite")
        rows.append(row)
    return rows


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        again = build_plan(run, plan.corpus)
    except UserError as error:
        raise BrokenError(f"the snapshot has none: {error.problems[0]}") from error
    for name in names:
        written, derived = getattr(plan, name), getattr(again, name)
        if written != derived:
            raise BrokenError(
                f"{name} isn't what the snapshot says: {_first_difference(plan, again)}"
            )
    batch, steps = plan.batch, plan.steps
    return f"{steps.total:,} steps of {batch.global_batch_size:,} rows, as the snapshot says"


def _first_difference(written: Plan, derived: Plan) -> str:
    before, after = (
        {path: value for path, value in flatten(asdict(side)) if path.partition(".")[0] in PLANNED}
        for side in (written, derived)
    )
    path = next(path for path in before if before[path] != after.get(path))
    return f"{path} is {before[path]}, not {after.get(path)}"


def _check_ds_config(files: Files) -> str:
    """It is what the snapshot and the plan come to; where monitors write may have moved."""
    written = dict(flatten(_read_json(files.dir.ds_config)))
    run, plan = files.run, files.plan
    if files.evaluates:
        size = plan.batch.micro_batch_size
        config = get_eval_ds_config(run, micro_batch_size=size, world_size=plan.world_size)
    else:
        config = get_train_ds_config(run, plan.batch, run_dir=files.dir.path)
    derived = dict(flatten(json.loads(json.dumps(config))))
    for path in dict.fromkeys([*written, *derived]):
        if written.get(path) != derived.get(path) and not path.endswith(".output_path"):
            told = f"{path} is {written.get(path)}, not {derived.get(path)}"
            raise BrokenError(f"isn't what the snapshot says: {told}")
    return f"{len(written)} values, as the snapshot says"


def _check_provenance(files: Files) -> str:
    if files.evaluates:
        raise AbsentError("an evaluation has none")
    values = _read_json(files.dir.provenance)
    commit = values.get("git_commit")
    return f"commit {commit[:12]}" if isinstance(commit, str) else "of no commit"


def _check_tokenizer(files: Files) -> str:
    if files.evaluates:
        raise AbsentError("an evaluation takes its run's")
    path = files.dir.tokenizer / "tokenizer.json"
    if not path.is_file():
        raise BrokenError("tokenizer.json is missing")
    assert_same("tokenizer.json", _hash_file(path), _corpus_of(files).tokenizer_hash)
    _read_json_of(files.dir.tokenizer / "tokenizer_config.json")
    return f"{_corpus_of(files).tokenizer_size:,} tokens, with the plan's hash"


def _read_json_of(path: Path) -> dict[str, Any]:
    """A JSON file in a folder, named where it is at fault."""
    try:
        return _read_json(path)
    except BrokenError as error:
        raise BrokenError(f"{path.name} {error}") from error


def assert_same(what: str, found: str, wanted: str) -> None:
    """Two hashes are the same.

    Raises:
        BrokenError: with the beginnings of both.
    """
    if found != wanted:
        raise BrokenError(f"the contents of {what} have changed: {found[:16]}, not {wanted[:16]}")


def _corpus_of(files: Files) -> Any:
    if files.plan.corpus is None:
        raise BrokenError("plan.json names no data")
    return files.plan.corpus


def _check_data(files: Files) -> str:
    """Snapshot and plan name the same data, and the plan's hash is of its sources."""
    corpus, data = _corpus_of(files), files.run.data
    mixed = data.name is DataName.mixture
    content = {"tokenizer": corpus.tokenizer_hash}
    for source in corpus.sources:
        content[f"data.sources.{source.name}" if mixed else "data"] = source.data_hash
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    if digest != corpus.content_hash:
        raise BrokenError("plan.json: corpus.content_hash isn't that of its sources and tokenizer")
    if data.hash is None and files.evaluates:
        return "other data than the run's"
    if data.hash != corpus.content_hash:
        told = f"{str(data.hash)[:16]} in the snapshot, {digest[:16]} in the plan"
        raise BrokenError(f"the hashes differ: {told}")
    return f"{len(corpus.sources)} source{'s' if len(corpus.sources) > 1 else ''}, {digest[:16]}"


def _check_tokens(files: Files, *, deep: bool) -> str:
    """The folders of tokens, where they are still here: their hash, and that no file is short."""
    from llama_pretrain.data.meta import HELDOUT, META, TRAIN, read_meta
    from llama_pretrain.data.packed import open_rows  # numpy

    there = [
        source for source in _corpus_of(files).sources if (Path(source.tokens_dir) / META).is_file()
    ]
    if not there:
        raise AbsentError("the cache has them no more; the next run makes them again")
    for source in there:
        folder = Path(source.tokens_dir)
        try:
            meta = read_meta(folder, path="data")
        except UserError as error:
            raise BrokenError(error.problems[0].message) from error
        assert_same(f"{folder}/{META}", meta.data_hash, source.data_hash)
        length = files.run.data.sequence_length
        for split, wanted in ((TRAIN, source.train_rows), (HELDOUT, source.heldout_rows)):
            try:
                found = len(open_rows(folder, meta, split, sequence_length=length))
            except (ValueError, OSError) as error:
                raise BrokenError(f"{split} of {source.name}: {error}") from error
            if found != wanted:
                raise BrokenError(f"{split} of {source.name} has {found:,} rows, not {wanted:,}")
            if deep:
                _read_tokens(folder, meta, split, name=source.name)
    missing = len(_corpus_of(files).sources) - len(there)
    told = "every token read" if deep else "by size; --deep reads them"
    return f"{len(there)} folder{'s' if len(there) > 1 else ''} {told}" + (
        f", {missing} not here" if missing else ""
    )


def _read_tokens(folder: Path, meta: Any, split: str, *, name: str) -> None:
    """Every id is one of the vocabulary, and documents end as often as there are documents."""
    import numpy as np

    ends = 0
    for extent in meta.splits[split].extents:
        path, width = folder / extent.file, np.dtype(meta.dtype).itemsize
        for first in range(extent.first, extent.first + extent.tokens, CHUNK):
            count = min(CHUNK, extent.first + extent.tokens - first)
            ids = np.fromfile(path, meta.dtype, count, offset=first * width)
            if len(ids) < count or ids.min() < 0 or ids.max() >= meta.vocab_size:
                raise BrokenError(f"{split} of {name}: {path} has ids outside of the vocabulary")
            ends += int((ids == meta.eos_id).sum())
    documents = meta.splits[split].documents
    ours = all(not Path(extent.file).is_absolute() for extent in meta.splits[split].extents)
    if ours and meta.row_tokens is None and documents is not None and ends != documents:
        raise BrokenError(f"{split} of {name} has {ends:,} ends of documents, not {documents:,}")


def _check_status(files: Files) -> str:
    """It agrees with the metrics, and a run that is running is held by a process."""
    if files.run.task.value in WITHOUT_STATUS:
        raise AbsentError(f"task={files.run.task.value} writes none")
    status = files.status
    if status == "running":
        if not is_held(files.dir, _read_json(files.dir.status).get("pid")):
            raise BrokenError("says running, and no process trains here: the run has crashed")
        return "running"
    if status not in COMPLETED:
        return status
    last = files.plan.steps.last
    ends = [row["step"] for row in files.rows if "finished" in row]
    if not ends:
        raise BrokenError(f"says {status}, and metrics.jsonl has no last line")
    if ends[-1] != last:
        raise BrokenError(f"says {status}, and the last step is {ends[-1]:,}, not {last:,}")
    evaluations = [row["eval_loss"] for row in files.rows if "eval_loss" in row]
    objective = _read_json(files.dir.status).get("objective")
    if evaluations and objective != evaluations[-1]:
        raise BrokenError(f"its objective is {objective}, and the last loss {evaluations[-1]}")
    return f"{status} after {last:,} steps"


def _check_metrics(files: Files) -> str:
    """Each step stands there once and in its order, with its tokens, numbers and batch."""
    if not files.dir.metrics.exists() and files.status not in (*COMPLETED, "running"):
        raise AbsentError("the run ended before its first step")
    rows = files.rows
    if files.evaluates:
        if len(rows) != 1 or "eval_loss" not in rows[0]:
            raise BrokenError("has no evaluation")
        return f"loss {rows[0]['eval_loss']:.4f}"
    size = files.plan.steps.tokens_per_step
    steps = [row for row in rows if "sample_hash" in row]
    for number, row in enumerate(steps, start=1):
        if row["step"] != number:
            raise BrokenError(f"step {number:,} is missing, or stands there twice")
        if not re.fullmatch("[0-9a-f]{16}", str(row["sample_hash"])):
            raise BrokenError(f"step {number:,} has no hash of its batch")
        if "loss" not in row and row.get("skipped") != "loss":
            raise BrokenError(f"step {number:,} has no loss")
    if any("loss" in row and "sample_hash" not in row for row in rows):
        raise BrokenError("a step has no hash of its batch")
    for row in rows:
        if row.get("tokens") != row["step"] * size:
            told = f"{row.get('tokens')} tokens, not {row['step'] * size:,}"
            raise BrokenError(f"a line of step {row['step']:,} has {told}")
        if row["step"] > len(steps):
            raise BrokenError(f"a line is of step {row['step']:,}, and steps end at {len(steps):,}")
    return f"{len(steps):,} steps without a gap, {_count(rows, 'eval_loss')} evaluations"


def _count(rows: Sequence[Mapping[str, Any]], key: str) -> int:
    return sum(1 for row in rows if key in row)


def _check_samples(files: Files) -> str:
    """Each text is of an evaluation."""
    if not files.dir.samples.is_file():
        raise AbsentError("the run wrote none")
    rows = [row for row in take_back(_read_lines(files.dir.samples)) if "text" in row]
    evaluated = [row["step"] for row in files.rows if "eval_loss" in row]
    for row in rows:
        if row["step"] not in evaluated:
            raise BrokenError(f"has a text of step {row['step']:,}, which was not evaluated")
    return f"{len(rows):,} texts"


def _check_latest(files: Files) -> str:
    """`latest` names a checkpoint that is there."""
    folders = sorted(path.name for path in files.dir.checkpoints.glob("step-*"))
    latest = files.dir.checkpoints / LATEST
    if not folders and not latest.exists():
        raise AbsentError("the run keeps none")
    if not latest.is_file():
        raise BrokenError(f"{LATEST} is missing")
    named = latest.read_text(encoding="utf-8", errors="replace").strip()
    if named != (folders[-1] if folders else None):
        raise BrokenError(
            f"{LATEST} names {named[:40]}, and the newest is {(folders or ['none'])[-1]}"
        )
    return f"{len(folders)} kept, {LATEST} is {named}"


def _check_checkpoint(files: Files, folder: Path) -> str:
    """Its files are as they were written, and it is of this run: same config, data and batch."""
    fault = find_fault(folder, config_hash=config_hash(files.run))
    if fault is not None:
        raise BrokenError(fault)
    manifest = read_manifest(folder)
    tokenizer = _corpus_of(files).tokenizer_hash
    if manifest.data.get("tokenizer") != tokenizer:
        raise BrokenError("is of another run: its tokenizer differs")
    hashes = {row["step"]: row["sample_hash"] for row in files.rows if "sample_hash" in row}
    if manifest.step not in hashes:
        raise BrokenError(f"is of step {manifest.step:,}, which metrics.jsonl doesn't have")
    if hashes[manifest.step] != manifest.sample_hash:
        raise BrokenError("is of another run: its last batch differs from that of metrics.jsonl")
    own = read_metrics(folder / "metrics.jsonl")
    if [row for row in own if "loss" in row] != [
        row for row in files.rows if "loss" in row and row["step"] <= manifest.step
    ]:
        raise BrokenError("is of another run: its losses differ from those of metrics.jsonl")
    size = sum(int(size) for size, _ in manifest.files.values())
    return f"{len(manifest.files)} files, {size:,} bytes, all with their hashes"


def _check_export(files: Files) -> str:
    """Its files have the hashes that its proof names, and its logits were near enough."""
    folder = files.dir.export
    if not folder.is_dir():
        raise AbsentError("the run has none")
    proof = _read_json_of(folder / PROOF)
    named = proof.get("files")
    if not isinstance(named, dict) or not named:
        raise BrokenError(f"{PROOF} names no files")
    for name, digest in named.items():
        path = folder / str(name)
        if Path(name).name != name or path.is_symlink():
            raise BrokenError(f"{name} lies outside of it")
        if not path.is_file():
            raise BrokenError(f"{name} is missing")
        assert_same(name, _hash_file(path), str(digest))
    others = sorted(path.name for path in folder.iterdir() if path.name not in (PROOF, *named))
    if others:
        raise BrokenError(f"{PROOF} doesn't name {others[0]}")
    if not proof.get("logit_difference", math.inf) <= proof.get("logit_tolerance", 0):
        raise BrokenError(f"{PROOF}: the logits differ by more than its tolerance")
    step, checkpoint = proof.get("step"), str(proof.get("checkpoint"))
    if step not in {row["step"] for row in files.rows if "sample_hash" in row}:
        raise BrokenError(f"is of step {step}, which metrics.jsonl doesn't have")
    kept = (files.dir.checkpoints / checkpoint).is_dir()
    return f"{len(named)} files of {checkpoint}" + ("" if kept else ", which is kept no more")


def iter_failures(checks: Sequence[Check]) -> Iterator[Check]:
    """The checks that have failed."""
    return (check for check in checks if check.result is Result.failed)

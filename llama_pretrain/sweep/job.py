"""One job of a sweep: run, unless it has finished before; whatever happens becomes its status."""

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from hydra.core.hydra_config import HydraConfig

from llama_pretrain import console
from llama_pretrain.config.ignored import find_ignored
from llama_pretrain.config.problems import UserError
from llama_pretrain.config.run import Run
from llama_pretrain.config.tasks import Resume, Task
from llama_pretrain.launch.signals import Detached, Preempted, Stopped
from llama_pretrain.launch.slurm import job_of
from llama_pretrain.launch.watch import RankError
from llama_pretrain.plan.machine import Machine
from llama_pretrain.plan.nodes import submits_job
from llama_pretrain.runs.agreement import DivergedError
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import evaluations, read_metrics
from llama_pretrain.runs.status import FINISHED, Outcome, Status, write_status
from llama_pretrain.sweep.directory import (
    JobRecord,
    SweepDir,
    SweepRecord,
    Verdict,
    change,
    read_row,
    read_state,
    read_sweep,
    write_sweep,
)
from llama_pretrain.sweep.jobs import (
    Primary,
    SweepJob,
    check_run,
    find_corpus,
    make_job,
    plan_on_data,
    refuse_job,
)
from llama_pretrain.sweep.placing import claim_slot, count_slots, share
from llama_pretrain.sweep.results import write_tables
from llama_pretrain.tasks.context import TaskContext
from llama_pretrain.tasks.pretrain import BusyError, PrunedError, UnsavedError
from llama_pretrain.tasks.run import run_task, train
from llama_pretrain.tasks.submit import submit_job, wait_for_jobs, waiting_job
from llama_pretrain.tasks.validate import resolve_valid

BASIC = "basic"
"""Hydra's own launcher and sweeper."""
LOG = "console.log"
"""What a job prints; in its run directory."""
STOP = ".stop"
"""A file in a sweep's directory that keeps jobs from starting."""
STATUS_SAYS_WHY = (RankError, PrunedError, BusyError, DivergedError, UnsavedError)
NO_RESULT = float("nan")
"""The objective of a job without a result: Optuna takes it for a failed trial."""


def count_own_slots(machine: Machine) -> int:
    """Jobs at a time on this machine; 0 if a launcher decides that elsewhere."""
    own = HydraConfig.get()
    launcher = own.runtime.choices["hydra/launcher"]
    if launcher == "joblib":
        return count_slots(machine, int(own.launcher.n_jobs))
    return 1 if launcher == BASIC else 0


def run_sweep_job(run: Run, words: Sequence[str], context: TaskContext) -> float | None:
    """Run a job of Hydra's multirun. Returns the objective; a signal is raised."""
    if run.task is not Task.pretrain:
        return _run_other_task(run, context)
    folder = SweepDir(Path(HydraConfig.get().sweep.dir).resolve())
    slots = count_own_slots(context.machine)
    context = replace(context, machine=share(context.machine, max(1, slots)))
    sweep = read_sweep(folder)
    record = sweep.find(words)
    if record is None:  # a sweeper that chooses its jobs one by one
        record = _add_job(run, list(words), folder, context)
    if record.verdict is not Verdict.runs or (folder.path / STOP).exists():
        return NO_RESULT
    run_dir = folder.job(record)
    if not has_finished(run_dir) and submits_job(run.launch):
        _submit(run, words, run_dir)
    elif not has_finished(run_dir):
        with claim_slot(folder.path, slots, context.machine), _output_to(run_dir.path / LOG):
            _train(run, folder, replace(context, run_dir=run_dir))
        write_tables(folder)
    objective: float | None = read_row(folder, record, objective=sweep.objective)["objective"]
    return NO_RESULT if objective is None else objective


def _submit(run: Run, words: Sequence[str], run_dir: RunDir) -> None:
    """Submit a job to Slurm, unless it is there; wait for it if the sweeper needs its result."""
    own = HydraConfig.get()
    argv = [*words, *Primary.of(own).words, "resume=auto"]
    argv = [word for word in argv if not word.startswith("sweep=")]
    try:
        job = waiting_job(run_dir) or submit_job(run, argv, run_dir)
    except (UserError, OSError) as error:
        problems = error.problems if isinstance(error, UserError) else [error]
        text = "; ".join(str(problem) for problem in problems)
        write_status(run_dir, Status.failed, Outcome(error=text))
        return
    if own.runtime.choices["hydra/sweeper"] != BASIC:
        wait_for_jobs([job])


def wait_for_submitted(folder: SweepDir) -> None:
    """Wait for the jobs of a sweep that Slurm runs."""
    records = [record for record in read_sweep(folder).jobs if record.folder]
    found = [job_of(folder.job(record)) for record in records]
    if not (jobs := [job for job in found if job is not None]):
        return
    try:
        wait_for_jobs(jobs)
    except Preempted as error:
        detached = Detached(error.number)
        detached.add_note("the jobs that have been submitted go on")
        raise detached from error


def _run_other_task(run: Run, context: TaskContext) -> float | None:
    """A job that does not train: its errors do not stop the others."""
    try:
        return run_task(run, context)
    except UserError as error:
        print(error)
    except (RankError, DivergedError) as error:
        print(error)
    return NO_RESULT


def _add_job(run: Run, words: list[str], folder: SweepDir, context: TaskContext) -> JobRecord:
    """Check and plan a job that was not known before, and add it to sweep.json."""
    with change(folder):
        sweep: SweepRecord = read_sweep(folder)
        swept = [
            key for key in (word.partition("=")[0] for word in words) if key not in sweep.fixed
        ]
        job: SweepJob = make_job(len(sweep.jobs), words, swept)
        try:
            job = check_run(job, run, dict(context.origins), context.machine)
        except UserError as error:
            job = refuse_job(job, error.problems)
        record = plan_on_data(job).record(folder)
        write_sweep(folder, replace(sweep, jobs=[*sweep.jobs, record]))
    return record


def _train(run: Run, folder: SweepDir, context: TaskContext) -> None:
    """Train a job in its run directory; errors become its status, a signal is raised."""
    run_dir, settings = context.run_dir, run.sweep
    if settings.prune:
        poll = _watch_others(folder, run_dir, at_least=settings.prune_after)
        context = replace(context, poll=poll)
    elsewhere = HydraConfig.get().runtime.choices["hydra/launcher"] != BASIC
    try:
        resolved = resolve_valid(replace(run, resume=Resume(run_dir="auto")), context.machine)
        console.show_warnings(find_ignored(resolved, context.origins))
        train(resolved, find_corpus(resolved), context)
    except STATUS_SAYS_WHY as error:
        print(error)
    except UserError as error:
        text = "; ".join(str(problem) for problem in error.problems)
        write_status(run_dir, Status.failed, Outcome(error=text))
    except (Preempted, Stopped):
        if not elsewhere:
            raise
        # Raised in a launcher's process, it would kill the other jobs.
    except Exception as error:  # a bug in one job must not end the others
        traceback.print_exc()
        write_status(run_dir, Status.failed, Outcome(error=f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Print to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


def has_finished(run_dir: RunDir) -> bool:
    """Whether a job's directory, which is named by its snapshot's hash, holds a finished run."""
    return run_dir.snapshot.is_file() and read_state(run_dir)[0] in FINISHED


Curve = Sequence[tuple[int, float]]
"""(tokens, loss) of each evaluation after the first step."""


def _watch_others(folder: SweepDir, run_dir: RunDir, *, at_least: int) -> Callable[[], None]:
    """What stops a job that has fallen behind; called while its workers run."""
    others = [
        read_evaluations(RunDir(other))
        for other in sorted(folder.path.glob("*/"))
        if other != run_dir.path and read_state(RunDir(other))[0] == Status.completed
    ]
    seen = -1

    def check() -> None:
        nonlocal seen
        size = run_dir.metrics.stat().st_size if run_dir.metrics.is_file() else 0
        if size == seen:
            return
        seen = size
        reason = falls_behind(read_evaluations(run_dir), others, at_least=at_least)
        if reason:
            raise PrunedError(reason)

    return check


def read_evaluations(run_dir: RunDir) -> list[tuple[int, float]]:
    """A run's evaluations so far."""
    evaluated = [row for row in evaluations(read_metrics(run_dir.metrics)) if row.step]
    return [(row.tokens, row.eval_loss) for row in evaluated]


def falls_behind(curve: Curve, others: Sequence[Curve], *, at_least: int) -> str:
    """Why a job should stop, by the median rule of Vizier (doi 10.1145/3097983.3098043).

    Its best loss so far is compared with the others' best at the same number of tokens; jobs that
    have not come as far, or were not evaluated by then, do not count.
    """
    if not curve:
        return ""
    tokens, best = curve[-1][0], min(loss for _, loss in curve)
    at_tokens = [
        min(losses)
        for other in others
        if other
        and other[-1][0] >= tokens
        and (losses := [loss for at, loss in other if at <= tokens])
    ]
    if len(at_tokens) < at_least or best <= (middle := median(at_tokens)):
        return ""
    return f"evaluation loss {best:.4f} at {tokens:,} tokens; the others' median is {middle:.4f}"

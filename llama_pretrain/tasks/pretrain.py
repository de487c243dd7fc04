"""task=pretrain: write the run directory, train in it, export, and record how it ended."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime

from llama_pretrain import console
from llama_pretrain.checkpoint.manifest import LATEST, checkpoint_name, discard, newest_of
from llama_pretrain.config.launch import Device
from llama_pretrain.config.ownership import validate_ownership
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.config.secrets import redact
from llama_pretrain.config.snapshot import without_command
from llama_pretrain.config.tasks import DriftPolicy, Generate
from llama_pretrain.files import write_text
from llama_pretrain.launch.local import NodesReturnedError, OtherNodes, launch, other_nodes
from llama_pretrain.launch.operators import build_operators, describe_operators
from llama_pretrain.launch.signals import Preempted, Stopped, describe_resume
from llama_pretrain.launch.slurm import describe_restart
from llama_pretrain.launch.spec import LaunchSpec
from llama_pretrain.launch.watch import RankError
from llama_pretrain.plan.plan import TrainingPlan
from llama_pretrain.runs.agreement import DivergedError
from llama_pretrain.runs.layout import RunDir, hold
from llama_pretrain.runs.metrics import (
    CheckpointRow,
    EvaluationRow,
    initial_weights,
    last,
    read_metrics,
)
from llama_pretrain.runs.phases import Phases
from llama_pretrain.runs.provenance import add_provenance
from llama_pretrain.runs.report import render_report
from llama_pretrain.runs.status import Outcome, Status, write_status
from llama_pretrain.tasks.context import TaskContext
from llama_pretrain.tasks.export import export
from llama_pretrain.tasks.generate import continue_text
from llama_pretrain.tasks.reproduce import Reproduction, begin, finish
from llama_pretrain.tasks.resume import Start, find_start, has_finished, note_start, restart, rewind
from llama_pretrain.tasks.run_directory import refuse_used, write_for_nodes, write_run_dir


class BusyError(UserError):
    """Another process is training in the run directory."""


class UnsavedError(Exception):
    """A run has done all its steps, but its last checkpoint or its export was not written."""


class PrunedError(Exception):
    """A job of a sweep was stopped because it fell behind the others."""


def pretrain(
    run: ResolvedRun,
    plan: TrainingPlan,
    context: TaskContext,
    *,
    reproduction: Reproduction | None = None,
) -> float | None:
    """Write the run directory, train in it, and record how it ended.

    Returns:
        The last evaluation loss.

    Raises:
        UserError: if the directory is used or cannot be resumed.
        RankError: if a rank failed, and restarts did not help.
        DivergedError: with drift=error, if the run differs from the one that it reproduces.
        UnsavedError: after the last step, if its checkpoint or its export was not written.
        Preempted, Stopped: after a signal.
    """
    run_dir = context.run_dir
    refuse(validate_ownership(run_dir.path))
    run_dir.path.mkdir(parents=True, exist_ok=True)
    if not any(run_dir.path.iterdir()):  # Hydra has created it with the usual permissions
        run_dir.path.chmod(int(run.provenance.directory_mode, 8))
    try:
        with hold(run_dir):
            start, resumed = Start(), run.resume.run_dir is not None
            if resumed:
                start = find_start(run, plan, run_dir)
                if start.step and has_finished(run_dir, start.step, plan):
                    console.say(f"{run_dir.path} has completed its {plan.steps.total} steps")
                    return _last_eval_loss(run_dir)
                resumed = run_dir.snapshot.exists()
            else:
                refuse_used(run_dir)
            run = without_command(run)
            console.show_config(run, context.origins)
            console.show_plan(run, plan, run_dir)
            write_run_dir(run, plan, context)
            if reproduction is not None:
                begin(reproduction, run_dir)
            if resumed:
                rewind(run_dir, start)
                when = datetime.now(UTC).isoformat(timespec="seconds")
                note_start(run_dir, start, resumed=f"{when} {describe_restart()}".strip())
            return _train(run, plan, context, start, reproduction)
    except BlockingIOError as error:
        message = f"another process is training in {run_dir.path}"
        raise BusyError([Problem(path="hydra.run.dir", message=message)]) from error


def _train(
    run: ResolvedRun,
    plan: TrainingPlan,
    context: TaskContext,
    start: Start,
    reproduction: Reproduction | None,
) -> float | None:
    """Train in a run directory that has been written, and record how it ended."""
    run_dir = context.run_dir
    restarts = 0
    status, verdict = Status.completed, ""
    with contextlib.suppress(OSError):
        run_dir.request.unlink()  # of an earlier launch
    write_status(run_dir, Status.running)
    try:
        build_operators(run, log=run_dir.ranks / "build.log", taking_time=console.taking_time)
        add_provenance(run_dir, operators=describe_operators(run))
        phases = context.phases

        def replan(nodes: int) -> tuple[ResolvedRun, TrainingPlan]:
            return write_for_nodes(run, plan, run_dir, nodes=nodes)

        with (
            other_nodes(run, run_dir, report=console.say, replan=replan) as others,
            _written_for_all(run, replan),
        ):
            while True:
                try:
                    spec = LaunchSpec(run, plan, run_dir, start.checkpoint)
                    late_signal = _launch(
                        spec, context, phases, first_step=start.step, others=others
                    )
                    break
                except NodesReturnedError:
                    phases = Phases()
                    start = restart(run_dir)
                    rewind(run_dir, start)
                    note_start(run_dir, start, restarted="nodes that were lost are back")
                except RankError as error:
                    if restarts == run.launch.max_restarts or not error.may_pass:
                        raise
                    restarts, phases = restarts + 1, Phases()
                    console.say(f"{error}\nrestart {restarts} of {run.launch.max_restarts}")
                    start = restart(run_dir)
                    rewind(run_dir, start)
                    note_start(run_dir, start, restarted=redact(str(error)).splitlines()[0])
                    write_status(run_dir, Status.running, Outcome(restarts=restarts))
        _add_initial_weights(run_dir)
        objective = _last_eval_loss(run_dir)
        unsaved = _describe_failed_save(run_dir)
        if run.checkpoint.export and not unsaved:
            unsaved = _export_at_end(run, plan, run_dir)
        if reproduction is not None:
            status, verdict = finish(reproduction, run_dir)
        if unsaved:
            status = Status.completed_unsaved
        outcome = Outcome(objective=objective, restarts=restarts, error=unsaved or None)
        write_status(run_dir, status, outcome)
        write_text(run_dir.report, render_report(run_dir))
    except BaseException as error:
        _record_failure(run_dir, error, restarts=restarts)
        if isinstance(error, (Preempted, Stopped)):
            newest = newest_of(run_dir.checkpoints)
            error.add_note(describe_resume(run_dir.path, checkpoint=newest))
        raise
    console.show_result(read_metrics(run_dir.metrics), run_dir)
    if late_signal:  # a sweep must not continue
        ended = Preempted(late_signal)
        ended.add_note("the run has completed")
        raise ended
    if reproduction is not None:
        if status is Status.diverged and reproduction.policy is DriftPolicy.error:
            raise DivergedError(verdict)
        console.say(verdict)
    if unsaved:
        raise UnsavedError(f"all steps are done, but {unsaved}")
    return objective


@contextlib.contextmanager
def _written_for_all(run: ResolvedRun, replan: Callable[[int], object]) -> Iterator[None]:
    """Leave the directory as it was planned, although the run may have ended on fewer nodes."""
    try:
        yield
    finally:
        if run.launch.min_nodes is not None:
            with contextlib.suppress(OSError):  # the disk may be what failed
                replan(run.launch.nodes)


def _launch(
    spec: LaunchSpec,
    context: TaskContext,
    phases: Phases,
    *,
    first_step: int,
    others: OtherNodes | None,
) -> int:
    """Launch ranks and show their progress. Returns what `launch` does."""
    phases.end("plan")
    phases.write(spec.run_dir)
    timings = spec.run.monitor.timings
    with console.follow_metrics(spec.run_dir, spec.plan, first_step=first_step, timings=timings):
        return launch(spec, report=console.say, poll=context.poll, others=others)


def _last_eval_loss(run_dir: RunDir) -> float | None:
    row = last(read_metrics(run_dir.metrics), EvaluationRow)
    return None if row is None else row.eval_loss


def _add_initial_weights(run_dir: RunDir) -> None:
    weights = initial_weights(read_metrics(run_dir.metrics))
    add_provenance(run_dir, initial_weights=weights)


def _record_failure(run_dir: RunDir, error: BaseException, *, restarts: int) -> None:
    """The status of a run that has not completed, and a report of what it did."""
    status, outcome = Status.failed, Outcome(error=str(error), restarts=restarts)
    if isinstance(error, RankError):
        outcome = replace(outcome, error=error.error, rank=error.rank, log=error.log)
    elif isinstance(error, PrunedError):
        status, outcome = Status.pruned, replace(outcome, objective=_last_eval_loss(run_dir))
    elif isinstance(error, Preempted):
        status = Status.preempted
    elif isinstance(error, (Stopped, KeyboardInterrupt)):
        status, outcome = Status.stopped, replace(outcome, error=str(error) or "stopped")
    else:
        outcome = replace(outcome, error=f"{type(error).__name__}: {error}")
    with contextlib.suppress(OSError, ValueError):  # the disk may be what failed
        write_status(run_dir, status, outcome)
        _add_initial_weights(run_dir)
        write_text(run_dir.report, render_report(run_dir))


def _describe_failed_save(run_dir: RunDir) -> str:
    """The error of a run's last save, and what there is instead; empty if it succeeded."""
    row = last(read_metrics(run_dir.metrics), CheckpointRow)
    if row is None or not row.checkpoint_error:
        return ""
    newest = newest_of(run_dir.checkpoints)
    left = "there is no checkpoint" if newest is None else f"the newest checkpoint is {newest.name}"
    return f"{row.checkpoint_error}; {left}"


def _export_at_end(run: ResolvedRun, plan: TrainingPlan, run_dir: RunDir) -> str:
    """Export the newest checkpoint, verify it, and generate a text with it.

    A last checkpoint that the settings request only to export it is deleted afterwards.

    Returns:
        Why there is no export; empty if there is one.
    """
    checkpoint = newest_of(run_dir.checkpoints)
    if checkpoint is None:
        return "there is no export: the run has written no checkpoint"
    try:
        export(run, run_dir, checkpoint, run_dir.export, say=console.say)
    except UserError as error:
        reason = "; ".join(str(problem) for problem in error.problems)
        return f"there is no export: {reason}; the newest checkpoint is {checkpoint.name}"
    if run.train.sample_prompt:
        prompt, length = run.train.sample_prompt, run.train.sample_tokens
        settings = replace(Generate(), prompt=prompt, num_tokens=length)
        # On the CPU: a sweep's next job uses the whole GPU.
        text = continue_text(run_dir.export, settings, seed=run.seed, device=Device.cpu)
        write_text(run_dir.path / "sample.txt", text + "\n")
    if not run.checkpoint.at_end and checkpoint.name == checkpoint_name(plan.steps.last):
        discard(checkpoint)
        before = newest_of(run_dir.checkpoints)
        latest = run_dir.checkpoints / LATEST
        if before is None:
            latest.unlink(missing_ok=True)
        else:
            write_text(latest, before.name + "\n")
    return ""

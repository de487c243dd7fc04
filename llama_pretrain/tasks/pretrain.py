"""task=pretrain: write the run directory, train in it, export, and record how it ended."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from llama_pretrain import console
from llama_pretrain.checkpoint.manifest import LATEST, checkpoint_name, discard, newest_of
from llama_pretrain.config.launch import Device
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.run import Run
from llama_pretrain.config.secrets import redact
from llama_pretrain.config.snapshot import as_written
from llama_pretrain.config.tasks import DriftPolicy
from llama_pretrain.files import write_text
from llama_pretrain.launch.local import launch
from llama_pretrain.launch.operators import build_operators, describe_operators
from llama_pretrain.launch.signals import Preempted, Stopped, how_to_go_on
from llama_pretrain.launch.watch import RankError
from llama_pretrain.plan.machine import Machine
from llama_pretrain.plan.plan import Plan, load_plan
from llama_pretrain.runs.agreement import DivergedError
from llama_pretrain.runs.layout import RunDir, hold
from llama_pretrain.runs.metrics import read_metrics
from llama_pretrain.runs.phases import Phases
from llama_pretrain.runs.provenance import add_provenance, initial_weights
from llama_pretrain.runs.report import render_report
from llama_pretrain.runs.status import Status, write_status
from llama_pretrain.tasks.export import export
from llama_pretrain.tasks.generate import SAMPLE, _continue
from llama_pretrain.tasks.reproduce import Reproduction, begin, finish
from llama_pretrain.tasks.resume import (
    Start,
    find_start,
    has_finished,
    note_start,
    rewind,
    start_again,
)
from llama_pretrain.tasks.run_directory import check_unused, write_run_dir


class BusyError(UserError):
    """Another process is training in the run directory."""


class PrunedError(Exception):
    """A point of a sweep was ended because it fell behind the others."""


def pretrain(
    run: Run,
    plan: Plan,
    *,
    run_dir: RunDir,
    argv: Sequence[str],
    machine: Machine,
    launch: Callable[..., int] = launch,
    reproduction: Reproduction | None = None,
    phases: Phases | None = None,
) -> float | None:
    """Write the run directory, train in it, and say how it ended.

    Args:
        launch: starts ranks and waits for them, as launch/local.py has it.
        phases: of this start, so far; `None` = it begins here.

    Raises:
        DivergedError: with drift=error, if the run is not equal to the one that it does again.
    """
    try:
        with hold(run_dir):
            return _pretrain(
                run,
                plan,
                run_dir=run_dir,
                argv=argv,
                machine=machine,
                launch=launch,
                reproduction=reproduction,
                phases=Phases() if phases is None else phases,
            )
    except BlockingIOError as error:
        message = f"another process is training in {run_dir.path}"
        raise BusyError([Problem(path="hydra.run.dir", message=message)]) from error


def _pretrain(
    run: Run,
    plan: Plan,
    *,
    run_dir: RunDir,
    argv: Sequence[str],
    machine: Machine,
    launch: Callable[..., int],
    reproduction: Reproduction | None,
    phases: Phases,
) -> float | None:
    start, resumed = Start(), run.resume.run_dir is not None
    if not resumed:
        check_unused(run_dir)
    else:
        start = find_start(run, plan, run_dir)
        if start.step and has_finished(run_dir, start.step, plan):
            console.say(f"{run_dir.path} has done its {plan.steps.total} steps")
            return _objective(run_dir)
        resumed = run_dir.snapshot.exists()
    run = as_written(run)
    console.show_config(run)
    console.show_plan(run, plan, run_dir)
    write_run_dir(run, plan, run_dir, argv=argv, machine=machine)
    if reproduction is not None:
        begin(reproduction, run_dir)
    if resumed:
        rewind(run_dir, start)
        note_start(run_dir, start, resumed=datetime.now(UTC).isoformat(timespec="seconds"))
    restarts, verdict = 0, (Status.completed, "")
    write_status(run_dir, Status.running)
    try:
        build_operators(run, log=run_dir.ranks / "build.log", taking_time=console.taking_time)
        add_provenance(run_dir, operators=describe_operators(run))
        while True:
            try:
                phases.end("plan")
                phases.write(run_dir)
                timings = run.monitor.timings
                with console.follow_metrics(run_dir, plan, first_step=start.step, timings=timings):
                    late = launch(
                        run, plan, run_dir, checkpoint=start.checkpoint, report=console.say
                    )
                break
            except RankError as error:
                if restarts == run.launch.max_restarts or not error.may_pass:
                    raise
                restarts, phases = restarts + 1, Phases()
                console.say(f"{error}\nrestart {restarts} of {run.launch.max_restarts}")
                start = start_again(run_dir)
                rewind(run_dir, start)
                note_start(run_dir, start, restarted=redact(str(error)).splitlines()[0])
                write_status(run_dir, Status.running, restarts=restarts)
        add_provenance(run_dir, initial_weights=initial_weights(run_dir))
        objective = _objective(run_dir)
        if run.checkpoint.export:
            export_at_end(run, run_dir)
        if reproduction is not None:
            verdict = finish(reproduction, run_dir)
        write_status(run_dir, verdict[0], objective=objective, restarts=restarts)
        write_text(run_dir.report, render_report(run_dir))
    except BaseException as error:
        _write_ending(run_dir, error, restarts=restarts)
        if isinstance(error, (Preempted, Stopped)):
            newest = newest_of(run_dir.checkpoints)
            error.add_note(how_to_go_on(run_dir.path, checkpoint=newest))
        raise
    console.show_result(read_metrics(run_dir.metrics), run_dir)
    if late:  # a sweep must not go on
        ended = Preempted(late)
        ended.add_note("the run has completed")
        raise ended
    status, told = verdict
    if reproduction is not None:
        if status is Status.diverged and reproduction.policy is DriftPolicy.error:
            raise DivergedError(told)
        console.say(told)
    return objective


def _objective(run_dir: RunDir) -> float | None:
    """The last evaluation loss."""
    rows = read_metrics(run_dir.metrics)
    return next((row["eval_loss"] for row in reversed(rows) if "eval_loss" in row), None)


def _write_ending(run_dir: RunDir, error: BaseException, *, restarts: int) -> None:
    """The status of a run that has not completed, and its report as far as it came."""
    if isinstance(error, RankError):
        write_status(
            run_dir,
            Status.failed,
            error=error.error,
            rank=error.rank,
            log=error.log,
            restarts=restarts,
        )
    elif isinstance(error, PrunedError):
        objective = _objective(run_dir)
        write_status(run_dir, Status.pruned, objective=objective, error=str(error))
    elif isinstance(error, Preempted):
        write_status(run_dir, Status.preempted, error=str(error), restarts=restarts)
    elif isinstance(error, (Stopped, KeyboardInterrupt)):
        write_status(run_dir, Status.stopped, error=str(error) or "stopped", restarts=restarts)
    else:
        told = f"{type(error).__name__}: {error}"
        write_status(run_dir, Status.failed, error=told, restarts=restarts)
    with contextlib.suppress(OSError, ValueError):  # the disk may be what has failed
        add_provenance(run_dir, initial_weights=initial_weights(run_dir))
        write_text(run_dir.report, render_report(run_dir))


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

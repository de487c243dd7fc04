"""The stations of a run, called one after another in the parent process."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from llama_pretrain import console
from llama_pretrain.config.compose import PROJECT_ROOT
from llama_pretrain.config.fields import parse_size
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.rules import check_run
from llama_pretrain.config.schema import DriftPolicy, Run, Task
from llama_pretrain.config.secrets import redact
from llama_pretrain.config.snapshot import as_written, render_snapshot
from llama_pretrain.finished import do_with_run, export_at_end
from llama_pretrain.launch.ahead import ServerProcess
from llama_pretrain.launch.forks import ForkServers
from llama_pretrain.launch.local import launch
from llama_pretrain.launch.operators import build_operators, describe_operators
from llama_pretrain.launch.signals import Preempted, Stopped, how_to_go_on
from llama_pretrain.launch.watch import RankError
from llama_pretrain.plan.choices import describe_choices, resolve_choices
from llama_pretrain.plan.cost import estimate_cost
from llama_pretrain.plan.ds_config import get_train_ds_config, trace_ds_config
from llama_pretrain.plan.feasible import check_machine
from llama_pretrain.plan.fit import list_fits
from llama_pretrain.plan.machine import Machine, detect_machine
from llama_pretrain.plan.plan import (
    Corpus,
    Plan,
    build_plan,
    check_corpus,
    check_fits,
    check_plan,
    render_plan,
)
from llama_pretrain.reproduce import (
    Reproduction,
    begin,
    find_reproduction,
    finish,
    is_reproduction,
)
from llama_pretrain.resume import Start, find_start, has_finished, note_start, rewind, start_again
from llama_pretrain.runs.agreement import DivergedError
from llama_pretrain.runs.checkpoints import newest_of
from llama_pretrain.runs.phases import Phases
from llama_pretrain.runs.provenance import (
    add_provenance,
    collect_provenance,
    earlier_launches,
    initial_weights,
    list_data_files,
    render_provenance,
    write_changes,
)
from llama_pretrain.runs.report import render_report
from llama_pretrain.runs.rundir import (
    RunDir,
    Status,
    hold,
    read_metrics,
    write_status,
    write_text,
)
from llama_pretrain.verify import verify_resume


def run_task(
    run: Run,
    *,
    run_dir: RunDir,
    argv: Sequence[str],
    origins: Mapping[str, str],
    phases: Phases | None = None,
    ahead: ServerProcess | None = None,
) -> float | None:
    """Do what `task` says. Returns the last evaluation loss, which Hydra calls the objective.

    Args:
        origins: where each setting is from (config/compose.py).
        phases: of this start, so far.
        ahead: the imports of ranks, begun on a guess.

    Raises:
        UserError: for everything that can be known before a rank starts.
        RankError: if a rank failed.
    """
    machine = detect_machine()
    before = run
    run, problems = check_everything(run, machine)
    refuse(problems)
    origins = {**origins, **describe_choices(before, run)}
    if run.task is Task.plan:
        show_plan(run, machine, origins)
        return None
    if run.task.reads_a_run:
        return do_with_run(run, run_dir, argv=argv)
    refuse(check_fits(run, build_plan(run, None)))
    with ForkServers(label=str(run_dir.path), ahead=ahead) as forks:
        if run.task.trains:
            forks.warm_up(run)
        return _train(
            run,
            run_dir,
            argv=argv,
            origins=origins,
            machine=machine,
            launch=partial(launch, forks=forks),
            phases=phases,
        )


def _train(
    run: Run,
    run_dir: RunDir,
    *,
    argv: Sequence[str],
    origins: Mapping[str, str],
    machine: Machine,
    launch: Callable[..., int],
    phases: Phases | None,
) -> float | None:
    """Prepare the data, and do with it what `task` says."""
    from llama_pretrain.data.cache import disk_problems  # numpy: not for a plan

    with disk_problems(run.data.cache_dir):
        corpus = prepare_data(run, run_dir)
    if not run.task.trains:
        console.show_corpus(run, build_plan(run, corpus))
        return None
    plan, reproduction = build_plan(run, corpus), None
    if run.task is Task.pretrain:  # before other data is refused: it is drift too
        reproduction = look_back(run, plan, run_dir, argv=argv, machine=machine, origins=origins)
    plan = plan_training(run, plan, run_dir=run_dir, origins=origins)
    if run.task is Task.verify_resume:
        verify(run, plan, run_dir, argv=argv, machine=machine, launch=launch)
        return None
    if run.task is Task.probe:
        return probe(run, plan, run_dir=run_dir, argv=argv, machine=machine, launch=launch)
    return pretrain(
        run,
        plan,
        run_dir=run_dir,
        argv=argv,
        machine=machine,
        launch=launch,
        reproduction=reproduction,
        phases=phases,
    )


def look_back(
    run: Run,
    plan: Plan,
    run_dir: RunDir,
    *,
    argv: Sequence[str],
    machine: Machine,
    origins: Mapping[str, str],
) -> Reproduction | None:
    """What has drifted since the run that this one does again; `None` if it does none again.

    Raises:
        UserError: with drift=error, for drift that nobody asked for.
    """
    if not is_reproduction(run, run_dir):
        return None
    return find_reproduction(
        run,
        plan,
        run_dir,
        provenance=describe_launch(run, plan, argv=argv, machine=machine),
        files=_data_files(plan),
        origins=origins,
    )


def plan_training(run: Run, plan: Plan, *, run_dir: RunDir, origins: Mapping[str, str]) -> Plan:
    """The plan of a run that is to train on its corpus, complete.

    Raises:
        UserError: if it may not.
    """
    refuse(check_corpus(run, plan))
    config = get_train_ds_config(run, plan.batch, run_dir=run_dir.path)
    return replace(plan, deepspeed_sources=trace_ds_config(config, origins))


def prepare_data(run: Run, run_dir: RunDir) -> Corpus:
    """The run's tokens, made or found; with task=inspect shown as well."""
    from llama_pretrain.data.corpus import describe_corpus, prepare_sources  # tokenizers

    tokenizer, prepared = prepare_sources(run, report=console.DataReport())
    corpus = describe_corpus(run, tokenizer, prepared)
    if run.task is Task.inspect:
        from llama_pretrain.data.inspect import inspect_data, render_page_of

        inspection = inspect_data(run, tokenizer, prepared)
        write_text(run_dir.inspection, render_page_of(run, inspection))
        console.show_inspection(inspection, run_dir.inspection)
    return corpus


def show_plan(run: Run, machine: Machine, origins: Mapping[str, str]) -> None:
    """All that is known of a run, and nothing started."""
    plan = build_plan(run, None)
    config = get_train_ds_config(run, plan.batch, run_dir=None)
    plan = replace(plan, deepspeed_sources=trace_ds_config(config, origins))
    console.show_config(run)
    console.show_plan(run, plan, None)
    if run.plan.fit is not None:
        fits = list_fits(run, plan.batch, limit=parse_size(run.plan.fit))
        console.show_fits(fits, limit=run.plan.fit)
    for problem in check_machine(run, machine):
        console.say(f"not on this machine: {problem}")
    console.show_sources(config, plan.deepspeed_sources)
    console.say(json.dumps(config, indent=2))


def probe(
    run: Run,
    plan: Plan,
    *,
    run_dir: RunDir,
    argv: Sequence[str],
    machine: Machine,
    launch: Callable[..., int],
) -> float | None:
    """Train a few steps of the real thing, and say what the whole run would take."""
    steps = run.plan.probe_steps
    short = replace(
        run,
        train=replace(run.train, max_steps=steps, eval_every_steps=None, eval_rows=1),
        checkpoint=replace(run.checkpoint, every_steps=None, at_end=False, export=False),
    )
    result = pretrain(
        short,
        replace(plan, steps=replace(plan.steps, last=steps, eval_rows=1)),
        run_dir=run_dir,
        argv=argv,
        machine=machine,
        launch=launch,
    )
    rows = read_metrics(run_dir.metrics)
    seconds = [plan.steps.tokens_per_step / row["tokens_per_s"] for row in rows if "loss" in row]
    counted = sorted(seconds[2:])  # the first two warm up
    speed = plan.steps.tokens_per_step / counted[len(counted) // 2]
    console.show_cost(
        estimate_cost(run, tokens=plan.steps.tokens, tokens_per_s=speed),
        steps=plan.steps,
        measured_over=len(counted),
    )
    return result


def verify(
    run: Run,
    plan: Plan,
    run_dir: RunDir,
    *,
    argv: Sequence[str],
    machine: Machine,
    launch: Callable[..., int],
) -> None:
    """Prove a resume on this config, in folders of the run directory."""
    check_unused(RunDir(run_dir.path / "whole"))
    console.show_config(run)
    console.show_plan(run, plan, run_dir)
    build_operators(run, log=run_dir.path / "build.log", taking_time=console.taking_time)

    def train(run: Run, plan: Plan, folder: RunDir, checkpoint: Path | None) -> None:
        write_run_dir(run, plan, folder, argv=argv, machine=machine)
        first_step = 0
        if checkpoint is not None:
            start = start_again(folder)
            rewind(folder, start)
            first_step = start.step
        with console.follow_metrics(folder, plan, first_step=first_step):
            late = launch(run, plan, folder, checkpoint=checkpoint, report=console.say)
        if late:
            raise Preempted(late)

    verify_resume(run, plan, run_dir, train=train)


def check_everything(run: Run, machine: Machine) -> tuple[Run, list[Problem]]:
    """The run with its choices made, and every problem that needs no look into the data."""
    try:
        run = resolve_choices(run, machine)
    except UserError as error:
        return run, [*check_run(run), *error.problems]
    problems = list(check_run(run))
    if run.task.trains:
        problems += check_machine(run, machine)
    return run, problems + list(check_plan(run))


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
    write_text(run_dir.data_files, json.dumps(_data_files(plan), indent=1) + "\n")
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


def _data_files(plan: Plan) -> dict[str, dict[str, str]]:
    from llama_pretrain.data.meta import META  # pydantic

    assert plan.corpus is not None
    return list_data_files(
        {source.name: Path(source.tokens_dir) / META for source in plan.corpus.sources}
    )

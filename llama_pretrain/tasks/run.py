"""Run the task that the config names."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from llama_pretrain import console
from llama_pretrain.checkpoint.pretrained import validate_pretrained
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import load_snapshot, to_plain
from llama_pretrain.config.tasks import Task
from llama_pretrain.config.validate import flatten, validate_run
from llama_pretrain.launch.ahead import ServerProcess
from llama_pretrain.launch.forks import ForkServers
from llama_pretrain.launch.local import launch
from llama_pretrain.plan.ds_config import get_train_ds_config, trace_ds_config
from llama_pretrain.plan.feasible import check_machine
from llama_pretrain.plan.machine import Machine, detect_machine
from llama_pretrain.plan.plan import Plan, build_plan, check_corpus, check_fits, check_plan
from llama_pretrain.plan.resolve import describe_choices, resolve_choices
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.phases import Phases
from llama_pretrain.tasks.evaluate import evaluate
from llama_pretrain.tasks.export import export, pick_checkpoint
from llama_pretrain.tasks.generate import generate
from llama_pretrain.tasks.plan import show_plan
from llama_pretrain.tasks.prepare import prepare_data
from llama_pretrain.tasks.pretrain import pretrain
from llama_pretrain.tasks.probe import probe
from llama_pretrain.tasks.reproduce import Reproduction, find_reproduction, is_reproduction
from llama_pretrain.tasks.run_directory import data_files_of, describe_launch
from llama_pretrain.tasks.verify_resume import verify


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
        files=data_files_of(plan),
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


def check_everything(run: Run, machine: Machine) -> tuple[Run, list[Problem]]:
    """The run with its choices made, and every problem that needs no look into the data."""
    unreadable = list(validate_pretrained(run))
    if unreadable:
        return run, [*validate_run(run), *unreadable]
    try:
        run = resolve_choices(run, machine)
    except UserError as error:
        return run, [*validate_run(run), *error.problems]
    problems = list(validate_run(run))
    if run.task.trains:
        problems += check_machine(run, machine)
    return run, problems + list(check_plan(run))


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

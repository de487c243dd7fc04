"""`python run.py -m ...`: the stations of a sweep, from its command line to its leaderboard."""

import contextlib
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig

from llama_pretrain import console
from llama_pretrain.config.compose import PROJECT_ROOT, read_config
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.tasks import Task
from llama_pretrain.launch.signals import Preempted, Stopped, receive_signals
from llama_pretrain.plan.machine import Machine, detect_machine
from llama_pretrain.plan.plan import Point
from llama_pretrain.process import list_processes
from llama_pretrain.runs.layout import RunDir, hold
from llama_pretrain.sweep.directory import (
    PointRecord,
    SweepDir,
    SweepRecord,
    Verdict,
    change,
    read_sweep,
    write_sweep,
)
from llama_pretrain.sweep.placing import count_slots, share
from llama_pretrain.sweep.points import (
    BASIC,
    Command,
    Corpora,
    SweepPoint,
    check_point,
    list_points,
    make_point,
    plan_point,
    sweep_folder,
)
from llama_pretrain.sweep.results import all_is_well, conclude, write_tables
from llama_pretrain.sweep.runner import Job, fork_servers
from llama_pretrain.sweep.view import (
    View,
    show_what_was_planned,
    summary,
)

NOTHING_CAME = "No trials are completed yet"
"""Optuna's words where no point has come to anything: their rows say why."""
STOP = ".stop"
"""A file in a sweep's directory while its points are asked to end."""
SWEPT_TASKS = (Task.pretrain.value, Task.plan.value)
"""Tasks whose points are planned together; others are plain jobs of Hydra."""


def run_sweep(argv: Sequence[str], command: Command) -> int:
    """Plan all points, run those that can be run, and say what came of each.

    Returns the exit code: 1 if a point has failed or was refused.

    Raises:
        UserError: if there is nothing to run.
        Preempted: after a signal; the same command goes on.
    """
    machine = detect_machine()
    settings = read_config(command.run_config).sweep
    slots = _count_slots(command, machine)
    own = share(machine, max(1, slots))
    only_plans = command.base.task == Task.plan.value
    points: list[SweepPoint] = []
    if command.sweeper == BASIC:
        points = [check_point(point, command, own) for point in list_points(command)]
        _refuse_if_all_alike(points)
        if only_plans:
            return show_plans(points)
    elif only_plans:
        message = f"shows points that are listed, and {command.sweeper} draws them one by one"
        raise UserError([Problem(path="task", message=message, hint="add hydra/sweeper=basic")])
    folder = sweep_folder(command, argv)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(RunDir(folder.path)))
        except BlockingIOError as error:
            message = f"another process runs this sweep in {folder.path}"
            raise UserError([Problem(path="hydra.sweep.dir", message=message)]) from error
        stack.enter_context(fork_servers())
        sweep = Sweep(command, folder, Job(folder, settings, own, slots), list(argv))
        return sweep.run(points)


def _count_slots(command: Command, machine: Machine) -> int:
    """Points at a time on this machine; 0 where a launcher sees to that elsewhere."""
    if command.launcher == "joblib":
        return count_slots(machine, int(command.base.hydra.launcher.n_jobs))
    return 1 if command.launcher == BASIC else 0


def show_plans(points: Sequence[SweepPoint]) -> int:
    """A table of all plans. Returns the exit code: 1 if one is refused."""
    return console.show_points(
        [
            Point(
                words=[f"{key}={value}" for key, value in point.settings.items()] or ["all alike"],
                plan=point.plan,
                problem=point.problem,
            )
            for point in points
        ]
    )


def _refuse_if_all_alike(points: Sequence[SweepPoint]) -> None:
    """What is wrong with every point is wrong with the command."""
    reasons = {point.problem for point in points if point.verdict is Verdict.refused}
    if len(reasons) == 1 and all(point.verdict is Verdict.refused for point in points):
        raise UserError([Problem(path="every point", message=reasons.pop())])


@dataclass
class Sweep:
    """A sweep under way, in the process of its command."""

    command: Command
    folder: SweepDir
    job: Job
    argv: list[str]
    corpora: Corpora = field(default_factory=Corpora)

    def run(self, points: Sequence[SweepPoint]) -> int:
        """Run the points, or let Hydra's sweeper find them."""
        self._warm_up(points)
        planned = [plan_point(point, self.corpora, self.folder) for point in points]
        records = [point.record(self.folder) for point in planned]
        record = SweepRecord(
            command=["python", "run.py", *self.argv],
            objective=self.job.settings.objective,
            points=records,
        )
        write_sweep(self.folder, record)
        if planned:
            show_what_was_planned(planned, slots=self.job.slots)
        console.say(f"sweep directory: {self.folder.path}")
        try:
            with View(self.folder):
                if self.command.sweeper != BASIC:
                    self._let_sweeper_choose()
                elif self.command.launcher == BASIC:
                    for point, known in zip(planned, records, strict=True):
                        if known.verdict is Verdict.runs:
                            self.job.run(point, known)
                            write_tables(self.folder)
                else:
                    self._launch_elsewhere(planned, records)
        except (Preempted, Stopped) as error:
            rows = write_tables(self.folder)
            again = shlex.join(["python", "run.py", *self.argv])
            error.__notes__ = [f"{summary(rows)}; to go on, the same command: {again}"]
            raise
        return 0 if all_is_well(conclude(self.folder)) else 1

    def _warm_up(self, points: Sequence[SweepPoint]) -> None:
        """Have the first ranks' imports begin while the data is prepared."""
        runs = [point.run for point in points if point.verdict is Verdict.runs]
        if self.command.launcher == BASIC and runs:
            assert runs[0] is not None
            fork_servers().warm_up(runs[0])

    def _launch_elsewhere(
        self, points: Sequence[SweepPoint], records: Sequence[PointRecord]
    ) -> None:
        """Have one of Hydra's launchers run the points, each by its number."""
        todo = {
            point.index: (point, record)
            for point, record in zip(points, records, strict=True)
            if record.verdict is Verdict.runs
        }
        if not todo:
            return
        # What it composes says nothing of the point: any config will do, and conf/ is everywhere.
        with self._hydra(str(PROJECT_ROOT / "conf"), "config", ()) as (config, context):
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=context, task_function=Numbered(self.job, todo), config=config
            )
            with pass_signals_on(self.folder):
                jobs = [[f"+point={number}"] for number in todo]
                for done in launcher.launch(jobs, initial_job_idx=0):
                    _ = done.return_value  # raises what nobody expected

    def _let_sweeper_choose(self) -> None:
        """Have one of Hydra's sweepers find points, one after another."""
        command = self.command
        fixed = command.fixed
        with self._hydra(command.folder, command.name, fixed) as (config, context):
            sweeper = Plugins.instance().instantiate_sweeper(
                config=config, hydra_context=context, task_function=Trials(self)
            )
            for name in ("optuna", "hydra_plugins"):  # what becomes of each point we tell
                logging.getLogger(name).setLevel(logging.CRITICAL)
            beside = command.launcher != BASIC
            try:
                with pass_signals_on(self.folder) if beside else contextlib.nullcontext():
                    sweeper.sweep(arguments=command.words)
            except ValueError as error:
                if NOTHING_CAME not in str(error):
                    raise UserError([Problem(path="hydra.sweeper", message=str(error))]) from error

    @contextlib.contextmanager
    def _hydra(
        self, folder: str, name: str, words: Sequence[str]
    ) -> Iterator[tuple[DictConfig, HydraContext]]:
        """A config with Hydra's own and a loader, as launchers and sweepers want them."""
        place = [f"hydra.sweep.dir='{self.folder.path}'", "hydra.sweep.subdir=."]
        theirs = [word for word in self.command.hydra_words if "hydra.sweep." not in word]
        with hydra.initialize_config_dir(folder, version_base="1.3"):
            overrides = [*words, *theirs, *place]
            config = hydra.compose(name, overrides=overrides, return_hydra_config=True)
            loader = GlobalHydra.instance().config_loader()
            yield config, HydraContext(config_loader=loader, callbacks=Callbacks(config))


@dataclass(frozen=True)
class Numbered:
    """The job that a launcher is given: it runs the point that `+point=` names."""

    job: Job
    todo: dict[int, tuple[SweepPoint, PointRecord]]

    def __call__(self, config: DictConfig) -> float | None:
        """Called by Hydra, in whatever process."""
        return unless_stopped(self.job, partial(self.job.run, *self.todo[config.point]))


def unless_stopped(job: Job, run: Callable[[], float | None]) -> float | None:
    """Run a point in a launcher's process, unless the sweep is being stopped."""
    if (job.folder.path / STOP).exists():
        return None
    try:
        return run()
    except (Preempted, Stopped):  # raised, it would have the launcher kill the others
        return None


@dataclass(frozen=True)
class Trials:
    """The job that a sweeper is given: a point that it has thought of."""

    sweep: Sweep

    def __call__(self, _config: DictConfig) -> float | None:
        """Called by Hydra. `None` is a failure to it."""
        words = list(HydraConfig.get().overrides.task)
        if self.sweep.command.launcher == BASIC:
            return self._try(words)
        return unless_stopped(self.sweep.job, partial(self._try, words))

    def _try(self, words: Sequence[str]) -> float | None:
        sweep = self.sweep
        with change(sweep.folder):
            record = read_sweep(sweep.folder)
            fixed = {word.partition("=")[0] for word in sweep.command.fixed}
            swept = [key for word in words if (key := word.partition("=")[0]) not in fixed]
            point = make_point(len(record.points), words, swept)
            point = check_point(point, sweep.command, sweep.job.machine)
            point = plan_point(point, sweep.corpora, sweep.folder)
            known = point.record(sweep.folder)
            write_sweep(sweep.folder, replace(record, points=[*record.points, known]))
        if known.verdict is not Verdict.runs:
            return None
        return sweep.job.run(point, known)


@contextlib.contextmanager
def pass_signals_on(folder: SweepDir) -> Iterator[None]:
    """The first signal ends each point that runs, with its checkpoint, and lets no other begin.

    Raises:
        Preempted: at the end, if there was one.
        Stopped: at once, after a second.
    """
    stop = folder.path / STOP
    stop.unlink(missing_ok=True)

    def tell(number: int) -> None:
        stop.touch()
        for process in list_processes():
            if process.parent == os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    try:
        with receive_signals(tell) as requests:
            yield
        requests.check()
    finally:
        stop.unlink(missing_ok=True)

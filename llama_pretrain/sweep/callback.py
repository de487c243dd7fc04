"""A sweep as Hydra's multirun: what happens before its first job and after its last one."""

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from llama_pretrain import console
from llama_pretrain.config.command_line import CommandLine
from llama_pretrain.config.compose import register
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.sweep import Objective
from llama_pretrain.config.tasks import Task
from llama_pretrain.launch.local import preload
from llama_pretrain.launch.signals import Detached, Preempted, Stopped, receive_signals
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.nodes import submits_job
from llama_pretrain.process import list_processes
from llama_pretrain.runs.layout import RunDir, hold
from llama_pretrain.sweep.directory import SweepDir, SweepRecord, Verdict, write_sweep
from llama_pretrain.sweep.job import BASIC, STOP, count_own_slots, wait_for_submitted
from llama_pretrain.sweep.jobs import (
    Primary,
    SweepJob,
    check_job,
    list_jobs,
    name_sweep,
    plan_on_data,
)
from llama_pretrain.sweep.placing import share
from llama_pretrain.sweep.results import all_succeeded, conclude, write_tables
from llama_pretrain.sweep.table import View, show_planned_jobs, summary

SWEPT_TASKS = (Task.pretrain.value, Task.plan.value)
"""Tasks whose jobs are planned together; others are plain jobs of Hydra."""


class Session:
    """A sweep that is running, in the process of its command."""

    def __init__(self, folder: SweepDir, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self._stack = stack

    def close(self, error: BaseException | None) -> int:
        """Write what compares the jobs, and print it. Returns the exit code.

        Args:
            error: what ended the sweep before its last job.

        Raises:
            Preempted, Stopped: after a signal that the jobs of a launcher have handled.
        """
        try:
            with self._stack:
                if error is None:
                    wait_for_submitted(self.folder)
        except (Preempted, Stopped, Detached) as stopped:
            self._add_note(stopped)
            raise
        if isinstance(error, (Preempted, Stopped)):
            self._add_note(error)
            return 0
        return 0 if all_succeeded(conclude(self.folder)) and error is None else 1

    def _add_note(self, error: BaseException) -> None:
        """How far the sweep has come, and how to continue it."""
        command = shlex.join(["python", "run.py", *_argv.get()])
        rows = write_tables(self.folder)
        error.add_note(f"{summary(rows)}; to continue, run it again: {command}")


_session: ContextVar[Session | None] = ContextVar("session", default=None)
_argv: ContextVar[Sequence[str]] = ContextVar("argv", default=())


def sweep_words(command: CommandLine) -> list[str]:
    """What Hydra is told about the directory of a sweep, unless the command names one."""
    _argv.set(command.argv)
    task = command.value("task") or Task.pretrain.value
    if not command.is_multirun or command.only_shows or task not in SWEPT_TASKS:
        return []
    given = command.value("hydra.sweep.dir")
    return [] if given is not None else [f"hydra.sweep.dir='{name_sweep(command.argv)}'"]


def close_sweep(error: BaseException | None) -> int:
    """End the sweep that this command runs, if any. Returns its exit code."""
    session = _session.get()
    _session.set(None)
    return 0 if session is None else session.close(error)


class SweepCallback(Callback):
    """Plans all jobs before the first starts, and shows how they go until the last has ended.

    Hydra turns an exception in a callback into a warning, so what must end the command is raised as
    SystemExit.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a launcher's process Hydra composes before it calls a job, with our resolvers."""
        register()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Plan the jobs, write sweep.json, and start the live table."""
        if config.task not in SWEPT_TASKS:
            return
        HydraConfig.instance().set_config(config)
        try:
            _session.set(_start(config))
        except UserError as error:
            console.show_problems(error.problems)
            raise SystemExit(1) from error


def _start(config: DictConfig) -> Session:
    """Plan the jobs of a sweep and start showing how they go.

    Raises:
        UserError: if there is nothing to run.
        SystemExit: after the table of `task=plan`.
    """
    own = config.hydra
    machine = detect_machine()
    slots = count_own_slots(machine)
    mine = share(machine, max(1, slots))
    basic = own.runtime.choices["hydra/sweeper"] == BASIC
    words = list(own.overrides.task)
    jobs: list[SweepJob] = []
    if basic:
        params = OmegaConf.to_container(own.sweeper.get("params") or OmegaConf.create({}))
        listed = list_jobs(words, {str(k): v for k, v in dict(params).items()})  # type: ignore[arg-type]  # a container
        jobs = [check_job(job, Primary.of(own), mine) for job in listed]
        reasons = {job.problem for job in jobs if job.verdict is Verdict.refused}
        if len(reasons) == 1 and all(job.verdict is Verdict.refused for job in jobs):
            raise UserError([Problem(path="every job", message=reasons.pop())])
    if config.task == Task.plan.value:
        if not basic:
            message = "requires listed jobs, but the sweeper chooses them one by one"
            raise UserError([Problem(path="task", message=message, hint="Add hydra/sweeper=basic")])
        sys.exit(console.show_jobs(jobs))
    place = SweepDir(Path(own.sweep.dir).expanduser().resolve())
    stack = contextlib.ExitStack()
    try:
        stack.enter_context(hold(RunDir(place.path)))
    except BlockingIOError as error:
        message = f"another process runs this sweep in {place.path}"
        raise UserError([Problem(path="hydra.sweep.dir", message=message)]) from error
    first = next((job.run for job in jobs if job.verdict is Verdict.runs), None)
    here = own.runtime.choices["hydra/launcher"] == BASIC
    if first is not None and not here and submits_job(first.launch):
        message = "submits each job by itself, and so do other launchers"
        hint = "Add hydra/launcher=basic, or launch=local"
        raise UserError([Problem(path="launch", message=message, hint=hint)])
    if first is not None and here and not submits_job(first.launch):
        preload(first)
    planned = [plan_on_data(job) for job in jobs]
    fixed = [word.partition("=")[0] for word in words if "," not in word and "(" not in word]
    record = SweepRecord(
        command=["python", "run.py", *_argv.get()],
        objective=Objective(config.sweep.objective),
        fixed=fixed,
        jobs=[job.record(place) for job in planned],
    )
    write_sweep(place, record)
    if planned:
        show_planned_jobs(planned, slots=slots)
    console.say(f"sweep directory: {place.path}")
    if not basic:
        for logger in ("optuna", "hydra_plugins"):  # the table shows what becomes of each job
            logging.getLogger(logger).setLevel(logging.CRITICAL)
    if own.runtime.choices["hydra/launcher"] != BASIC:
        stack.enter_context(_forward_signals(place))
    stack.enter_context(View(place))
    return Session(place, stack)


@contextlib.contextmanager
def _forward_signals(folder: SweepDir) -> Iterator[None]:
    """The first signal ends each running job with a checkpoint, and keeps others from starting.

    Raises:
        Preempted: at the end, if there was one.
        Stopped: at once, after a second one.
    """
    stop = folder.path / STOP
    stop.unlink(missing_ok=True)

    def forward(number: int) -> None:
        stop.touch()
        for process in list_processes():
            if process.parent == os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    try:
        with receive_signals(forward) as requests:
            yield
        requests.check()
    finally:
        stop.unlink(missing_ok=True)

"""`launch=slurm` outside of an allocation: submit the run as a job, and follow it if asked to."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from llama_pretrain import console
from llama_pretrain.config.ignored import find_ignored
from llama_pretrain.config.launch import Device
from llama_pretrain.config.problems import Problem, UserError, refuse
from llama_pretrain.config.run import Run
from llama_pretrain.config.tasks import Task
from llama_pretrain.launch.signals import Detached, Preempted
from llama_pretrain.launch.slurm import (
    count_job_gpus,
    job_of,
    list_states,
    submit,
    validate_job,
    write_job_script,
)
from llama_pretrain.plan.nodes import count_nodes
from llama_pretrain.plan.plan import build_plan, load_plan
from llama_pretrain.plan.resolve import describe_choices
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics
from llama_pretrain.runs.status import Status, read_state, read_status
from llama_pretrain.tasks.context import TaskContext
from llama_pretrain.tasks.run_directory import refuse_used
from llama_pretrain.tasks.validate import resolve_valid

POLL_S = 2.0
ATTEMPTS = 5
"""Questions to Slurm that may fail before that is an error."""


class JobError(Exception):
    """A job of Slurm has ended, and its run has not completed."""


def submit_run(run: Run, context: TaskContext) -> None:
    """Plan a run as its job's nodes will, as far as that is known here, and submit it.

    Raises:
        UserError: for mistakes that do not need the nodes to be seen, and if Slurm refuses it.
        JobError: after `launch.slurm.wait`, if the run has not completed.
    """
    refuse(validate_job(run.launch.slurm))
    if run.task is not Task.pretrain:
        message = f"task={run.task.value} is not submitted"
        hint = "Run it in an allocation, or add launch=local"
        raise UserError([Problem(path="launch", message=message, hint=hint)])
    planned = resolve_valid(at_nodes(run, context.machine.num_gpus), context.machine)
    origins = {**context.origins, **describe_choices(run, planned)}
    console.show_warnings(find_ignored(planned, origins))
    console.show_config(planned, origins)
    console.show_plan(planned, build_plan(planned), context.run_dir)
    words, place = list(context.argv), context.run_dir.path
    if "resume=auto" in words and not any(word.startswith("hydra.run.dir=") for word in words):
        words[words.index("resume=auto")] = f"resume={place}"  # of which the config is
    job = submit_job(run, words, context.run_dir)
    log = context.run_dir.path / f"slurm-{job}.log"
    console.say(f"job {job} is submitted: {context.run_dir.job_script}")
    console.say(f"to follow it: tail -F {log}\nto end it: scancel {job}")
    if run.launch.slurm.wait:
        follow(job, context.run_dir)


def at_nodes(run: Run, gpus_here: int) -> Run:
    """A run to plan: with the GPUs that its job asks for."""
    launch, gpus = run.launch, count_job_gpus(run.launch.slurm)
    if gpus and launch.device is not Device.cpu:
        count = gpus if launch.num_processes is None else launch.num_processes
        launch = replace(launch, device=Device.cuda, num_processes=count)
    elif launch.device is Device.auto and not gpus_here:
        launch = replace(launch, device=Device.cpu)
    return replace(run, task=Task.plan, launch=launch)


def submit_job(run: Run, argv: Sequence[str], run_dir: RunDir) -> str:
    """Write a job script and submit it, unless the directory's job is still there. Returns its id.

    Args:
        argv: the words of the command.

    Raises:
        UserError: if the directory holds a run, or Slurm refuses the job.
    """
    words = [word for word in argv if not word.startswith(("hydra.run.dir=", "launch.slurm.wait="))]
    if not any(word.startswith("resume=") for word in words):
        refuse_used(run_dir)
    try:
        job = waiting_job(run_dir)
    except OSError as error:
        message = f"Slurm does not answer: {error.strerror}"
        raise UserError([Problem(path="launch", message=message)]) from error
    if job is not None:
        message = f"job {job} is in the queue for {run_dir.path}"
        hint = f"Wait for it, or end it: scancel {job}"
        raise UserError([Problem(path="hydra.run.dir", message=message, hint=hint)])
    run_dir.path.mkdir(parents=True, exist_ok=True)
    if not any(run_dir.path.iterdir()):
        run_dir.path.chmod(int(run.provenance.directory_mode, 8))
    write_job_script(run.launch, count_nodes(run.launch), words, run_dir)
    return submit(run_dir)


def waiting_job(run_dir: RunDir) -> str | None:
    """The job of a run directory, unless it has ended.

    Raises:
        OSError: if Slurm does not answer, several times.
    """
    job = job_of(run_dir)
    if job is None:
        return None
    for _ in range(ATTEMPTS):
        with contextlib.suppress(OSError):
            return job if job in list_states([job]) else None
        time.sleep(POLL_S)
    return job if job in list_states([job]) else None


def follow(job: str, run_dir: RunDir) -> None:
    """Show how the run of a job goes, over restarts, until the job has ended.

    Raises:
        JobError: if the run has not completed then.
        Detached: after a signal, which leaves the job alone.
    """
    try:
        with contextlib.ExitStack() as stack:
            shown = False

            def show_progress() -> None:
                nonlocal shown
                if not shown and run_dir.plan.is_file() and read_status(run_dir) is not None:
                    shown = True
                    plan = load_plan(run_dir.plan)
                    stack.enter_context(console.follow_metrics(run_dir, plan, first_step=0))

            wait_for_jobs([job], poll=show_progress, say=console.say)
    except Preempted as error:
        detached = Detached(error.number)
        detached.add_note(f"job {job} goes on; to end it: scancel {job}")
        raise detached from error
    status = read_status(run_dir)
    if status is None or not status.is_complete:
        state, reason = read_state(run_dir)
        crashed = "is crashed" if state == Status.running else f"is {state}"  # a moment ago
        text = f"job {job} has ended; its run {crashed if state else 'has not begun'}"
        log = run_dir.path / f"slurm-{job}.log"
        raise JobError(f"{text}{f': {reason}' if reason else ''}\n  its log: {log}")
    console.show_result(read_metrics(run_dir.metrics), run_dir)


def wait_for_jobs(
    jobs: Sequence[str],
    *,
    poll: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Wait until jobs have ended.

    Args:
        poll: called every two seconds.
        say: prints what becomes of them.
    """
    before: dict[str, str] = {}
    failures = 0
    while True:
        try:
            states = list_states(jobs)
        except OSError as error:  # perhaps for a moment
            failures += 1
            if failures == ATTEMPTS:
                console.say(f"Slurm does not answer: {error.strerror}")
        else:
            failures = 0
            for job in jobs:
                state = f"is {states[job]}" if job in states else "has ended"
                if before.get(job) != state:
                    say(f"job {job} {state}")
                before[job] = state
            if not states:
                return
        poll()
        time.sleep(POLL_S)

"""task=verify_resume: prove that a resumed run equals an uninterrupted one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llama_pretrain import console
from llama_pretrain.checkpoint.manifest import checkpoint_name, read_manifest
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.files import write_json
from llama_pretrain.launch.local import launch
from llama_pretrain.launch.operators import build_operators
from llama_pretrain.launch.signals import Preempted
from llama_pretrain.launch.spec import LaunchSpec
from llama_pretrain.plan.plan import TrainingPlan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import StepRow, read_metrics, steps
from llama_pretrain.tasks.context import TaskContext
from llama_pretrain.tasks.resume import restart, rewind
from llama_pretrain.tasks.run_directory import refuse_used, write_run_dir

COMPARED = ("loss", "grad_norm", "learning_rate", "sample_hash")


def verify_resume(run: ResolvedRun, plan: TrainingPlan, context: TaskContext) -> None:
    """Train uninterrupted, train half and resume, and compare, in directories of the run directory.

    Raises:
        UserError: with the first difference, or if the run is too short.
        RankError: if a rank failed.
    """
    half, folder = run.resume.verify_steps, context.run_dir.path
    if plan.steps.total < 2 * half:
        message = f"the run has {plan.steps.total} steps, fewer than {2 * half} (got {half})"
        raise UserError([Problem(path="resume.verify_steps", message=message, hint="Lower it")])
    whole, resumed = RunDir(folder / "whole"), RunDir(folder / "cut")
    refuse_used(whole)
    console.show_config(run, context.origins)
    console.show_plan(run, plan, context.run_dir)
    build_operators(run, log=folder / "build.log", taking_time=console.taking_time)
    saved = replace(
        run.checkpoint, every_steps=None, every_minutes=None, at_end=True, export=False, keep_last=2
    )
    run = replace(run, checkpoint=saved)

    def train(run_dir: RunDir, *, last: int, checkpoint: Path | None = None) -> None:
        until = replace(plan, steps=replace(plan.steps, last=last))
        write_run_dir(run, until, replace(context, run_dir=run_dir))
        first_step = 0
        if checkpoint is not None:
            start = restart(run_dir)
            rewind(run_dir, start)
            first_step = start.step
        with console.follow_metrics(run_dir, until, first_step=first_step):
            late_signal = launch(LaunchSpec(run, until, run_dir, checkpoint), report=console.say)
        if late_signal:
            raise Preempted(late_signal)

    console.say(f"1 of 3: {2 * half} steps without interruption")
    train(whole, last=2 * half)
    console.say(f"2 of 3: {half} steps")
    train(resumed, last=half)
    console.say(f"3 of 3: from the checkpoint of step {half} to step {2 * half}")
    checkpoint = resumed.checkpoints / checkpoint_name(half)
    train(resumed, last=2 * half, checkpoint=checkpoint)
    differences = list(compare(whole, resumed, last=2 * half))
    rows = read_metrics(whole.metrics), read_metrics(resumed.metrics)
    console.show_verification(*rows, cut_at=half)
    result = {"steps": 2 * half, "cut_after": half, "differences": differences}
    write_json(folder / "verify_resume.json", result)
    if differences:
        raise UserError([Problem(path="task", message=differences[0])])
    console.say(f"bitwise equal: {2 * half} steps, and every file of weights and optimizer state")


def compare(whole: RunDir, resumed: RunDir, *, last: int) -> Iterator[str]:
    """Where two runs differ, from the first step on."""
    ours, theirs = _steps(whole), _steps(resumed)
    for step in range(1, last + 1):
        for key in COMPARED:
            one, other = getattr(ours.get(step), key, None), getattr(theirs.get(step), key, None)
            if one != other:
                yield f"step {step}: {key} is {other} when resumed and {one} without interruption"
    name = checkpoint_name(last)
    files, others = (read_manifest(side.checkpoints / name).files for side in (whole, resumed))
    for file in sorted(files):
        if file.startswith("rank") and files[file] != others.get(file):
            yield f"the weights or the optimizer state after step {last} differ ({name}/{file})"


def _steps(run_dir: RunDir) -> dict[int, StepRow]:
    return {row.step: row for row in steps(read_metrics(run_dir.metrics))}

"""task=verify_resume: prove that a resumed run equals an uninterrupted one."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_pretrain import console
from llama_pretrain.checkpoint.manifest import checkpoint_name, read_manifest
from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.config.run import Run
from llama_pretrain.files import write_text
from llama_pretrain.launch.operators import build_operators
from llama_pretrain.launch.signals import Preempted
from llama_pretrain.plan.machine import Machine
from llama_pretrain.plan.plan import Plan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics
from llama_pretrain.tasks.resume import rewind, start_again
from llama_pretrain.tasks.run_directory import check_unused, write_run_dir


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


COMPARED = ("loss", "grad_norm", "learning_rate", "sample_hash")


Train = Callable[[Run, Plan, RunDir, Path | None], None]
"""Write a run directory, and train in it from a checkpoint or from the start."""


def verify_resume(run: Run, plan: Plan, run_dir: RunDir, *, train: Train) -> None:
    """Train three times, compare, and say what was found.

    Raises:
        UserError: with the first difference, or if the run is too short to be cut.
    """
    half = run.resume.verify_steps
    if plan.steps.total < 2 * half:
        message = (
            f"the run has {plan.steps.total} steps, and {2 * half} are to be done (got {half})"
        )
        raise UserError([Problem(path="resume.verify_steps", message=message, hint="lower it")])
    whole, cut = RunDir(run_dir.path / "whole"), RunDir(run_dir.path / "cut")
    saved = replace(
        run.checkpoint, every_steps=None, every_minutes=None, at_end=True, export=False, keep_last=2
    )
    run = replace(run, checkpoint=saved)

    def until(last: int) -> Plan:
        return replace(plan, steps=replace(plan.steps, last=last))

    console.say(f"1 of 3: {2 * half} steps in one go")
    train(run, until(2 * half), whole, None)
    console.say(f"2 of 3: {half} steps")
    train(run, until(half), cut, None)
    console.say(f"3 of 3: from the checkpoint of step {half} to step {2 * half}")
    train(run, until(2 * half), cut, cut.checkpoints / checkpoint_name(half))
    differences = list(compare(whole, cut, last=2 * half))
    console.show_verification(read_metrics(whole.metrics), read_metrics(cut.metrics), cut_at=half)
    result = {"steps": 2 * half, "cut_after": half, "differences": differences}
    write_text(run_dir.path / "verify_resume.json", json.dumps(result, indent=2) + "\n")
    if differences:
        raise UserError([Problem(path="task", message=differences[0])])
    console.say(
        f"equal to the bit: {2 * half} steps, and every file of weights and optimizer state"
    )


def compare(whole: RunDir, cut: RunDir, *, last: int) -> Iterator[str]:
    """Where two runs differ, from the first step on."""
    ours, theirs = _steps(whole), _steps(cut)
    for step in range(1, last + 1):
        for key in COMPARED:
            one, other = ours.get(step, {}).get(key), theirs.get(step, {}).get(key)
            if one != other:
                yield f"step {step}: {key} is {other} after the cut and {one} without it"
    name = checkpoint_name(last)
    files, others = (read_manifest(side.checkpoints / name).files for side in (whole, cut))
    for file in sorted(files):
        if file.startswith("rank") and files[file] != others.get(file):
            yield f"the weights or the optimizer state after step {last} differ ({name}/{file})"


def _steps(run_dir: RunDir) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in read_metrics(run_dir.metrics) if "sample_hash" in row}

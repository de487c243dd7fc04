"""`python -m llama_pretrain checkpoint`: have a run that trains write a checkpoint, and go on."""

import argparse
import time
from pathlib import Path

from llama_pretrain.cli.terminal import say

POLL_S = 0.2


def add_checkpoint(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The subcommand and its arguments."""
    parser = commands.add_parser(
        "checkpoint",
        help="have a run that trains write a checkpoint, and go on",
        description="Asks a run for a checkpoint after its current step, from any machine that"
        " sees its directory, and waits until it is written. The run goes on. Exit code 1 if the"
        " run ends without it, or the time is up.",
    )
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="SECONDS", help="wait at most (600)"
    )
    parser.set_defaults(do=checkpoint_command)


def checkpoint_command(arguments: argparse.Namespace) -> int:
    """Ask, and wait. Exit code 1 if there is no checkpoint, 2 if there is no run."""
    from llama_pretrain.runs.layout import RunDir  # pydantic
    from llama_pretrain.runs.metrics import CheckpointRow, read_metrics, steps
    from llama_pretrain.runs.status import Status, read_state

    run_dir = RunDir(arguments.run)
    state, _ = read_state(run_dir)
    if state is None:
        say(f"error: {run_dir.path} is not a run directory, or its run has not begun", error=True)
        return 2
    if state != Status.running:
        say(f"error: {run_dir.path} is not training: it is {state}", error=True)
        return 1
    rows = read_metrics(run_dir.metrics)
    done = max((row.step for row in steps(rows)), default=0)
    before = {row.step for row in rows if isinstance(row, CheckpointRow)}
    try:
        run_dir.request.touch()
    except OSError as error:
        say(f"error: {run_dir.request}: {error.strerror}", error=True)
        return 1
    deadline = time.monotonic() + arguments.timeout
    while True:
        state, reason = read_state(run_dir)  # before the metrics: it may end with a checkpoint
        rows = read_metrics(run_dir.metrics)
        saved = [row for row in rows if isinstance(row, CheckpointRow) and row.step >= done]
        new = [row for row in saved if row.step not in before]
        if new and new[0].checkpoint_error:
            say(f"error: {new[0].checkpoint_error}", error=True)
            return 1
        if new:
            say(f"{run_dir.checkpoints / str(new[0].checkpoint)}")
            return 0
        if state != Status.running:
            text = f"{run_dir.path} has ended without it: {state}"
            say(f"error: {text}{f', {reason}' if reason else ''}", error=True)
            return 1
        if time.monotonic() > deadline:
            say(f"error: no checkpoint within {arguments.timeout:g} s", error=True)
            return 1
        time.sleep(POLL_S)

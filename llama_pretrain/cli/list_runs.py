"""`python -m llama_pretrain list`: a table of all runs, and which have crashed."""

import argparse
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from llama_pretrain.cli.listing import Listed, list_runs
from llama_pretrain.cli.terminal import Columns, say, table_lines, terminal_width
from llama_pretrain.runs.status import CRASHED
from llama_pretrain.runs.units import printable

DEFAULT = "outputs"
OPTIONAL = ("tokens/s", "model", "loss", "started (UTC)", "eval loss", "steps")
"""Columns that a narrow terminal drops, the least important first."""
NUMBERS = ("steps", "loss", "eval loss", "tokens/s")


def add_list(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "list",
        help="a table of all runs, and which of them have crashed",
        description="A table of all runs below a folder, the newest last, with the jobs of sweeps"
        " and evaluations. A run has crashed if its status is running and no process holds its"
        " lock. Writes nothing.",
    )
    parser.add_argument(
        "dir", nargs="?", type=Path, help=f"the folder to look in (default: {DEFAULT})"
    )
    parser.add_argument(
        "--status", metavar="STATUS", help="only runs with this status, as in --status crashed"
    )
    parser.add_argument("--json", action="store_true", help="a JSON list, for scripts")
    parser.set_defaults(do=list_command)


def list_command(arguments: argparse.Namespace) -> int:
    """Print the table. Exit code 2 if the named folder does not exist."""
    root = arguments.dir or Path(DEFAULT)
    if arguments.dir is not None and not root.is_dir():
        say(f"error: {root} is not a folder", error=True)
        return 2
    runs = list_runs(root) if root.is_dir() else []
    shown = [run for run in runs if arguments.status in (None, run.status)]
    if arguments.json:
        say(json.dumps([asdict(run) | {"path": str(run.path)} for run in shown], indent=2))
    elif not shown:
        which = "runs" if arguments.status is None else f"{arguments.status} runs"
        say(f"no {which} in {root}")
    else:
        for line in render_list(shown, root=root, width=terminal_width()):
            say(line)
    return 0


def render_list(runs: Sequence[Listed], *, root: Path, width: int | None) -> list[str]:
    """The table, a count by status, and how to continue each crashed run."""
    cells = {
        "run": [_place(run, root) for run in runs],
        "started (UTC)": [_time(run.started) for run in runs],
        "status": [run.status for run in runs],
        "model": [run.model or "-" for run in runs],
        "steps": [_steps(run) for run in runs],
        "loss": [_number(run.loss, ".4f") for run in runs],
        "eval loss": [_number(run.eval_loss, ".4f") for run in runs],
        "tokens/s": [_number(run.tokens_per_s, ",.0f") for run in runs],
    }
    rows = list(zip(*cells.values(), strict=True))
    columns = Columns(list(cells), NUMBERS, path="run", optional=OPTIONAL)
    lines = table_lines(columns, rows, width=width)
    counts = Counter(run.status for run in runs)
    total = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return [*lines, "", total, *_hints(runs)]


def _hints(runs: Sequence[Listed]) -> Iterator[str]:
    """A command to copy for each crashed run."""
    for run in runs:
        if run.status == CRASHED:
            option, what = "resume", f"resume from {run.checkpoint}"
            if run.checkpoint is None:
                option, what = "reproduce", "no complete checkpoint, start again"
            command = shlex.join(["python", "run.py", f"{option}={run.path}"])
            yield f"crashed, {what}: {printable(command)}"


def _place(run: Listed, root: Path) -> str:
    text = str(run.path.relative_to(root))
    return text if run.kind == "run" else f"{text} ({run.kind})"


def _time(time: str | None) -> str:
    try:
        return datetime.fromisoformat(time or "").astimezone(UTC).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError):
        return "-"


def _steps(run: Listed) -> str:
    planned = "" if run.steps is None else f"/{run.steps:,}"
    if run.step is None:
        return f"0{planned}" if planned else "-"
    return f"{run.step:,}{planned}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

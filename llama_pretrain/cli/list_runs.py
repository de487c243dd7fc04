"""`python -m llama_pretrain list`: all runs in a table, and those that have crashed."""

import argparse
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from llama_pretrain.cli.listing import CRASHED, Kind, Listed, list_runs
from llama_pretrain.cli.terminal import say, terminal_width
from llama_pretrain.runs.terminal import printable, shorten, text_table

DEFAULT = "outputs"


DROPPED = ("tokens/s", "model", "loss", "started (UTC)", "eval loss", "steps")
"""Columns that a narrow terminal does without, the least needed first."""


NUMBERS = ("steps", "loss", "eval loss", "tokens/s")


def add_list(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The subcommand and its arguments."""
    parser = commands.add_parser(
        "list",
        help="a table of all runs, and which of them have crashed",
        description="A table of all runs below a folder, the newest last: runs of sweeps and"
        " evaluations too. A run has crashed if it says that it is running and no process holds"
        " it. Nothing is written.",
    )
    parser.add_argument(
        "dir", nargs="?", type=Path, help=f"the folder to look in (default: {DEFAULT})"
    )
    parser.add_argument(
        "--status", metavar="STATUS", help="only runs of this status, as in --status crashed"
    )
    parser.add_argument("--json", action="store_true", help="a JSON list, for scripts")
    parser.set_defaults(do=list_command)


def list_command(arguments: argparse.Namespace) -> int:
    """Print the table. Exit code 2 if the folder that was named is none."""
    root = arguments.dir or Path(DEFAULT)
    if arguments.dir is not None and not root.is_dir():
        say(f"error: {root} is no folder", error=True)
        return 2
    runs = list_runs(root) if root.is_dir() else []
    shown = [run for run in runs if arguments.status in (None, run.status)]
    if arguments.json:
        say(json.dumps([asdict(run) | {"path": str(run.path)} for run in shown], indent=2))
        return 0
    if not shown:
        which = "runs" if arguments.status is None else f"{arguments.status} runs"
        say(f"no {which} in {root}")
        return 0
    for line in render_list(shown, root=root, width=terminal_width()):
        say(line)
    return 0


def render_list(runs: Sequence[Listed], *, root: Path, width: int | None) -> list[str]:
    """The table, how many there are, and how to go on with those that have crashed."""
    columns = {
        "run": [_place(run, root) for run in runs],
        "started (UTC)": [_time(run.started) for run in runs],
        "status": [run.status for run in runs],
        "model": [printable(run.model or "-") for run in runs],
        "steps": [_steps(run) for run in runs],
        "loss": [_number(run.loss, ".4f") for run in runs],
        "eval loss": [_number(run.eval_loss, ".4f") for run in runs],
        "tokens/s": [_number(run.tokens_per_s, ",.0f") for run in runs],
    }

    def table() -> list[str]:
        rows = list(zip(*columns.values(), strict=True))
        return text_table(list(columns), rows, numbers=NUMBERS)

    dropped = iter(DROPPED)
    while width is not None and max(map(len, table())) > width:
        name = next(dropped, None)
        if name is None:
            room = width - max(map(len, columns["status"])) - 2
            columns["run"] = [shorten(text, max(8, room)) for text in columns["run"]]
            break
        del columns[name]
    counts = Counter(run.status for run in runs)
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return [*table(), "", told, *_hints(runs)]


def _hints(runs: Sequence[Listed]) -> list[str]:
    """What to do about each run that has crashed: one line, to be copied."""
    lines = []
    for run in runs:
        if run.status == CRASHED:
            word, why = ("resume", f"from {run.checkpoint}")
            if run.checkpoint is None:
                word, why = ("reproduce", "anew: it has no complete checkpoint")
            command = shlex.join(["python", "run.py", f"{word}={run.path}"])
            lines.append(f"crashed, go on {why}: {printable(command)}")
    return lines


def _place(run: Listed, root: Path) -> str:
    text = printable(str(run.path.relative_to(root)))
    return text if run.kind is Kind.run else f"{text} ({run.kind.value})"


def _time(time: str | None) -> str:
    try:
        return datetime.fromisoformat(time or "").astimezone(UTC).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return "-"


def _steps(run: Listed) -> str:
    if run.step is None:
        return "-" if run.steps is None else f"0/{run.steps:,}"
    return f"{run.step:,}" if run.steps is None else f"{run.step:,}/{run.steps:,}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

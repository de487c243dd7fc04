"""The two consoles that everything is printed to, and number formats."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from llama_pretrain.config.problems import Problem

GIB = 1 << 30
PIPE_WIDTH = 400
"""Where output is no terminal, a line that a person copies stays one line."""


out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


errors = Console(highlight=False, soft_wrap=True, stderr=True)


def say(message: str) -> None:
    """One plain line."""
    out.print(escape(message), soft_wrap=True)


def note(message: str) -> None:
    """One plain line on standard error, for a task whose output is something else."""
    errors.print(escape(message))


def show_problems(problems: Sequence[Problem]) -> None:
    """Every mistake, one a line, on standard error."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    errors.print(f"[bold red]{count}, nothing was started:[/]")
    for problem in problems:
        errors.print(f"  {escape(str(problem))}")


def show_failure(message: str) -> None:
    """The error that ended a run, on standard error."""
    errors.print(f"[bold red]{escape(message)}[/]")


@contextmanager
def taking_time(what: str) -> Iterator[None]:
    """What is under way while the block runs: its seconds count up on a terminal, else a line."""
    if not out.is_terminal:
        say(what)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    began = time.monotonic()
    with Progress(*columns, console=out, transient=True) as progress:
        progress.add_task(escape(what), total=None)
        yield
    say(f"{what} ({time.monotonic() - began:.0f} s)")


def two_columns(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.title_style = "bold"
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def rate_text(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def percent_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"

"""The two consoles that everything is printed to, and number formats."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from llama_pretrain.config.problems import Problem
from llama_pretrain.runs.units import printable

GIB = 1 << 30
PIPE_WIDTH = 400
"""Where output is no terminal, a line that a person copies stays one line."""


class PlainConsole(Console):
    """Prints text that may come from anywhere: brackets are no markup, escapes have no effect.

    Styled text is a `Text`, made by `styled`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        plain = {"markup": False, "emoji": False, "highlight": False}
        return super().render_str(printable(text, keep="\n\t"), **options | plain)


def styled(text: str, style: str) -> Text:
    """Text from anywhere, in a style of ours."""
    return Text(printable(text, keep="\n\t"), style=style)


out = PlainConsole(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


errors = PlainConsole(highlight=False, soft_wrap=True, stderr=True)


def say(message: str) -> None:
    """One plain line."""
    out.print(message, soft_wrap=True)


def note(message: str) -> None:
    """One plain line on standard error, for a task whose output is something else."""
    errors.print(message)


def show_problems(problems: Sequence[Problem]) -> None:
    """Every mistake, one a line, on standard error."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    errors.print(styled(f"{count}, nothing was started:", "bold red"))
    for problem in problems:
        errors.print(f"  {problem}")


def show_failure(message: str) -> None:
    """The error that ended a run, on standard error."""
    errors.print(styled(message, "bold red"))


@contextmanager
def taking_time(what: str) -> Iterator[None]:
    """What is under way while the block runs: its seconds count up on a terminal, else a line."""
    if not out.is_terminal:
        say(what)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    began = time.monotonic()
    with Progress(*columns, console=out, transient=True) as progress:
        progress.add_task(what, total=None)
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

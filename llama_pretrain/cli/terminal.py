"""Output of the subcommands: plain lines and rich tables, whole in a pipe."""

import io
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from llama_pretrain.config.problems import UserError
from llama_pretrain.runs.units import elide, printable

MIN_PATH = 24
"""Columns that a path keeps as long as other columns can go."""
PIPE_WIDTH = 10_000
"""Columns where output is no terminal: no row is folded, so that it can be searched."""


def say(text: str, *, error: bool = False) -> None:
    """Print to standard output or standard error; `?` replaces characters that it cannot encode."""
    stream = sys.stderr if error else sys.stdout
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding), file=stream)


def say_problems(error: UserError) -> None:
    """A user's mistakes, one per line."""
    for problem in error.problems:
        say(printable(f"error: {problem}"), error=True)


def terminal_width() -> int | None:
    """Columns of the terminal; `None` in a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns, and what becomes of them on a narrow terminal."""

    names: Sequence[str]
    numbers: Sequence[str] = ()
    """Aligned to the right."""
    fold: Sequence[str] = ()
    """Those whose cells may take several lines."""
    path: str | None = None
    """One whose cells lose their middle before a column is dropped."""
    optional: Sequence[str] = ()
    """Those that can be dropped, the least important first."""


def table_lines(
    columns: Columns, rows: Sequence[Sequence[str]], *, width: int | None = None
) -> list[str]:
    """A table as plain lines for a terminal of so many columns; `None` = a pipe."""
    console = Console(file=io.StringIO(), width=width or PIPE_WIDTH, color_system=None)
    unlimited = console.options.update(max_width=PIPE_WIDTH)
    names, dropped = list(columns.names), list(columns.optional)
    cells = [dict(zip(names, map(printable, row), strict=True)) for row in rows]
    while True:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in names:
            justify: Literal["left", "right"] = "right" if name in columns.numbers else "left"
            no_wrap = name not in columns.fold
            table.add_column(name, justify=justify, overflow="fold", no_wrap=no_wrap)
        for row in cells:
            table.add_row(*(Text(row[name]) for name in names))
        excess = Measurement.get(console, unlimited, table).maximum - console.width
        longest = max((len(row[columns.path]) for row in cells), default=0) if columns.path else 0
        room = max(longest - excess, len(columns.path or ""))
        if excess > 0 and dropped and room < MIN_PATH:
            names.remove(dropped.pop(0))
        elif excess > 0 and columns.path and room < longest:
            cells = [row | {columns.path: elide(row[columns.path], room)} for row in cells]
        else:
            break
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]

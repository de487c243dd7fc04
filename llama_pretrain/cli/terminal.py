"""Output of the subcommands: plain lines and rich tables, whole in a pipe."""

import io
import shutil
import sys
from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from llama_pretrain.config.problems import UserError
from llama_pretrain.runs.units import printable

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


def table_lines(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Sequence[str] = (),
    optional: Sequence[str] = (),
    fold: Sequence[str] = (),
    width: int | None = None,
) -> list[str]:
    """A table as plain lines.

    Args:
        numbers: columns that are aligned to the right.
        optional: columns that a narrow terminal drops, the least important first.
        fold: columns whose cells a narrow terminal folds.
        width: of the terminal; `None` = a pipe.
    """
    console = Console(file=io.StringIO(), width=width or PIPE_WIDTH, color_system=None)
    shown, dropped = list(columns), list(optional)
    while True:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in shown:
            justify: Literal["left", "right"] = "right" if name in numbers else "left"
            table.add_column(name, justify=justify, overflow="fold", no_wrap=name not in fold)
        places = [columns.index(name) for name in shown]
        for row in rows:
            table.add_row(*(Text(printable(row[place])) for place in places))
        unlimited = console.options.update(max_width=PIPE_WIDTH)
        wanted = Measurement.get(console, unlimited, table).maximum
        if wanted <= console.width or not dropped:
            break
        shown.remove(dropped.pop(0))
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]

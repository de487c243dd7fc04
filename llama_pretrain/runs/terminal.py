"""Tables and plots as plain text: the same on a terminal, in a pipe and in a log."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from llama_pretrain.runs.page import Point, place, tick_label

GAP = "  "
SEVERAL = "#"
"""Where more than one line goes through a place of a plot."""


def printable(text: str) -> str:
    """A text that stays on its line and does nothing to a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def shorten(text: str, width: int) -> str:
    """The end of a text, for a path tells most there."""
    return text if len(text) <= width else "…" + text[len(text) - max(0, width - 1) :]


def text_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()
) -> list[str]:
    """Lines of a table; the columns of `numbers` stand to the right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]
    right = [name in numbers for name in head]
    return [
        GAP.join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]


def values_of(
    name: str, values: Sequence[str], *, letters: Sequence[str], width: int | None
) -> list[str]:
    """A name and its value in each run: on one line where that fits, else a line each."""
    pairs = [f"{letter} {value}" for letter, value in zip(letters, values, strict=True)]
    line = GAP.join([name, *pairs])
    if width is None or len(line) <= width:
        return [line]
    indent = " " * (len(name) - len(name.lstrip()) + 2)
    return [name, *(indent + pair for pair in pairs)]


def plot(lines: Mapping[str, Sequence[Point]], *, width: int, height: int) -> list[str]:
    """Curves against tokens, each drawn with its letter: lines of text, none wider than `width`.

    Empty where no curve has two points.
    """
    drawn = {letter: sorted(points) for letter, points in lines.items() if len(points) > 1}
    xs = [x for points in drawn.values() for x, _ in points]
    if not xs or max(xs) <= min(xs):
        return []
    left = 8
    num_columns = max(10, width - left - 2)
    span = (min(xs), max(xs))
    heights = {letter: _by_column(points, span, num_columns) for letter, points in drawn.items()}
    ys = [y for columns in heights.values() for y in columns.values()]
    low, high = min(ys), max(ys)
    if high == low:
        low, high = low - 0.5, high + 0.5
    grid = [[" "] * num_columns for _ in range(height)]
    for letter, columns in heights.items():
        for column, y in columns.items():
            row = round(place(y, (low, high), to=(height - 1, 0)))
            grid[row][column] = letter if grid[row][column] == " " else SEVERAL
    labelled = {0: high, height // 2: place(height // 2, (0, height - 1), to=(high, low))}
    labelled[height - 1] = low
    body = [
        (f"{labelled[row]:.4g}" if row in labelled else "").rjust(left - 1)
        + " |"
        + "".join(cells).rstrip()
        for row, cells in enumerate(grid)
    ]
    ends = [tick_label(float(f"{value:.3g}")) for value in span]
    axis = ends[0] + f"{ends[1]} tokens".rjust(num_columns - len(ends[0]))
    return [*body, " " * left + "+" + "-" * num_columns, " " * (left + 1) + axis]


def _by_column(points: Sequence[Point], span: Point, num_columns: int) -> dict[int, float]:
    """The mean of the points in each column, and a straight line where a column has none."""
    sums: dict[int, list[float]] = {}
    for x, y in points:
        sums.setdefault(round(place(x, span, to=(0, num_columns - 1))), []).append(y)
    known = {column: math.fsum(ys) / len(ys) for column, ys in sums.items()}
    columns = sorted(known)
    filled = dict(known)
    for before, after in pairwise(columns):
        for column in range(before + 1, after):
            filled[column] = place(column, (before, after), to=(known[before], known[after]))
    return filled

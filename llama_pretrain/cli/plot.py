"""Curves as lines of text, each drawn with its letter."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise

from llama_pretrain.runs.chart import place, tick_label
from llama_pretrain.runs.metrics import Point

SEVERAL = "#"
"""Where more than one curve passes through a place."""
MARGIN = 8


def plot(curves: Mapping[str, Sequence[Point]], *, width: int, height: int) -> list[str]:
    """Draw curves against tokens; no line is wider than `width`. Empty if none has two points."""
    drawn = {letter: sorted(points) for letter, points in curves.items() if len(points) > 1}
    xs = [x for points in drawn.values() for x, _ in points]
    if not xs or max(xs) <= min(xs):
        return []
    num_columns, span = max(10, width - MARGIN - 2), (min(xs), max(xs))
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
    middle = place(height // 2, (0, height - 1), to=(high, low))
    labels = {0: high, height // 2: middle, height - 1: low}
    lines = [
        (f"{labels[row]:.4g}" if row in labels else "").rjust(MARGIN - 1)
        + f" |{''.join(cells).rstrip()}"
        for row, cells in enumerate(grid)
    ]
    first, last = (tick_label(float(f"{value:.3g}")) for value in span)
    axis = first + f"{last} tokens".rjust(num_columns - len(first))
    return [*lines, " " * MARGIN + "+" + "-" * num_columns, " " * (MARGIN + 1) + axis]


def _by_column(points: Sequence[Point], span: Point, num_columns: int) -> dict[int, float]:
    """The mean of the points in each column, linearly interpolated where a column has none."""
    values: dict[int, list[float]] = {}
    for x, y in points:
        values.setdefault(round(place(x, span, to=(0, num_columns - 1))), []).append(y)
    known = {column: statistics.fmean(ys) for column, ys in sorted(values.items())}
    filled = dict(known)
    for before, after in pairwise(known):
        for column in range(before + 1, after):
            filled[column] = place(column, (before, after), to=(known[before], known[after]))
    return filled

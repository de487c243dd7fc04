"""Curves against tokens as SVG, and the script that reads them out under the pointer."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TypeGuard

from llama_pretrain.runs.page import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Point,
    place,
    tick_label,
    ticks,
)

MAX_POINTS = 2000
"""Of a curve: more than a screen has columns."""
NUM_STYLES = 8
"""Colours and dashes of lines; after these they begin again."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a file can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def curve(rows: Sequence[Mapping[str, Any]], key: str, *, unit: float = 1) -> list[Point]:
    """A curve against tokens, without the values that are no numbers."""
    pairs = ((row.get("tokens"), row.get(key)) for row in rows)
    return [(x, y / unit) for x, y in pairs if is_number(x) and is_number(y)]


def thin(points: Sequence[Point], *, limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: of each stretch its lowest and its highest, so that spikes stay."""
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(len(points) / (limit // 2))
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        by_value = sorted(points[start : start + stretch], key=lambda point: point[1])
        kept += sorted({by_value[0], by_value[-1]})
    return kept


def chart(
    title: str, *, unit: str, lines: Mapping[str, Sequence[Point]], wide: bool = False
) -> str:
    """A figure against tokens; empty where no line has two points.

    The y axis of a wide one need not begin at 0. A line's name is told in the key; one without a
    name needs none.
    """
    thinned = {name: thin(points) for name, points in lines.items() if len(points) > 1}
    xs = [x for points in thinned.values() for x, _ in points]
    ys = [y for points in thinned.values() for _, y in points]
    if max(xs, default=0) <= 0:
        return ""
    y_ticks = ticks(min(ys) if wide else min(0, *ys), max(ys))
    x_range, y_range = (0, max(xs)), (y_ticks[0], y_ticks[-1])
    plot = (LEFT, RIGHT, TOP, BOTTOM)
    axes = json.dumps({"x": x_range, "y": y_range, "plot": plot, "names": list(thinned)})
    keys = [
        f'<span class="key {_style(index)}">{escape(name)}</span>'
        for index, name in enumerate(thinned)
        if name
    ]
    ends = {name: (lines[name][0][1], lines[name][-1][1]) for name in thinned}
    told = [f"{name} from {first:.4g} to {last:.4g}" for name, (first, last) in ends.items()]
    curves = [
        _curve(points, index=index, x_range=x_range, y_range=y_range)
        for index, points in enumerate(thinned.values())
    ]
    name = re.sub("[^a-z]+", "-", f"{title} {unit}".lower()).strip("-")
    return f"""
<figure class="{"wide" if wide else "narrow"}" aria-labelledby="{name}">
<figcaption><h3 id="{name}">{escape(title)}</h3>{"".join(keys)}</figcaption>
<svg viewBox="0 0 360 220" role="img" data-axes="{escape(axes)}"
 aria-label="{escape(f"{title} ({unit}) against tokens")}" aria-describedby="{name}-told">
<desc id="{name}-told">{escape("; ".join(told).strip())}</desc>
<text x="{LEFT}" y="12">{escape(unit)}</text>
<text class="end" x="{RIGHT}" y="{BOTTOM + 33}">tokens</text>
{_grid(y_ticks, x_range=x_range)}{"".join(curves)}<path class="cursor" d=""/>
</svg>
<p class="readout" aria-hidden="true"></p>
</figure>"""


def charts(drawn: Sequence[str]) -> str:
    """Figures beside each other; empty ones are left out."""
    text = "".join(drawn)
    return text and f'<div class="charts">{text}</div>'


def _style(index: int) -> str:
    return f"line{index % NUM_STYLES}"


def _grid(y_ticks: Sequence[float], *, x_range: Point) -> str:
    drawn = ""
    for tick in y_ticks:
        y = place(tick, (y_ticks[0], y_ticks[-1]), to=(BOTTOM, TOP))
        drawn += f'<path class="grid" d="M{LEFT} {y:.2f}H{RIGHT}"/>'
        drawn += f'<text class="end" x="{LEFT - 6}" y="{y + 4:.2f}">{tick_label(tick)}</text>'
    for tick in ticks(*x_range):
        if tick <= x_range[1]:
            x = place(tick, x_range, to=(LEFT, RIGHT))
            drawn += f'<path class="grid" d="M{x:.2f} {BOTTOM}v4"/>'
            drawn += f'<text class="mid" x="{x:.2f}" y="{BOTTOM + 17}">{tick_label(tick)}</text>'
    return drawn


def _curve(points: Sequence[Point], *, index: int, x_range: Point, y_range: Point) -> str:
    placed = (
        f"{place(x, x_range, to=(LEFT, RIGHT)):.2f},{place(y, y_range, to=(BOTTOM, TOP)):.2f}"
        for x, y in points
    )
    return f'<polyline class="{_style(index)}" points="{" ".join(placed)}"/>'


READOUT = """
const tokens = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 4});
for (const svg of document.querySelectorAll("svg[data-axes]")) {
  const {x, y, plot: [left, right, top, bottom], names} = JSON.parse(svg.dataset.axes);
  const readout = svg.parentElement.querySelector(".readout");
  const cursor = svg.querySelector(".cursor");
  const lines = [...svg.querySelectorAll("polyline")].map(line =>
    line.getAttribute("points").split(" ").map(pair => pair.split(",").map(Number)));
  const value = (at, from, to, [low, high]) => low + (at - from) / (to - from) * (high - low);
  const show = event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const near = lines.map(points =>
      points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    const said = near.map(([, height], i) =>
      `${names[i]} ${Number(value(height, bottom, top, y).toPrecision(4))}`.trim());
    const first = near.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
    const place = tokens.format(value(first[0], left, right, x));
    readout.textContent = `at ${place} tokens: ${said.join(", ")}`;
    cursor.setAttribute("d", `M${first[0]} ${top}V${bottom}`);
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => {
    readout.textContent = "";
    cursor.setAttribute("d", "");
  });
}
"""

"""Charts: values placed in an SVG of 360 x 220, which templates/macros.html.j2 draws."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from llama_pretrain.files import hash_text
from llama_pretrain.runs.metrics import Point

LEFT, RIGHT, TOP, BOTTOM = 56, 344, 24, 184
"""The plot in the viewBox, whose units are a phone's CSS pixels."""
MAX_POINTS = 2000
"""Of a curve: more than a screen has columns."""
NUM_STYLES = 8
"""Line styles (colour and dash) before they repeat."""
LOG_RATIO = 8
"""An axis is logarithmic if its largest value is at least this many times its smallest."""


class Mark(str, Enum):
    line = "line"
    dots = "dots"
    bars = "bars"


@dataclass(frozen=True, kw_only=True)
class Series:
    """Values to draw."""

    points: Sequence[Point]
    name: str = ""
    """For the key; empty = not in the key."""
    mark: Mark = Mark.line
    colour: str = ""
    """CSS; empty = by `style`."""
    style: str = ""
    """CSS class; empty = by position."""
    titles: Sequence[str] = ()
    """Tooltip of each dot or bar; of a line, one, which is read out when the line is nearest."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The horizontal axis."""

    name: str
    span: Point
    """Values at the left and the right edge."""
    ticks: Sequence[tuple[float, str]]
    """Value and label."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What the template draws: series, and where their values lie in the picture."""

    title: str
    unit: str
    series: Sequence[Series]
    axis: Axis
    y_ticks: Sequence[float]
    wide: bool

    @property
    def id(self) -> str:
        return f"chart-{hash_text(self.title + self.unit)[:8]}"

    @property
    def y_span(self) -> Point:
        return self.y_ticks[0], self.y_ticks[-1]

    def x(self, value: float) -> float:
        return place(value, self.axis.span, to=(LEFT, RIGHT))

    def y(self, value: float) -> float:
        return place(value, self.y_span, to=(BOTTOM, TOP))

    def path(self, series: Series) -> str:
        """The points of a line."""
        return " ".join(f"{self.x(x):.2f},{self.y(y):.2f}" for x, y in series.points)

    @property
    def bar_width(self) -> float:
        return (RIGHT - LEFT) / len(self.series[0].points) - 2

    @property
    def description(self) -> str:
        """What a screen reader says of the values."""
        return "; ".join(text for item in self.series if (text := _describe(item)))

    @property
    def axes(self) -> str:
        """JSON for the script that reads values out."""
        names = [item.titles[0] if item.titles else item.name for item in self.series]
        plot = (LEFT, RIGHT, TOP, BOTTOM)
        return json.dumps({"x": self.axis.span, "y": self.y_span, "plot": plot, "names": names})


def draw(
    title: str,
    series: Sequence[Series],
    *,
    unit: str,
    axis: Axis | None = None,
    wide: bool = False,
    from_zero: bool = False,
) -> Chart | None:
    """A chart of series; `None` if there is nothing to draw.

    Args:
        axis: `None` = tokens, from 0; then lines of fewer than two points are left out.
        from_zero: whether the vertical axis includes 0.
    """
    shown = [
        replace(item, points=thin(item.points), style=item.style or f"line{number % NUM_STYLES}")
        for number, item in enumerate(item for item in series if axis or len(item.points) > 1)
    ]
    xs = [x for item in shown for x, _ in item.points]
    ys = [y for item in shown for _, y in item.points]
    if not xs or (axis is None and max(xs) <= 0):
        return None
    y_ticks = ticks(min(0, *ys) if from_zero else min(ys), max(ys))
    axis = axis or token_axis(max(xs))
    return Chart(title=title, unit=unit, series=shown, axis=axis, y_ticks=y_ticks, wide=wide)


def _describe(item: Series) -> str:
    if item.mark is Mark.dots:
        return ""
    if item.titles:
        return "; ".join(item.titles)
    first, last = item.points[0][1], item.points[-1][1]
    return f"{item.name} from {first:.4g} to {last:.4g}".strip()


def thin(points: Sequence[Point], *, limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: the lowest and the highest of each stretch, so that spikes stay."""
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(len(points) / (limit // 2))
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        by_value = sorted(points[start : start + stretch], key=lambda point: point[1])
        kept += sorted({by_value[0], by_value[-1]})
    return kept


def token_axis(high: float) -> Axis:
    """Tokens from 0."""
    marks = [(tick, tick_label(tick)) for tick in ticks(0, high) if tick <= high]
    return Axis(name="tokens", span=(0, high), ticks=marks)


def option_axis(name: str, texts: Sequence[str]) -> tuple[Axis, dict[str, float]]:
    """An axis for the values of an option, and where each value lies on it.

    Numbers lie by their size, logarithmically if they span much; other values side by side.
    """
    values = list(dict.fromkeys(texts))
    numbers = {text: number for text in values if (number := to_number(text)) is not None}
    if len(values) > 1 and len(numbers) == len(values):
        low, high = min(numbers.values()), max(numbers.values())
        logarithmic = low > 0 and high / low >= LOG_RATIO
        scale = math.log if logarithmic else float
        span = (scale(low), scale(high))
        values.sort(key=lambda text: numbers[text])
        places = {
            text: place(scale(numbers[text]), span, to=(LEFT + 20, RIGHT - 20)) for text in values
        }
        name += ", logarithmic" if logarithmic else ""
    else:
        width = (RIGHT - LEFT) / len(values)
        places = {text: LEFT + width * (number + 0.5) for number, text in enumerate(values)}
    every = math.ceil(len(values) / ((RIGHT - LEFT) // 48))
    marks = [(places[text], _option_label(text)) for text in values[::every]]
    return Axis(name=name, span=(LEFT, RIGHT), ticks=marks), places


def _option_label(text: str) -> str:
    number = to_number(text)
    if number is not None and len(text) > 6:
        text = tick_label(number)
    return text if len(text) <= 14 else f"{text[:13]}…"


def to_number(text: str) -> float | None:
    """An option's value, if it is a finite number."""
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def ticks(low: float, high: float) -> list[float]:
    """Multiples of a round step, about five, from below `low` to above `high`."""
    rough = (high - low) / 5 or abs(high) / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def tick_label(value: float) -> str:
    """A number on an axis, as short as possible."""
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{suffix}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{value:.4g}" if not 0 < abs(value) < 0.01 else f"{float(mantissa):g}e{int(exponent)}"


def place(value: float, span: Point, *, to: Point) -> float:
    """Map a value from one range to another."""
    return to[0] + (value - span[0]) / (span[1] - span[0]) * (to[1] - to[0])

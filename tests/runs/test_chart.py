"""Where values lie in a chart, and what is left out."""

import math
from collections.abc import Sequence

import pytest

from llama_pretrain.runs.chart import Axis, Mark, Series, draw, option_axis, thin


def test_points_lie_where_their_values_say() -> None:
    """x: 0 to 4000 tokens over 56 to 344; y: the ticks 5 to 8 over 184 to 24."""
    chart = draw("Loss", [Series(points=[(1000, 8.0), (4000, 5.0)])], unit="nats")
    assert chart is not None
    assert chart.path(chart.series[0]) == "128.00,24.00 344.00,184.00"
    from_zero = draw("Rate", [Series(points=[(1000, 1.0), (4000, 4.0)])], unit="", from_zero=True)
    assert from_zero is not None
    assert from_zero.path(from_zero.series[0]) == "128.00,144.00 344.00,24.00"


def test_bars_begin_at_zero() -> None:
    axis = Axis(name="tokens", span=(0, 2), ticks=[(0.5, "8"), (1.5, "16")])
    bars = Series(mark=Mark.bars, points=[(0.5, 10), (1.5, 5)], titles=["a", "b"])
    chart = draw("text", [bars], unit="documents", axis=axis, from_zero=True)
    assert chart is not None
    placed = [(chart.x(x), chart.y(y)) for x, y in chart.series[0].points]
    assert (placed, chart.bar_width) == ([(128.0, 24.0), (272.0, 104.0)], 142)


@pytest.mark.parametrize("points", [[], [(1.0, 2.0)], [(0.0, 2.0), (0.0, 3.0)]])
def test_too_few_points_make_no_chart(points: Sequence[tuple[float, float]]) -> None:
    assert draw("Loss", [Series(points=points)], unit="") is None


def test_values_that_never_change_have_an_axis() -> None:
    chart = draw("Loss", [Series(points=[(1, 0.0), (2, 0.0)])], unit="")
    assert chart is not None
    assert len(chart.y_ticks) == 2


@pytest.mark.parametrize(
    ("texts", "places"),
    [
        pytest.param(["1", "2", "3"], [76, 200, 324], id="numbers"),
        pytest.param(["1e-4", "1e-2", "1e-3"], [76, 324, 200], id="logarithmic"),
        pytest.param(["b", "a", "b"], [128, 272, 128], id="words-side-by-side"),
        pytest.param(["5", "5"], [200, 200], id="one-value"),
        pytest.param(["0", "1_000"], [76, 324], id="zero-is-not-logarithmic"),
    ],
)
def test_where_options_lie_on_an_axis(texts: Sequence[str], places: Sequence[float]) -> None:
    _, found = option_axis("x", texts)
    assert [found[text] for text in texts] == pytest.approx(places)


def test_thin_keeps_spikes_and_order() -> None:
    points = [(float(x), 1.0) for x in range(10_000)]
    points[1234] = (1234.0, 99.0)
    points[8765] = (8765.0, -99.0)
    thinned = thin(points, limit=100)
    assert len(thinned) <= 100
    assert thinned == sorted(thinned)
    assert {points[1234], points[8765]} <= set(thinned)
    assert thin(points[:100], limit=100) == points[:100]
    spiky = draw("", [Series(points=[(x, math.sin(x)) for x in range(20_000)])], unit="")
    assert spiky is not None
    assert 1500 < len(spiky.series[0].points) <= 2000

"""The page of a sweep: what it draws, and in a real browser that it opens, sorts and fits."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.config.sweep import Objective
from llama_pretrain.runs.status import Status, write_status
from llama_pretrain.sweep.directory import PointRecord, SweepDir, SweepRecord, Verdict, read_rows
from llama_pretrain.sweep.report import Axis, render_sweep_report
from tests.browser import PHONE, OpenPageFunction

RATES = ("1e-4", "1e-3", "1e-2")
STAGES = ("stage1", "stage3")


def make_sweep(folder: Path) -> tuple[SweepDir, SweepRecord]:
    """Six points that ended, one that failed, one that was left out."""
    points = []
    for index, (stage, rate) in enumerate((s, r) for s in STAGES for r in RATES):
        settings = {"zero": stage, "optim.learning_rate": rate}
        label = ",".join(f"{key}={value}" for key, value in settings.items())
        points.append(make_point(folder, index, settings, label, loss=4 + index / 10))
    failed = PointRecord(
        index=6, label="<b>bad</b>", settings={"zero": "<b>"}, words=[], folder="06-bad"
    )
    (folder / "06-bad").mkdir()
    write_status(SweepDir(folder).point(failed), Status.failed, error="ValueError: <script>no")
    points.append(failed)
    unfit = {"zero": "stage0", "optim.learning_rate": "1"}
    points.append(
        PointRecord(
            index=7,
            label="large",
            settings=unfit,
            words=[],
            verdict=Verdict.unfit,
            reason="needs 9",
        )
    )
    record = SweepRecord(
        command=["python", "run.py", "-m", "zero=stage1,stage3"],
        objective=Objective.eval_loss,
        points=points,
    )
    return SweepDir(folder), record


def make_point(
    folder: Path, index: int, settings: dict[str, str], label: str, *, loss: float
) -> PointRecord:
    point = PointRecord(
        index=index, label=label, settings=settings, words=[], folder=f"{index:02d}-point"
    )
    run_dir = SweepDir(folder).point(point)
    run_dir.path.mkdir()
    rows: list[dict[str, Any]] = []
    for step in range(1, 6):
        place = {"step": step, "tokens": step * 1000}
        rows.append(
            {
                **place,
                "loss": loss + 2 / step,
                "tokens_per_s": 500.0 * (index + 1),
                "memory_bytes": (100 + index) << 20,
            }
        )
        rows.append({**place, "eval_loss": loss + 1 / step})
    run_dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir.report.write_text("<!doctype html><title>a point</title>")
    write_status(run_dir, Status.completed)
    return point


@pytest.fixture
def page(tmp_path: Path) -> Path:
    folder, record = make_sweep(tmp_path)
    folder.report.write_text(render_sweep_report(folder, record, read_rows(folder, record)))
    return folder.report


def test_what_the_page_says(page: Path) -> None:
    text = page.read_text()
    assert "8 points: 6 completed · 1 failed · 1 unfit" in text
    assert "Best evaluation loss: <strong>4.2</strong> nats a token" in text
    assert "zero=stage1,optim.learning_rate=1e-4" in text
    assert "python run.py -m zero=stage1,stage3" in text
    assert "ValueError: &lt;script&gt;no" in text
    assert "<b>" not in text
    # A point a dot, in each of the two scatters of each of the four measures.
    assert text.count("<circle") == 6 * 2 * 4
    assert text.count('<polyline style="stroke:') == 6 * 2


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
def test_where_values_lie_on_an_axis(texts: Sequence[str], places: Sequence[float]) -> None:
    axis = Axis(texts)
    assert [axis.x(text) for text in texts] == pytest.approx(places)


def column(opened: Any, number: int) -> list[str]:
    cells: list[str] = opened.page.locator(
        f"table.sortable tbody td:nth-child({number})"
    ).all_inner_texts()
    return [cell.strip() for cell in cells]


def test_it_opens_without_a_network_and_its_table_sorts(
    page: Path, open_page: OpenPageFunction
) -> None:
    opened = open_page(page)
    assert opened.errors == []
    assert opened.requests == []
    heads = opened.page.locator("table.sortable th")
    names = heads.all_inner_texts()
    assert names[:4] == ["point", "zero", "optim.learning_rate", "status"]
    rate, loss = 3, names.index("evaluation loss") + 1

    def press(number: int) -> None:
        heads.nth(number - 1).locator("button").click()

    press(rate)  # numbers by their size, what has none at the end
    assert column(opened, rate) == ["1e-4", "1e-4", "1e-3", "1e-3", "1e-2", "1e-2", "1", ""]
    assert heads.nth(rate - 1).get_attribute("aria-sort") == "ascending"
    press(rate)
    assert column(opened, rate)[:3] == ["1", "1e-2", "1e-2"]
    press(loss)
    assert column(opened, loss) == [f"{4.2 + n / 10:.4f}" for n in range(6)] + ["", ""]
    assert heads.nth(rate - 1).get_attribute("aria-sort") == "none"
    press(4)
    assert column(opened, 4)[:2] == ["completed", "completed"]
    assert opened.errors == []


def test_a_curve_is_named_when_it_is_pointed_at(page: Path, open_page: OpenPageFunction) -> None:
    opened = open_page(page)
    chart = opened.page.locator("svg.overlay").first
    chart.scroll_into_view_if_needed()
    best = chart.locator("polyline").first
    x, y = best.evaluate("line => line.getAttribute('points').split(' ').pop().split(',')")
    box = chart.bounding_box()
    scale = box["width"] / 360
    opened.page.mouse.move(box["x"] + float(x) * scale, box["y"] + float(y) * scale)
    readout = chart.locator(".readout").inner_html()
    assert readout == "zero=stage1,optim.learning_rate=1e-4: 4.2000 at the end"
    assert best.get_attribute("class") == "near"


def test_it_fits_a_phone_and_is_told_to_a_screen_reader(
    page: Path, open_page: OpenPageFunction
) -> None:
    opened = open_page(page, width=PHONE)
    assert opened.beyond() == []
    outline = opened.outline()
    assert 'heading "Evaluation loss over each swept value" [level=2]' in outline
    assert "Evaluation loss against tokens" in outline
    assert 'region "All points"' in outline
    assert outline.count("- img ") == 2 * 4 + 2
    opened.page.locator("table.sortable a").first.click()
    assert opened.page.title() == "a point"

"""The page of a sweep: what it draws, and in a real browser that it opens, sorts and fits."""

from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.config.sweep import Objective
from llama_pretrain.runs.metrics import Row
from llama_pretrain.runs.status import Outcome, Status, write_status
from llama_pretrain.sweep.directory import JobRecord, SweepDir, SweepRecord, Verdict, read_rows
from llama_pretrain.sweep.report import render_sweep_report
from tests.browser import PHONE, OpenPageFunction
from tests.rows import MIB, evaluation_row, step_row, write_rows

RATES = ("1e-4", "1e-3", "1e-2")
STAGES = ("stage1", "stage3")


def make_sweep(folder: Path) -> tuple[SweepDir, SweepRecord]:
    """Six jobs that ended, one that failed, one that was left out."""
    jobs = []
    for index, (stage, rate) in enumerate((s, r) for s in STAGES for r in RATES):
        settings = {"zero": stage, "optim.learning_rate": rate}
        label = ",".join(f"{key}={value}" for key, value in settings.items())
        jobs.append(make_job(folder, index, settings, label, loss=4 + index / 10))
    failed = JobRecord(
        index=6, label="<b>bad</b>", settings={"zero": "<b>"}, words=[], folder="06-bad"
    )
    (folder / "06-bad").mkdir()
    write_status(
        SweepDir(folder).job(failed), Status.failed, Outcome(error="ValueError: <script>no")
    )
    jobs.append(failed)
    unfit = {"zero": "stage0", "optim.learning_rate": "1"}
    jobs.append(
        JobRecord(
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
        jobs=jobs,
    )
    return SweepDir(folder), record


def make_job(
    folder: Path, index: int, settings: dict[str, str], label: str, *, loss: float
) -> JobRecord:
    job = JobRecord(
        index=index, label=label, settings=settings, words=[], folder=f"{index:02d}-job"
    )
    run_dir = SweepDir(folder).job(job)
    run_dir.path.mkdir()
    measures = {"tokens_per_s": 500.0 * (index + 1), "memory_bytes": (100 + index) * MIB}
    rows: list[Row] = []
    for step in range(1, 6):
        rows.append(step_row(step, loss=loss + 2 / step, **measures))
        rows.append(evaluation_row(step, loss + 1 / step))
    write_rows(run_dir.metrics, rows)
    run_dir.report.write_text("<!doctype html><title>a job</title>")
    write_status(run_dir, Status.completed)
    return job


@pytest.fixture
def page(tmp_path: Path) -> Path:
    folder, record = make_sweep(tmp_path)
    folder.report.write_text(render_sweep_report(folder, record, read_rows(folder, record)))
    return folder.report


def test_text_and_charts(page: Path) -> None:
    text = page.read_text()
    assert "8 jobs: 6 completed · 1 failed · 1 unfit" in text
    assert "Best evaluation loss: <strong>4.2</strong> nats per token" in text
    assert "zero=stage1,optim.learning_rate=1e-4" in text
    assert "python run.py -m zero=stage1,stage3" in text
    assert "ValueError: &lt;script&gt;no" in text
    assert "<b>" not in text
    # A job a dot, in each of the two scatters of each of the four measures.
    assert text.count("<circle") == 6 * 2 * 4
    assert text.count('style="stroke:hsl(') == 6 * 2


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
    assert names[:4] == ["job", "zero", "optim.learning_rate", "status"]
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
    chart = opened.page.locator("figure:has(svg[data-nearest])").first
    chart.scroll_into_view_if_needed()
    best, svg = chart.locator("polyline").first, chart.locator("svg")
    x, y = best.evaluate("line => line.getAttribute('points').split(' ').pop().split(',')")
    box = svg.bounding_box()
    scale = box["width"] / 360
    opened.page.mouse.move(box["x"] + float(x) * scale, box["y"] + float(y) * scale)
    readout = chart.locator(".readout").text_content()
    assert readout == "zero=stage1,optim.learning_rate=1e-4: 4.2000 at the end"
    assert best.get_attribute("class").strip() == "near"


def test_it_fits_a_phone_and_has_an_accessibility_tree(
    page: Path, open_page: OpenPageFunction
) -> None:
    opened = open_page(page, width=PHONE)
    assert opened.beyond() == []
    outline = opened.outline()
    assert 'heading "Evaluation loss over each swept value" [level=2]' in outline
    assert "Evaluation loss (nats per token) against tokens" in outline
    assert 'region "All jobs"' in outline
    assert outline.count("- img ") == 2 * 4 + 2
    opened.page.locator("table.sortable a").first.click()
    assert opened.page.title() == "a job"

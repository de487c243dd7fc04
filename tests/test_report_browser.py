"""The report of a run in a real browser: on a desk, on a phone, on paper, without sight."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.report import render_report
from tests.browser import DESK, PHONE, OpenPageFunction
from tests.test_runs_report import HOSTILE, PLAN, PROVENANCE, ROWS, SNAPSHOT, write_metrics

LONG = "x" * 300
"""A word that no line is long enough for."""
CONTRASTS = """() => {
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v =>
    v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const under = element => {
    for (; element; element = element.parentElement) {
      const found = numbers(getComputedStyle(element).backgroundColor);
      if (found[3] !== 0) return found;
    }
  };
  return [...document.querySelectorAll("main :not(desc)")]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
    .map(e => {
      const style = getComputedStyle(e), inside = e.namespaceURI.endsWith("svg");
      const a = light(numbers(inside ? style.fill : style.color)), b = light(under(e));
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 80)];
    });
}"""
"""Of each element with text: contrast with what is behind it, and the element (WCAG 2.2)."""


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """The report of a run with everything that one can have, and long words in it."""
    run_dir = RunDir(tmp_path / "run")
    (run_dir.checkpoints / "step-00000004").mkdir(parents=True)
    run_dir.snapshot.write_text(SNAPSHOT)
    run_dir.plan.write_text(json.dumps(PLAN | {"corpus": {"tokens_dir": f"/data/{LONG}"}}))
    run_dir.provenance.write_text(json.dumps(PROVENANCE | {"host": LONG}))
    run_dir.status.write_text(json.dumps({"status": "failed", "error": LONG, "restarts": 1}))
    (run_dir.path / "sample.txt").write_text(f"{HOSTILE} {LONG}\n")
    samples = [{"step": step, "tokens": step, "text": f"{LONG} {step}"} for step in (0, 2, 4)]
    run_dir.samples.write_text("".join(json.dumps(row) + "\n" for row in samples))
    sources = {"eval_loss/web": 5.5, "eval_loss/code": 4.5}
    write_metrics(run_dir, [row | (sources if "eval_loss" in row else {}) for row in ROWS])
    run_dir.report.write_text(render_report(run_dir))
    return run_dir.report


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_report_opens_quietly(
    open_page: OpenPageFunction, report: Path, width: int, scheme: str
) -> None:
    opened = open_page(report, width=width, color_scheme=scheme)
    opened.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert (opened.errors, opened.requests) == ([], [])
    assert opened.beyond() == []
    assert opened.page.title() == "run"
    low = [pair for pair in opened.page.evaluate(CONTRASTS) if pair[0] < 4.5]
    assert low == []


def test_it_can_be_read_without_sight(open_page: OpenPageFunction, report: Path) -> None:
    opened = open_page(report)
    outline = opened.outline()
    assert outline.startswith("- main:")
    headings = re.findall(r'- heading "([^"]+)" \[level=(\d)\]', outline)
    levels = [int(level) for _, level in headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert ("What happened", "2") in headings
    for name in ("Loss", "Learning rate", "Throughput", "Memory", "Evaluation of each source"):
        assert f'- figure "{name}":' in outline
    assert '- img "Loss (nats a token) against tokens"' in outline
    assert '- table "Memory of a rank at its peak, in the phase step":' in outline
    assert '- rowheader "weights"' in outline
    told = opened.page.get_by_role("img", name="Loss (nats").evaluate(
        "svg => document.getElementById(svg.getAttribute('aria-describedby')).textContent"
    )
    assert told == "training from 8 to 5; evaluation from 8 to 5"


def test_a_pointer_reads_curves_out(open_page: OpenPageFunction, report: Path) -> None:
    page = open_page(report).page
    figure = page.get_by_role("figure", name="Loss", exact=True)
    assert figure.locator(".readout").text_content() == ""
    svg = figure.locator("svg")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.94, box["y"] + box["height"] / 2)
    said = "at 4K tokens: training 5, evaluation 5"
    assert figure.locator(".readout").text_content() == said
    page.mouse.move(box["x"], box["y"] - 20)
    assert figure.locator(".readout").text_content() == ""


def test_paper_is_white_and_has_all(open_page: OpenPageFunction, report: Path) -> None:
    """Also where the screen is dark: what is folded opens for the print and closes after it."""
    page = open_page(report, color_scheme="dark").page
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) != "rgb(255, 255, 255)"
    opened = "[...document.querySelectorAll('details')].map(details => details.open)"
    assert page.evaluate(opened) == [False] * 3
    page.evaluate(f"addEventListener('beforeprint', () => {{ window.printed = {opened}; }})")
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert page.evaluate("window.printed") == [True] * 3
    assert page.evaluate(opened) == [False] * 3
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    assert [pair for pair in page.evaluate(CONTRASTS) if pair[0] < 4.5] == []
    kept = "[...document.querySelectorAll('figure')].map(f => getComputedStyle(f).breakInside)"
    assert set(page.evaluate(kept)) == {"avoid"}
    # Without the script too: the folded config is on the paper.
    assert page.locator("details pre").first.is_visible()


def test_paper_without_a_script_has_all(open_page: OpenPageFunction, report: Path) -> None:
    page = open_page(report, java_script_enabled=False).page
    config = page.locator("details pre").first
    assert not config.is_visible()
    page.emulate_media(media="print")
    assert config.bounding_box()["height"] > 50

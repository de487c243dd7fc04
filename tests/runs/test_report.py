"""The report of a run: what it shows and leaves out, and how it works in a real browser."""

import json
import math
import re
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import CheckpointRow, RollbackRow, Row, SampleRow
from llama_pretrain.runs.phases import NAMES
from llama_pretrain.runs.report import render_report
from tests.browser import DESK, PHONE, OpenPageFunction
from tests.rows import MIB, evaluation_row, event_row, step_row, summary_row, write_rows

SECTIONS = [
    "What was asked",
    "What was planned",
    "What happened",
    "What the model wrote",
    "Provenance",
    "Run it again",
]
EXPORTED = "The exported model, sampling at random"
CHARTS = ["Loss", "Learning rate", "Gradient norm", "Throughput", "Memory"]
PLAN = {
    "device": "cuda",
    "world_size": 2,
    "batch": {"global_batch_size": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
    "steps": {"total": 4, "tokens_per_step": 1000, "tokens": 4000, "epochs": None},
    "parameters": {"embedding": 600, "decayed": 1_000_000, "not_decayed": 2500},
    "device_memory": 80 << 30,
    "memory": {"phase": "step", "weights": 100 * MIB, "logits": 60 * MIB, "host": 7 * MIB},
}
PROVENANCE = {
    "argv": ["data=text", "data.paths=[a b.txt]"],
    "git_commit": "abc123",
    "machine": {"cores": 2, "memory_bytes": 8 << 30},
}
SNAPSHOT = """model: {name: tiny}
data: {name: stdlib, paths: [corpus/a.txt, b.txt]}
seed: 0
precision: {name: bf16}
zero: {stage: 2}
train: {sample_prompt: "if a < b"}
"""
HOSTILE = '</pre><script>alert("x")</script><img src=//evil.test/x> & ]]>'
LONG = "x" * 300
"""A word that is too long for every line."""
FIRST = evaluation_row(0, 8.0, perplexity=2980.958, bits_per_byte=3.25)
ROWS: list[Row] = [
    FIRST,
    step_row(1),
    step_row(2, loss=None, skipped_steps=1),
    CheckpointRow(
        step=2,
        tokens=2000,
        checkpoint="step-00000002",
        checkpoint_seconds=1.234,
        checkpoint_stall_seconds=0.25,
    ),
    step_row(3, grad_norm=None, skipped_steps=1),
    step_row(4, skipped_steps=2),
    evaluation_row(4, 5.0, perplexity=148.413, bits_per_byte=2.125),
    CheckpointRow(step=4, tokens=4000, checkpoint="step-00000004", checkpoint_seconds=2.0),
    summary_row(4),
]


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A small completed run, its newest checkpoint kept."""
    run_dir = RunDir(tmp_path / "lr=0.1 <b>")
    (run_dir.checkpoints / "step-00000004").mkdir(parents=True)
    run_dir.snapshot.write_text(SNAPSHOT)
    run_dir.plan.write_text(json.dumps(PLAN))
    run_dir.provenance.write_text(json.dumps(PROVENANCE))
    run_dir.status.write_text(json.dumps({"status": "completed"}))
    (run_dir.path / "sample.txt").write_text(HOSTILE + "\n")
    write_rows(run_dir.metrics, ROWS)
    return run_dir


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps the text in each."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.found: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
            self.found.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.found[tag][-1] += data

    def tables(self) -> list[str]:
        return [text.replace("\n", "") for text in self.found.get("table", [])]


def test_sections_charts_and_figures(run_dir: RunDir) -> None:
    page = Page(render_report(run_dir))
    assert page.found["h1"] == ["lr=0.1 <b> completed"]
    assert page.found["h2"] == SECTIONS
    assert page.found["h3"] == [
        *CHARTS, "Skipped steps, restarts, signals", "Checkpoints", EXPORTED
    ]  # fmt: skip
    facts = "tiny model · 1,002,500 parameters · stdlib data · 4,000 tokens · 4 steps"
    assert page.found["header"][0].endswith(f"{facts} · world size 2 · cuda · bf16 · ZeRO stage 2")
    names, values = page.found["dt"], page.found["dd"]
    assert dict(zip(names, zip(values[::2], values[1::2], strict=True), strict=True)) == {
        "Training loss": ("5.4321", "mean of the last 20 steps"),
        "Evaluation loss": ("5.0000", "from 8.0000 at step 0"),
        "Perplexity": ("148.4", "last evaluation"),
        "Bits per byte": ("2.125", "last evaluation"),
        "Tokens/s": ("12,346", "median, all ranks"),
        "MFU": ("45.7%", "median"),
        "Peak memory": ("192 MiB", "120% of the 160 MiB planned"),  # 100 + 60: not the host's 7
        "Training time": ("2.0 s", "of the steps that count"),  # four of 1000 tokens at 2000/s
    }


def test_tables(run_dir: RunDir) -> None:
    page = Page(render_report(run_dir))
    asked, planned, memory, plan, saves, provenance = page.tables()
    assert asked == (
        "optionvaluedata.namestdlibdata.pathscorpus/a.txt, b.txtprecision.namebf16zero.stage2seed0"
    )
    assert planned == (
        "whatvalueglobal batch8 rows = 2 micro x 2 accumulated x 2 ranks"
        "steps4tokens per step1,000tokens4,000"
    )
    assert memory == (
        "Memory of a rank at its peak, in the phase step"
        "partbytesweights100 MiBlogits60 MiBtotal160 MiBdevice memory80.0 GiB"
    )
    assert saves == (
        "checkpointstepseconds to saveseconds waitedkept"
        "step-0000000221.230.25nostep-0000000442.00yes"
    )
    assert "Skipped steps: 2 (at 2, 4)" in page.found["p"]
    assert "memory · weights100 MiB" in plan
    assert "steps · epochsnone" in plan
    assert provenance == (
        "whatvalueargvdata=text, data.paths=[a b.txt]git commitabc123"
        "machine · cores2machine · memory bytes8.0 GiB"
    )
    assert {values.get("scope") for tag, values in page.tags if tag == "th"} == {"row", "col"}


def test_events(run_dir: RunDir) -> None:
    where = {"step": 4, "tokens": 4000, "rolled_back_from": 9}
    rollback = RollbackRow(**where, spike_loss=8.5, spike_z=7.0, skipped_batches=[7, 8])
    fault = "step-00000006 was not written: No space left (rank 0)"
    events: list[Row] = [
        step_row(3, loss=None, skipped="loss"),
        step_row(5, skipped="spike", loss=7.25, spike_z=9.87),
        rollback,
        event_row(4, restarted="rank 1 failed: ended by SIGKILL"),
        event_row(4, resumed="2026-05-04T03:02:01+00:00"),
        CheckpointRow(step=6, tokens=6000, checkpoint_error=fault),
        event_row(7, preempted="SIGTERM"),
    ]
    write_rows(run_dir.metrics, events)
    assert re.findall("<li>(.*?)</li>", render_report(run_dir)) == [
        "step 3: skipped, its loss was not finite",
        "step 4: rolled back from step 9, whose loss of 8.5000 spiked; skipped global batches 7, 8",
        "step 4: restarted from here after: rank 1 failed: ended by SIGKILL",
        "step 4: resumed from here at 2026-05-04T03:02:01+00:00",
        f"step 6: {fault}",
        "step 7: ended by SIGTERM, with a checkpoint",
    ]  # the rollback to step 4 took step 5 back
    write_rows(run_dir.metrics, [event for event in events if event is not rollback])
    spike = "step 5: skipped, the loss of 7.2500 spiked (9.9 standard deviations)"
    assert spike in render_report(run_dir)


def test_the_status_is_that_of_status_json(run_dir: RunDir) -> None:
    status = {"status": "failed", "error": "rank 1 <died>", "restarts": 2}
    run_dir.status.write_text(json.dumps(status))
    page = Page(render_report(run_dir))
    assert page.found["h1"] == ["lr=0.1 <b> failed"]
    assert "The run ended with: rank 1 <died>" in page.found["p"]
    assert "Restarts after a rank failed: 2" in page.found["p"]


def test_a_column_for_each_start(run_dir: RunDir) -> None:
    seconds = {"compose": 0.5, "spawn": 1.25, "engine": 2.0}
    starts = [event_row(1, start_seconds=seconds), event_row(7, start_seconds={"spawn": 0.25})]
    write_rows(run_dir.metrics, [step_row(1), *starts])
    table = next(text for text in Page(render_report(run_dir)).tables() if "phase" in text[:5])
    assert table.startswith("phaseto step 1to step 7")
    assert f"{NAMES['spawn']}1.250.25" in table
    assert table.endswith("total3.750.25")


def test_hostile_text_is_escaped_and_nothing_is_loaded(run_dir: RunDir) -> None:
    text = render_report(run_dir)
    page = Page(text)
    given, config, sample, command = page.found["pre"]
    assert sample == HOSTILE
    assert given == "python run.py data=text 'data.paths=[a b.txt]'"
    assert command == f"python run.py 'reproduce={run_dir.path}'"
    assert config == SNAPSHOT.rstrip()
    assert "Prompt: if a < b" in page.found["p"]
    assert text.count("<script>") == 1
    assert "img" not in page.found
    (run_dir.path / "sample.txt").unlink()
    own = re.sub("(?m)^ *// .*$", "", render_report(run_dir))  # comments of the script
    assert re.findall(r"https?:|//|url\(|@import|\b(?:src|href)=", own) == []
    assert "content=\"default-src 'none'; " in own


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("metrics.jsonl", "What happened"),
        ("plan.json", "What was planned"),
        ("snapshot.yaml", None),
        ("provenance.json", "Provenance"),
        ("sample.txt", "What the model wrote"),
        ("status.json", None),
    ],
)
def test_what_is_missing_is_left_out(run_dir: RunDir, name: str, section: str | None) -> None:
    (run_dir.path / name).unlink()
    page = Page(render_report(run_dir))
    assert page.found["h2"] == [title for title in SECTIONS if title != section]


def test_an_empty_directory_has_a_report(tmp_path: Path) -> None:
    assert Page(render_report(RunDir(tmp_path))).found["h2"] == ["Run it again"]


def test_long_runs_make_small_pages(run_dir: RunDir) -> None:
    rows: list[Row] = [step_row(step, loss=5 + math.sin(step)) for step in range(1, 20_001)]
    rows += [CheckpointRow(step=n, tokens=n, checkpoint=f"step-{n}") for n in range(1, 26)]
    write_rows(run_dir.metrics, rows)
    samples = [SampleRow(step=n, tokens=n, prompt="", text=f"<{n}>") for n in range(0, 2500, 100)]
    write_rows(run_dir.samples, samples)
    started = time.perf_counter()
    page = Page(render_report(run_dir))
    assert time.perf_counter() - started < 5
    assert len(page.text) < 300_000
    assert "5 earlier checkpoints are not listed." in page.found["p"]
    assert "step-5<" not in page.text
    assert "step-6<" in page.text
    at = page.found["h3"].index("step 0, 0 tokens")
    assert page.found["h3"][at + 9 :] == ["step 2,400, 2,400 tokens", EXPORTED]
    assert {"<0>", "<2400>"} <= {*page.found["pre"]}
    assert "15 more are in samples.jsonl." in page.found["p"]


CONTRASTS = (Path(__file__).parent / "contrasts.js").read_text()
"""Contrast of each element with text against its background (WCAG 2.2), and the element."""


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """The report of a run with everything that a run can have, and long words in it."""
    run_dir = RunDir(tmp_path / "run")
    (run_dir.checkpoints / "step-00000004").mkdir(parents=True)
    run_dir.snapshot.write_text(SNAPSHOT)
    run_dir.plan.write_text(json.dumps(PLAN | {"corpus": {"tokens_dir": f"/data/{LONG}"}}))
    run_dir.provenance.write_text(json.dumps(PROVENANCE | {"host": LONG}))
    run_dir.status.write_text(json.dumps({"status": "failed", "error": LONG, "restarts": 1}))
    (run_dir.path / "sample.txt").write_text(f"{HOSTILE} {LONG}\n")
    write_rows(
        run_dir.samples,
        [SampleRow(step=step, tokens=step, prompt="", text=f"{LONG} {step}") for step in (0, 2, 4)],
    )
    sources = [evaluation_row(n, 8.0 - n, by_source={"web <1>": 5.5, "code": 4.5}) for n in (0, 3)]
    write_rows(run_dir.metrics, [sources[0], *ROWS[1:6], sources[1], *ROWS[7:]])
    run_dir.report.write_text(render_report(run_dir))
    return run_dir.report


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_it_opens_quietly(
    open_page: OpenPageFunction, report: Path, width: int, scheme: str
) -> None:
    opened = open_page(report, width=width, color_scheme=scheme)
    opened.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert (opened.errors, opened.requests, opened.beyond()) == ([], [], [])
    assert opened.page.title() == "run"
    assert [pair for pair in opened.page.evaluate(CONTRASTS) if pair[0] < 4.5] == []


def test_it_can_be_read_without_sight(open_page: OpenPageFunction, report: Path) -> None:
    opened = open_page(report)
    outline = opened.outline()
    assert outline.startswith("- main:")
    headings = re.findall(r'- heading "([^"]+)" \[level=(\d)\]', outline)
    levels = [int(level) for _, level in headings]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for name in (*CHARTS, "Evaluation of each source"):
        assert f'- figure "{name}":' in outline
    assert '- img "Loss (nats per token) against tokens"' in outline
    assert '- table "Memory of a rank at its peak, in the phase step":' in outline
    assert '- rowheader "weights"' in outline
    description = "svg => document.getElementById(svg.getAttribute('aria-describedby')).textContent"
    loss = opened.page.get_by_role("img", name="Loss (nats")
    assert loss.evaluate(description) == "training from 8 to 5; evaluation from 8 to 5"
    sources = opened.page.get_by_role("img", name="Evaluation of each source")
    assert sources.evaluate(description) == "code from 4.5 to 4.5; web <1> from 5.5 to 5.5"


def test_a_pointer_reads_curves_out(open_page: OpenPageFunction, report: Path) -> None:
    page = open_page(report).page
    figure = page.get_by_role("figure", name="Loss", exact=True)
    assert figure.locator(".readout").text_content() == ""
    svg = figure.locator("svg")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.94, box["y"] + box["height"] / 2)
    assert figure.locator(".readout").text_content() == "at 4K tokens: training 5, evaluation 5"
    page.mouse.move(box["x"], box["y"] - 20)
    assert figure.locator(".readout").text_content() == ""


def test_paper_is_white_and_has_everything(open_page: OpenPageFunction, report: Path) -> None:
    """Also if the screen is dark: what is folded opens for the print and closes after it."""
    page = open_page(report, color_scheme="dark").page
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) != "rgb(255, 255, 255)"
    opened = "[...document.querySelectorAll('details')].map(details => details.open)"
    assert page.evaluate(opened) == [False] * 3
    page.evaluate(f"addEventListener('beforeprint', () => {{ window.printed = {opened}; }})")
    assert page.pdf(format="A4").startswith(b"%PDF")
    assert page.evaluate("window.printed") == [True] * 3
    assert page.evaluate(opened) == [False] * 3
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    assert [pair for pair in page.evaluate(CONTRASTS) if pair[0] < 4.5] == []
    kept = "[...document.querySelectorAll('figure')].map(f => getComputedStyle(f).breakInside)"
    assert {*page.evaluate(kept)} == {"avoid"}
    without_script = open_page(report, java_script_enabled=False).page
    without_script.emulate_media(media="print")
    assert without_script.locator("details pre").first.bounding_box()["height"] > 50

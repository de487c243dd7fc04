"""The report of a finished run: its figures, its curves, and what it leaves out."""

import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.runs.chart import thin
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.report import render_report

SECTIONS = [
    "What was asked",
    "What was planned",
    "What happened",
    "What the model wrote",
    "Provenance",
    "Run it again",
]
UNDER_CHARTS = ["Skipped steps, restarts, signals", "Checkpoints"]
FINAL_TEXT = "The exported model, drawing at random"
CHARTS = ["Loss", "Learning rate", "Gradient norm", "Throughput", "Memory"]
MIB = 1 << 20
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


def step_row(step: int, **values: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "tokens": step * 1000,
        "loss": 9.0 - step,
        "learning_rate": step * 1e-4,
        "grad_norm": 1.5,
        "tokens_per_s": 2000.0,
        "mfu": 0.4,
        "memory_bytes": 150 * MIB,
        "skipped_steps": 0,
    }
    return row | values


def eval_row(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "tokens": step * 1000} | values


ROWS = [
    eval_row(0, eval_loss=8.0, perplexity=2980.958, bits_per_byte=3.25),
    step_row(1),
    step_row(2, loss=math.nan, skipped_steps=1),
    eval_row(
        2, checkpoint="step-00000002", checkpoint_seconds=1.234, checkpoint_stall_seconds=0.25
    ),
    step_row(3, grad_norm=None, skipped_steps=1),
    step_row(4, skipped_steps=2),
    eval_row(4, eval_loss=5.0, perplexity=148.413, bits_per_byte=2.125),
    eval_row(4, checkpoint="step-00000004", checkpoint_seconds=2.0),
    {
        "step": 4,
        "finished": True,
        "train_loss": 5.4321,
        "median_tokens_per_s": 12345.6,
        "median_mfu": 0.4567,
        "peak_memory_bytes": 192.0 * MIB,
    },
]


def write_metrics(run_dir: RunDir, rows: list[dict[str, Any]]) -> None:
    run_dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A small finished run, its newest checkpoint kept."""
    run_dir = RunDir(tmp_path / "lr=0.1 <b>")
    (run_dir.checkpoints / "step-00000004").mkdir(parents=True)
    run_dir.snapshot.write_text(SNAPSHOT)
    run_dir.plan.write_text(json.dumps(PLAN))
    run_dir.provenance.write_text(json.dumps(PROVENANCE))
    run_dir.status.write_text(json.dumps({"status": "completed"}))
    (run_dir.path / "sample.txt").write_text(HOSTILE + "\n")
    write_metrics(run_dir, ROWS)
    return run_dir


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps what they hold."""

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

    def attributes(self, wanted: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == wanted]


def test_shows_every_section_and_chart(run_dir: RunDir) -> None:
    page = Page(render_report(run_dir))
    assert page.found["h1"] == ["lr=0.1 <b> completed"]
    assert page.found["h2"] == SECTIONS
    assert page.found["h3"] == [*CHARTS, *UNDER_CHARTS, FINAL_TEXT]
    facts = "tiny model · 1,002,500 parameters · stdlib data · 4,000 tokens · 4 steps"
    assert page.found["header"][0].endswith(f"{facts} · world size 2 · cuda · bf16 · ZeRO stage 2")


def test_key_figures(run_dir: RunDir) -> None:
    page = Page(render_report(run_dir))
    names, values = page.found["dt"], page.found["dd"]
    assert dict(zip(names, zip(values[::2], values[1::2], strict=True), strict=True)) == {
        "Training loss": ("5.4321", "mean of the last 20 steps"),
        "Evaluation loss": ("5.0000", "from 8.0000 at step 0"),
        "Perplexity": ("148.4", "last evaluation"),
        "Bits per byte": ("2.125", "last evaluation"),
        "Tokens/s": ("12,346", "median, all ranks"),
        "MFU": ("45.7%", "median"),
        "Peak memory": ("192 MiB", "120% of the 160 MiB planned"),  # 100 + 60: not the host's 7
        "Training time": ("2.0 s", "of the steps that counted"),  # four of 1000 tokens at 2000/s
    }


def test_checkpoints_skipped_steps_plan_and_provenance(run_dir: RunDir) -> None:
    page = Page(render_report(run_dir))
    asked, planned, memory, plan, saves, provenance = page.found["table"]
    assert asked == (
        "settingvaluedata.namestdlibdata.pathscorpus/a.txt, b.txtprecision.namebf16zero.stage2seed0"
    )
    assert planned == (
        "whatvalueglobal batch8 rows = 2 micro x 2 accumulated x 2 ranks"
        "steps4tokens of a step1,000tokens4,000"
    )
    assert memory == (
        "Memory of a rank at its peak, in the phase step"
        "partbytesweights100 MiBlogits60 MiBin all160 MiBthe device has80.0 GiB"
    )
    assert saves == (
        "checkpointstepseconds to saveseconds waitedkept"
        "step-0000000221.230.25nostep-0000000442.00yes"
    )
    assert "<p>Skipped steps: 2 (at 2, 4)</p>" in page.text
    assert "memory · weights100 MiB" in plan
    assert "steps · epochsnone" in plan
    assert provenance == (
        "whatvalueargvdata=text, data.paths=[a b.txt]git commitabc123"
        "machine · cores2machine · memory bytes8.0 GiB"
    )
    assert {attributes.get("scope") for attributes in page.attributes("th")} == {"row", "col"}


def test_what_did_not_go_straight_on_is_told(run_dir: RunDir) -> None:
    events = [
        eval_row(3, skipped="loss"),
        eval_row(5, skipped="spike", loss=7.25, spike_z=9.87),
        eval_row(4, rolled_back_from=9, spike_loss=8.5, spike_z=7.0, left_out_batches=[7, 8]),
        eval_row(4, restarted="rank 1 failed: ended by SIGKILL"),
        eval_row(4, resumed="2026-05-04T03:02:01+00:00"),
        eval_row(6, checkpoint_error="step-00000006 was not written: No space left (rank 0)"),
        eval_row(7, preempted="SIGTERM"),
    ]
    write_metrics(run_dir, events)
    assert re.findall("<li>(.*?)</li>", render_report(run_dir)) == [
        "step 3: skipped, its loss was not finite",
        "step 4: back from step 9, whose loss of 8.5000 spiked; left out: global batches 7, 8",
        "step 4: started again from here, after: rank 1 failed: ended by SIGKILL",
        "step 4: resumed from here at 2026-05-04T03:02:01+00:00",
        "step 6: step-00000006 was not written: No space left (rank 0)",
        "step 7: ended by SIGTERM, with a checkpoint",
    ]  # step 5's spike was taken back by the rollback to step 4
    write_metrics(run_dir, [event for event in events if "rolled_back_from" not in event])
    spike = "step 5: skipped, the loss of 7.2500 spiked (9.9 standard deviations)"
    assert spike in render_report(run_dir)


def test_the_status_is_what_status_json_says(run_dir: RunDir) -> None:
    status = {"status": "failed", "error": "rank 1 <died>", "restarts": 2}
    run_dir.status.write_text(json.dumps(status))
    page = Page(render_report(run_dir))
    assert page.found["h1"] == ["lr=0.1 <b> failed"]
    assert "It ended with: rank 1 <died>" in page.found["p"]
    assert "Restarts after a rank had failed: 2" in page.found["p"]


def test_text_of_others_is_escaped(run_dir: RunDir) -> None:
    page = Page(render_report(run_dir))
    given, config, sample, command = page.found["pre"]
    assert sample == HOSTILE
    assert given == "python run.py data=text 'data.paths=[a b.txt]'"
    assert command == f"python run.py 'reproduce={run_dir.path}'"
    assert config == SNAPSHOT.rstrip()
    assert "<p>Prompt: if a &lt; b</p>" in page.text
    assert page.text.count("<script>") == 1
    assert page.attributes("img") == []


def test_loads_nothing_from_anywhere(run_dir: RunDir) -> None:
    (run_dir.path / "sample.txt").unlink()
    text = render_report(run_dir)
    assert re.findall(r"https?:|//|url\(|@import|\b(?:src|href)=", text) == []
    assert "content=\"default-src 'none'; " in text


def test_charts_are_readable_without_sight_and_on_a_phone(run_dir: RunDir) -> None:
    page = Page(render_report(run_dir))
    charts = page.attributes("svg")
    assert [chart["role"] for chart in charts] == ["img"] * len(CHARTS)
    assert [chart["viewbox"] for chart in charts] == ["0 0 360 220"] * len(CHARTS)
    assert charts[0]["aria-label"] == "Loss (nats a token) against tokens"
    assert page.found["desc"][0] == "training from 8 to 5; evaluation from 8 to 5"
    assert page.found["desc"][1] == "from 0.0001 to 0.0004"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in (
        page.attributes("meta")
    )


def test_points_lie_where_their_values_say(run_dir: RunDir) -> None:
    """x: 0 to 4000 tokens over 56 to 344; y: the ticks 5 to 8 over 184 to 24."""
    training, evaluation, learning_rate, grad_norm, *_ = Page(render_report(run_dir)).attributes(
        "polyline"
    )
    assert training["points"] == "128.00,24.00 272.00,130.67 344.00,184.00"
    assert evaluation["points"] == "56.00,24.00 344.00,184.00"
    assert learning_rate["points"] == "128.00,144.00 200.00,104.00 272.00,64.00 344.00,24.00"
    assert grad_norm["points"] == "128.00,24.00 200.00,24.00 344.00,24.00"


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


def test_too_few_points_make_no_chart(run_dir: RunDir) -> None:
    write_metrics(run_dir, [ROWS[0], step_row(1), step_row(2, memory_bytes=None, loss=math.inf)])
    page = Page(render_report(run_dir))
    assert page.found["h3"][:-2] == ["Learning rate", "Gradient norm", "Throughput"]
    write_metrics(run_dir, [ROWS[0], ROWS[0]])  # both at 0 tokens
    assert Page(render_report(run_dir)).found["h3"] == [FINAL_TEXT]


def test_values_that_never_change_have_an_axis(run_dir: RunDir) -> None:
    rows = [step_row(step, loss=0.0, grad_norm=0.0, learning_rate=0.0) for step in (1, 2, 3)]
    write_metrics(run_dir, rows)
    assert Page(render_report(run_dir)).found["h3"][: len(CHARTS)] == CHARTS


def test_only_the_newest_checkpoints_are_listed(run_dir: RunDir) -> None:
    write_metrics(run_dir, [eval_row(step, checkpoint=f"step-{step}") for step in range(1, 26)])
    page = Page(render_report(run_dir))
    assert "<p>5 earlier checkpoints are not listed.</p>" in page.text
    assert "step-5<" not in page.text
    assert "step-6<" in page.text


def test_thin_keeps_spikes_and_order() -> None:
    points = [(float(x), 1.0) for x in range(10_000)]
    points[1234] = (1234.0, 99.0)
    points[8765] = (8765.0, -99.0)
    thinned = thin(points, limit=100)
    assert len(thinned) <= 100
    assert thinned == sorted(thinned)
    assert {points[1234], points[8765]} <= set(thinned)
    assert thin(points[:100], limit=100) == points[:100]


def test_a_long_run_makes_a_small_page(run_dir: RunDir) -> None:
    rows = [step_row(step, loss=5 + math.sin(step)) for step in range(1, 20_001)]
    write_metrics(run_dir, rows)
    started = time.perf_counter()
    page = Page(render_report(run_dir))
    assert time.perf_counter() - started < 5
    counts = [str(line["points"]).count(",") for line in page.attributes("polyline")]
    assert len(counts) == 6  # five charts, and the estimate beside the memory
    assert max(counts) <= 2000
    assert counts[0] > 1500
    assert len(page.text) < 300_000


def test_sources_are_drawn_apart(run_dir: RunDir) -> None:
    values = [{"eval_loss/web <1>": 5.0 - step, "eval_loss/code": 4.0} for step in (0, 1)]
    write_metrics(run_dir, [eval_row(step, **row) for step, row in enumerate(values)])
    page = Page(render_report(run_dir))
    assert page.found["h3"][0] == "Evaluation of each source"
    assert page.found["desc"] == ["code from 4 to 4; web <1> from 5 to 4"]
    assert "web <1>" in page.found["span"]


def test_samples_are_shown_from_the_first_to_the_last(run_dir: RunDir) -> None:
    rows = [
        {"step": step, "tokens": step * 1000, "text": f"<{step}>"} for step in range(0, 2500, 100)
    ]
    run_dir.samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(render_report(run_dir))
    at = page.found["h3"].index("step 0, 0 tokens")
    assert page.found["h3"][at + 9] == "step 2,400, 2,400,000 tokens"
    assert page.found["h3"][at + 10 :] == [FINAL_TEXT]
    assert {"<0>", "<2400>"} <= set(page.found["pre"])
    assert "15 more are in samples.jsonl." in page.found["p"]

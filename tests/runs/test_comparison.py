"""Runs side by side: what differs, when a loss was reached, and the page."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import render_snapshot
from llama_pretrain.runs.comparison import Comparison, first_at, load_runs
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import Row
from tests.browser import DESK, PHONE, OpenPageFunction
from tests.rows import MIB, evaluation_row, step_row, write_rows

CORPUS = {"tokenizer_hash": "t", "content_hash": "c"}
PLAN = {
    "steps": {"total": 4, "tokens_per_step": 1000},
    "memory": {"phase": "step", "weights": 100 * MIB, "host": 9 * MIB},
    "corpus": CORPUS,
}
PROVENANCE = {
    "time": "2026-05-04T03:02:01+00:00",
    "argv": ["a"],
    "git_commit": "abc",
    "packages": {"torch": "2.9", "numpy": "2.0"},
    "machine": {"cores": 2, "gpus": [{"name": "x"}]},
}


def write_run(
    folder: Path,
    *,
    run: Run | None = None,
    losses: tuple[float, ...] = (6.0, 5.5, 5.0, 4.5),
    rate: float = 2000.0,
    plan: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Path:
    """A run with an evaluation after each second step."""
    run_dir = RunDir(folder)
    folder.mkdir(parents=True)
    run_dir.snapshot.write_text(render_snapshot(run or Run()))
    run_dir.plan.write_text(json.dumps(PLAN | (plan or {})))
    run_dir.provenance.write_text(json.dumps(PROVENANCE | (provenance or {})))
    run_dir.status.write_text(json.dumps({"status": "completed"}))
    rows: list[Row] = [evaluation_row(0, 7.0)]
    for step, loss in enumerate(losses, start=1):
        measured = {"mfu": 0.25, "tokens_per_s": rate * step, "memory_bytes": step * MIB}
        rows.append(step_row(step, loss=loss, **measured))
        if step % 2 == 0:
            rows.append(evaluation_row(step, loss + 0.25))
    write_rows(run_dir.metrics, rows)
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return write_pair(tmp_path)


def write_pair(tmp_path: Path) -> list[Path]:
    """Two runs that differ a little."""
    run = Run(seed=5)
    other = replace(run, seed=6, optim=replace(run.optim, learning_rate=0.003))
    changed = {
        "git_commit": "def",
        "packages": {"torch": "2.10", "numpy": "2.0"},
        "argv": ["b"],
        "machine": {"cores": 2, "gpus": [{"name": "y"}]},
        "lock": None,
    }
    losses = (6.0, 5.0, 4.0, 3.0)
    second = tmp_path / "y" / "run"
    return [
        write_run(tmp_path / "x" / "run", run=run),
        write_run(second, run=other, losses=losses, rate=4000.0, provenance=changed),
    ]


def compare(*paths: Path, loss: float | None = None) -> Comparison:
    return Comparison(load_runs(paths), loss=loss)


def test_only_what_differs_by_section(pair: list[Path]) -> None:
    found = compare(*pair)
    assert [item.texts for item in found.config] == [
        ["seed", "5", "6"],
        ["learning_rate", "0.0003", "0.003"],
    ]
    assert [(item.group, *item.texts) for item in found.provenance] == [
        ("general", "git_commit", "abc", "def"),
        ("general", "lock", "-", "null"),
        ("packages", "torch", "2.9", "2.10"),
        ("machine", "gpus.0.name", "x", "y"),
        ("command and time", "argv", "[a]", "[b]"),
    ]
    same = compare(pair[0], pair[0])
    assert (same.config, same.provenance, same.notes) == ([], [], [])


def test_when_a_loss_was_reached(pair: list[Path]) -> None:
    """A: steps of 0.5, 0.25, 1/6 and 0.125 s, evaluations 5.75 and 4.75. B: half of the times."""
    first, second = (run.contents for run in load_runs(pair))
    row, seconds = first_at(first, 4.75)
    assert row == evaluation_row(4, 4.75)
    assert seconds == pytest.approx(0.5 + 0.25 + 1 / 6 + 0.125)
    row, seconds = first_at(second, 5.3)
    assert row == evaluation_row(2, 5.25)
    assert seconds == pytest.approx(0.375)
    assert first_at(first, 4.7) == (None, None)
    assert first_at(first, 7.0) == (evaluation_row(0, 7.0), 0.0)
    assert [run.name for run in load_runs(pair)] == ["x/run", "y/run"]


def test_numbers_stand_side_by_side(pair: list[Path]) -> None:
    assert compare(*pair).numbers() == [  # the worst of the last evaluations is A's
        ("status", "completed", "completed"),
        ("steps", "4", "4"),
        ("steps planned", "4", "4"),
        ("tokens", "4,000", "4,000"),
        ("training time", "1.0 s", "0.52 s"),
        ("training loss", "5.2500", "4.5000"),
        ("evaluation loss", "4.7500", "3.2500"),
        ("bits per byte", "2.5000", "2.5000"),
        ("time to loss 4.7500", "1.0 s", "0.52 s"),
        ("tokens to loss 4.7500", "4,000", "4,000"),
        ("steps to loss 4.7500", "4", "4"),
        ("tokens/s (median)", "5,000", "10,000"),
        ("MFU (median)", "25.0%", "25.0%"),
        ("peak memory", "4 MiB", "4 MiB"),
        ("planned memory", "100 MiB", "100 MiB"),
    ]


def test_files_that_are_missing_or_damaged(pair: list[Path]) -> None:
    run_dir = RunDir(pair[1])
    run_dir.metrics.write_text('{"step": 1, "tokens"\n')
    run_dir.plan.unlink()
    run_dir.provenance.write_text("[1]")
    run_dir.status.write_text("{")
    found = compare(*pair, loss=4.75)
    assert "B has no metrics" in found.notes
    assert ("evaluation loss", "4.7500", "-") in found.numbers()
    assert ("status", "completed", "-") in found.numbers()
    assert ["git_commit", "abc", "-"] in [item.texts for item in found.provenance]
    assert "<h2>Numbers</h2>" in found.to_html()


def test_notes_say_what_is_not_comparable(pair: list[Path], tmp_path: Path) -> None:
    machines = "the machines differ: compare times, tokens/s and MFU with care"
    assert compare(*pair).notes == [machines]
    text = write_run(tmp_path / "text", plan={"corpus": CORPUS | {"content_hash": "other"}})
    data = "the data differs: evaluation losses are of different text"
    assert compare(pair[0], text).notes == [data]
    tokens = write_run(tmp_path / "tokens", plan={"corpus": CORPUS | {"tokenizer_hash": "u"}})
    tokenizers = "the tokenizers differ: losses are per other tokens; compare bits per byte"
    assert compare(pair[0], tokens).notes == [tokenizers]


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_in_a_browser(
    open_page: OpenPageFunction, pair: list[Path], tmp_path: Path, width: int
) -> None:
    script = {"host": "<script>alert(1)</script>"}
    hostile = write_run(tmp_path / "<b>evil" / ("x" * 200), provenance=script)
    page = tmp_path / "compare.html"
    page.write_text(compare(*pair, hostile).to_html())
    opened = open_page(page, width=width)
    assert (opened.errors, opened.requests, opened.beyond()) == ([], [], [])
    outline = opened.outline()
    for name in ("The runs", "Numbers", "Curves", "Config", "Provenance"):
        assert f'- heading "{name}" [level=2]' in outline
    lines = opened.page.get_by_role("figure", name="Evaluation loss").locator("polyline")
    assert lines.count() == 3
    colours = lines.evaluate_all("found => found.map(line => getComputedStyle(line).stroke)")
    assert len({*colours}) == 3

"""Runs side by side: what differs, when a loss was reached, and how it is shown."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.config.run import Run
from llama_pretrain.config.snapshot import render_snapshot
from llama_pretrain.runs.compare import first_at, load_runs
from llama_pretrain.runs.compare_page import render_comparison
from llama_pretrain.runs.compare_text import render_text
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.terminal import plot
from tests.browser import DESK, PHONE, OpenPageFunction
from tests.conftest import ROOT

MIB = 1 << 20
PLAN = {
    "steps": {"total": 4, "tokens_per_step": 1000},
    "memory": {"phase": "step", "weights": 100 * MIB, "host": 9 * MIB},
    "corpus": {"tokenizer_hash": "t", "content_hash": "c"},
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
    rows: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "eval_loss": 7.0}]
    for step, loss in enumerate(losses, start=1):
        row = {"step": step, "tokens": step * 1000, "loss": loss, "mfu": 0.25}
        rows.append(row | {"tokens_per_s": rate * step, "memory_bytes": step * MIB})
        if step % 2 == 0:
            rows.append({"step": step, "tokens": step * 1000, "eval_loss": loss + 0.25})
    run_dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two runs that differ a little."""
    run = Run(seed=5)
    other = replace(run, optim=replace(run.optim, learning_rate=0.003, name=run.optim.name))
    changed = {
        "git_commit": "def",
        "packages": {"torch": "2.10", "numpy": "2.0"},
        "argv": ["b"],
        "machine": {"cores": 2, "gpus": [{"name": "y"}]},
        "lock": None,
    }
    return [
        write_run(tmp_path / "x" / "run", run=run),
        write_run(
            tmp_path / "y" / "run",
            run=replace(other, seed=6),
            losses=(6.0, 5.0, 4.0, 3.0),
            rate=4000.0,
            provenance=changed,
        ),
    ]


def text_of(paths: list[Path], *, loss: float | None = None, width: int | None = None) -> list[str]:
    return list(render_text(load_runs(paths), loss=loss, width=width))


def test_only_what_differs_is_told_by_section(pair: list[Path]) -> None:
    lines = text_of(pair)
    config = lines[lines.index("config") + 1 : lines.index("provenance") - 1]
    assert config == [
        "  general",
        "    seed  A 5  B 6",
        "  optim",
        "    learning_rate  A 0.0003  B 0.003",
    ]
    at = lines.index("provenance")
    assert lines[at + 1 : lines.index("", at)] == [
        "  general",
        "    git_commit  A abc  B def",
        "    lock  A -  B null",
        "  packages",
        "    torch  A 2.9  B 2.10",
        "  machine",
        "    gpus.0.name  A x  B y",
        "  command and time",
        "    argv  A a  B b",
    ]
    assert "note: the machines differ: times, tokens/s and MFU are theirs as well" in lines


def test_when_a_loss_was_reached(pair: list[Path]) -> None:
    """A: steps of 0.5, 0.25, 1/6 and 0.125 s, evaluations 5.75 and 4.75. B: half of the times."""
    first, second = load_runs(pair)
    reached = first_at(first, 4.75)
    assert reached is not None
    assert (reached.step, reached.tokens) == (4, 4000)
    assert reached.seconds == pytest.approx(0.5 + 0.25 + 1 / 6 + 0.125)
    reached = first_at(second, 5.3)
    assert reached is not None
    assert reached.step == 2
    assert reached.seconds == pytest.approx(0.375)
    assert [run.name for run in (first, second)] == ["x/run", "y/run"]
    assert first_at(first, 4.7) is None
    start = first_at(first, 7.0)
    assert start is not None
    assert (start.step, start.seconds) == (0, 0.0)


def test_numbers_stand_side_by_side(pair: list[Path]) -> None:
    lines = text_of(pair, loss=4.75)
    at = next(number for number, line in enumerate(lines) if line.startswith("numbers"))
    rows = {line[:24].strip(): line[24:].split() for line in lines[at + 1 : lines.index("", at)]}
    table = [" ".join(line.split()) for line in lines[at : lines.index("", at)]]
    assert len(rows) == len(table) - 1
    assert table == [
        "numbers A B",
        "status completed completed",
        "steps 4 4",
        "steps planned 4 4",
        "tokens 4,000 4,000",
        "training time 1.0 s 0.52 s",
        "training loss 5.2500 4.5000",
        "evaluation loss 4.7500 3.2500",
        "time to loss 4.7500 1.0 s 0.52 s",
        "tokens to loss 4.7500 4,000 4,000",
        "steps to loss 4.7500 4 4",
        "tokens/s (median) 5,000 10,000",
        "MFU (median) 25.0% 25.0%",
        "peak memory 4 MiB 4 MiB",
        "planned memory 100 MiB 100 MiB",
    ]


def test_curves_have_letters(pair: list[Path]) -> None:
    lines = text_of(pair)
    at = lines.index("evaluation loss, nats a token (# = several runs)")
    drawn = lines[at + 1 : at + 15]
    assert drawn[0].startswith("      7 |#")  # both begin at 7
    assert drawn[-1].startswith("   3.25 |")
    assert drawn[-1].endswith("B")
    assert any(line.endswith("A") for line in drawn)
    assert max(map(len, lines[at:])) <= 72


def test_a_plot_by_hand() -> None:
    """Ten columns: A falls by one row a column, B lies on its first and last points."""
    line = [(float(x), 9.0 - x) for x in range(10)]
    drawn = plot({"A": line, "B": [line[0], line[9]], "C": [(3.0, 1.0)]}, width=20, height=10)
    assert drawn[:10] == [
        f"{label.rjust(7)} |{' ' * column}#"
        for column, label in enumerate(["9", "", "", "", "", "4", "", "", "", "0"])
    ]
    assert drawn[10] == " " * 8 + "+" + "-" * 10
    assert drawn[11].split() == ["0", "9", "tokens"]
    assert plot({"A": [(1.0, 2.0)]}, width=60, height=5) == []
    assert plot({"A": [(1.0, 2.0), (1.0, 3.0)]}, width=60, height=5) == []
    flat = plot({"A": [(0.0, 2.0), (5.0, 2.0)]}, width=30, height=3)
    assert flat[1] == "      2 |" + "A" * 20


def test_nothing_is_wider_than_a_narrow_terminal(pair: list[Path], tmp_path: Path) -> None:
    third = write_run(tmp_path / "third", run=Run(seed=7))
    lines = text_of([*pair, third], loss=4.75, width=60)
    told = lines[lines.index("config") :]
    assert max(map(len, told)) <= 60
    assert "    seed  A 5  B 6  C 7" in told
    assert "# = several" in "".join(told)
    narrow = text_of(pair, loss=4.75, width=30)
    at = narrow.index("    learning_rate")
    assert narrow[at + 1 : at + 3] == ["      A 0.0003", "      B 0.003"]


def test_a_run_beside_itself(pair: list[Path]) -> None:
    lines = text_of([pair[0], pair[0]])
    assert "config: nothing differs" in lines
    assert "provenance: nothing differs" in lines
    at = lines.index("evaluation loss, nats a token (# = several runs)")
    assert {letter for line in lines[at + 1 : at + 15] for letter in line[9:]} <= {"#", " "}
    page = render_comparison(load_runs([pair[0], pair[0]]), loss=None)
    assert page.count("Nothing differs.") == 2


def test_files_that_are_missing_or_damaged(pair: list[Path]) -> None:
    run_dir = RunDir(pair[1])
    run_dir.metrics.write_text('{"step": 1, "tokens"\n')
    run_dir.plan.unlink()
    run_dir.provenance.write_text("[1]")
    run_dir.status.write_text("{")
    lines = text_of(pair, loss=4.75)
    assert "note: B has no metrics" in lines
    assert any(" ".join(line.split()) == "evaluation loss 4.7500 -" for line in lines)
    assert any(" ".join(line.split()) == "status completed -" for line in lines)
    assert "    git_commit  A abc  B -" in lines
    assert "<h2>Numbers</h2>" in render_comparison(load_runs(pair), loss=4.75)


def test_other_tokens_and_other_text_are_told(pair: list[Path], tmp_path: Path) -> None:
    corpus = {"tokenizer_hash": "t", "content_hash": "other"}
    text = write_run(tmp_path / "text", plan={"corpus": corpus})
    assert "note: the data differs: evaluation losses are of other text" in text_of([pair[0], text])
    tokens = write_run(tmp_path / "tokens", plan={"corpus": corpus | {"tokenizer_hash": "u"}})
    note = "note: the tokenizers differ: losses are of other tokens; compare bits per byte"
    assert note in text_of([pair[0], tokens])
    assert not [line for line in text_of([pair[0], pair[0]]) if line.startswith("note")]


def compare(*words: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "llama_pretrain", "compare", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_the_command_writes_what_it_is_asked_for(pair: list[Path], tmp_path: Path) -> None:
    done = compare(*pair, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    # The worst of the last evaluations is A's, so both reach it.
    assert "time to loss 4.7500" in done.stdout
    assert not (tmp_path / "compare.html").exists()
    done = compare(*pair, "--json", "--loss", "5.25", "--html", cwd=tmp_path)
    values = json.loads(done.stdout)
    assert values["loss"] == 5.25
    assert [run["steps_to_loss"] for run in values["runs"]] == [4, 2]
    assert values["config"][0] == {"name": "seed", "values": [5, 6]}
    assert done.stderr == "page: compare.html\n"
    assert (tmp_path / "compare.html").read_text().startswith("<!doctype html>")


def test_a_place_that_is_no_run_is_named(pair: list[Path], tmp_path: Path) -> None:
    run = pair[0]
    (run / "export").mkdir()
    (run / "export" / "export.json").touch()
    checkpoint = run / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    wrong = [run / "export", checkpoint, run / "snapshot.yaml", run.parent, tmp_path / "none"]
    done = compare(run, *wrong, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"error: {run}/export: is the export of a run; name the run: {run}",
        f"error: {checkpoint}: is a checkpoint of a run; name the run: {run}",
        f"error: {run}/snapshot.yaml: is a file, and no run directory; name the run: {run}",
        f"error: {run.parent}: holds no run: it has no snapshot.yaml; runs are in it: {run}",
        f"error: {tmp_path}/none: there is no such folder",
    ]
    one = compare(run, cwd=tmp_path)
    assert (one.returncode, one.stderr) == (2, "error: name two runs or more\n")
    place = tmp_path / "file"
    place.touch()
    done = compare(run, run, "--html", place / "page.html", cwd=tmp_path)
    assert done.returncode == 2
    assert f"error: {place}/page.html can't be written: " in done.stderr


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_in_a_browser(
    open_page: OpenPageFunction, pair: list[Path], tmp_path: Path, width: int
) -> None:
    hostile = write_run(
        tmp_path / "<b>evil" / ("x" * 200), provenance={"host": "<script>alert(1)</script>"}
    )
    page = tmp_path / "compare.html"
    page.write_text(render_comparison(load_runs([*pair, hostile]), loss=4.75))
    opened = open_page(page, width=width)
    assert (opened.errors, opened.requests, opened.beyond()) == ([], [], [])
    outline = opened.outline()
    for name in ("The runs", "Numbers", "Curves", "Config", "Provenance"):
        assert f'- heading "{name}" [level=2]' in outline
    assert '- figure "Evaluation loss":' in outline
    lines = opened.page.get_by_role("figure", name="Evaluation loss").locator("polyline")
    assert lines.count() == 3
    colours = lines.evaluate_all("found => found.map(line => getComputedStyle(line).stroke)")
    assert len({*colours}) == 3

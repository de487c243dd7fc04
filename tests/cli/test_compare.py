"""The subcommand `compare`: its text, its JSON, its page, and paths that are no runs."""

import json
from pathlib import Path

import pytest

from llama_pretrain.__main__ import main
from llama_pretrain.cli.compare import render_text
from llama_pretrain.cli.plot import plot
from llama_pretrain.config.run import Run
from llama_pretrain.runs.comparison import Comparison, load_runs
from tests.runs.test_comparison import write_pair, write_run


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return write_pair(tmp_path)


def lines_of(paths: list[Path], *, width: int | None = None) -> list[str]:
    return list(render_text(Comparison(load_runs(paths)), width=width))


def words(lines: list[str]) -> list[str]:
    return [" ".join(line.split()) for line in lines]


def test_the_text_has_every_section(pair: list[Path]) -> None:
    lines = lines_of(pair)
    assert lines[:2] == [f"A  {pair[0]}", f"B  {pair[1]}"]
    at = lines.index("")
    assert words(lines[at + 1 : lines.index("", at + 1)]) == [
        "config A B",
        "general",
        "seed 5 6",
        "optim",
        "learning_rate 0.0003 0.003",
    ]
    assert "time to loss 4.7500 1.0 s 0.52 s" in words(lines)
    at = lines.index("evaluation loss, nats per token (# = several runs)")
    drawn = lines[at + 1 : at + 15]
    assert drawn[0].startswith("      7 |#")  # both begin at 7
    assert drawn[-1].startswith("   3.25 |")
    assert drawn[-1].endswith("B")
    assert max(map(len, lines[at:])) <= 72
    assert "config: nothing differs" in lines_of([pair[0], pair[0]])


def test_no_line_is_wider_than_the_terminal(pair: list[Path], tmp_path: Path) -> None:
    third = write_run(tmp_path / "third", run=Run(seed=7), provenance={"argv": ["x" * 500]})
    for width in (50, 70):
        lines = lines_of([*pair, third], width=width)
        assert max(map(len, lines[lines.index("") :])) <= width
    wide = lines_of([*pair, third])
    assert any("[" + "x" * 159 in line for line in wide)


def test_a_plot_by_hand() -> None:
    """Ten columns: A falls by one row per column, B lies on its first and last points."""
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


def test_the_command_writes_what_it_is_asked_for(
    pair: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [str(path) for path in pair]
    assert main(["compare", *runs]) == 0
    assert "time to loss 4.7500" in capsys.readouterr().out
    assert not Path("compare.html").exists()
    assert main(["compare", *runs, "--json", "--loss", "5.25", "--html"]) == 0
    out, err = capsys.readouterr()
    values = json.loads(out)
    assert values["loss"] == 5.25
    assert [run["steps_to_loss"] for run in values["runs"]] == [4, 2]
    assert values["config"][0] == {"name": "seed", "values": [5, 6]}
    assert err == "page: compare.html\n"
    assert Path("compare.html").read_text().startswith("<!doctype html>")


def test_a_path_that_is_no_run_is_named(
    pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pair[0]
    (run / "export").mkdir()
    wrong = [run / "export", run / "snapshot.yaml", run.parent, tmp_path / "none"]
    assert main(["compare", str(run), *map(str, wrong)]) == 2
    out, err = capsys.readouterr()
    wrong_path = "is no run directory: no snapshot.yaml. Name a run"
    assert out == ""
    assert err.splitlines() == [
        f"error: {run}/export: {wrong_path}: {run}.",
        f"error: {run}/snapshot.yaml: {wrong_path}: {run}.",
        f"error: {run.parent}: {wrong_path}: {run}.",
        f"error: {tmp_path}/none: does not exist",
    ]
    assert main(["compare", str(run)]) == 2
    assert capsys.readouterr().err == "error: name two runs or more\n"
    (tmp_path / "file").touch()
    assert main(["compare", str(run), str(run), "--html", str(tmp_path / "file/page.html")]) == 2
    assert "page.html cannot be written: " in capsys.readouterr().err

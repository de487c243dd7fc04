"""The seconds of a start, from one process to the next, and as they are shown."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from llama_pretrain.console import progress
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.phases import NAMES, Phases, process_start, read_phases
from tests.conftest import ROOT


def test_phases_add_up_over_processes(tmp_path: Path) -> None:
    began, run_dir = time.time(), RunDir(tmp_path)
    parent = Phases(began - 2.0)
    parent.end("compose")
    time.sleep(0.05)
    parent.end("plan")
    parent.write(run_dir)
    time.sleep(0.05)
    rank = read_phases(run_dir)  # it has nothing but the file
    rank.end("spawn")
    rank.end("first_step")
    rank.end("first_step")
    seconds = rank.describe()
    assert list(seconds) == ["compose", "plan", "spawn", "first_step"]
    assert seconds["compose"] == pytest.approx(2.0, abs=0.04)
    assert seconds["plan"] == pytest.approx(0.05, abs=0.04)
    assert seconds["spawn"] == pytest.approx(0.05, abs=0.04)
    assert sum(seconds.values()) == pytest.approx(time.time() - began + 2.0, abs=0.04)


def test_compiling_is_taken_out_of_its_phase() -> None:
    phases = Phases(time.time() - 5.0)
    phases.end("evaluation", compiling=3.0)
    assert phases.describe() == {"compile": 3.0, "evaluation": pytest.approx(2.0, abs=0.05)}


@pytest.mark.parametrize("content", [None, "", "{"], ids=["absent", "empty", "torn"])
def test_a_rank_without_its_parents_phases_begins_now(tmp_path: Path, content: str | None) -> None:
    run_dir = RunDir(tmp_path)
    if content is not None:
        run_dir.ranks.mkdir()
        (run_dir.ranks / "start.json").write_text(content)
    phases = read_phases(run_dir)
    phases.end("spawn")
    assert phases.describe()["spawn"] < 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports it")
def test_a_process_knows_when_it_was_started() -> None:
    code = "import time; time.sleep(0.3)\n"
    code += "from llama_pretrain.runs.phases import process_start; print(process_start())"
    before = time.time()
    printed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ).stdout
    assert float(printed) == pytest.approx(before, abs=0.2)
    assert process_start() < before


def test_the_terminal_shows_each_phase_and_the_time_so_far() -> None:
    out = io.StringIO()
    seconds = {"compose": 0.5, "spawn": 1.25, "engine": 2.0}
    Console(file=out, width=100).print(progress.start_table(seconds))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines[-3:] == [
        [*NAMES["compose"].split(), "0.50", "0.50"],
        [*NAMES["spawn"].split(), "1.25", "1.75"],
        [*NAMES["engine"].split(), "2.00", "3.75"],
    ]

"""A sweep's files: what came of each point, told from its run directory."""

import csv
import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.config.sweep import Objective
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.status import Status, write_status
from llama_pretrain.sweep.directory import (
    PointRecord,
    SweepDir,
    SweepRecord,
    Verdict,
    list_sweeps,
    rank_rows,
    read_rows,
    read_state,
    read_sweep,
    write_results,
    write_sweep,
)


def step(number: int, loss: float, speed: float, memory: int) -> dict[str, Any]:
    return {
        "step": number,
        "tokens": number * 100,
        "loss": loss,
        "tokens_per_s": speed,
        "memory_bytes": memory,
    }


def evaluation(number: int, loss: float) -> dict[str, Any]:
    return {"step": number, "tokens": number * 100, "eval_loss": loss}


SUMMARY = {
    "step": 2,
    "tokens": 200,
    "finished": True,
    "train_loss": 4.5,
    "median_tokens_per_s": 55.0,
    "peak_memory_bytes": 900,
    "planned_memory_bytes": 1000,
}
ROWS = [evaluation(0, 6.0), step(1, 5.0, 50, 700), step(2, 4.0, 100, 800), evaluation(2, 3.5)]


@pytest.fixture
def folder(tmp_path: Path) -> SweepDir:
    return SweepDir(tmp_path)


def record(index: int, **options: Any) -> PointRecord:
    label = f"seed={index}"
    settings = {"seed": str(index)}
    point = PointRecord(
        index=index, label=label, settings=settings, words=[label], folder=f"{index:02d}-{label}"
    )
    return replace(point, **options)


def make_run(folder: SweepDir, point: PointRecord, rows: list[dict[str, Any]]) -> RunDir:
    run_dir = folder.point(point)
    run_dir.path.mkdir(exist_ok=True)
    run_dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def test_a_row_for_each_point_whatever_became_of_it(folder: SweepDir) -> None:
    points = [record(index) for index in range(5)]
    points.append(record(5, verdict=Verdict.unfit, reason="too large", folder=""))
    write_status(make_run(folder, points[0], [*ROWS, SUMMARY]), Status.completed)
    failed = make_run(folder, points[1], ROWS[:3])
    write_status(failed, Status.failed, error="ValueError: no\nmore lines")
    write_status(make_run(folder, points[2], ROWS[:1]), Status.running)
    write_status(make_run(folder, points[3], ROWS), Status.pruned, error="fell behind")
    sweep = SweepRecord(command=["python"], objective=Objective.eval_loss, points=points)
    write_sweep(folder, sweep)
    assert read_sweep(folder) == sweep
    rows = read_rows(folder, sweep)
    states = [row["status"] for row in rows]
    assert states == ["completed", "failed", "crashed", "pruned", "waiting", "unfit"]
    assert [row["objective"] for row in rows] == [3.5, None, None, 3.5, None, None]
    done = rows[0]
    assert (done["train_loss"], done["tokens_per_s"], done["peak_memory_bytes"]) == (4.5, 55, 900)
    assert done["planned_memory_bytes"] == 1000
    assert done["seconds"] == pytest.approx(100 / 50 + 100 / 100)
    assert (rows[1]["steps"], rows[1]["train_loss"]) == (2, 4.0)
    assert rows[1]["reason"] == "ValueError: no\nmore lines"
    assert rows[5]["reason"] == "too large"
    write_results(folder, sweep, rows)
    lines = [json.loads(line) for line in folder.results.read_text().splitlines()]
    assert lines == rows
    table = list(csv.DictReader(folder.table.open()))
    assert [line["seed"] for line in table] == ["0", "1", "2", "3", "4", "5"]
    assert table[1]["reason"] == "ValueError: no more lines"
    assert float(table[0]["objective"]) == 3.5


def test_the_best_is_what_the_objective_says(folder: SweepDir) -> None:
    points = [record(index) for index in range(3)]
    for index, point in enumerate(points):
        summary = {**SUMMARY, "median_tokens_per_s": 10.0 * index, "train_loss": float(index)}
        write_status(make_run(folder, point, [*ROWS, summary]), Status.completed)
    for objective, best in ((Objective.tokens_per_s, 2), (Objective.train_loss, 0)):
        sweep = SweepRecord(command=[], objective=objective, points=points)
        ranked = rank_rows(read_rows(folder, sweep), objective)
        assert ranked[0]["index"] == best
        assert len(ranked) == 3


def test_a_run_that_says_it_runs_is_believed_while_it_is_held(folder: SweepDir) -> None:
    run_dir = make_run(folder, record(0), [])
    assert read_state(run_dir) == ("waiting", "")
    write_status(run_dir, Status.running)
    assert read_state(run_dir) == ("crashed", "its process is gone")
    with (run_dir.path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_state(run_dir) == ("running", "")
    assert read_state(run_dir)[0] == "crashed"
    run_dir.status.write_text('{"status": "on fire"}')
    assert read_state(run_dir) == ("waiting", "")


def test_sweeps_are_found_below_a_folder(tmp_path: Path) -> None:
    for name in ("b/x", "a", "a/inner"):
        os.makedirs(tmp_path / name)
        (tmp_path / name / "sweep.json").write_text("{}")
    assert [sweep.path.relative_to(tmp_path).as_posix() for sweep in list_sweeps(tmp_path)] == [
        "a",
        "b/x",
    ]

"""The files of a sweep: results of each job, from its run directory."""

import csv
import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_pretrain.config.sweep import Objective
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import Row
from llama_pretrain.runs.status import Outcome, Status, write_status
from llama_pretrain.sweep.directory import (
    JobRecord,
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
from tests.rows import evaluation_row, step_row, summary_row, write_rows

SUMMARY = summary_row(
    2, train_loss=4.5, median_tokens_per_s=55.0, peak_memory_bytes=900, planned_memory_bytes=1000
)
ROWS = [
    evaluation_row(0, 6.0),
    step_row(1, loss=5.0, tokens_per_s=500.0, memory_bytes=700),
    step_row(2, loss=4.0, tokens_per_s=1000.0, memory_bytes=800),
    evaluation_row(2, 3.5),
]


@pytest.fixture
def folder(tmp_path: Path) -> SweepDir:
    return SweepDir(tmp_path)


def record(index: int, **options: Any) -> JobRecord:
    label = f"seed={index}"
    settings = {"seed": str(index)}
    job = JobRecord(
        index=index, label=label, settings=settings, words=[label], folder=f"{index:02d}-{label}"
    )
    return replace(job, **options)


def make_run(folder: SweepDir, job: JobRecord, rows: Sequence[Row]) -> RunDir:
    run_dir = folder.job(job)
    run_dir.path.mkdir(exist_ok=True)
    write_rows(run_dir.metrics, rows)
    return run_dir


def test_a_row_for_each_job_whatever_became_of_it(folder: SweepDir) -> None:
    jobs = [record(index) for index in range(5)]
    jobs.append(record(5, verdict=Verdict.unfit, reason="too large", folder=""))
    write_status(make_run(folder, jobs[0], [*ROWS, SUMMARY]), Status.completed)
    failed = make_run(folder, jobs[1], ROWS[:3])
    write_status(failed, Status.failed, Outcome(error="ValueError: no\nmore lines"))
    write_status(make_run(folder, jobs[2], ROWS[:1]), Status.running)
    write_status(make_run(folder, jobs[3], ROWS), Status.pruned, Outcome(error="fell behind"))
    sweep = SweepRecord(command=["python"], objective=Objective.eval_loss, jobs=jobs)
    write_sweep(folder, sweep)
    assert read_sweep(folder) == sweep
    rows = read_rows(folder, sweep)
    states = [row["status"] for row in rows]
    assert states == ["completed", "failed", "crashed", "pruned", "waiting", "unfit"]
    assert [row["objective"] for row in rows] == [3.5, None, None, 3.5, None, None]
    done = rows[0]
    assert (done["train_loss"], done["tokens_per_s"], done["peak_memory_bytes"]) == (4.5, 55, 900)
    assert done["planned_memory_bytes"] == 1000
    assert done["seconds"] == pytest.approx(1000 / 500 + 1000 / 1000)
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


def test_the_objective_ranks_jobs(folder: SweepDir) -> None:
    jobs = [record(index) for index in range(3)]
    for index, job in enumerate(jobs):
        summary = replace(SUMMARY, median_tokens_per_s=10.0 * index, train_loss=float(index))
        write_status(make_run(folder, job, [*ROWS, summary]), Status.completed)
    for objective, best in ((Objective.tokens_per_s, 2), (Objective.train_loss, 0)):
        sweep = SweepRecord(command=[], objective=objective, jobs=jobs)
        ranked = rank_rows(read_rows(folder, sweep), objective)
        assert ranked[0]["index"] == best
        assert len(ranked) == 3


def test_a_running_job_is_held_by_a_process(folder: SweepDir) -> None:
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

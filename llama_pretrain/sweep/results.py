"""The results of a sweep: files and leaderboard, derived from the run directories of its jobs."""

from pathlib import Path

from llama_pretrain.config.problems import Problem, UserError
from llama_pretrain.files import write_text
from llama_pretrain.runs.status import FINISHED
from llama_pretrain.sweep.directory import (
    Row,
    SweepDir,
    Verdict,
    list_sweeps,
    read_rows,
    read_sweep,
    write_results,
)
from llama_pretrain.sweep.hparams import write_hparams
from llama_pretrain.sweep.report import render_sweep_report
from llama_pretrain.sweep.table import show_leaderboard


def write_tables(folder: SweepDir) -> list[Row]:
    """Write results.jsonl and results.csv with the results so far."""
    record = read_sweep(folder)
    rows = read_rows(folder, record)
    write_results(folder, record, rows)
    return rows


def conclude(folder: SweepDir) -> list[Row]:
    """Write everything that compares the jobs, and print the leaderboard."""
    rows, record = write_tables(folder), read_sweep(folder)
    write_hparams(folder, record, rows)
    write_text(folder.report, render_sweep_report(folder, record, rows))
    show_leaderboard(record, rows, folder)
    return rows


def all_succeeded(rows: list[Row]) -> bool:
    """Whether each job has a result, except those that do not fit the memory."""
    return all(row["status"] in (*FINISHED, Verdict.unfit.value) for row in rows)


def conclude_newest(place: Path) -> list[Row]:
    """The same for a sweep, or for the newest one below a directory.

    Raises:
        UserError: if there is none.
    """
    sweeps = list_sweeps(place)
    if not sweeps:
        hint = "Name the directory of a sweep, or one that contains sweeps"
        raise UserError([Problem(path=str(place), message="there is no sweep here", hint=hint)])
    return conclude(max(sweeps, key=lambda sweep: sweep.record.stat().st_mtime))

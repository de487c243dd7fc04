"""The live table of a sweep, and its leaderboard."""

import sys
import threading
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llama_pretrain import console
from llama_pretrain.config.sweep import Objective
from llama_pretrain.runs.metrics import EvaluationRow, StepRow, last, read_tail
from llama_pretrain.runs.status import FINISHED
from llama_pretrain.runs.units import elide
from llama_pretrain.sweep.directory import (
    JobRecord,
    Row,
    SweepDir,
    SweepRecord,
    Verdict,
    rank_rows,
    read_state,
    read_sweep,
)
from llama_pretrain.sweep.jobs import SweepJob, shorten

REFRESH_S = 0.5
NARROW = 90
"""Terminal width below which a table only has its most important columns."""
STYLES = {
    "completed": "green",
    "pruned": "yellow",
    "completed_unsaved": "red",
    "running": "bold cyan",
    "failed": "red",
    "crashed": "red",
    "refused": "red",
    "unfit": "magenta",
}
NAMES = {
    Objective.eval_loss: "eval loss",
    Objective.train_loss: "train loss",
    Objective.tokens_per_s: "tokens/s",
    Objective.peak_memory_bytes: "peak memory",
}
MIB = 1 << 20


class View:
    """Shows the progress of a sweep that something else runs, from its files.

    On a terminal a table, elsewhere a line for each job that starts or ends.
    """

    def __init__(self, folder: SweepDir):
        self._folder = folder
        # A separate console: what jobs print is redirected while they run.
        self._console = console.PlainConsole(
            highlight=False,
            file=sys.stdout,
            width=None if sys.stdout.isatty() else console.PIPE_WIDTH,
        )
        self._done = threading.Event()
        self._finished: dict[str, list[str]] = {}
        self._printed: dict[int, str] = {}

    def __enter__(self) -> "View":
        show = self._draw if self._console.is_terminal else self._print_changes
        self._thread = threading.Thread(target=show, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _draw(self) -> None:
        with Live(
            self._table(),
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,  # the leaderboard replaces it
        ) as live:
            while not self._done.wait(REFRESH_S):
                live.update(self._table(), refresh=True)

    def _print_changes(self) -> None:
        self._skip_finished()
        while True:
            last = self._done.is_set()
            record = read_sweep(self._folder)
            for job in record.jobs:
                cells = self._cells(job)
                status = cells[1]
                before = self._printed.get(job.index, "waiting")
                if status != before:
                    self._printed[job.index] = status
                    line = f"{job.index + 1}/{len(record.jobs)} {job.label}: {status}"
                    if status != "running":
                        line += _ending(cells)
                    self._console.print(line, soft_wrap=True)
            if last:
                return
            self._done.wait(REFRESH_S)

    def _skip_finished(self) -> None:
        """Do not print jobs again that an earlier command has run."""
        for job in read_sweep(self._folder).jobs:
            if job.verdict is Verdict.runs:
                self._printed[job.index] = self._cells(job)[1]
        finished = sum(status in FINISHED for status in self._printed.values())
        if finished:
            self._console.print(f"{finished} jobs have finished before")

    def _cells(self, job: JobRecord) -> list[str]:
        """Label, status, step, loss, evaluation loss, tokens/s, memory, reason."""
        if job.verdict is not Verdict.runs:
            return [job.label, job.verdict.value, "", "", "", "", "", job.reason]
        if job.folder in self._finished:
            return self._finished[job.folder]
        run_dir = self._folder.job(job)
        status, reason = read_state(run_dir)
        rows = read_tail(run_dir.metrics) if status != "waiting" else []
        step, evaluated = last(rows, StepRow), last(rows, EvaluationRow)
        cells = [
            job.label,
            status,
            "" if step is None else str(step.step),
            _number(step and step.loss, ".4f"),
            _number(evaluated and evaluated.eval_loss, ".4f"),
            _number(step and step.tokens_per_s, ",.0f"),
            _mebibytes(step and step.memory_bytes),
            reason.splitlines()[0] if reason else "",
        ]
        if status in FINISHED:
            self._finished[job.folder] = cells
        return cells

    def _table(self) -> RenderableType:
        jobs = read_sweep(self._folder).jobs
        cells = [self._cells(job) for job in jobs]
        counts = {status: sum(c[1] == status for c in cells) for status in {c[1] for c in cells}}
        summary = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
        room = max(3, self._console.height - 6)
        active = [i for i, c in enumerate(cells) if c[1] == "running"]
        first = max(0, min((active or [0])[0] - room // 2, len(cells) - room))
        wide = self._console.width >= NARROW
        table = _frame(["job", "status", "step", "loss", "eval loss", "tokens/s", "memory", ""])
        shown = range(len(table.columns)) if wide else (0, 1, 2, 4)
        if not wide:
            table = _frame(["job", "status", "step", "eval loss"])
        for job, row in list(zip(jobs, cells, strict=True))[first : first + room]:
            style = STYLES.get(row[1], "dim")
            label = job.label if wide else _short_label(job)
            table.add_row(*(console.styled([label, *row[1:]][number], style) for number in shown))
        return Group(Text(f"{len(jobs)} jobs: {summary}", style="bold"), table)


def _frame(names: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in names:
        right = name in ("step", "loss", "eval loss", "tokens/s", "memory")
        table.add_column(
            name,
            justify="right" if right else "left",
            overflow="ellipsis" if name in ("job", "") else "fold",
            no_wrap=name == "",
        )
    return table


def _short_label(job: JobRecord) -> str:
    """The settings that set a job apart, without their sections."""
    settings = job.settings.items()
    parts = [f"{key.rpartition('.')[2]}={shorten(value)}" for key, value in settings]
    return ",".join(parts) or job.label


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _mebibytes(value: Any) -> str:
    return "" if value is None else f"{value / MIB:,.0f} MiB"


def _ending(cells: Sequence[str]) -> str:
    names = ("step", "loss", "eval loss", "tokens/s", "memory")
    numbers = [f"{name} {cell}" for name, cell in zip(names, cells[2:7], strict=True) if cell]
    text = f" ({', '.join(numbers)})" if numbers else ""
    return f"{text}: {cells[7]}" if cells[7] else text


def show_planned_jobs(jobs: Sequence[SweepJob], *, slots: int) -> None:
    """What will run, and each job that will not, with the reason."""
    table = Table(title="will not run", title_justify="left", box=None, pad_edge=False)
    for name in ("job", "", "reason"):
        table.add_column(name, overflow="fold")
    for job in jobs:
        if job.verdict is not Verdict.runs:
            style = STYLES[job.verdict.value]
            cells = (job.label, job.verdict.value, job.problem)
            table.add_row(*(console.styled(cell, style) for cell in cells))
    if table.row_count:
        console.out.print(table)
    plans = [p.plan for p in jobs if p.verdict is Verdict.runs and p.plan is not None]
    text = f"{len(jobs)} jobs, {len(plans)} to run"
    if plans:
        need, have = max(plan.memory.total for plan in plans), plans[0].device_memory
        tokens = sum(plan.steps.tokens for plan in plans)
        text += f": {tokens:,} tokens in total, at most {_mebibytes(need)} of"
        text += f" {_mebibytes(have)} a rank"
    console.say(f"{text}, {slots} at a time" if slots > 1 else text)


def measure(row: Row, objective: Objective) -> str:
    """The value of the objective in a row, with its unit."""
    value = row[objective.value]
    if objective is Objective.peak_memory_bytes:
        return _mebibytes(value)
    return _number(value, ",.0f" if objective is Objective.tokens_per_s else ".4f")


def show_leaderboard(record: SweepRecord, rows: Sequence[Row], folder: SweepDir) -> None:
    """Finished jobs, the best first; below them the others, each with the reason."""
    out = console.out
    objective = record.objective
    ranked = rank_rows(rows, objective)
    names = ["#", *record.swept, NAMES[objective]]
    extra = [key for key in Objective if key is not objective]
    wide = out.width >= NARROW
    names += [NAMES[key] for key in extra] if wide else []
    names += ["", "run directory"] if wide else []
    if ranked:
        table = Table(title="leaderboard", title_justify="left", box=None, pad_edge=False)
        for name in names:
            right = name == "#" or name in NAMES.values()
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for place, row in enumerate(ranked, start=1):
            style = "bold green" if place == 1 else None
            settings = [shorten(row["settings"].get(key, "")) for key in record.swept]
            cells = [str(place), *settings, measure(row, objective)]
            if wide:
                cells += [measure(row, key) for key in extra]
                cells += ["" if row["status"] == "completed" else row["status"]]
                cells.append(elide(row["run_dir"], out.width // 2))
            table.add_row(*cells, style=style)
        out.print(table)
    left = [row for row in rows if row["objective"] is None]
    if left:
        out.print(console.styled("without a result", "bold"))
        for row in left:
            reason = f": {' '.join(row['reason'].split())}" if row["reason"] else ""
            out.print(f"  {row['label']}:", console.styled(f"{row['status']}{reason}", "red"))
    console.say(f"{summary(rows)}; details in {folder.path}")


def summary(rows: Sequence[Row]) -> str:
    """How many jobs have which status."""
    states = [row["status"] for row in rows]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return f"{len(rows)} jobs: {', '.join(counts)}"

"""What a person sees of a sweep: a table that lives while it runs, and the leaderboard."""

import sys
import threading
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llama_pretrain import console
from llama_pretrain.config.sweep import Objective
from llama_pretrain.runs.metrics import read_end
from llama_pretrain.runs.status import FINISHED
from llama_pretrain.sweep.directory import (
    PointRecord,
    Row,
    SweepDir,
    SweepRecord,
    Verdict,
    rank_rows,
    read_state,
    read_sweep,
)
from llama_pretrain.sweep.points import SweepPoint, shorten

LOOK_EVERY_S = 0.5
NARROW = 90
"""Columns of a terminal below which a table has its most important columns alone."""
STYLES = {
    "completed": "green",
    "pruned": "yellow",
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
    """Shows how a sweep goes while something else runs it: everything is read from its files.

    On a terminal a table, elsewhere a line for each point that begins or ends.
    """

    def __init__(self, folder: SweepDir):
        self._folder = folder
        # Of its own, for what points print goes elsewhere while they run.
        self._console = Console(
            highlight=False,
            file=sys.stdout,
            width=None if sys.stdout.isatty() else console.PIPE_WIDTH,
        )
        self._done = threading.Event()
        self._ended: dict[str, list[str]] = {}
        self._told: dict[int, str] = {}

    def __enter__(self) -> "View":
        show = self._draw if self._console.is_terminal else self._tell
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
            transient=True,  # the leaderboard comes in its place
        ) as live:
            while not self._done.wait(LOOK_EVERY_S):
                live.update(self._table(), refresh=True)

    def _tell(self) -> None:
        self._skip_what_was()
        while True:
            last = self._done.is_set()
            record = read_sweep(self._folder)
            for point in record.points:
                cells = self._cells(point)
                status = cells[1]
                before = self._told.get(point.index, "waiting")
                if status != before:
                    self._told[point.index] = status
                    line = f"{point.index + 1}/{len(record.points)} {point.label}: {status}"
                    if status != "running":
                        line += _ending(cells)
                    self._console.print(escape(line), soft_wrap=True)
            if last:
                return
            self._done.wait(LOOK_EVERY_S)

    def _skip_what_was(self) -> None:
        """Don't tell again how points ended that an earlier command has run."""
        for point in read_sweep(self._folder).points:
            if point.verdict is Verdict.runs:
                self._told[point.index] = self._cells(point)[1]
        finished = sum(status in FINISHED for status in self._told.values())
        if finished:
            self._console.print(f"{finished} points were finished before")

    def _cells(self, point: PointRecord) -> list[str]:
        """Label, status, step, loss, evaluation loss, tokens/s, memory, reason."""
        if point.verdict is not Verdict.runs:
            return [point.label, point.verdict.value, "", "", "", "", "", point.reason]
        if point.folder in self._ended:
            return self._ended[point.folder]
        run_dir = self._folder.point(point)
        status, reason = read_state(run_dir)
        rows = read_end(run_dir.metrics) if status != "waiting" else []
        step: Row = next((row for row in reversed(rows) if "loss" in row), {})
        evaluated: Row = next((row for row in reversed(rows) if "eval_loss" in row), {})
        cells = [
            point.label,
            status,
            str(step.get("step", "")),
            _number(step.get("loss"), ".4f"),
            _number(evaluated.get("eval_loss"), ".4f"),
            _number(step.get("tokens_per_s"), ",.0f"),
            _mebibytes(step.get("memory_bytes")),
            reason.splitlines()[0] if reason else "",
        ]
        if status in FINISHED:
            self._ended[point.folder] = cells
        return cells

    def _table(self) -> RenderableType:
        points = read_sweep(self._folder).points
        cells = [self._cells(point) for point in points]
        counts = {status: sum(c[1] == status for c in cells) for status in {c[1] for c in cells}}
        told = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
        room = max(3, self._console.height - 6)
        active = [i for i, c in enumerate(cells) if c[1] == "running"]
        first = max(0, min((active or [0])[0] - room // 2, len(cells) - room))
        wide = self._console.width >= NARROW
        table = _frame(["point", "status", "step", "loss", "eval loss", "tokens/s", "memory", ""])
        shown = range(len(table.columns)) if wide else (0, 1, 2, 4)
        if not wide:
            table = _frame(["point", "status", "step", "eval loss"])
        for point, row in list(zip(points, cells, strict=True))[first : first + room]:
            style = STYLES.get(row[1], "dim")
            label = point.label if wide else _short_label(point)
            table.add_row(*(Text([label, *row[1:]][number], style=style) for number in shown))
        return Group(Text(f"{len(points)} points: {told}", style="bold"), table)


def _frame(names: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in names:
        right = name in ("step", "loss", "eval loss", "tokens/s", "memory")
        table.add_column(
            name,
            justify="right" if right else "left",
            overflow="ellipsis" if name in ("point", "") else "fold",
            no_wrap=name == "",
        )
    return table


def _short_label(point: PointRecord) -> str:
    """What sets a point apart, without the sections of its settings."""
    settings = point.settings.items()
    told = [f"{key.rpartition('.')[2]}={shorten(value)}" for key, value in settings]
    return ",".join(told) or point.label


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _mebibytes(value: Any) -> str:
    return "" if value is None else f"{value / MIB:,.0f} MiB"


def _ending(cells: Sequence[str]) -> str:
    names = ("step", "loss", "eval loss", "tokens/s", "memory")
    numbers = [f"{name} {cell}" for name, cell in zip(names, cells[2:7], strict=True) if cell]
    text = f" ({', '.join(numbers)})" if numbers else ""
    return f"{text}: {cells[7]}" if cells[7] else text


def show_what_was_planned(points: Sequence[SweepPoint], *, slots: int) -> None:
    """What will run, and each point that is left out, with its reason."""
    table = Table(title="left out", title_justify="left", box=None, pad_edge=False)
    for name in ("point", "", "reason"):
        table.add_column(name, overflow="fold")
    for point in points:
        if point.verdict is not Verdict.runs:
            style = STYLES[point.verdict.value]
            cells = (point.label, point.verdict.value, point.problem)
            table.add_row(*(Text(cell, style=style) for cell in cells))
    if table.row_count:
        console.out.print(table)
    plans = [p.plan for p in points if p.verdict is Verdict.runs and p.plan is not None]
    text = f"{len(points)} points, {len(plans)} to run"
    if plans:
        need, have = max(plan.memory.total for plan in plans), plans[0].device_memory
        tokens = sum(plan.steps.tokens for plan in plans)
        text += f": {tokens:,} tokens in all, at most {_mebibytes(need)} of a rank's"
        text += f" {_mebibytes(have)}"
    console.say(f"{text}, {slots} at a time" if slots > 1 else text)


def measure(row: Row, objective: Objective) -> str:
    """A row's value of the objective, with its unit."""
    value = row[objective.value]
    if objective is Objective.peak_memory_bytes:
        return _mebibytes(value)
    return _number(value, ",.0f" if objective is Objective.tokens_per_s else ".4f")


def show_leaderboard(record: SweepRecord, rows: Sequence[Row], folder: SweepDir) -> None:
    """Finished points, the best first; below them the others, each with its reason."""
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
            settings = [escape(shorten(row["settings"].get(key, ""))) for key in record.swept]
            cells = [str(place), *settings, measure(row, objective)]
            if wide:
                cells += [measure(row, key) for key in extra]
                cells += ["" if row["status"] == "completed" else row["status"], row["run_dir"]]
            table.add_row(*cells, style=style)
        out.print(table)
    left = [row for row in rows if row["objective"] is None]
    if left:
        out.print("[bold]without a result[/]")
        for row in left:
            reason = f": {' '.join(row['reason'].split())}" if row["reason"] else ""
            out.print(f"  {escape(row['label'])}: [red]{row['status']}[/]{escape(reason)}")
    console.say(f"{summary(rows)}; all of it in {folder.path}")


def summary(rows: Sequence[Row]) -> str:
    """How many points have come to what."""
    states = [row["status"] for row in rows]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return f"{len(rows)} points: {', '.join(counts)}"

"""report.html of a sweep: one self-contained page that compares its jobs."""

import shlex
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any
from urllib.parse import quote

from llama_pretrain.config.sweep import Objective
from llama_pretrain.runs.chart import Chart, Mark, Series, draw, option_axis, thin
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import curve, read_metrics
from llama_pretrain.runs.page import render_page
from llama_pretrain.runs.units import MIB, format_number, is_number
from llama_pretrain.sweep.directory import Row, SweepDir, SweepRecord, rank_rows

MAX_CURVES = 60
"""Curves of the best jobs; more are indistinguishable."""
CURVE_POINTS = 300
TITLES = {
    Objective.eval_loss: ("evaluation loss", "nats per token"),
    Objective.train_loss: ("training loss", "nats per token, mean of the last steps"),
    Objective.tokens_per_s: ("throughput", "tokens/s, median"),
    Objective.peak_memory_bytes: ("peak memory", "MiB, largest rank"),
}


def render_sweep_report(folder: SweepDir, record: SweepRecord, rows: Sequence[Row]) -> str:
    """The HTML of a sweep, as far as it has come."""
    ranked = rank_rows(rows, record.objective)
    # Hues at the golden angle: neighbours differ, and no two are alike.
    colours = {
        row["index"]: f"hsl({(215 + place * 137.508) % 360:.0f} 62% 46%)"
        for place, row in enumerate(ranked)
    }
    title, unit = TITLES[record.objective]
    measured = [key for key in Objective if any(value_of(row, key) is not None for row in ranked)]
    states = [row["status"] for row in rows]
    counts = " · ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    value = value_of(ranked[0], record.objective) if ranked else None
    shown = ranked[:MAX_CURVES]
    return render_page(
        "sweep",
        title=folder.path.resolve().name,
        summary=f"{len(rows)} jobs: {counts} · swept: {', '.join(record.swept) or 'nothing'}",
        best={"value": f"{value:.6g}", "unit": unit, "label": ranked[0]["label"]}
        if value is not None
        else None,
        objective=title,
        objective_charts=_scatters(record, ranked, [record.objective]),
        other_charts=_scatters(record, ranked, [k for k in measured if k is not record.objective]),
        curves=_curves(folder, shown, colours),
        keys=[(colours[row["index"]], row["label"]) for row in shown],
        not_drawn=len(ranked) - len(shown),
        command=shlex.join(record.command),
        **_table(folder, record, rows, colours),
    )


def value_of(row: Row, key: Objective) -> float | None:
    """A measure of a row in the unit that the page shows."""
    value = row[key.value]
    if not is_number(value):
        return None
    return value / MIB if key is Objective.peak_memory_bytes else float(value)


def _scatters(
    record: SweepRecord, ranked: Sequence[Row], keys: Sequence[Objective]
) -> list[Chart | None]:
    return [
        _scatter(option, key, ranked)
        for key in keys
        for option in record.swept
        if len({row["settings"].get(option) for row in ranked}) > 1 or len(record.swept) == 1
    ]


def _scatter(option: str, key: Objective, ranked: Sequence[Row]) -> Chart | None:
    """A measure over an option: a dot per job, and a line through the means."""
    found = [
        (row["settings"][option], value, row["label"])
        for row in sorted(ranked, key=lambda row: row["index"])
        if option in row["settings"] and (value := value_of(row, key)) is not None
    ]
    if not found:
        return None
    axis, places = option_axis(option, [text for text, _, _ in found])
    means = {text: mean(value for at, value, _ in found if at == text) for text in places}
    title, unit = TITLES[key]
    ordered = sorted(places, key=lambda text: places[text])
    line = Series(
        points=[(places[text], means[text]) for text in ordered],
        titles=["means: " + "; ".join(f"{text}: {means[text]:.4g}" for text in ordered)],
        style="mean",
    )
    dots = Series(
        mark=Mark.dots,
        points=[(places[text], value) for text, value, _ in found],
        titles=[f"{label}: {value:.6g}" for _, value, label in found],
    )
    return draw(f"{title.capitalize()} over {option}", [line, dots], unit=unit, axis=axis)


def _curves(
    folder: SweepDir, shown: Sequence[Row], colours: Mapping[int, str]
) -> list[Chart | None]:
    """Curves of many jobs against tokens, one over the other."""
    metrics = [read_metrics(RunDir(folder.path / row["run_dir"]).metrics) for row in shown]
    charts = []
    for name, title in (("eval_loss", "Evaluation loss"), ("loss", "Training loss")):
        lines = []
        for row, rows in zip(shown, metrics, strict=True):
            points = thin(curve(rows, name), limit=CURVE_POINTS)
            end = f"{row['label']}: {points[-1][1]:.4f} at the end" if points else ""
            colour = colours[row["index"]]
            lines.append(Series(points=points, titles=[end], colour=colour))
        charts.append(draw(title, lines, unit="nats per token"))
    return charts


def _table(
    folder: SweepDir, record: SweepRecord, rows: Sequence[Row], colours: Mapping[int, str]
) -> dict[str, Any]:
    """Every job: cells as (text, value to sort by)."""
    keys = [key for key in Objective if any(value_of(row, key) is not None for row in rows)]
    jobs = []
    for row in rows:
        link = f"{row['run_dir']}/report.html"
        cells = [(text := row["settings"].get(key, ""), text) for key in record.swept]
        cells.append((row["status"], row["status"]))
        for key in keys:
            is_loss = key in (Objective.eval_loss, Objective.train_loss)
            cells.append(_cell(value_of(row, key), ".4f" if is_loss else ",.0f"))
        cells += [_cell(row["steps"], ","), (row["reason"], row["reason"])]
        jobs.append(
            {
                "index": row["index"],
                "colour": colours.get(row["index"], "transparent"),
                "link": quote(link) if (folder.path / link).is_file() else "",
                "cells": cells,
            }
        )
    titles = [TITLES[key][0] for key in keys]
    return {"head": ["job", *record.swept, "status", *titles, "steps", "reason"], "jobs": jobs}


def _cell(value: float | None, form: str) -> tuple[str, str]:
    return format_number(value, form), "" if value is None else str(value)

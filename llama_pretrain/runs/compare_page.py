"""The comparison of runs as one HTML page."""

from collections.abc import Sequence
from html import escape

from llama_pretrain.runs.chart import READOUT, chart, charts, curve
from llama_pretrain.runs.compare import (
    Difference,
    RunFiles,
    config_differences,
    number_rows,
    provenance_differences,
    text_of,
    warnings_of,
)
from llama_pretrain.runs.page import render_page, section, table

GIB = 1 << 30
CURVES = (
    ("Evaluation loss", "nats a token", "eval_loss", 1, True),
    ("Training loss", "nats a token", "loss", 1, True),
    ("Throughput", "tokens/s", "tokens_per_s", 1, False),
    ("Gradient norm", "before clipping", "grad_norm", 1, False),
    ("Learning rate", "of each step", "learning_rate", 1, False),
    ("Memory", "GiB, rank 0's peak so far", "memory_bytes", GIB, False),
)
"""Title, unit, key, what it is divided by, and whether the figure is wide."""


def render_comparison(runs: Sequence[RunFiles], *, loss: float | None) -> str:
    """The HTML of a comparison."""
    title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    names = [f"{run.letter}: {run.name}" for run in runs]
    who = table([(run.letter, run.name, str(run.path)) for run in runs], head=WHO)
    told = "".join(f"<li>{escape(text)}</li>" for text in warnings_of(runs))
    numbers = [(label, *texts) for label, texts in number_rows(runs, loss=loss)]
    figures = [
        chart(
            title,
            unit=unit,
            lines=dict(zip(names, (curve(run.rows, key, unit=scale) for run in runs), strict=True)),
            wide=wide,
        )
        for title, unit, key, scale, wide in CURVES
    ]
    heads = ("what", *(run.letter for run in runs))
    sections = [
        f"<header><h1>{escape(title)}</h1></header>",
        section("The runs", who + (told and f"<ul>{told}</ul>")),
        section("Numbers", table(numbers, head=heads)),
        section("Curves", charts(figures)),
        section("Config", _differences(config_differences(runs), runs) or SAME),
        section("Provenance", _differences(provenance_differences(runs), runs) or SAME),
    ]
    return render_page(f"{title} compared", sections, script=READOUT)


WHO = ("letter", "run", "directory")
SAME = "<p>Nothing differs.</p>"


def _differences(found: Sequence[Difference], runs: Sequence[RunFiles]) -> str:
    """A table for each section of the config, or of the provenance."""
    groups: dict[str, list[list[str]]] = {}
    for difference in found:
        name = difference.name.removeprefix(f"{difference.group}.")
        texts = [text_of(value) for value in difference.values]
        groups.setdefault(difference.group, []).append([name, *texts])
    head = ("setting", *(run.letter for run in runs))
    return "".join(
        f"<h3>{escape(group)}</h3>" + table(rows, head=head) for group, rows in groups.items()
    )

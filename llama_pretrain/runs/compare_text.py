"""The comparison of runs as lines of text, and as JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from llama_pretrain.runs.compare import (
    Difference,
    RunFiles,
    config_differences,
    curves_of,
    measure,
    number_rows,
    provenance_differences,
    text_of,
    warnings_of,
)
from llama_pretrain.runs.terminal import plot, printable, text_table, values_of

PLOT_WIDTH, PLOT_HEIGHT = 72, 14
"""Of a plot in a pipe, and its most on a terminal; lines."""
LONGEST = 160
"""Letters of a value; the rest is in the JSON."""


def render_json(runs: Sequence[RunFiles], *, loss: float | None) -> str:
    """All that is compared, and nothing shortened."""

    return json.dumps(
        {
            "loss": loss,
            "runs": [
                {
                    "path": str(run.path),
                    "status": run.status.get("status"),
                    **measure(run, loss=loss),
                }
                for run in runs
            ],
            "config": [asdict(found) for found in config_differences(runs)],
            "provenance": [asdict(found) for found in provenance_differences(runs)],
        },
        indent=2,
    )


def render_text(
    runs: Sequence[RunFiles], *, loss: float | None, width: int | None
) -> Iterator[str]:
    """The comparison as lines; on a terminal no line but a long value is wider than it."""

    letters = [run.letter for run in runs]
    yield from (f"{run.letter}  {printable(str(run.path))}" for run in runs)
    yield from (f"note: {text}" for text in warnings_of(runs))
    for title, found in (
        ("config", config_differences(runs)),
        ("provenance", provenance_differences(runs)),
    ):
        yield ""
        yield title if found else f"{title}: nothing differs"
        yield from _grouped(found, letters, width=width)
    rows = number_rows(runs, loss=loss)
    lines = text_table(
        ["numbers", *letters], [(label, *texts) for label, texts in rows], numbers=letters
    )
    if width is not None and max(map(len, lines)) > width:
        lines = ["numbers"]
        for label, texts in rows:
            lines += values_of(f"  {label}", texts, letters=letters, width=width)
    yield ""
    yield from lines
    size = {"width": min(width or PLOT_WIDTH, PLOT_WIDTH), "height": PLOT_HEIGHT}
    for title, key in (("evaluation loss", "eval_loss"), ("training loss", "loss")):
        drawn = plot(dict(zip(letters, curves_of(runs, key), strict=True)), **size)
        if drawn:
            yield ""
            yield f"{title}, nats a token (# = several runs)"
            yield from drawn


def _grouped(
    found: Sequence[Difference], letters: Sequence[str], *, width: int | None
) -> Iterator[str]:
    """Differences under the names of their groups."""
    group = None
    for difference in found:
        if difference.group != group:
            group = difference.group
            yield f"  {group}"
        texts = [printable(_cut(text_of(value))) for value in difference.values]
        name = printable(difference.name.removeprefix(f"{group}."))
        yield from values_of(f"    {name}", texts, letters=letters, width=width)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"

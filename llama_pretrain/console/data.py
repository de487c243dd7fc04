"""Progress of data preparation, and a summary of a corpus."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from llama_pretrain.config.run import Run
from llama_pretrain.console.output import out, say
from llama_pretrain.console.progress import LINE_EVERY_S
from llama_pretrain.plan.plan import Plan

if TYPE_CHECKING:
    from llama_pretrain.data.inspect import Inspection, SourceFacts


def show_corpus(run: Run, plan: Plan) -> None:
    """What was prepared, a line a source."""
    assert plan.corpus is not None
    assert plan.steps.epochs is not None
    table = Table(title="prepared", title_justify="left", box=None, pad_edge=False)
    table.add_column("source", style="cyan")
    for name in ("training tokens", "rows", "held-out rows", "epochs"):
        table.add_column(name, justify="right")
    table.add_column("folder", overflow="fold")
    for source in plan.corpus.sources:
        table.add_row(
            source.name,
            f"{source.train_tokens:,}",
            f"{source.train_rows:,} x {run.data.sequence_length}",
            f"{source.heldout_rows:,}",
            f"{plan.steps.epochs[source.name]:.2f}",
            source.tokens_dir,
        )
    out.print(table)


def show_inspection(inspection: "Inspection", page: Path) -> None:
    """Sources, lengths of documents, and the first rows of a run."""
    from llama_pretrain.data.inspect import SOURCE_HEAD, source_rows  # torch: not for a plan

    table = Table(title="sources", title_justify="left", box=None, pad_edge=False)
    for number, name in enumerate(SOURCE_HEAD):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for line in source_rows(inspection):
        table.add_row(*(escape(cell) for cell in line))
    out.print(table)
    for source in inspection.sources:
        out.print(_length_bars(source))
    for row in inspection.rows:
        text = Text(overflow="fold")
        for token in row.tokens:
            style = "" if token.has_target else "dim strike"
            if token.ends_document:
                text.append(f" {token.text}|", style="bold red")
            elif token.has_target or out.is_terminal:
                text.append(token.text, style=style)
            else:
                text.append(f"[{token.text}]")
        facts = f"{row.documents} documents, {row.targets:,} targets"
        out.rule(f"row {row.number} of {row.source}: {facts}", style="dim", align="left")
        out.print(text)
    say(f"the same as a page: {page}")


def _length_bars(source: "SourceFacts") -> Table:
    """Documents by length: a bar a power of 2."""
    table = Table(title=f"{source.name}: lengths", title_justify="left", box=None, pad_edge=False)
    table.add_column("tokens, up to", justify="right")
    table.add_column("documents", justify="right")
    table.add_column()
    most = max((count for _, count in source.lengths), default=1)
    for length, count in source.lengths:
        table.add_row(f"{length:,}", f"{count:,}", "#" * -(-40 * count // most))
    return table


class DataReport:
    """What preparing tells: a bar on a terminal, else a line every few seconds."""

    def say(self, line: str) -> None:
        say(line)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int, int], None]]:
        began = time.monotonic()
        if out.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%" if total else ""),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(compact=True),
            )
            with Progress(*columns, console=out, expand=True, transient=True) as bar:
                task = bar.add_task(what, total=total or None, text="")

                def draw(done: int, text: int) -> None:
                    speed = _megabytes_a_second(text or done, began)
                    bar.update(task, completed=done, text=speed)

                yield draw
            return
        said = began

        def write(done: int, text: int) -> None:
            nonlocal said
            now = time.monotonic()
            if now - said >= LINE_EVERY_S:
                said = now
                line = f"{what}: {_megabytes_a_second(text or done, began)}"
                if total:
                    left = timedelta(seconds=round((now - began) * (total - done) / max(1, done)))
                    line += f", {done / total:.0%}, eta {left}"
                say(line)

        yield write


def _megabytes_a_second(num_bytes: int, began: float) -> str:
    seconds = max(1e-3, time.monotonic() - began)
    return f"{num_bytes / 1e6:.1f} MB at {num_bytes / 1e6 / seconds:.1f} MB/s"

"""The progress of data preparation, the prepared corpus, and the result of task=inspect."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.console.output import out, say
from llama_pretrain.console.progress import LINE_EVERY_S
from llama_pretrain.plan.plan import TrainingPlan

if TYPE_CHECKING:
    from llama_pretrain.data.inspect import Inspection, SourceFacts


def show_corpus(run: ResolvedRun, plan: TrainingPlan) -> None:
    """Print a table of the prepared sources."""
    table = Table(title="prepared", title_justify="left", box=None, pad_edge=False)
    table.add_column("source", style="cyan")
    for name in ("training tokens", "sequences", "held-out sequences", "epochs"):
        table.add_column(name, justify="right")
    table.add_column("directory", overflow="fold")
    for source in plan.corpus.sources:
        table.add_row(
            source.name,
            f"{source.train_tokens:,}",
            f"{source.train_sequences:,} x {run.data.sequence_length}",
            f"{source.heldout_sequences:,}",
            f"{plan.steps.epochs[source.name]:.2f}",
            source.tokens_dir,
        )
    out.print(table)


def show_inspection(
    inspection: "Inspection", sources: Sequence[tuple[str, ...]], page: Path
) -> None:
    """Print sources, lengths of documents, and the first sequences of a run.

    Args:
        sources: a table: its head, and a row for each source.
    """
    table = Table(title="sources", title_justify="left", box=None, pad_edge=False)
    for number, name in enumerate(sources[0]):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for line in sources[1:]:
        table.add_row(*line)
    out.print(table)
    for source in inspection.sources:
        out.print(_length_bars(source))
    for sequence in inspection.sequences:
        text = Text(overflow="fold")
        for token in sequence.tokens:
            style = "" if token.has_target else "dim strike"
            if token.ends_document:
                text.append(f" {token.text}|", style="bold red")
            elif token.has_target or out.is_terminal:
                text.append(token.text, style=style)
            else:
                text.append(f"[{token.text}]")
        facts = f"{sequence.documents} documents, {sequence.targets:,} targets"
        out.rule(
            f"sequence {sequence.number} of {sequence.source}: {facts}", style="dim", align="left"
        )
        out.print(text)
    say(f"page: {page}")


def _length_bars(source: "SourceFacts") -> Table:
    """A bar chart of documents by length."""
    table = Table(title=f"{source.name}: lengths", title_justify="left", box=None, pad_edge=False)
    table.add_column("tokens, up to", justify="right")
    table.add_column("documents", justify="right")
    table.add_column()
    most = max((count for _, count in source.lengths), default=1)
    for length, count in source.lengths:
        table.add_row(f"{length:,}", f"{count:,}", "#" * -(-40 * count // most))
    return table


class DataReport:
    """Reports data preparation: a progress bar on a terminal, else a line every few seconds."""

    def say(self, line: str) -> None:
        say(line)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int, int], None]]:
        started = time.monotonic()
        if out.is_terminal:
            columns = (
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%" if total else ""),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(compact=True),
            )
            with Progress(*columns, console=out, expand=True, transient=True) as bar:
                task = bar.add_task(what, total=total or None, text="")

                def draw(done: int, text: int) -> None:
                    speed = _format_speed(text or done, started)
                    bar.update(task, completed=done, text=speed)

                yield draw
            return
        last_line = started

        def write(done: int, text: int) -> None:
            nonlocal last_line
            now = time.monotonic()
            if now - last_line >= LINE_EVERY_S:
                last_line = now
                line = f"{what}: {_format_speed(text or done, started)}"
                if total:
                    left = timedelta(seconds=round((now - started) * (total - done) / max(1, done)))
                    line += f", {done / total:.0%}, eta {left}"
                say(line)

        yield write


def _format_speed(num_bytes: int, started: float) -> str:
    seconds = max(1e-3, time.monotonic() - started)
    return f"{num_bytes / 1e6:.1f} MB at {num_bytes / 1e6 / seconds:.1f} MB/s"

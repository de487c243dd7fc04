"""A progress bar on a terminal, a line every few seconds elsewhere."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from llama_pretrain.console.output import out, percent_text, rate_text, say
from llama_pretrain.plan.plan import TrainingPlan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import (
    CheckpointRow,
    EvaluationRow,
    EventRow,
    RollbackRow,
    Row,
    StepRow,
    parse_row,
)
from llama_pretrain.runs.phases import NAMES

LINE_EVERY_S = 5.0


@contextmanager
def follow_metrics(
    run_dir: RunDir, plan: TrainingPlan, *, first_step: int, timings: bool = False
) -> Iterator[None]:
    """Show metrics.jsonl as it grows: one bar on a terminal, else a line every few seconds.

    Args:
        timings: whether the seconds of the start are shown too.
    """
    done = threading.Event()
    start = run_dir.metrics.stat().st_size if run_dir.metrics.exists() else 0
    show = _follow_with_bar if out.is_terminal else _follow_with_lines
    thread = threading.Thread(
        target=show, args=(run_dir.metrics, start, plan, first_step, done, timings), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _new_rows(path: Path, start: int, done: threading.Event) -> Iterator[Row | None]:
    """Rows as they are written; `None` every 0.2 s without one; ends after `done`."""
    position, rest = start, b""
    while True:
        last_look = done.is_set()
        content = b""
        if path.exists():
            with path.open("rb") as file:
                if (size := os.fstat(file.fileno()).st_size) < position:  # a resume has cut it
                    position, rest = size, b""
                file.seek(position)
                content = file.read()
        position += len(content)
        *lines, rest = (rest + content).split(b"\n")
        for line in lines:
            yield parse_row(line)
        if last_look:
            return
        yield None
        done.wait(0.2)


def _step_text(row: StepRow) -> str:
    mfu = f" mfu {percent_text(row.mfu)}" if row.mfu is not None else ""
    numbers = f"loss {row.loss:.3f} lr {row.learning_rate:.1e}"
    return f"{numbers} {rate_text(row.tokens_per_s)} tok/s{mfu}"


def _follow_with_bar(
    path: Path,
    start: int,
    plan: TrainingPlan,
    first_step: int,
    done: threading.Event,
    timings: bool,
) -> None:
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=out, expand=True) as progress:
        task = progress.add_task(
            "starting ranks", total=plan.steps.last, completed=first_step, text=""
        )
        for row in _new_rows(path, start, done):
            if isinstance(row, StepRow) and row.loss is not None:
                what = "finishing" if row.step == plan.steps.last else "training"
                progress.update(task, completed=row.step, description=what, text=_step_text(row))
            elif isinstance(row, EvaluationRow):
                progress.console.print(_eval_text(row))
            elif timings and isinstance(row, EventRow) and row.start_seconds:
                progress.console.print(start_table(row.start_seconds))
            if text := _event_text(row):
                progress.console.print(text)


def _follow_with_lines(
    path: Path,
    start: int,
    plan: TrainingPlan,
    _first_step: int,
    done: threading.Event,
    timings: bool,
) -> None:
    printed_at = 0.0
    began: tuple[float, int] | None = None  # when the first step was seen, and which it was
    say(f"starting {plan.world_size} rank{'s' if plan.world_size > 1 else ''}")
    for row in _new_rows(path, start, done):
        now = time.monotonic()
        if text := _event_text(row):
            say(text)
        if timings and isinstance(row, EventRow) and row.start_seconds:
            out.print(start_table(row.start_seconds))
        elif isinstance(row, EvaluationRow):
            say(_eval_text(row))
        elif not isinstance(row, StepRow) or row.loss is None:
            continue
        elif now - printed_at >= LINE_EVERY_S or row.step == plan.steps.last:
            printed_at = now
            text = f"step {row.step}/{plan.steps.last} {_step_text(row)}"
            if began is None:
                began = now, row.step
            else:
                pace = (now - began[0]) / max(1, row.step - began[1])
                left = timedelta(seconds=round(pace * (plan.steps.last - row.step)))
                text += f" eta {left}"
            say(text)


def start_table(seconds: Mapping[str, float]) -> Table:
    """Seconds from the command to the end of its first step, one line per phase."""
    table = Table(title="start", title_justify="left", box=None, pad_edge=False)
    table.title_style = "bold"
    table.add_column("phase", style="cyan", no_wrap=True)
    for name in ("seconds", "so far"):
        table.add_column(name, justify="right")
    so_far = 0.0
    for name, text in NAMES.items():
        if name in seconds:
            so_far += seconds[name]
            table.add_row(text, f"{seconds[name]:.2f}", f"{so_far:.2f}")
    return table


def _event_text(row: Row | None) -> str:
    """A line for a skipped step, a rollback or a failed save; empty for everything else."""
    match row:
        case StepRow(skipped="spike"):
            return f"step {row.step}: skipped, its loss spiked"
        case StepRow() if row.skipped:
            return f"step {row.step}: skipped, its {row.skipped} is not finite"
        case RollbackRow():
            batches = ", ".join(str(number) for number in row.skipped_batches)
            went = f"back to step {row.step} from step {row.rolled_back_from}, whose loss spiked"
            return f"{went}; left out: global batches {batches}"
        case CheckpointRow() if row.checkpoint_error:
            return f"step {row.step}: {row.checkpoint_error}"
    return ""


def _eval_text(row: EvaluationRow) -> str:
    loss = f"eval loss {row.eval_loss:.4f} perplexity {row.perplexity:.2f}"
    text = f"step {row.step}: {loss} bits/byte {row.bits_per_byte:.3f}"
    apart = [f"{name} {value:.4f}" for name, value in row.by_source.items()]
    return f"{text} ({', '.join(apart)})" if apart else text

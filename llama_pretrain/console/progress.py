"""A progress bar on a terminal, a line every few seconds elsewhere."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from llama_pretrain.console.output import out, percent_text, rate_text, say
from llama_pretrain.plan.plan import Plan
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.phases import NAMES

LINE_EVERY_S = 5.0


@contextmanager
def follow_metrics(
    run_dir: RunDir, plan: Plan, *, first_step: int, timings: bool = False
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


def _new_rows(path: Path, start: int, done: threading.Event) -> Iterator[dict[str, Any]]:
    """Rows as they are written; `{}` a few times a second when there is none; ends after `done`."""
    position, rest = start, b""
    while True:
        last_look = done.is_set()
        content = b""
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                content = file.read()
        position += len(content)
        *lines, rest = (rest + content).split(b"\n")
        for line in lines:
            yield json.loads(line)
        if last_look:
            return
        yield {}
        done.wait(0.2)


def _step_text(row: dict[str, Any]) -> str:
    mfu = f" mfu {percent_text(row['mfu'])}" if row["mfu"] is not None else ""
    numbers = f"loss {row['loss']:.3f} lr {row['learning_rate']:.1e}"
    return f"{numbers} {rate_text(row['tokens_per_s'])} tok/s{mfu}"


def _follow_with_bar(
    path: Path, start: int, plan: Plan, first_step: int, done: threading.Event, timings: bool
) -> None:
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=out, expand=True) as progress:
        task = progress.add_task(
            "starting ranks", total=plan.steps.last, completed=first_step, text=""
        )
        for row in _new_rows(path, start, done):
            if "loss" in row:
                progress.update(
                    task, completed=row["step"], description="training", text=_step_text(row)
                )
                if row["step"] == plan.steps.last:
                    progress.update(task, description="finishing")
            elif "eval_loss" in row:
                progress.console.print(_eval_text(row))
            elif timings and "start_seconds" in row:
                progress.console.print(_start_table(row))
            if text := _event_text(row):
                progress.console.print(text)


def _follow_with_lines(
    path: Path, start: int, plan: Plan, _first_step: int, done: threading.Event, timings: bool
) -> None:
    said = 0.0
    began: tuple[float, int] | None = None  # when the first step was seen, and which it was
    say(f"starting {plan.world_size} rank{'s' if plan.world_size > 1 else ''}")
    for row in _new_rows(path, start, done):
        now = time.monotonic()
        if text := _event_text(row):
            say(text)
        if timings and "start_seconds" in row:
            out.print(_start_table(row))
        elif "eval_loss" in row:
            say(_eval_text(row))
        elif "loss" in row and (now - said >= LINE_EVERY_S or row["step"] == plan.steps.last):
            said = now
            text = f"step {row['step']}/{plan.steps.last} {_step_text(row)}"
            if began is None:
                began = now, row["step"]
            else:
                pace = (now - began[0]) / max(1, row["step"] - began[1])
                left = timedelta(seconds=round(pace * (plan.steps.last - row["step"])))
                text += f" eta {left}"
            say(text)


def _start_table(row: dict[str, Any]) -> Table:
    """Seconds from the command to the end of its first step, a line a phase."""
    seconds = row["start_seconds"]
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


def _event_text(row: dict[str, Any]) -> str:
    """A line for what doesn't go straight on; empty for everything else."""
    step = f"step {row.get('step')}"
    if "skipped" in row:
        why = (
            "its loss spiked" if row["skipped"] == "spike" else f"its {row['skipped']} isn't finite"
        )
        return f"{step}: skipped, {why}"
    if "rolled_back_from" in row:
        batches = ", ".join(str(number) for number in row["left_out_batches"])
        went = f"back to {step} from step {row['rolled_back_from']}, whose loss spiked"
        return f"{went}; left out: global batches {batches}"
    return f"{step}: {row['checkpoint_error']}" if "checkpoint_error" in row else ""


def _eval_text(row: dict[str, Any]) -> str:
    loss = f"eval loss {row['eval_loss']:.4f} perplexity {row['perplexity']:.2f}"
    text = f"step {row['step']}: {loss} bits/byte {row['bits_per_byte']:.3f}"
    apart = [f"{key[10:]} {row[key]:.4f}" for key in row if key.startswith("eval_loss/")]
    return f"{text} ({', '.join(apart)})" if apart else text

"""What a person sees: the config, the plan, one progress bar or plain lines, and the result."""

import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.tree import Tree

from llama_pretrain.config.problems import Problem
from llama_pretrain.config.schema import Run
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.plan.plan import Plan
from llama_pretrain.runs.rundir import RunDir

LINE_EVERY_S = 5.0
GIB = 1 << 30

PIPE_WIDTH = 400
"""Where output is no terminal, a line that a person copies stays one line."""

out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
errors = Console(highlight=False, soft_wrap=True, stderr=True)


def say(message: str) -> None:
    """One plain line."""
    out.print(escape(message), soft_wrap=True)


def show_problems(problems: Sequence[Problem]) -> None:
    """Every mistake, one a line, on standard error."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    errors.print(f"[bold red]{count}, nothing was started:[/]")
    for problem in problems:
        errors.print(f"  {escape(str(problem))}")


def show_failure(message: str) -> None:
    """The error that ended a run, on standard error."""
    errors.print(f"[bold red]{escape(message)}[/]")


def show_config(run: Run) -> None:
    """The composed config as a tree."""
    tree = Tree("[bold]config[/]", guide_style="dim")
    _grow(tree, to_plain(run))
    out.print(tree)


def _grow(tree: Tree, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            _grow(tree.add(f"[bold cyan]{key}[/]"), value)
        else:
            tree.add(f"{key}: [green]{escape(_plain(value))}[/]")


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def show_plan(run: Run, plan: Plan, run_dir: RunDir | None) -> None:
    """What will happen, in a table of two columns."""
    table = _two_columns("plan")
    batch, steps, size, memory = plan.batch, plan.steps, plan.parameters, plan.memory
    precision, optim = run.precision.name.value, run.optim.name.value
    table.add_row("device", f"{plan.device}, {precision}, {optim}, ZeRO stage {run.zero.stage}")
    threads = f" x {run.launch.threads_per_process} threads" if plan.device == "cpu" else ""
    nodes = f" on {run.launch.nodes} machines" if run.launch.nodes > 1 else ""
    table.add_row("ranks", f"{plan.world_size}{nodes}{threads}")
    triangle = (
        f"{batch.global_batch_size} rows = {batch.micro_batch_size} micro"
        f" x {batch.gradient_accumulation_steps} accumulated x {plan.world_size} ranks"
    )
    table.add_row("global batch", triangle)
    decay = f"{size.decayed:,} with weight decay, {size.not_decayed:,} without"
    table.add_row("parameters", f"{size.total:,}: {decay}")
    per_step = f"{steps.total:,} of {steps.tokens_per_step:,} tokens = {steps.tokens:,} tokens"
    epochs = "" if steps.epochs is None else f", {steps.epochs:.2f} epochs"
    table.add_row("steps", per_step + epochs)
    rates = f"{plan.peak_learning_rate:g} after {steps.warmup} steps of warm-up"
    table.add_row(
        "learning rate", f"{rates}, {run.schedule.name.value} to {plan.final_learning_rate:g}"
    )
    table.add_row("compute", f"{plan.flops_per_token * steps.tokens:.2e} FLOP")
    parts = ", ".join(
        f"{name} {_size(value)}"
        for name, value in to_plain(memory).items()
        if name != "host" and value
    )
    host = f" + {_size(memory.host)} offloaded" if memory.host else ""
    table.add_row("memory a rank", f"{_size(memory.total)}{host} estimated: {parts}")
    if plan.corpus is not None:
        rows = f"{plan.corpus.train_rows:,} rows of {run.data.sequence_length} tokens"
        table.add_row("data", f"{run.data.name.value}: {rows}, {steps.eval_rows} for evaluation")
    if run_dir is not None:
        table.add_row("run directory", str(run_dir.path))
        table.add_row("again", shlex.join(["python", "run.py", f"reproduce={run_dir.path}"]))
    out.print(table)


def _two_columns(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.title_style = "bold"
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / (1 << 20):.0f} MiB"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def show_result(rows: Sequence[dict[str, Any]], run_dir: RunDir) -> None:
    """How the run ended, where things lie, and what to look at next."""
    table = _two_columns("result")
    summary: dict[str, Any] = next((row for row in reversed(rows) if "finished" in row), {})
    evaluations = [row for row in rows if "eval_loss" in row]
    if summary.get("train_loss") is not None:
        table.add_row(
            "train loss",
            f"{summary['train_loss']:.4f} (mean of the last {summary['train_loss_steps']} steps)",
        )
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        text = f"{last['eval_loss']:.4f}, from {first['eval_loss']:.4f} at step {first['step']}"
        table.add_row("eval loss", text)
        bits = f"{last['bits_per_byte']:.3f}"
        table.add_row("perplexity", f"{last['perplexity']:.2f}; bits per byte {bits}")
    table.add_row("tokens/s", f"{_rate(summary.get('median_tokens_per_s'))} (median)")
    table.add_row("MFU", f"{_percent(summary.get('median_mfu'))} (median)")
    table.add_row("peak memory", f"{_size(summary.get('peak_memory_bytes', 0))} (largest rank)")
    sample = run_dir.path / "sample.txt"
    if sample.is_file():
        text = " ".join(sample.read_text(encoding="utf-8").split())
        table.add_row("sample", escape(text if len(text) < 300 else text[:297] + "..."))
    for name, path in (
        ("run directory", run_dir.path),
        ("checkpoints", run_dir.checkpoints),
        ("export", run_dir.export),
        ("report", run_dir.report),
    ):
        if path.exists():
            table.add_row(name, str(path))
    if run_dir.tensorboard.exists():
        table.add_row("curves", shlex.join(["tensorboard", "--logdir", str(run_dir.tensorboard)]))
    out.print(table)


@contextmanager
def follow_metrics(run_dir: RunDir, plan: Plan, *, first_step: int) -> Iterator[None]:
    """Show metrics.jsonl as it grows: one bar on a terminal, else a line every few seconds."""
    done = threading.Event()
    start = run_dir.metrics.stat().st_size if run_dir.metrics.exists() else 0
    show = _follow_with_bar if out.is_terminal else _follow_with_lines
    thread = threading.Thread(
        target=show, args=(run_dir.metrics, start, plan, first_step, done), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _new_rows(path: Path, start: int, done: threading.Event) -> Iterator[dict[str, Any]]:
    """Rows as they are written; `{}` a few times a second when there is none; ends after `done`."""
    import json

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
    mfu = f" mfu {_percent(row['mfu'])}" if row["mfu"] is not None else ""
    numbers = f"loss {row['loss']:.3f} lr {row['learning_rate']:.1e}"
    return f"{numbers} {_rate(row['tokens_per_s'])} tok/s{mfu}"


def _follow_with_bar(
    path: Path, start: int, plan: Plan, first_step: int, done: threading.Event
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
            "starting ranks", total=plan.steps.total, completed=first_step, text=""
        )
        for row in _new_rows(path, start, done):
            if "loss" in row:
                progress.update(
                    task, completed=row["step"], description="training", text=_step_text(row)
                )
                if row["step"] == plan.steps.total:
                    progress.update(task, description="finishing")
            elif "eval_loss" in row:
                progress.console.print(_eval_text(row))


def _follow_with_lines(
    path: Path, start: int, plan: Plan, _first_step: int, done: threading.Event
) -> None:
    said = 0.0
    began: tuple[float, int] | None = None  # when the first step was seen, and which it was
    say(f"starting {plan.world_size} rank{'s' if plan.world_size > 1 else ''}")
    for row in _new_rows(path, start, done):
        now = time.monotonic()
        if "eval_loss" in row:
            say(_eval_text(row))
        elif "loss" in row and (now - said >= LINE_EVERY_S or row["step"] == plan.steps.total):
            said = now
            text = f"step {row['step']}/{plan.steps.total} {_step_text(row)}"
            if began is None:
                began = now, row["step"]
            else:
                pace = (now - began[0]) / max(1, row["step"] - began[1])
                left = timedelta(seconds=round(pace * (plan.steps.total - row["step"])))
                text += f" eta {left}"
            say(text)


def _eval_text(row: dict[str, Any]) -> str:
    loss = f"eval loss {row['eval_loss']:.4f} perplexity {row['perplexity']:.2f}"
    return f"step {row['step']}: {loss} bits/byte {row['bits_per_byte']:.3f}"

"""What a person sees: the config, the plan, one progress bar or plain lines, and the result."""

import json
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.tree import Tree

from llama_pretrain.config.deepspeed import DeepSpeed
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.rules import flatten
from llama_pretrain.config.schema import Run
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.plan.cost import CostPlan
from llama_pretrain.plan.fit import Fit
from llama_pretrain.plan.plan import Plan, Point, Steps
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
    values, defaults = to_plain(run), to_plain(DeepSpeed())
    # Twelve sections of DeepSpeed that are rarely touched: only what differs.
    changed = {key: value for key, value in values["deepspeed"].items() if value != defaults[key]}
    values["deepspeed"] = changed or "all at their defaults"
    _grow(tree, values)
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
    compute = f"{plan.flops_per_token * steps.tokens:.2e} FLOP ({plan.flops_per_token:.3g} a token)"
    table.add_row("compute", compute)
    parts = ", ".join(f"{name} {_size(value)}" for name, value in memory.parts.items() if value)
    verdict = "fits" if plan.fits else "[bold red]does not fit[/]"
    table.add_row(
        "memory a rank",
        f"{_size(memory.total)} at its peak ({memory.phase}), {verdict} in"
        f" {_size(plan.device_memory)}: {parts}",
    )
    for name, size_beside in (("host", memory.host), ("disk", memory.disk)):
        if size_beside:
            table.add_row(f"on the {name}", f"{_size(size_beside)} a rank")
    table.add_row("a rank keeps", f"{plan.parameters_per_rank:,} parameters")
    if plan.world_size > 1:
        traffic = plan.traffic
        between = traffic.between_machines
        away = f", {_size(between)} of it between machines" if between else ""
        table.add_row(
            "traffic",
            f"a rank sends {_size(traffic.total)} a step{away}: {_size(traffic.gather)} of"
            f" parameters, {_size(traffic.reduce)} of gradients ({traffic.volume:.3g}P)",
        )
    if plan.cost is not None:
        table.add_row("cost", _cost_text(plan.cost))
    if plan.corpus is not None:
        rows = f"{plan.corpus.train_rows:,} rows of {run.data.sequence_length} tokens"
        table.add_row("data", f"{run.data.name.value}: {rows}, {steps.eval_rows} for evaluation")
    if run_dir is not None:
        table.add_row("run directory", str(run_dir.path))
        table.add_row("again", shlex.join(["python", "run.py", f"reproduce={run_dir.path}"]))
    out.print(table)


def _cost_text(cost: CostPlan) -> str:
    text = f"{cost.hours:,.3g} hours at {cost.tokens_per_s:,.0f} tokens/s,"
    text += f" {cost.device_hours:,.3g} device-hours"
    if cost.kilowatt_hours is not None:
        text += f", {cost.kilowatt_hours:,.3g} kWh"
    return text if cost.price is None else f"{text}, {cost.price:,.2f} in money"


def show_cost(cost: CostPlan, *, steps: Steps, measured_over: int) -> None:
    """What a probe found."""
    table = _two_columns("probe")
    length = f"{steps.total:,} steps of {steps.tokens_per_step:,} tokens"
    table.add_row("the whole run", f"{length}: {_cost_text(cost)}")
    table.add_row("measured over", f"{measured_over} steps, without evaluation and checkpoints")
    table.add_row("to plan with it", f"task=plan plan.tokens_per_s={cost.tokens_per_s:.0f}")
    out.print(table)


def show_fits(fits: Sequence[Fit], *, limit: str) -> None:
    """What fits a memory, best first, and what doesn't."""
    table = Table(
        title=f"what fits in {limit}, with the largest micro batch of each",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("micro batch", "memory", "sends a step", "on the host"):
        table.add_column(name, justify="right")
    table.add_column("add", style="cyan", overflow="fold")
    for fit in fits:
        rows = "none" if fit.micro_batch_size is None else str(fit.micro_batch_size)
        host = _size(fit.memory.host) if fit.memory.host else "-"
        table.add_row(
            rows,
            _size(fit.memory.total),
            _size(fit.traffic),
            host,
            " ".join(fit.overrides),
            style="dim" if fit.micro_batch_size is None else None,
        )
    out.print(table)


def show_points(points: Sequence[Point]) -> int:
    """The plans of a sweep in one table. Returns the exit code: 1 if a point was refused."""
    table = Table(title="plans", title_justify="left", box=None, pad_edge=False)
    table.add_column("point", style="cyan", overflow="fold")
    for name in ("micro x accumulated x ranks", "weights", "gradients", "optimizer"):
        table.add_column(name, justify="right")
    for name in ("activations", "rest", "a rank", "sends a step", "fits"):
        table.add_column(name, justify="right")
    shared = set.intersection(*(set(point.words) for point in points))
    for point in points:
        label = " ".join(word for word in point.words if word not in shared) or "all alike"
        if point.plan is None:
            table.add_row(label, f"[red]{escape(point.problem)}[/]")
            continue
        plan, memory = point.plan, point.plan.memory
        batch = plan.batch
        shown = (
            memory.weights,
            memory.gradients,
            memory.master_weights + memory.optimizer,
            memory.activations + memory.logits,
        )
        table.add_row(
            label,
            f"{batch.micro_batch_size} x {batch.gradient_accumulation_steps} x {plan.world_size}",
            *(_size(size) for size in (*shown, memory.total - sum(shown), memory.total)),
            _size(plan.traffic.total),
            "yes" if plan.fits else "[bold red]no[/]",
        )
    out.print(table)
    return 1 if any(point.plan is None for point in points) else 0


def show_sources(config: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Where the values of the DeepSpeed JSON are from that aren't defaults."""
    table = Table(title="DeepSpeed's values", title_justify="left", box=None, pad_edge=False)
    for name in ("key", "value", "from"):
        table.add_column(name, overflow="fold")
    for path, value in flatten(config):
        if sources[path] != "default":
            table.add_row(path, escape(json.dumps(value)), escape(sources[path]))
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

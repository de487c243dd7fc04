"""What a person sees: the config, the plan, one progress bar or plain lines, and the result."""

import json
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from llama_pretrain.config.deepspeed import DeepSpeed
from llama_pretrain.config.problems import Problem
from llama_pretrain.config.rules import flatten
from llama_pretrain.config.schema import Run
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.plan.cost import CostPlan
from llama_pretrain.plan.fit import Fit
from llama_pretrain.plan.plan import Plan, Point, Steps
from llama_pretrain.runs.phases import NAMES
from llama_pretrain.runs.rundir import RunDir

if TYPE_CHECKING:
    from llama_pretrain.data.inspect import Inspection, SourceFacts

LINE_EVERY_S = 5.0
GIB = 1 << 30

PIPE_WIDTH = 400
"""Where output is no terminal, a line that a person copies stays one line."""

out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
errors = Console(highlight=False, soft_wrap=True, stderr=True)


def say(message: str) -> None:
    """One plain line."""
    out.print(escape(message), soft_wrap=True)


def note(message: str) -> None:
    """One plain line on standard error, for a task whose output is something else."""
    errors.print(escape(message))


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
    epochs = ""
    if steps.epochs is not None and len(steps.epochs) == 1:
        epochs = f", {next(iter(steps.epochs.values())):.2f} epochs"
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
        _add_sources(table, plan)
    _add_stages(table, run, plan)
    if run_dir is not None:
        table.add_row("run directory", str(run_dir.path))
        table.add_row("again", shlex.join(["python", "run.py", f"reproduce={run_dir.path}"]))
    out.print(table)


def _add_sources(table: Table, plan: Plan) -> None:
    """A line for each source of a mixture."""
    assert plan.corpus is not None
    if len(plan.corpus.sources) == 1 or plan.steps.epochs is None:
        return
    first = plan.sampling.stages[0]
    for source, quota in zip(plan.corpus.sources, first.quotas, strict=True):
        text = f"{plan.steps.epochs[source.name]:.2f} epochs of {source.train_rows:,} rows"
        table.add_row(f"  {source.name}", f"{text}, {quota / plan.sampling.block:.1%} at first")


def _add_stages(table: Table, run: Run, plan: Plan) -> None:
    """A line for each stage of the data, where there are several or rows are cut."""
    sampling, length = plan.sampling, run.data.sequence_length
    if len(sampling.stages) == 1 and sampling.stages[0].sequence_length == length:
        return
    for stage in sampling.stages:
        step = stage.first_sample // plan.batch.global_batch_size + 1
        text = f"rows of {stage.sequence_length} tokens"
        if len(sampling.names) > 1:
            shares = zip(sampling.names, stage.quotas, strict=True)
            text += ", " + ", ".join(f"{name} {q / sampling.block:.1%}" for name, q in shares)
        table.add_row(f"from step {step:,}", text)


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


@contextmanager
def taking_time(what: str) -> Iterator[None]:
    """What is under way while the block runs: its seconds count up on a terminal, else a line."""
    if not out.is_terminal:
        say(what)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    began = time.monotonic()
    with Progress(*columns, console=out, transient=True) as progress:
        progress.add_task(escape(what), total=None)
        yield
    say(f"{what} ({time.monotonic() - began:.0f} s)")


def _megabytes_a_second(num_bytes: int, began: float) -> str:
    seconds = max(1e-3, time.monotonic() - began)
    return f"{num_bytes / 1e6:.1f} MB at {num_bytes / 1e6 / seconds:.1f} MB/s"


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


def show_evaluation(row: dict[str, Any], run_dir: RunDir) -> None:
    """What task=evaluate has found: losses in nats a token."""
    table = _two_columns("evaluation")
    table.add_row("checkpoint", row["checkpoint"])
    table.add_row("loss", f"{row['eval_loss']:.6f}")
    table.add_row("perplexity", f"{row['perplexity']:.4f}")
    table.add_row("bits per byte", f"{row['bits_per_byte']:.5f}")
    for key in row:
        if key.startswith("eval_loss/"):
            table.add_row(f"loss on {key[10:]}", f"{row[key]:.6f}")
    table.add_row("tokens", f"{row['eval_tokens']:,}")
    table.add_row("written to", str(run_dir.path))
    out.print(table)


def show_verification(
    whole: Sequence[dict[str, Any]], cut: Sequence[dict[str, Any]], *, cut_at: int
) -> None:
    """The steps of two runs side by side, one of them cut after a step."""
    table = Table(title="resume", title_justify="left", box=None, pad_edge=False)
    for name in ("step", "loss", "after the cut", "gradient norm", "after the cut", "equal"):
        table.add_column(name, justify="right")
    after = {row["step"]: row for row in cut if "sample_hash" in row}
    for row in whole:
        if "sample_hash" not in row:
            continue
        other = after.get(row["step"], {})
        cells = [_number(side.get(key)) for key in ("loss", "grad_norm") for side in (row, other)]
        keys = ("loss", "grad_norm", "learning_rate", "sample_hash")
        equal = all(row.get(key) == other.get(key) for key in keys)
        mark = " (cut here)" if row["step"] == cut_at else ""
        table.add_row(f"{row['step']}{mark}", *cells, "yes" if equal else "[bold red]no[/]")
    out.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.9g}"


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
    mfu = f" mfu {_percent(row['mfu'])}" if row["mfu"] is not None else ""
    numbers = f"loss {row['loss']:.3f} lr {row['learning_rate']:.1e}"
    return f"{numbers} {_rate(row['tokens_per_s'])} tok/s{mfu}"


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

"""report.html: one self-contained page about a run.

What was asked, planned and done, what the model wrote, with what, and how to reproduce it.
"""

import shlex
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from llama_pretrain.files import read_json, read_regular
from llama_pretrain.runs.chart import Chart, Series, draw
from llama_pretrain.runs.contents import RunContents, Values, dig, flatten, read_contents
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import (
    CheckpointRow,
    EventRow,
    RollbackRow,
    Row,
    SampleRow,
    StepRow,
    SummaryRow,
    curve,
    evaluations,
    last,
    read_metrics,
    select,
    steps,
)
from llama_pretrain.runs.page import render_page
from llama_pretrain.runs.phases import NAMES
from llama_pretrain.runs.units import GIB, format_number, format_seconds, format_size, is_number

Table = list[tuple[str, ...]]

MAX_LISTED = 20
"""Checkpoints, events and skipped steps beyond these are only counted."""
MAX_SAMPLES = 10
MAIN_OPTIONS = (
    "data.name",
    "data.paths",
    "data.sequence_length",
    "tokenizer.name",
    "model.path",
    "optim.name",
    "optim.learning_rate",
    "schedule.name",
    "batch.global_batch_size",
    "train.max_steps",
    "train.max_tokens",
    "train.eval_every_steps",
    "checkpoint.every_steps",
    "precision.name",
    "zero.stage",
    "launch.num_processes",
    "seed",
)
"""Options that a reader looks for first; the whole config is folded below them."""


def render_report(run_dir: RunDir) -> str:
    """The HTML of a run that has ended. What its files do not record is left out."""
    run = read_contents(run_dir.path)
    return render_page(
        "run",
        title=run_dir.path.resolve().name,
        status=run.status.get("status"),
        facts=list(_facts(run)),
        again=shlex.join(["python", "run.py", f"reproduce={run_dir.path}"]),
        provenance=_all_values(run.provenance),
        **_asked(run),
        **_planned(run),
        **_reproduction(run_dir),
        **_happened(run),
        **_samples(run),
    )


def _facts(run: RunContents) -> Iterator[str]:
    """The header's line."""
    sizes = [dig(run.plan, f"parameters.{key}") for key in ("decayed", "not_decayed")]
    for form, value in (
        ("{} model", dig(run.config, "model.name")),
        ("{:,} parameters", None if None in sizes else sum(sizes)),
        ("{} data", dig(run.config, "data.name")),
        ("{:,} tokens", dig(run.plan, "steps.tokens")),
        ("{:,} steps", dig(run.plan, "steps.total")),
        ("world size {:,}", run.plan.get("world_size")),
        ("{}", run.plan.get("device")),
        ("{}", dig(run.config, "precision.name")),
        ("ZeRO stage {}", dig(run.config, "zero.stage")),
    ):
        if value is not None:
            yield form.format(value)


def _asked(run: RunContents) -> Values:
    """The command line, the main options, and the snapshot."""
    words = run.provenance.get("argv")
    options = {path: dig(run.config, path) for path in MAIN_OPTIONS}
    return {
        "command": shlex.join(["python", "run.py", *map(str, words)])
        if isinstance(words, list)
        else "",
        "settings": [
            (path, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
            for path, value in options.items()
            if value not in (None, [])
        ],
        "snapshot": _read_text(run.dir.snapshot),
    }


def _read_text(path: Path) -> str:
    try:
        return read_regular(path).decode("utf-8", errors="replace").rstrip()
    except OSError:
        return ""


def _planned(run: RunContents) -> Values:
    """The main figures, memory by part, and the whole plan."""
    plan = run.plan
    names = ("global_batch_size", "micro_batch_size", "gradient_accumulation_steps")
    ranks, shared = plan.get("world_size"), plan.get("sequence_parallel_size", 1)
    groups = ranks // shared if ranks and shared else None
    factors = [*(dig(plan, f"batch.{name}") for name in names), groups]
    triangle = ""
    if None not in factors:
        what = "ranks" if shared == 1 else f"x {shared} ranks that share sequences"
        triangle = "{:,} rows = {:,} micro x {:,} accumulated x {:,} ".format(*factors) + what
    rates = [plan.get(f"{name}_learning_rate") for name in ("peak", "final")]
    flops, tokens = plan.get("flops_per_token"), dig(plan, "steps.tokens")
    warmup = format_number(dig(plan, "steps.warmup"), ",")
    lines = [
        ("global batch", triangle),
        ("steps", format_number(dig(plan, "steps.total"), ",")),
        ("tokens per step", format_number(dig(plan, "steps.tokens_per_step"), ",")),
        ("tokens", format_number(tokens, ",")),
        ("warmup", f"{warmup} steps" if warmup else ""),
        ("learning rate", ", at the end ".join(f"{rate:g}" for rate in rates if is_number(rate))),
        ("compute", f"{flops * tokens:.3g} FLOP" if None not in (flops, tokens) else ""),
    ]
    parts = run.planned_memory
    memory = [(name.replace("_", " "), format_size(size)) for name, size in parts.items() if size]
    if memory:
        memory.append(("total", format_size(sum(parts.values()))))
        if is_number(plan.get("device_memory")):
            memory.append(("device memory", format_size(plan["device_memory"])))
    phase = dig(plan, "memory.phase")
    return {
        "planned": [line for line in lines if line[1]],
        "memory": memory,
        "memory_phase": f", in the phase {phase}" if phase else "",
        "plan": _all_values(plan),
    }


def _reproduction(run_dir: RunDir) -> Values:
    """The verdict of a reproduction, and what had drifted."""
    found = read_json(run_dir.reproduction) or {}
    return {
        "verdict": (found.get("verdict") or "not finished") if found else "",
        "drift": [
            (*(item[key] for key in ("path", "group", "before", "now")), item["asked"] and "yes")
            for item in found.get("drift", [])
        ],
    }


def _happened(run: RunContents) -> Values:
    """Figures, curves, events and checkpoints."""
    saves = [row for row in select(run.rows, CheckpointRow) if row.checkpoint]
    events = [text for row in run.rows if (text := _event(row))]
    if len(events) > MAX_LISTED:
        events[MAX_LISTED:] = [f"and {len(events) - MAX_LISTED:,} more"]
    return {
        "error": run.status.get("error"),
        "figures": [figure for figure in _figures(run) if figure[1]],
        "curves": list(_curves(run)),
        "starts": _starts(run.rows),
        "skipped": _skipped(steps(run.rows)),
        "restarts": run.status.get("restarts"),
        "events": events,
        "checkpoints": [
            (
                row.checkpoint,
                f"{row.step:,}",
                format_number(row.checkpoint_seconds, ".2f"),
                format_number(row.checkpoint_stall_seconds, ".2f"),
                "yes" if (run.dir.checkpoints / row.checkpoint).is_dir() else "no",
            )
            for row in saves[-MAX_LISTED:]
        ],
        "earlier_checkpoints": max(0, len(saves) - MAX_LISTED),
    }


def _figures(run: RunContents) -> Iterator[tuple[str, str, str]]:
    """Name, value and note of the numbers that a reader looks for first."""
    summary, evaluated = last(run.rows, SummaryRow), evaluations(run.rows)
    planned, seconds = sum(run.planned_memory.values()), run.seconds_by_step
    if summary is not None:
        loss = format_number(summary.train_loss, ".4f")
        yield "Training loss", loss, "mean of the last 20 steps"
    if evaluated:
        first, final = evaluated[0], evaluated[-1]
        note = f"from {first.eval_loss:.4f} at step {first.step}"
        yield "Evaluation loss", f"{final.eval_loss:.4f}", note
        yield "Perplexity", f"{final.perplexity:,.4g}", "last evaluation"
        yield "Bits per byte", f"{final.bits_per_byte:.3f}", "last evaluation"
    if summary is not None:
        peak = summary.peak_memory_bytes
        note = "largest rank"
        if planned:
            note = f"{peak / planned:.0%} of the {format_size(planned)} planned"
        yield "Tokens/s", f"{summary.median_tokens_per_s:,.0f}", "median, all ranks"
        yield "MFU", format_number(summary.median_mfu, ".1%"), "median"
        yield "Peak memory", format_size(peak), note
    time = format_seconds(sum(seconds.values())) if seconds else ""
    yield "Training time", time, "of the steps that count"


def _curves(run: RunContents) -> Iterator[Chart | None]:
    losses = [
        Series(name="training", points=curve(run.rows, "loss")),
        Series(name="evaluation", points=curve(run.rows, "eval_loss")),
    ]
    yield draw("Loss", losses, unit="nats per token", wide=True)
    for title, unit, name in (
        ("Learning rate", "of each step", "learning_rate"),
        ("Gradient norm", "before clipping", "grad_norm"),
        ("Throughput", "tokens/s", "tokens_per_s"),
    ):
        yield draw(title, [Series(points=curve(run.rows, name))], unit=unit, from_zero=True)
    peaks, planned = curve(run.rows, "memory_bytes", unit=GIB), sum(run.planned_memory.values())
    memory = [Series(name="measured", points=peaks)]
    if len(peaks) > 1 and planned:
        ends = [(tokens, planned / GIB) for tokens, _ in (peaks[0], peaks[-1])]
        memory.append(Series(name="planned", points=ends))
    yield draw("Memory", memory, unit="GiB, rank 0's peak so far", from_zero=True)
    found = evaluations(run.rows)
    names = sorted({name for row in found for name in row.by_source})
    by_source = [
        Series(
            name=name,
            points=[(row.tokens, row.by_source[name]) for row in found if name in row.by_source],
        )
        for name in names
    ]
    yield draw("Evaluation of each source", by_source, unit="nats per token", wide=True)


def _starts(rows: Sequence[Row]) -> Table:
    """Seconds of each phase, a column per start (a resumed run has several), under a heading."""
    starts = [row for row in select(rows, EventRow) if row.start_seconds]
    columns = [row.start_seconds for row in starts]
    if not columns:
        return []
    lines: Table = [("phase", *(f"to step {row.step}" for row in starts))]
    for name, text in NAMES.items():
        if any(name in column for column in columns):
            lines.append((text, *(format_number(column.get(name), ".2f") for column in columns)))
    return [*lines, ("total", *(f"{sum(column.values()):.2f}" for column in columns))]


def _skipped(rows: Sequence[StepRow]) -> str:
    """The steps at which the count of skipped steps rose."""
    counts = [(0, 0), *((row.step, row.skipped_steps) for row in rows)]
    at = [f"{step:,}" for (_, was), (step, now) in pairwise(counts) if now > was]
    if len(counts) == 1:
        return ""
    listed = ", ".join(at[:MAX_LISTED]) + (" and later" if len(at) > MAX_LISTED else "")
    return f"{counts[-1][1]}{f' (at {listed})' if at else ''}"


def _event(row: Row) -> str:
    """What a skipped step, a rollback, a restart, a resume or a failed save was."""
    text = ""
    match row:
        case StepRow(skipped="spike"):
            loss, score = format_number(row.loss, ".4f"), format_number(row.spike_z, ".1f")
            text = f"skipped, the loss of {loss} spiked ({score} standard deviations)"
        case StepRow() if row.skipped:
            text = f"skipped, its {row.skipped} was not finite"
        case RollbackRow():
            batches = ", ".join(map(str, row.skipped_batches))
            text = f"rolled back from step {row.rolled_back_from:,}, whose loss of"
            text += f" {row.spike_loss:.4f} spiked; skipped global batches {batches}"
        case EventRow() if row.resumed:
            text = f"resumed from here at {row.resumed}"
        case EventRow() if row.restarted:
            text = f"restarted from here after: {row.restarted}"
        case EventRow() if row.preempted:
            text = f"ended by {row.preempted}, with a checkpoint"
        case CheckpointRow():
            text = row.checkpoint_error
    return text and f"step {row.step:,}: {text}"


def _samples(run: RunContents) -> Values:
    """Generations after evaluations, from the first to the last, and that of the export."""
    rows = select(read_metrics(run.dir.samples), SampleRow)
    count = min(len(rows), MAX_SAMPLES)
    picked = [rows[index * (len(rows) - 1) // max(1, count - 1)] for index in range(count)]
    return {
        "prompt": dig(run.config, "train.sample_prompt"),
        "samples": [(f"step {row.step:,}, {row.tokens:,} tokens", row.text) for row in picked],
        "more_samples": len(rows) - count,
        "exported_sample": _read_text(run.dir.path / "sample.txt"),
    }


def _all_values(values: Values) -> Table:
    """Nested values as (name in words, text)."""
    found = flatten(values, separator=" · ") if values else {}
    return [(name.replace("_", " "), _format(name, value)) for name, value in found.items()]


def _format(name: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(item).strip() for item in value) or "none"
    if not is_number(value) or isinstance(value, bool):
        return "none" if value is None or value == {} else str(value)
    if name.startswith("memory · ") or name.endswith("_bytes"):
        return format_size(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"

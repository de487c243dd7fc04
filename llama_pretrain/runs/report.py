"""report.html: one page about a run that loads nothing from anywhere.

What was asked, what was planned, what happened, what the model wrote, with what, and how to do it
again.
"""

import json
import shlex
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from llama_pretrain.runs.chart import READOUT, chart, charts, curve, is_number
from llama_pretrain.runs.figures import format_seconds, format_size, seconds_of_steps
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics
from llama_pretrain.runs.page import Point, folded, render_page, section, table
from llama_pretrain.runs.phases import NAMES

Row = dict[str, Any]

MAX_NAMED = 20
"""Checkpoints and skipped steps beyond these are only counted."""
MAX_SAMPLES = 10
"""Texts that are shown, from the first to the last."""
GIB = 1 << 30
ASKED = (
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
"""Settings that a reader asks for first; the whole config is folded below them."""


def render_report(run_dir: RunDir) -> str:
    """The HTML of a run that has ended; what its files don't tell is left out."""
    rows, plan = read_metrics(run_dir.metrics), _load(run_dir.plan)
    provenance = _load(run_dir.provenance)
    sections = [
        _header(run_dir, plan=plan),
        section("What was asked", _asked(run_dir, provenance)),
        section("What was planned", _planned(plan)),
        section("Reproduction", _reproduction(run_dir)),
        section("What happened", _happened(run_dir, rows, plan=plan)),
        section("What the model wrote", _samples(run_dir)),
        section("Provenance", table(_flatten(provenance)), folded=True),
        section("Run it again", _again(run_dir)),
    ]
    return render_page(run_dir.path.resolve().name, sections, script=READOUT)


def _reproduction(run_dir: RunDir) -> str:
    """Of a run that does another one again: how far they are equal, and what had drifted."""
    found = _load(run_dir.reproduction)
    told = f"<p>{escape(found.get('told') or 'not finished')}</p>" if found else ""
    lines = [
        (item["path"], item["group"], item["before"], item["now"], "yes" if item["asked"] else "")
        for item in found.get("drift", [])
    ]
    head = ("what", "group", "then", "now", "asked for")
    return told + table(lines, head=head)


def _load(path: Path) -> Row:
    """A JSON or YAML file's mapping; empty where there is no file."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    values: Row = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    return values


def _dig(values: Any, *keys: str) -> Any:
    """A nested value, or `None` where a file lacks it."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _memory_parts(plan: Row) -> dict[str, float]:
    """Bytes that the plan expects on a rank's device, by part; `host` and `disk` lie elsewhere."""
    parts = plan.get("memory") or {}
    return {
        name: size
        for name, size in parts.items()
        if is_number(size) and name not in ("host", "disk")
    }


def _show(value: Any, form: str) -> str:
    return format(value, form) if is_number(value) else ""


def _header(run_dir: RunDir, *, plan: Row) -> str:
    status, config = _load(run_dir.status).get("status"), _load(run_dir.snapshot)
    sizes = [_dig(plan, "parameters", key) for key in ("decayed", "not_decayed")]
    facts = [
        ("{} model", _dig(config, "model", "name")),
        ("{:,} parameters", None if None in sizes else sum(sizes)),
        ("{} data", _dig(config, "data", "name")),
        ("{:,} tokens", _dig(plan, "steps", "tokens")),
        ("{:,} steps", _dig(plan, "steps", "total")),
        ("world size {:,}", plan.get("world_size")),
        ("{}", plan.get("device")),
        ("{}", _dig(config, "precision", "name")),
        ("ZeRO stage {}", _dig(config, "zero", "stage")),
    ]
    said = " · ".join(form.format(value) for form, value in facts if value is not None)
    badge = f' <span class="badge">{escape(status)}</span>' if status else ""
    name = escape(run_dir.path.resolve().name)
    return f"<header><h1>{name}{badge}</h1><p>{escape(said)}</p></header>"


def _asked(run_dir: RunDir, provenance: Row) -> str:
    """The command line, the main settings, and all of them."""
    words = provenance.get("argv")
    command = ""
    if isinstance(words, list):
        text = shlex.join(["python", "run.py", *(str(word) for word in words)])
        command = f"<pre>{escape(text)}</pre>"
    config = _load(run_dir.snapshot)
    known = ((path, _dig(config, *path.split("."))) for path in ASKED)
    lines = [(path, _setting(value)) for path, value in known if value not in (None, [])]
    settings = table(lines, head=("setting", "value"))
    return command + settings + folded("The whole config", _pre(run_dir.snapshot))


def _setting(value: Any) -> str:
    """A setting as one would write it."""
    return ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)


def _planned(plan: Row) -> str:
    """The main figures, memory by part, and the whole plan."""
    batch = plan.get("batch") or {}
    names = ("micro_batch_size", "gradient_accumulation_steps")
    factors = [*(batch.get(name) for name in names), plan.get("world_size")]
    rows = batch.get("global_batch_size")
    triangle = ""
    if rows is not None and None not in factors:
        triangle = "{:,} rows = {:,} micro x {:,} accumulated x {:,} ranks".format(rows, *factors)
    rates = [plan.get(f"{name}_learning_rate") for name in ("peak", "final")]
    sizes = [_dig(plan, "steps", name) for name in ("tokens_per_step", "tokens")]
    flops = plan.get("flops_per_token")
    lines = [
        ("global batch", triangle),
        ("steps", _show(_dig(plan, "steps", "total"), ",")),
        ("tokens of a step", _show(sizes[0], ",")),
        ("tokens", _show(sizes[1], ",")),
        ("warm-up", f"{text} steps" if (text := _show(_dig(plan, "steps", "warmup"), ",")) else ""),
        (
            "learning rate",
            ", at the end ".join(_show(rate, "g") for rate in rates if is_number(rate)),
        ),
        ("compute", f"{flops * sizes[1]:.3g} FLOP" if None not in (flops, sizes[1]) else ""),
    ]
    return (
        table([line for line in lines if line[1]])
        + _planned_memory(plan)
        + folded("The whole plan", table(_flatten(plan)))
    )


def _planned_memory(plan: Row) -> str:
    parts = _memory_parts(plan)
    lines = [(name.replace("_", " "), format_size(size)) for name, size in parts.items() if size]
    if not lines:
        return ""
    phase = _dig(plan, "memory", "phase")
    where = f", in the phase {phase}" if phase else ""
    total = [("in all", format_size(sum(parts.values())))]
    if is_number(plan.get("device_memory")):
        total.append(("the device has", format_size(plan["device_memory"])))
    title = f"Memory of a rank at its peak{where}"
    return table([*lines, *total], head=("part", "bytes"), caption=title)


def _happened(run_dir: RunDir, rows: Sequence[Row], *, plan: Row) -> str:
    """Figures, curves, what did not go straight on, and checkpoints."""
    status = _load(run_dir.status)
    summary: Row = next((row for row in reversed(rows) if "finished" in row), {})
    error = status.get("error")
    failed = f"<p>It ended with: {escape(str(error))}</p>" if error else ""
    events = _skipped(rows) + _restarts(status) + _events(rows)
    saves, starts = _checkpoints(run_dir, rows), _starts(rows)
    return (
        failed
        + _figures(rows, summary=summary, plan=plan)
        + _charts(rows, plan=plan)
        + (starts and f"<h3>From the command to its first step, seconds</h3>{starts}")
        + (events and f"<h3>Skipped steps, restarts, signals</h3>{events}")
        + (saves and f"<h3>Checkpoints</h3>{saves}")
    )


def _starts(rows: Sequence[Row]) -> str:
    """A column for each start of the run: a resumed one has had several."""
    starts = [row for row in rows if isinstance(row.get("start_seconds"), dict)]
    seconds = [row["start_seconds"] for row in starts]
    lines = [
        (text, *(_show(column.get(name), ".2f") for column in seconds))
        for name, text in NAMES.items()
        if any(is_number(column.get(name)) for column in seconds)
    ]
    if lines:
        totals = [sum(filter(is_number, column.values())) for column in seconds]
        lines.append(("together", *(f"{total:.2f}" for total in totals)))
    return table(lines, head=("phase", *(f"to step {row['step']}" for row in starts)))


def _restarts(status: Row) -> str:
    count = status.get("restarts")
    return f"<p>Restarts after a rank had failed: {count:,}</p>" if count else ""


def _figures(rows: Sequence[Row], *, summary: Row, plan: Row) -> str:
    """Cards of the numbers that one asks for first; losses in nats a token."""
    evaluations = [row for row in rows if is_number(row.get("eval_loss"))]
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    start = f"from {first['eval_loss']:.4f} at step {first['step']}" if first else ""
    peak, planned = summary.get("peak_memory_bytes"), sum(_memory_parts(plan).values())
    memory = "largest rank"
    if planned and is_number(peak):
        memory = f"{peak / planned:.0%} of the {format_size(planned)} planned"
    figures = [
        ("Training loss", _show(summary.get("train_loss"), ".4f"), "mean of the last 20 steps"),
        ("Evaluation loss", _show(last.get("eval_loss"), ".4f"), start),
        ("Perplexity", _show(last.get("perplexity"), ",.4g"), "last evaluation"),
        ("Bits per byte", _show(last.get("bits_per_byte"), ".3f"), "last evaluation"),
        ("Tokens/s", _show(summary.get("median_tokens_per_s"), ",.0f"), "median, all ranks"),
        ("MFU", _show(summary.get("median_mfu"), ".1%"), "median"),
        ("Peak memory", format_size(peak) if is_number(peak) else "", memory),
        ("Training time", _training_time(rows, plan), "of the steps that counted"),
    ]
    cards = "".join(
        f"<div><dt>{name}</dt><dd>{text}</dd><dd>{note}</dd></div>"
        for name, text, note in figures
        if text
    )
    return cards and f'<dl class="figures">{cards}</dl>'


def _training_time(rows: Sequence[Row], plan: Row) -> str:
    """Seconds of all steps, without evaluations and checkpoints."""
    seconds = seconds_of_steps(rows, tokens_per_step=_dig(plan, "steps", "tokens_per_step"))
    return format_seconds(sum(seconds.values())) if seconds else ""


def _charts(rows: Sequence[Row], *, plan: Row) -> str:
    loss = {"training": curve(rows, "loss"), "evaluation": curve(rows, "eval_loss")}
    sources = sorted({key for row in rows for key in row if key.startswith("eval_loss/")})
    by_source = {key.removeprefix("eval_loss/"): curve(rows, key) for key in sources}
    peaks, estimate = curve(rows, "memory_bytes", unit=GIB), sum(_memory_parts(plan).values())
    memory: dict[str, Sequence[Point]] = {"measured": peaks}
    if len(peaks) > 1 and estimate:
        memory["planned"] = [(x, estimate / GIB) for x, _ in (peaks[0], peaks[-1])]
    singles = (
        ("Learning rate", "of each step", "learning_rate"),
        ("Gradient norm", "before clipping", "grad_norm"),
        ("Throughput", "tokens/s", "tokens_per_s"),
    )
    return charts(
        [
            chart("Loss", unit="nats a token", lines=loss, wide=True),
            *(
                chart(title, unit=unit, lines={"": curve(rows, key)})
                for title, unit, key in singles
            ),
            chart("Memory", unit="GiB, rank 0's peak so far", lines=memory),
            chart("Evaluation of each source", unit="nats a token", lines=by_source, wide=True),
        ]
    )


def _pre(path: Path) -> str:
    """A file's text as it is."""
    if not path.is_file():
        return ""
    return f"<pre>{escape(path.read_text(encoding='utf-8', errors='replace').rstrip())}</pre>"


def _flatten(values: Row, prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (name in words, text)."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            found += _flatten(value, f"{name} · ")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for number, item in enumerate(value, start=1):
                found += _flatten(item, f"{name} · {item.get('name', number)} · ")
        elif isinstance(value, list):
            found.append((name, ", ".join(str(item).strip() for item in value) or "none"))
        elif value is None or isinstance(value, bool | str):
            found.append((name, "none" if value is None else str(value)))
        elif prefix == "memory · " or name.endswith(" bytes"):
            found.append((name, format_size(value)))
        else:
            found.append((name, f"{value:,}" if isinstance(value, int) else f"{value:.6g}"))
    return found


def _skipped(rows: Sequence[Row]) -> str:
    """The steps at which the count of skipped ones rose."""
    counts = [(0, 0), *((r["step"], r["skipped_steps"]) for r in rows if "skipped_steps" in r)]
    if len(counts) == 1:
        return ""
    steps = [f"{step:,}" for (_, was), (step, now) in pairwise(counts) if now > was]
    named = ", ".join(steps[:MAX_NAMED]) + (" and later" if len(steps) > MAX_NAMED else "")
    return f"<p>Skipped steps: {counts[-1][1]}{f' (at {named})' if steps else ''}</p>"


def _events(rows: Sequence[Row]) -> str:
    """What did not go straight on: skips with their reason, rollbacks, restarts, failed saves."""
    told = [text for row in rows if (text := _event(row))]
    more = f"<li>and {len(told) - MAX_NAMED:,} more</li>" if len(told) > MAX_NAMED else ""
    items = "".join(f"<li>{escape(text)}</li>" for text in told[:MAX_NAMED])
    return items and f"<ul>{items}{more}</ul>"


def _event(row: Row) -> str:
    step = f"step {row['step']:,}"
    if row.get("skipped") == "spike":
        loss, score = _show(row.get("loss"), ".4f"), _show(row.get("spike_z"), ".1f")
        return f"{step}: skipped, the loss of {loss} spiked ({score} standard deviations)"
    if "skipped" in row:
        return f"{step}: skipped, its {row['skipped']} was not finite"
    if "rolled_back_from" in row:
        batches = ", ".join(str(number) for number in row["left_out_batches"])
        loss = _show(row.get("spike_loss"), ".4f")
        start = f"{step}: back from step {row['rolled_back_from']:,}, whose loss of {loss} spiked"
        return f"{start}; left out: global batches {batches}"
    if "resumed" in row:
        return f"{step}: resumed from here at {row['resumed']}"
    if "restarted" in row:
        return f"{step}: started again from here, after: {row['restarted']}"
    if "preempted" in row:
        return f"{step}: ended by {row['preempted']}, with a checkpoint"
    return f"{step}: {row['checkpoint_error']}" if "checkpoint_error" in row else ""


def _checkpoints(run_dir: RunDir, rows: Sequence[Row]) -> str:
    saves = [row for row in rows if "checkpoint" in row]
    lines = []
    for row in saves[-MAX_NAMED:]:
        kept = (run_dir.checkpoints / row["checkpoint"]).is_dir()
        seconds = _show(row.get("checkpoint_seconds"), ".2f")
        stall = _show(row.get("checkpoint_stall_seconds"), ".2f")
        kept_text = "yes" if kept else "no"
        lines.append((row["checkpoint"], f"{row['step']:,}", seconds, stall, kept_text))
    earlier = len(saves) - len(lines)
    told = f"<p>{earlier:,} earlier checkpoints are not listed.</p>" if earlier else ""
    return told + table(
        lines, head=("checkpoint", "step", "seconds to save", "seconds waited", "kept")
    )


def _samples(run_dir: RunDir) -> str:
    """Texts after evaluations, from the first to the last, and that of the export."""
    rows = [row for row in read_metrics(run_dir.samples) if "text" in row]
    count = min(len(rows), MAX_SAMPLES)
    picked = [rows[index * (len(rows) - 1) // max(1, count - 1)] for index in range(count)]
    prompt = _dig(_load(run_dir.snapshot), "train", "sample_prompt")
    shown = ""
    for row in picked:
        place = f"step {row['step']:,}, {row['tokens']:,} tokens"
        shown += f"<h3>{place}</h3><pre>{escape(str(row['text']))}</pre>"
    if len(rows) > count:
        shown += f"<p>{len(rows) - count:,} more are in samples.jsonl.</p>"
    if text := _pre(run_dir.path / "sample.txt"):
        shown += f"<h3>The exported model, drawing at random</h3>{text}"
    return shown and (f"<p>Prompt: {escape(str(prompt))}</p>" if prompt else "") + shown


def _again(run_dir: RunDir) -> str:
    command = shlex.join(["python", "run.py", f"reproduce={run_dir.path}"])
    return f"<pre>{escape(command)}</pre>"

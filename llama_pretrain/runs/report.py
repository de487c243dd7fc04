"""report.html: one page about a run that loads nothing from anywhere."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from llama_pretrain.runs.page import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Point,
    place,
    render_page,
    section,
    table,
    tick_label,
    ticks,
)
from llama_pretrain.runs.rundir import RunDir, read_metrics

Row = dict[str, Any]

MAX_POINTS = 2000
"""Of a curve: more than a screen has columns."""
MAX_NAMED = 20
"""Checkpoints and skipped steps beyond these are only counted."""
GIB = 1 << 30


def render_report(run_dir: RunDir) -> str:
    """The HTML of a finished run; what its files don't tell is left out."""
    rows, plan = read_metrics(run_dir.metrics), _load(run_dir.plan)
    summary: Row = next((row for row in reversed(rows) if "finished" in row), {})
    command = shlex.join(["python", "run.py", f"reproduce={run_dir.path}"])
    sections = [
        _header(run_dir, plan=plan),
        section("Key figures", _figures(rows, summary=summary, plan=plan)),
        section("Reproduction", _reproduction(run_dir)),
        section("Curves", _charts(rows, plan=plan)),
        section(
            "Checkpoints and skipped steps",
            _skipped(rows) + _events(rows) + _checkpoints(run_dir, rows),
        ),
        section("Sample", _sample(run_dir)),
        section("Run it again", f"<pre>{escape(command)}</pre>"),
        section("What was planned", table(_flatten(plan))),
        section("Config", _pre(run_dir.snapshot), folded=True),
        section("Provenance", table(_flatten(_load(run_dir.provenance))), folded=True),
    ]
    return render_page(run_dir.path.resolve().name, sections, script=SCRIPT)


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


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _points(rows: Sequence[Row], key: str, *, unit: float = 1) -> list[Point]:
    """A curve against tokens, without the values that are no numbers."""
    pairs = ((row.get("tokens"), row.get(key)) for row in rows)
    return [(x, y / unit) for x, y in pairs if _is_number(x) and _is_number(y)]


def _estimate(plan: Row) -> int | None:
    """Bytes that the plan expects on a rank's device; `host` lies elsewhere."""
    parts = plan.get("memory")
    return (
        None
        if parts is None
        else sum(size for name, size in parts.items() if name not in ("phase", "host", "disk"))
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.0f} MiB"


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


def _figures(rows: Sequence[Row], *, summary: Row, plan: Row) -> str:
    """Cards of the numbers that one asks for first; losses in nats a token."""
    evaluations = [row for row in rows if _is_number(row.get("eval_loss"))]
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    start = f"from {first['eval_loss']:.4f} at step {first['step']}" if first else ""
    peak, estimate = summary.get("peak_memory_bytes"), _estimate(plan)
    memory = "largest rank" if estimate is None else f"the plan estimated {_size(estimate)}"
    if plan.get("device") == "cpu":
        memory += ", without libraries"
    figures = [
        ("Training loss", _show(summary.get("train_loss"), ".4f"), "mean of the last 20 steps"),
        ("Evaluation loss", _show(last.get("eval_loss"), ".4f"), start),
        ("Perplexity", _show(last.get("perplexity"), ",.4g"), "last evaluation"),
        ("Bits per byte", _show(last.get("bits_per_byte"), ".3f"), "last evaluation"),
        ("Tokens/s", _show(summary.get("median_tokens_per_s"), ",.0f"), "median, all ranks"),
        ("MFU", _show(summary.get("median_mfu"), ".1%"), "median"),
        ("Peak memory", _size(peak) if _is_number(peak) else "", memory),
    ]
    cards = "".join(
        f"<div><dt>{name}</dt><dd>{text}</dd><dd>{note}</dd></div>"
        for name, text, note in figures
        if text
    )
    return cards and f'<dl class="figures">{cards}</dl>'


def _show(value: Any, form: str) -> str:
    return format(value, form) if _is_number(value) else ""


def _charts(rows: Sequence[Row], *, plan: Row) -> str:
    loss = {"training": _points(rows, "loss"), "evaluation": _points(rows, "eval_loss")}
    peaks, estimate = _points(rows, "memory_bytes", unit=GIB), _estimate(plan)
    memory = {"measured": peaks}
    if len(peaks) > 1 and estimate is not None:
        memory["planned"] = [(x, estimate / GIB) for x, _ in (peaks[0], peaks[-1])]
    drawn = (
        _chart("Loss", unit="nats a token", lines=loss, wide=True)
        + _chart("Learning rate", unit="of each step", lines={"": _points(rows, "learning_rate")})
        + _chart("Gradient norm", unit="before clipping", lines={"": _points(rows, "grad_norm")})
        + _chart("Throughput", unit="tokens/s", lines={"": _points(rows, "tokens_per_s")})
        + _chart("Memory", unit="GiB, rank 0's peak so far", lines=memory)
    )
    return drawn and f'<div class="charts">{drawn}</div>'


def thin(points: Sequence[Point], *, limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: of each stretch its lowest and its highest, so that spikes stay."""
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(len(points) / (limit // 2))
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        by_value = sorted(points[start : start + stretch], key=lambda point: point[1])
        kept += sorted({by_value[0], by_value[-1]})
    return kept


def _chart(
    title: str, *, unit: str, lines: Mapping[str, Sequence[Point]], wide: bool = False
) -> str:
    """A figure against tokens; empty where no line has two points.

    The y axis of a wide one need not begin at 0.
    """
    thinned = {name: thin(points) for name, points in lines.items() if len(points) > 1}
    xs = [x for points in thinned.values() for x, _ in points]
    ys = [y for points in thinned.values() for _, y in points]
    if max(xs, default=0) <= 0:
        return ""
    y_ticks = ticks(min(ys) if wide else min(0, *ys), max(ys))
    x_range, y_range = (0, max(xs)), (y_ticks[0], y_ticks[-1])
    plot = (LEFT, RIGHT, TOP, BOTTOM)
    axes = json.dumps({"x": x_range, "y": y_range, "plot": plot, "names": list(thinned)})
    keys = [f'<span class="key line{i}">{name}</span>' for i, name in enumerate(thinned) if name]
    ends = {name: (lines[name][0][1], lines[name][-1][1]) for name in thinned}
    told = [f"{name} from {first:.4g} to {last:.4g}" for name, (first, last) in ends.items()]
    curves = [
        _curve(points, index=index, x_range=x_range, y_range=y_range)
        for index, points in enumerate(thinned.values())
    ]
    return f"""
<figure class="{"wide" if wide else "narrow"}">
<figcaption><h3>{title}</h3>{"".join(keys)}</figcaption>
<svg viewBox="0 0 360 220" role="img" data-axes="{escape(axes)}"
 aria-label="{title} ({unit}) against tokens">
<desc>{"; ".join(told).strip()}</desc>
<text class="readout" x="{LEFT}" y="12">{unit}</text>
<text class="end" x="{RIGHT}" y="{BOTTOM + 33}">tokens</text>
{_grid(y_ticks, x_range=x_range)}{"".join(curves)}<path class="cursor" d=""/>
</svg>
</figure>"""


def _grid(y_ticks: Sequence[float], *, x_range: Point) -> str:
    drawn = ""
    for tick in y_ticks:
        y = place(tick, (y_ticks[0], y_ticks[-1]), to=(BOTTOM, TOP))
        drawn += f'<path class="grid" d="M{LEFT} {y:.2f}H{RIGHT}"/>'
        drawn += f'<text class="end" x="{LEFT - 6}" y="{y + 4:.2f}">{tick_label(tick)}</text>'
    for tick in ticks(*x_range):
        if tick <= x_range[1]:
            x = place(tick, x_range, to=(LEFT, RIGHT))
            drawn += f'<path class="grid" d="M{x:.2f} {BOTTOM}v4"/>'
            drawn += f'<text class="mid" x="{x:.2f}" y="{BOTTOM + 17}">{tick_label(tick)}</text>'
    return drawn


def _curve(points: Sequence[Point], *, index: int, x_range: Point, y_range: Point) -> str:
    placed = (
        f"{place(x, x_range, to=(LEFT, RIGHT)):.2f},{place(y, y_range, to=(BOTTOM, TOP)):.2f}"
        for x, y in points
    )
    return f'<polyline class="line{index}" points="{" ".join(placed)}"/>'


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
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for number, item in enumerate(value, start=1):
                found += _flatten(item, f"{name} · {item.get('name', number)} · ")
        elif isinstance(value, list):
            found.append((name, ", ".join(str(item).strip() for item in value) or "none"))
        elif value is None or isinstance(value, bool | str):
            found.append((name, "none" if value is None else str(value)))
        elif prefix == "memory · " or name.endswith(" bytes"):
            found.append((name, _size(value)))
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


def _sample(run_dir: RunDir) -> str:
    text = _pre(run_dir.path / "sample.txt")
    prompt = _dig(_load(run_dir.snapshot), "train", "sample_prompt")
    return text and (f"<p>Prompt: {escape(prompt)}</p>" if prompt else "") + text


SCRIPT = """
const tokens = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 4});
for (const svg of document.querySelectorAll("svg")) {
  const {x, y, plot: [left, right, top, bottom], names} = JSON.parse(svg.dataset.axes);
  const readout = svg.querySelector(".readout"), cursor = svg.querySelector(".cursor");
  const unit = readout.textContent;
  const lines = [...svg.querySelectorAll("polyline")].map(line =>
    line.getAttribute("points").split(" ").map(pair => pair.split(",").map(Number)));
  const value = (at, from, to, [low, high]) => low + (at - from) / (to - from) * (high - low);
  const show = event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const near = lines.map(points =>
      points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    const said = near.map(([, height], i) =>
      `${names[i]} ${Number(value(height, bottom, top, y).toPrecision(4))}`);
    readout.textContent = `${tokens.format(value(near[0][0], left, right, x))}: ${said.join(", ")}`;
    cursor.setAttribute("d", `M${near[0][0]} ${top}V${bottom}`);
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => {
    readout.textContent = unit;
    cursor.setAttribute("d", "");
  });
}
addEventListener("beforeprint", () =>
  document.querySelectorAll("details").forEach(details => { details.open = true; }));
"""

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

from llama_pretrain.runs.rundir import RunDir, read_metrics

Row = dict[str, Any]
Point = tuple[float, float]
"""(tokens, value)."""

MAX_POINTS = 2000
"""Of a curve: more than a screen has columns."""
MAX_NAMED = 20
"""Checkpoints and skipped steps beyond these are only counted."""
LEFT, RIGHT, TOP, BOTTOM = 56, 344, 24, 184
"""The plot in a chart's viewBox of 360 x 220, whose units are a phone's CSS pixels."""
GIB = 1 << 30


def render_report(run_dir: RunDir) -> str:
    """The HTML of a finished run; what its files don't tell is left out."""
    rows, plan = read_metrics(run_dir.metrics), _load(run_dir.plan)
    summary: Row = next((row for row in reversed(rows) if "finished" in row), {})
    command = shlex.join(["python", "run.py", f"reproduce={run_dir.path}"])
    sections = [
        _header(run_dir, plan=plan),
        _section("Key figures", _figures(rows, summary=summary, plan=plan)),
        _section("Curves", _charts(rows, plan=plan)),
        _section("Checkpoints and skipped steps", _skipped(rows) + _checkpoints(run_dir, rows)),
        _section("Sample", _sample(run_dir)),
        _section("Run it again", f"<pre>{escape(command)}</pre>"),
        _section("What was planned", _table(_flatten(plan))),
        _section("Config", _pre(run_dir.snapshot), folded=True),
        _section("Provenance", _table(_flatten(_load(run_dir.provenance))), folded=True),
    ]
    title, body = escape(run_dir.path.resolve().name), "\n".join(filter(None, sections))
    return PAGE.format(title=title, style=STYLE, script=SCRIPT, body=body)


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


def _ticks(low: float, high: float) -> list[float]:
    """Multiples of a round step, about five, from below `low` to above `high`."""
    rough = (high - low) / 5 or abs(high) / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _tick_label(value: float) -> str:
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{suffix}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{value:.4g}" if not 0 < abs(value) < 0.01 else f"{float(mantissa):g}e{int(exponent)}"


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
    y_ticks = _ticks(min(ys) if wide else min(0, *ys), max(ys))
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


def _place(value: float, span: Point, *, to: Point) -> float:
    return to[0] + (value - span[0]) / (span[1] - span[0]) * (to[1] - to[0])


def _grid(y_ticks: Sequence[float], *, x_range: Point) -> str:
    drawn = ""
    for tick in y_ticks:
        y = _place(tick, (y_ticks[0], y_ticks[-1]), to=(BOTTOM, TOP))
        drawn += f'<path class="grid" d="M{LEFT} {y:.2f}H{RIGHT}"/>'
        drawn += f'<text class="end" x="{LEFT - 6}" y="{y + 4:.2f}">{_tick_label(tick)}</text>'
    for tick in _ticks(*x_range):
        if tick <= x_range[1]:
            x = _place(tick, x_range, to=(LEFT, RIGHT))
            drawn += f'<path class="grid" d="M{x:.2f} {BOTTOM}v4"/>'
            drawn += f'<text class="mid" x="{x:.2f}" y="{BOTTOM + 17}">{_tick_label(tick)}</text>'
    return drawn


def _curve(points: Sequence[Point], *, index: int, x_range: Point, y_range: Point) -> str:
    placed = (
        f"{_place(x, x_range, to=(LEFT, RIGHT)):.2f},{_place(y, y_range, to=(BOTTOM, TOP)):.2f}"
        for x, y in points
    )
    return f'<polyline class="line{index}" points="{" ".join(placed)}"/>'


def _section(title: str, body: str, *, folded: bool = False) -> str:
    if not body:
        return ""
    if folded:
        return f"<details><summary><h2>{title}</h2></summary>{body}</details>"
    return f"<section><h2>{title}</h2>{body}</section>"


def _pre(path: Path) -> str:
    """A file's text as it is."""
    if not path.is_file():
        return ""
    return f"<pre>{escape(path.read_text(encoding='utf-8', errors='replace').rstrip())}</pre>"


def _table(rows: Sequence[Sequence[str]], *, head: Sequence[str] = ("what", "value")) -> str:
    """A table whose first column names its rows."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = ""
    for name, *cells in rows:
        values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f'<tr><th scope="row">{escape(name)}</th>{values}</tr>'
    return body and f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _flatten(values: Row, prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (name in words, text)."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            found += _flatten(value, f"{name} · ")
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


def _checkpoints(run_dir: RunDir, rows: Sequence[Row]) -> str:
    saves = [row for row in rows if "checkpoint" in row]
    lines = []
    for row in saves[-MAX_NAMED:]:
        kept = (run_dir.checkpoints / row["checkpoint"]).is_dir()
        seconds = _show(row.get("checkpoint_seconds"), ".2f")
        lines.append((row["checkpoint"], f"{row['step']:,}", seconds, "yes" if kept else "no"))
    earlier = len(saves) - len(lines)
    told = f"<p>{earlier:,} earlier checkpoints are not listed.</p>" if earlier else ""
    return told + _table(lines, head=("checkpoint", "step", "seconds to save", "kept"))


def _sample(run_dir: RunDir) -> str:
    text = _pre(run_dir.path / "sample.txt")
    prompt = _dig(_load(run_dir.snapshot), "train", "sample_prompt")
    return text and (f"<p>Prompt: {escape(prompt)}</p>" if prompt else "") + text


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main><script>{script}</script></body>
</html>
"""

STYLE = """
:root { --page: #fff; --text: #1b1f24; --dim: #59636e; --edge: #d8dee4; --soft: #f3f5f8;
  --line0: #1f66d1; --line1: #c2410c }
@media screen and (prefers-color-scheme: dark) { :root { --page: #12151a; --text: #e6e9ee;
  --dim: #9aa4b1; --edge: #333a45; --soft: #1b2027; --line0: #6aa5ff; --line1: #ffa057 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1240px; margin: auto; padding: 1rem }
h1 { margin: 0; font-size: 1.7rem } h3 { margin: 0; font-size: 1rem }
h2 { margin: 2rem 0 .6rem; font-size: 1.25rem } summary h2 { display: inline }
summary { cursor: pointer; margin: 1.5rem 0 .6rem }
header p, dt, dd + dd, tbody th { color: var(--dim); font-weight: 400 }
.badge { font-size: .9rem; padding: .15em .7em; border: 1px solid; border-radius: 1em }
.figures { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)) }
.figures > div, pre { background: var(--soft); border-radius: .5rem; padding: .6rem .8rem }
dd { margin: 0; font-size: 1.4rem; font-weight: 600 } dt, dd + dd, .key { font-size: .85rem }
.charts { display: grid; gap: 1.2rem } figure { margin: 0; min-width: 0 }
figcaption { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline }
.key::before { content: ""; display: inline-block; width: 1.6em; margin-right: .4em;
  border-top: 2px solid var(--line0); vertical-align: middle }
.key.line1::before { border-top: 2px dashed var(--line1) }
svg { display: block; width: 100%; height: auto; touch-action: pan-y }
text { font-size: 13px; fill: var(--dim) } .end { text-anchor: end } .mid { text-anchor: middle }
path, polyline { fill: none; vector-effect: non-scaling-stroke }
.grid { stroke: var(--edge) } .cursor { stroke: var(--dim) }
.line0 { stroke: var(--line0); stroke-width: 1.5 }
.line1 { stroke: var(--line1); stroke-width: 2.5; stroke-dasharray: 7 4 }
table { border-collapse: collapse; width: 100%; max-width: 60rem; font-size: .92rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--edge) }
th, td:not(:last-child) { overflow-wrap: break-word }
pre { white-space: pre-wrap; margin: 0; font: .87rem/1.45 ui-monospace, monospace }
@media (min-width: 600px) { .charts { grid-template-columns: 1fr 1fr } .wide { grid-column: span 2 }
  .wide text { font-size: 8px } }
@media (min-width: 1000px) { .charts { grid-template-columns: repeat(4, 1fr) }
  .wide { grid-row: span 2 } }
@media print { figure, tr, dl > div { break-inside: avoid } h2 { break-after: avoid } }
"""

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

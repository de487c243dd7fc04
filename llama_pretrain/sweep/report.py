"""report.html of a sweep: one page that compares its points, and loads nothing from anywhere."""

import math
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from statistics import mean
from urllib.parse import quote

from llama_pretrain.config.sweep import Objective
from llama_pretrain.runs.chart import thin
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics
from llama_pretrain.runs.page import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Point,
    place,
    render_page,
    section,
    tick_label,
    ticks,
)
from llama_pretrain.sweep.directory import Row, SweepDir, SweepRecord, rank_rows

MIB = 1 << 20


MAX_CURVES = 60
"""Of the best points; more than these are a carpet."""


CURVE_POINTS = 300


LOG_FROM = 8
"""An axis is logarithmic where its largest value is so many times its smallest."""


TITLES = {
    Objective.eval_loss: ("evaluation loss", "nats a token"),
    Objective.train_loss: ("training loss", "nats a token, mean of the last steps"),
    Objective.tokens_per_s: ("throughput", "tokens/s, median"),
    Objective.peak_memory_bytes: ("peak memory", "MiB, largest rank"),
}


def render_sweep_report(folder: SweepDir, record: SweepRecord, rows: Sequence[Row]) -> str:
    """The HTML of a sweep, as far as it has come."""
    ranked = rank_rows(rows, record.objective)
    colours = {row["index"]: _colour(place) for place, row in enumerate(ranked)}
    objective, _ = TITLES[record.objective]
    measured = [key for key in Objective if any(value_of(row, key) is not None for row in ranked)]
    others = [key for key in measured if key is not record.objective]
    sections = [
        _header(folder, record, rows),
        section(
            f"{objective.capitalize()} over each swept value",
            _scatters(record, ranked, [record.objective]),
        ),
        section("Curves of all points", _curves(folder, ranked, colours)),
        section("Throughput, memory and losses", _scatters(record, ranked, others)),
        section("Points", _table(folder, record, rows, colours)),
        section("Run it again", f"<pre>{escape(shlex.join(record.command))}</pre>"),
    ]
    name = folder.path.resolve().name
    return render_page(name, sections, script=SCRIPT, style=STYLE)


def value_of(row: Row, key: Objective) -> float | None:
    """A measure of a row in the unit that the page shows."""
    value = row[key.value]
    if value is None or not math.isfinite(value):
        return None
    return value / MIB if key is Objective.peak_memory_bytes else float(value)


def _colour(place: int) -> str:
    """Of the golden angle: neighbours differ, and no two are alike."""
    return f"hsl({(215 + place * 137.508) % 360:.0f} 62% 46%)"


def _header(folder: SweepDir, record: SweepRecord, rows: Sequence[Row]) -> str:
    states = [row["status"] for row in rows]
    counts = " · ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    swept = ", ".join(record.swept) or "nothing"
    best = rank_rows(rows, record.objective)[:1]
    told = ""
    if best:
        title, unit = TITLES[record.objective]
        value = value_of(best[0], record.objective)
        told = f"<p>Best {title}: <strong>{value:.6g}</strong> {unit}, with "
        told += f"{escape(best[0]['label'])}</p>"
    name = escape(folder.path.resolve().name)
    said = f"{len(rows)} points: {counts} · swept: {swept}"
    return f"<header><h1>{name}</h1><p>{escape(said)}</p>{told}</header>"


def _scatters(record: SweepRecord, ranked: Sequence[Row], keys: Sequence[Objective]) -> str:
    drawn = "".join(
        _scatter(setting, key, ranked)
        for key in keys
        for setting in record.swept
        if len({row["settings"].get(setting) for row in ranked}) > 1 or len(record.swept) == 1
    )
    return drawn and f'<div class="charts">{drawn}</div>'


class Axis:
    """Where values of a setting lie: by their size where they are numbers, else side by side."""

    def __init__(self, texts: Sequence[str]):
        self.values = list(dict.fromkeys(texts))
        numbers = [to_number(text) for text in self.values]
        self.numbers: dict[str, float] = {}
        if len(numbers) > 1 and all(number is not None for number in numbers):
            known = [number for number in numbers if number is not None]
            self.is_log = min(known) > 0 and max(known) / min(known) >= LOG_FROM
            scale = math.log if self.is_log else float
            self.numbers = {
                text: scale(number) for text, number in zip(self.values, known, strict=True)
            }
            self.values.sort(key=lambda text: self.numbers[text])

    def x(self, text: str) -> float:
        """In the units of the picture."""
        if self.numbers:
            span = (min(self.numbers.values()), max(self.numbers.values()))
            return place(self.numbers[text], span, to=(LEFT + 20, RIGHT - 20))
        return LEFT + (RIGHT - LEFT) * (self.values.index(text) + 0.5) / len(self.values)

    def labels(self) -> str:
        """The values under the axis, as many as there is room for."""
        room = max(1, (RIGHT - LEFT) // 48)
        every = -(-len(self.values) // room)
        drawn = ""
        for value in self.values[::every]:
            text, x = value, self.x(value)
            number = to_number(text)
            if number is not None and len(text) > 6:
                text = tick_label(number)
            short = text if len(text) <= 14 else f"{text[:13]}…"
            drawn += f'<path class="grid" d="M{x:.1f} {BOTTOM}v4"/>'
            drawn += f'<text class="mid" x="{x:.1f}" y="{BOTTOM + 17}">{escape(short)}</text>'
        return drawn


def to_number(text: str) -> float | None:
    """A setting's value, where it is a finite number."""
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _scatter(setting: str, key: Objective, ranked: Sequence[Row]) -> str:
    """A measure over a setting: a dot a point, and a line through the means."""
    found = [
        (row["settings"][setting], value, row["label"])
        for row in sorted(ranked, key=lambda row: row["index"])
        if setting in row["settings"] and (value := value_of(row, key)) is not None
    ]
    if not found:
        return ""
    axis = Axis([text for text, _, _ in found])
    values = [value for _, value, _ in found]
    lines = ticks(min(values), max(values))
    span = (lines[0], lines[-1])
    title, unit = TITLES[key]
    dots = "".join(
        f'<circle cx="{axis.x(text):.1f}" cy="{place(value, span, to=(BOTTOM, TOP)):.1f}" r="4">'
        f"<title>{escape(label)}: {value:.6g}</title></circle>"
        for text, value, label in found
    )
    means = [
        (axis.x(text), mean(value for at, value, _ in found if at == text)) for text in axis.values
    ]
    through = " ".join(f"{x:.1f},{place(value, span, to=(BOTTOM, TOP)):.1f}" for x, value in means)
    told = "; ".join(
        f"{text}: {value:.4g}" for text, (_, value) in zip(axis.values, means, strict=True)
    )
    scale = ", logarithmic" if axis.numbers and axis.is_log else ""
    return f"""
<figure>
<figcaption><h3>{title.capitalize()} over {escape(setting)}</h3></figcaption>
<svg viewBox="0 0 360 220" role="img" aria-label="{escape(f"{title} ({unit}) over {setting}")}">
<desc>means: {escape(told)}</desc>
<text x="{LEFT}" y="12">{unit}</text>
<text class="end" x="{RIGHT}" y="{BOTTOM + 33}">{escape(setting)}{scale}</text>
{_levels(lines)}{axis.labels()}<polyline class="mean" points="{through}"/>{dots}
</svg>
</figure>"""


def _levels(lines: Sequence[float]) -> str:
    drawn = ""
    for line in lines:
        y = place(line, (lines[0], lines[-1]), to=(BOTTOM, TOP))
        drawn += f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
        drawn += f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{tick_label(line)}</text>'
    return drawn


def _curves(folder: SweepDir, ranked: Sequence[Row], colours: Mapping[int, str]) -> str:
    shown = ranked[:MAX_CURVES]
    metrics = {
        row["index"]: read_metrics(RunDir(folder.path / row["run_dir"]).metrics) for row in shown
    }
    labels = {row["index"]: row["label"] for row in shown}
    drawn = ""
    for key, title in (("eval_loss", "Evaluation loss"), ("loss", "Training loss")):
        lines = {}
        for row in shown:
            points = [
                (line["tokens"], line[key])
                for line in metrics[row["index"]]
                if line.get(key) is not None
            ]
            if len(points) > 1:
                lines[row["index"]] = thin(points, limit=CURVE_POINTS)
        drawn += _overlay(title, lines, labels=labels, colours=colours)
    keys = "".join(
        f'<li><i style="background:{colours[row["index"]]}"></i>{escape(row["label"])}</li>'
        for row in shown
    )
    more = len(ranked) - len(shown)
    left = f"<p>{more} more points are not drawn.</p>" if more else ""
    return drawn and f'<div class="overlays">{drawn}</div><ul class="keys">{keys}</ul>{left}'


def _overlay(
    title: str,
    lines: Mapping[int, Sequence[Point]],
    *,
    labels: Mapping[int, str],
    colours: Mapping[int, str],
) -> str:
    """Curves of many points against tokens, one over the other."""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    if not xs or max(xs) <= 0:
        return ""
    levels = ticks(min(ys), max(ys))
    x_span, y_span = (0, max(xs)), (levels[0], levels[-1])
    drawn = ""
    for index, points in lines.items():
        path = " ".join(
            f"{place(x, x_span, to=(LEFT, RIGHT)):.1f},{place(y, y_span, to=(BOTTOM, TOP)):.1f}"
            for x, y in points
        )
        said = escape(f"{labels[index]}: {points[-1][1]:.4f} at the end")
        drawn += f'<polyline style="stroke:{colours[index]}" data-label="{said}" points="{path}"/>'
    for tick in ticks(*x_span):
        if tick <= x_span[1]:
            x = place(tick, x_span, to=(LEFT, RIGHT))
            drawn += f'<text class="mid" x="{x:.1f}" y="{BOTTOM + 17}">{tick_label(tick)}</text>'
    told = "; ".join(f"{labels[index]}: {points[-1][1]:.4g}" for index, points in lines.items())
    return f"""
<figure>
<figcaption><h3>{title}</h3></figcaption>
<svg class="overlay" viewBox="0 0 360 220" role="img" aria-label="{title} against tokens">
<desc>at the end: {escape(told)}</desc>
<text class="readout" x="{LEFT}" y="12">nats a token</text>
<text class="end" x="{RIGHT}" y="{BOTTOM + 33}">tokens</text>
{_levels(levels)}{drawn}
</svg>
</figure>"""


def _table(
    folder: SweepDir, record: SweepRecord, rows: Sequence[Row], colours: Mapping[int, str]
) -> str:
    """Every point; a click on a heading sorts."""
    keys = [key for key in Objective if any(value_of(row, key) is not None for row in rows)]
    names = ["point", *record.swept, "status", *(TITLES[key][0] for key in keys), "steps"]
    names.append("reason")
    head = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escape(name)}</button></th>'
        for name in names
    )
    body = ""
    for row in rows:
        swatch = f'<i style="background:{colours.get(row["index"], "transparent")}"></i>'
        link = f"{row['run_dir']}/report.html"
        text = str(row["index"])
        if (folder.path / link).is_file():
            text = f'<a href="{escape(quote(link))}">{text}</a>'
        cells = [(f"{swatch}{text}", str(row["index"]))]
        for key in record.swept:
            text = row["settings"].get(key, "")
            cells.append((escape(text), text))
        cells.append((row["status"], row["status"]))
        for measure in keys:
            value = value_of(row, measure)
            is_loss = measure in (Objective.eval_loss, Objective.train_loss)
            cells.append(_cell(value, ".4f" if is_loss else ",.0f"))
        cells.append(_cell(row["steps"], ","))
        cells.append((escape(row["reason"]), row["reason"]))
        body += "<tr>" + "".join(
            f'<td data-value="{escape(value)}">{text}</td>' for text, value in cells
        )
        body += "</tr>"
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="All points">'
        f'<table class="sortable"><caption>A heading sorts by its column.</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: float | None, form: str) -> tuple[str, str]:
    """A number as it is read, and as it is sorted by."""
    return ("", "") if value is None else (format(value, form), str(value))


STYLE = """
.charts, .overlays { display: grid; gap: 1.2rem }
@media (min-width: 600px) { .charts { grid-template-columns: 1fr 1fr } }
@media (min-width: 1000px) { .charts { grid-template-columns: repeat(3, 1fr) }
  .overlays { grid-template-columns: 1fr 1fr } .overlays text { font-size: 8px } }
circle { fill: var(--line0); fill-opacity: .75 } .mean { stroke: var(--line0); stroke-opacity: .45 }
.overlay polyline { stroke-width: 1.5 } .overlay polyline.faint { stroke-opacity: .15 }
.overlay polyline.near { stroke-width: 3 }
.keys { columns: 18rem; padding: 0; margin: .6rem 0; list-style: none; font-size: .85rem }
.keys li { display: flex; align-items: baseline; break-inside: avoid }
.keys i, td i { flex: none; display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .5em; vertical-align: -.05em }
.scroll { overflow-x: auto } .sortable { max-width: none }
.sortable td, .sortable th { white-space: nowrap }
.sortable td:last-child { white-space: normal; min-width: 16rem }
caption { text-align: left; color: var(--dim); font-size: .85rem }
th button { all: unset; cursor: pointer; font-weight: 600 }
th button:focus-visible { outline: 2px solid var(--line0) }
th[aria-sort=ascending] button::after { content: " ▲" }
th[aria-sort=descending] button::after { content: " ▼" }
@media print { .sortable td, .sortable th { white-space: normal } .scroll { overflow: visible } }
"""


SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const falling = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const value = row => row.cells[column].dataset.value;
    const number = text => text.trim() === "" ? NaN : Number(text.replaceAll("_", ""));
    const rows = [...body.rows].sort((a, b) => {
      const [left, right] = [value(a), value(b)];
      if ((left === "") !== (right === "")) return left === "" ? 1 : -1;
      const difference = number(left) - number(right);
      const order = Number.isNaN(difference) ? left.localeCompare(right) : difference;
      return falling ? -order : order;
    });
    body.append(...rows);
  }));
}
for (const svg of document.querySelectorAll("svg.overlay")) {
  const readout = svg.querySelector(".readout"), unit = readout.textContent;
  const lines = [...svg.querySelectorAll("polyline")].map(line => ({line, points:
    line.getAttribute("points").split(" ").map(pair => pair.split(",").map(Number))}));
  const show = event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    const away = ({points}) =>
      Math.min(...points.map(([left, top]) => Math.hypot(left - x, top - y)));
    const near = lines.reduce((a, b) => away(b) < away(a) ? b : a);
    for (const {line} of lines) {
      line.classList.toggle("near", line === near.line);
      line.classList.toggle("faint", line !== near.line);
    }
    readout.textContent = near.line.dataset.label;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => {
    readout.textContent = unit;
    for (const {line} of lines) line.classList.remove("near", "faint");
  });
}
"""

"""What our HTML pages share: one file that loads nothing from anywhere."""

import math
from collections.abc import Sequence
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 56, 344, 24, 184
"""The plot in a chart's viewBox of 360 x 220, whose units are a phone's CSS pixels."""

Point = tuple[float, float]


def render_page(title: str, body: Sequence[str], *, script: str = "", style: str = "") -> str:
    """A page of sections; empty ones are left out."""
    return PAGE.format(
        title=escape(title),
        style=STYLE + style,
        script=script + PRINTING,
        body="\n".join(filter(None, body)),
    )


def section(title: str, body: str, *, folded: bool = False) -> str:
    """A heading and what is under it; nothing where there is nothing."""
    if not body:
        return ""
    if folded:
        return f"<details><summary><h2>{title}</h2></summary>{body}</details>"
    return f"<section><h2>{title}</h2>{body}</section>"


def folded(title: str, body: str) -> str:
    """Something long inside a section that opens on request; nothing where there is nothing."""
    return body and f"<details><summary>{escape(title)}</summary>{body}</details>"


def table(
    rows: Sequence[Sequence[str]],
    *,
    head: Sequence[str] = ("what", "value"),
    caption: str = "",
) -> str:
    """A table whose first column names its rows. A wide one scrolls by itself, not the page."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = ""
    for name, *cells in rows:
        values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f'<tr><th scope="row">{escape(name)}</th>{values}</tr>'
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    drawn = f"<table>{told}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    label = escape(caption or f"table of {', '.join(head)}")
    return (
        body and f'<div class="scroll" tabindex="0" role="group" aria-label="{label}">{drawn}</div>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Multiples of a round step, about five, from below `low` to above `high`."""
    rough = (high - low) / 5 or abs(high) / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def tick_label(value: float) -> str:
    """A number on an axis, as short as it can be."""
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{suffix}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{value:.4g}" if not 0 < abs(value) < 0.01 else f"{float(mantissa):g}e{int(exponent)}"


def place(value: float, span: Point, *, to: Point) -> float:
    """Where a value of one range lies in another."""
    return to[0] + (value - span[0]) / (span[1] - span[0]) * (to[1] - to[0])


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
  --line0: #1f66d1; --line1: #c2410c; --line2: #15803d; --line3: #7e22ce; --line4: #be185d;
  --line5: #0e7490; --line6: #854d0e; --line7: #4b5563 }
@media screen and (prefers-color-scheme: dark) { :root { --page: #12151a; --text: #e6e9ee;
  --dim: #9aa4b1; --edge: #333a45; --soft: #1b2027; --line0: #6aa5ff; --line1: #ffa057;
  --line2: #4ade80; --line3: #c084fc; --line4: #f472b6; --line5: #22d3ee; --line6: #facc15;
  --line7: #cbd5e1 } }
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
  border-top: 2px solid var(--line); vertical-align: middle }
.key:is(.line1, .line3, .line5, .line7)::before { border-top-style: dashed }
.readout { margin: 0; min-height: 1.5em; font-size: .85rem; color: var(--dim) }
svg { display: block; width: 100%; height: auto; touch-action: pan-y }
text { font-size: 13px; fill: var(--dim) } .end { text-anchor: end } .mid { text-anchor: middle }
path, polyline { fill: none; vector-effect: non-scaling-stroke }
.grid { stroke: var(--edge) } .cursor { stroke: var(--dim) }
.line0 { --line: var(--line0) } .line1 { --line: var(--line1) } .line2 { --line: var(--line2) }
.line3 { --line: var(--line3) } .line4 { --line: var(--line4) } .line5 { --line: var(--line5) }
.line6 { --line: var(--line6) } .line7 { --line: var(--line7) }
polyline { stroke: var(--line); stroke-width: 1.5 }
.line1, .line3, .line5, .line7 { stroke-width: 2.5; stroke-dasharray: 7 4 }
.scroll { overflow-x: auto } .scroll + .scroll, pre + .scroll { margin-top: 1rem }
section > h3 { margin: 1.2rem 0 .4rem }
caption { text-align: left; color: var(--dim); font-size: .85rem }
table { border-collapse: collapse; width: 100%; max-width: 60rem; font-size: .92rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--edge) }
th { overflow-wrap: break-word } td { min-width: 5.5rem }
pre { white-space: pre-wrap; margin: 0; font: .87rem/1.45 ui-monospace, monospace }
@media (min-width: 600px) { .charts { grid-template-columns: 1fr 1fr } .wide { grid-column: span 2 }
  .wide text { font-size: 8px } }
@media (min-width: 1000px) { .charts { grid-template-columns: repeat(4, 1fr) }
  .wide { grid-row: span 2 } }
@media print { @page { margin: 15mm } body { font-size: 10pt } main { max-width: none; padding: 0 }
  figure, tr, dl > div { break-inside: avoid } h2, h3, summary { break-after: avoid }
  .scroll { overflow: visible } .charts { grid-template-columns: 1fr 1fr }
  .readout { display: none } details::details-content { content-visibility: visible; height: auto }
  .wide { grid-column: span 2; grid-row: auto } * { print-color-adjust: exact } }
"""

PRINTING = """
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  closed.forEach(details => { details.open = true; });
});
addEventListener("afterprint", () => closed.forEach(details => { details.open = false; }));
"""
"""What is folded is printed too."""

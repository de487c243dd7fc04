"""Models, tables and the plot of benchmarks/throughput.py."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "img" / "throughput.svg"
BLOCKS = {
    "defaults": ("ours", "trainer", "bare"),
    "best": ("ours_best", "trainer_compile", "bare_compile"),
}
"""The arms that take turns, ours first; ratios are to the two others."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model's shape."""

    base: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    warm_steps: int

    @property
    def words(self) -> list[str]:
        """Overrides that make it."""
        return [
            f"model={self.base}",
            f"model.vocab_size={self.vocab_size}",
            f"model.hidden_size={self.hidden_size}",
            f"model.intermediate_size={self.intermediate_size}",
            f"model.num_hidden_layers={self.num_layers}",
            f"model.num_attention_heads={self.num_heads}",
            "model.max_position_embeddings=2048",
        ]


SIZES = {
    "6m": Size(
        base="tiny",
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_layers=4,
        num_heads=4,
        warm_steps=5,
    ),
    "35m": Size(
        base="tiny",
        vocab_size=32_000,
        hidden_size=384,
        intermediate_size=1024,
        num_layers=6,
        num_heads=6,
        warm_steps=5,
    ),
    "125m": Size(
        base="130m",
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        warm_steps=3,
    ),
    "1b": Size(
        base="tiny",
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=16,
        num_heads=16,
        warm_steps=3,
    ),
}


def flops_per_token(size: Size, *, row: int) -> int:
    """Operations of forward and backward for one token; the module's docstring has the formula."""
    width = size.hidden_size
    layer = 4 * width**2 + 3 * width * size.intermediate_size
    products = size.num_layers * layer + size.vocab_size * width
    return 6 * products + 6 * size.num_layers * width * row


@dataclass(frozen=True, kw_only=True)
class Line:
    """An arm in a table."""

    arm: str
    tokens_per_s: float
    mfu: float
    ratio_to_trainer: float | None
    ratio_to_bare: float | None
    peak_bytes: int
    first_step_s: float


def lines_of(result: Mapping[str, Any]) -> list[Line]:
    """The lines of a cell's table: medians, and medians of each round's ratios."""
    lines = []
    for block, found in result["blocks"].items():
        arms = found["arms"]

        def ratio(name: str, other: str, arms: Mapping[str, Any] = arms) -> float | None:
            if other not in arms:
                return None
            pairs = zip(arms[name]["tokens_per_s"], arms[other]["tokens_per_s"], strict=True)
            return float(statistics.median(mine / theirs for mine, theirs in pairs))

        _, trainer, bare = BLOCKS[block]
        for name, arm in arms.items():
            pairs = zip(arm["tokens_per_s"], found["ceiling_gflops"], strict=True)
            shares = [rate * result["flops_per_token"] / (top * 1e9) for rate, top in pairs]
            lines.append(
                Line(
                    arm=name,
                    tokens_per_s=statistics.median(arm["tokens_per_s"]),
                    mfu=statistics.median(shares),
                    ratio_to_trainer=ratio(name, trainer),
                    ratio_to_bare=ratio(name, bare),
                    peak_bytes=arm["peak_bytes"],
                    first_step_s=arm["first_step_s"],
                )
            )
    return lines


def render_table(result: Mapping[str, Any]) -> str:
    """A cell's table, as text."""

    def shown(ratio: float | None) -> str:
        return "-" if ratio is None else f"{ratio:.2f}"

    heads = ("arm", "tokens/s", "MFU", "/trainer", "/bare", "peak MiB", "1st step s")
    cells = [
        (
            line.arm,
            f"{line.tokens_per_s:,.0f}",
            f"{line.mfu:.2f}",
            shown(line.ratio_to_trainer),
            shown(line.ratio_to_bare),
            f"{line.peak_bytes / 2**20:,.0f}",
            f"{line.first_step_s:.1f}",
        )
        for line in lines_of(result)
    ]
    rows = [f"{result['size']}, rows of {result['row']}"]
    rows += [
        name.ljust(16) + "".join(f"{cell:>12}" for cell in own) for name, *own in (heads, *cells)
    ]
    for block, found in result["blocks"].items():
        rows.append(
            f"{block}: ceiling {statistics.median(found['ceiling_gflops']):,.0f} GFLOP/s (median);"
            f" losses differ by {found['largest_loss_difference']:.4f} at most"
            f" (tolerance {found['tolerance']})"
        )
    return "\n".join(rows)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a cell's file; of one that is there, the blocks that were not run stay."""
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))["blocks"]
        result = {**result, "blocks": {**old, **result["blocks"]}}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


COLOURS = {"ours": "#1f6f8b", "trainer": "#c9803a", "bare": "#8a8f98"}
PANEL_W, PANEL_H, BAR_H, LABEL_W = 430, 210, 22, 120


def render_plot(results: Sequence[Mapping[str, Any]]) -> str:
    """A panel of bars a cell, as SVG: tokens/s, and the ratio to the Trainer of the same block."""
    sizes = [size for size in SIZES if any(result["size"] == size for result in results)]
    rows = sorted({result["row"] for result in results})
    width, height = PANEL_W * len(rows), PANEL_H * len(sizes) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"',
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="#222">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for result in results:
        left, top = PANEL_W * rows.index(result["row"]), PANEL_H * sizes.index(result["size"])
        parts.append(f'<g transform="translate({left} {top})">{_panel(result)}</g>')
    note = "tokens/s, median of rounds; in brackets: times Trainer, or Trainer with torch_compile"
    parts.append(f'<text x="12" y="{height - 8}" fill="#555">{escape(note)}</text></svg>')
    return "\n".join(parts) + "\n"


def _panel(result: Mapping[str, Any]) -> str:
    lines = lines_of(result)
    scale = (PANEL_W - LABEL_W - 120) / max(line.tokens_per_s for line in lines)
    title = f"{result['size']} parameters, rows of {result['row']}"
    parts = [f'<text x="12" y="24" font-weight="bold">{escape(title)}</text>']
    for place, line in enumerate(lines):
        y, length = 38 + place * (BAR_H + 5), line.tokens_per_s * scale
        colour = COLOURS[line.arm.partition("_")[0]]
        ratio = "" if line.ratio_to_trainer is None else f" ({line.ratio_to_trainer:.2f}x)"
        parts.append(
            f'<text x="{LABEL_W - 6}" y="{y + 15}" text-anchor="end">{escape(line.arm)}</text>'
            f'<rect x="{LABEL_W}" y="{y}" width="{length:.1f}" height="{BAR_H}" fill="{colour}"/>'
            f'<text x="{LABEL_W + length + 5:.1f}" y="{y + 15}">{line.tokens_per_s:,.0f}{ratio}'
            "</text>"
        )
    return "".join(parts)


def plot() -> None:
    """Draw what lies in the results."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("throughput-*.json"))]
    if not found:
        sys.exit(f"no throughput-*.json in {RESULTS}: run the benchmark first")
    PLOT.write_text(render_plot(found), encoding="utf-8")
    print(PLOT)

"""Throughput and memory as a run grows (ranks, accumulation, rows), and with each kernel.

    python benchmarks/scale.py [--rounds 5] [--match ranks]
    python benchmarks/scale.py --plot

Each point is `python run.py` of the 6M model for a few steps, its data cached; kernels are shown on
the 35M model with rows of 1,024. Points take turns, round after round. Throughput is the median
of the steps after the first two, then of the rounds; memory is the largest rank's peak. With more
ranks than cores the curve shows what ranks cost, not what they bring.
"""

import argparse
import json
import os
import re
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, ROOT, train_alone, write_record
from benchmarks.throughput_report import SIZES
from benchmarks.turns import TOKENS_PER_STEP
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import last_value, read_metrics
from llama_pretrain.runs.metrics import steps as step_rows

PLOT = ROOT / "docs" / "img" / "scale.svg"
STEPS = 10
TOKENS = 2048
"""Of a micro batch, where nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run of a curve."""

    curve: str
    at: str
    """Its place on the axis."""
    words: tuple[str, ...]


def list_points() -> list[Point]:
    """All points, by curve."""
    cores = os.cpu_count() or 1
    points = []
    words: tuple[str, ...]
    for ranks, threads in ((1, 1), (1, cores), (cores, 1), (2 * cores, 1)):
        words = (
            f"launch.num_processes={ranks}",
            f"launch.threads_per_process={threads}",
            "data.sequence_length=512",
            "batch.global_batch_size=16",
            "batch.micro_batch_size=4",
        )
        points.append(Point(curve="ranks x threads", at=f"{ranks} x {threads}", words=words))
    for number in (1, 2, 4, 8):
        words = (
            "data.sequence_length=512",
            "batch.micro_batch_size=4",
            f"batch.gradient_accumulation_steps={number}",
        )
        points.append(Point(curve="accumulation", at=str(number), words=words))
    for length in (128, 256, 512, 1024, 2048, 4096):
        micro = max(1, TOKENS // length)
        words = (
            f"data.sequence_length={length}",
            f"batch.micro_batch_size={micro}",
            "batch.gradient_accumulation_steps=1",
        )
        points.append(Point(curve="tokens of a row", at=str(length), words=words))
    for micro in (1, 2, 4, 8, 16):
        words = (
            "data.sequence_length=512",
            f"batch.micro_batch_size={micro}",
            "batch.gradient_accumulation_steps=1",
        )
        points.append(Point(curve="rows of a micro batch", at=str(micro), words=words))
    return points + list(_list_kernels())


def _list_kernels() -> Iterator[Point]:
    """`kernels=plain` with one of the others at a time, and all that go together."""
    one_more = {
        "plain": (),
        **{name: (name,) for name in ONE_MORE},
        "auto": ("kernels=auto",),
        "compiled": ("kernels=compiled",),
    }
    size, row = "35m", 1024
    for name, words in one_more.items():
        yield Point(
            curve=f"kernels, {size} x {row}",
            at=name.removeprefix("kernels."),
            words=(
                *SIZES[size].words,
                *(words if name in ("auto", "compiled") else ("kernels=plain", *words)),
                f"data.sequence_length={row}",
                f"batch.global_batch_size={TOKENS_PER_STEP['cpu'] // row}",
            ),
        )


ONE_MORE = (
    "kernels.attention=blocked",
    "kernels.loss=chunked",
    "kernels.rms_norm=fused",
    "kernels.rotary=fused",
    "kernels.swiglu=fused",
    "kernels.matmul=fp32",
    "kernels.allocator=keep",
    "kernels.compile=layers",
    "kernels.compile=model",
)


def measure(point: Point, folder: Path) -> dict[str, float]:
    """Tokens a second and peak bytes of one run.

    Raises:
        SystemExit: if it fails.
    """
    steps = ("model.max_position_embeddings=4096", f"train.max_steps={STEPS}")
    train_alone(folder, *steps, *point.words)
    rows = read_metrics(RunDir(folder).metrics)
    rates = [row.tokens_per_s for row in step_rows(rows)]
    return {
        "tokens_per_s": statistics.median(rates[2:]),
        "peak_bytes": last_value(rows, "peak_memory_bytes") or 0.0,
    }


def run(points: list[Point], *, rounds: int) -> list[dict[str, Any]]:
    """Every point, in turns."""
    found: list[dict[str, Any]] = [
        {"curve": point.curve, "at": point.at, "words": point.words, "rounds": []}
        for point in points
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            for place, point in enumerate(points):
                folder = Path(scratch) / f"{number}-{place}"
                found[place]["rounds"].append(measure(point, folder))
            print(f"round {number + 1} of {rounds} is done", flush=True)
    for line in found:
        for key in ("tokens_per_s", "peak_bytes"):
            line[key] = statistics.median(each[key] for each in line["rounds"])
    return found


def show(found: list[dict[str, Any]]) -> None:
    """A table."""
    curve = ""
    for line in found:
        if line["curve"] != curve:
            curve = line["curve"]
            print(f"\n{curve:24}{'tokens/s':>12}{'peak MiB':>12}")
        print(f"{line['at']:24}{line['tokens_per_s']:>12,.0f}{line['peak_bytes'] / 2**20:>12,.0f}")


PANEL_W, BAR_H = 420, 22


def draw(found: list[dict[str, Any]]) -> str:
    """A panel a curve, as SVG: bars of tokens/s, and memory beside them."""
    curves = list(dict.fromkeys(line["curve"] for line in found))
    panels = [[line for line in found if line["curve"] == curve] for curve in curves]
    pairs = [panels[place : place + 2] for place in range(0, len(panels), 2)]
    heights = [60 + (BAR_H + 5) * max(map(len, pair)) for pair in pairs]
    width, height = 2 * PANEL_W, sum(heights)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"',
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="#222">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for number, pair in enumerate(pairs):
        for place, lines in enumerate(pair):
            where = f"translate({PANEL_W * place} {sum(heights[:number])})"
            parts.append(f'<g transform="{where}">{_panel(lines[0]["curve"], lines)}</g>')
    return "\n".join(parts) + "</svg>\n"


def _panel(curve: str, lines: list[dict[str, Any]]) -> str:
    scale = 130 / max(line["tokens_per_s"] for line in lines)
    title = f"tokens/s and peak MiB by {curve}"
    parts = [f'<text x="12" y="24" font-weight="bold">{escape(title)}</text>']
    for place, line in enumerate(lines):
        y, length = 38 + place * (BAR_H + 5), line["tokens_per_s"] * scale
        said = f"{line['tokens_per_s']:,.0f} ({line['peak_bytes'] / 2**20:,.0f} MiB)"
        parts.append(
            f'<text x="144" y="{y + 15}" text-anchor="end">{escape(line["at"])}</text>'
            f'<rect x="150" y="{y}" width="{length:.1f}" height="{BAR_H}" fill="#1f6f8b"/>'
            f'<text x="{155 + length:.1f}" y="{y + 15}">{said}</text>'
        )
    return "".join(parts)


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--match", default="", help="only points whose name this expression finds")
    parser.add_argument("--results", type=Path, help="write there, though it be some curves")
    parser.add_argument("--plot", action="store_true", help="draw the results, run nothing")
    options = parser.parse_args()
    if options.plot:
        record = json.loads((RESULTS / "scale.json").read_text())
        PLOT.write_text(draw(record["points"]), encoding="utf-8")
        return
    points = [
        point for point in list_points() if re.search(options.match, f"{point.curve}, {point.at}")
    ]
    found = run(points, rounds=options.rounds)
    show(found)
    if options.results or not options.match:
        packages = ("torch", "transformers", "deepspeed")
        folder = options.results or RESULTS
        write_record("scale", {"points": found}, packages=packages, folder=folder)


if __name__ == "__main__":
    main()

"""The result of a run, an evaluation or a verification."""

import shlex
from collections.abc import Sequence

from rich.table import Table

from llama_pretrain.console.output import out, percent_text, rate_text, styled, two_columns
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import (
    EvaluationRow,
    Row,
    SummaryRow,
    evaluations,
    last,
    steps,
)
from llama_pretrain.runs.units import elide, format_size

WIDEST_NAME = len("run directory  ")


def show_result(rows: Sequence[Row], run_dir: RunDir) -> None:
    """How the run ended, where things lie, and what to look at next."""
    table = two_columns("result")
    summary, evaluated = last(rows, SummaryRow), evaluations(rows)
    if summary is not None and summary.train_loss is not None:
        text = f"{summary.train_loss:.4f} (mean of the last {summary.train_loss_steps} steps)"
        table.add_row("train loss", text)
    if evaluated:
        first, final = evaluated[0], evaluated[-1]
        text = f"{final.eval_loss:.4f}, from {first.eval_loss:.4f} at step {first.step}"
        table.add_row("eval loss", text)
        bits = f"{final.bits_per_byte:.3f}"
        table.add_row("perplexity", f"{final.perplexity:.2f}; bits per byte {bits}")
    if summary is not None:
        table.add_row("tokens/s", f"{rate_text(summary.median_tokens_per_s)} (median)")
        table.add_row("MFU", f"{percent_text(summary.median_mfu)} (median)")
        table.add_row("peak memory", f"{format_size(summary.peak_memory_bytes)} (largest rank)")
    sample = run_dir.path / "sample.txt"
    if sample.is_file():
        text = " ".join(sample.read_text(encoding="utf-8").split())
        table.add_row("sample", text if len(text) < 300 else text[:297] + "...")
    table.add_row("run directory", str(run_dir.path))
    for name, path in (
        ("checkpoints", run_dir.checkpoints),
        ("export", run_dir.export),
        ("report", run_dir.report),
    ):
        if path.exists():
            table.add_row(name, elide(str(path), out.width - WIDEST_NAME))
    if run_dir.tensorboard.exists():
        table.add_row("curves", shlex.join(["tensorboard", "--logdir", str(run_dir.tensorboard)]))
    out.print(table)


def show_evaluation(row: EvaluationRow, run_dir: RunDir) -> None:
    """What task=evaluate has found: losses in nats a token."""
    table = two_columns("evaluation")
    table.add_row("checkpoint", row.checkpoint)
    table.add_row("loss", f"{row.eval_loss:.6f}")
    table.add_row("perplexity", f"{row.perplexity:.4f}")
    table.add_row("bits per byte", f"{row.bits_per_byte:.5f}")
    for name, loss in row.by_source.items():
        table.add_row(f"loss on {name}", f"{loss:.6f}")
    table.add_row("tokens", f"{row.eval_tokens:,}")
    table.add_row("written to", str(run_dir.path))
    out.print(table)


def show_verification(whole: Sequence[Row], cut: Sequence[Row], *, cut_at: int) -> None:
    """The steps of two runs side by side, one of them cut after a step."""
    table = Table(title="resume", title_justify="left", box=None, pad_edge=False)
    for name in ("step", "loss", "after the cut", "gradient norm", "after the cut", "equal"):
        table.add_column(name, justify="right")
    after = {row.step: row for row in steps(cut)}
    for row in steps(whole):
        other = after.get(row.step)
        sides = (row, other)
        cells = [
            _number(getattr(side, name, None)) for name in ("loss", "grad_norm") for side in sides
        ]
        names = ("loss", "grad_norm", "learning_rate", "sample_hash")
        equal = all(getattr(row, name) == getattr(other, name, None) for name in names)
        mark = " (cut here)" if row.step == cut_at else ""
        table.add_row(
            f"{row.step}{mark}", *cells, styled("yes", "") if equal else styled("no", "bold red")
        )
    out.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.9g}"

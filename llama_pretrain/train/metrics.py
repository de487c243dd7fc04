"""Metrics of a run, written by rank 0: metrics.jsonl; optionally TensorBoard, CSV and W&B."""

import csv
from collections.abc import Iterable
from typing import Any

from llama_pretrain.config.monitor import Monitor
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import (
    RollbackRow,
    Row,
    SampleRow,
    StepRow,
    SummaryRow,
    append_row,
    open_to_append,
    read_metrics,
    select,
)

CSV_COLUMNS = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "memory_bytes")


class MetricsWriter:
    """Appends rows to metrics.jsonl and to the views of it; does nothing on ranks other than 0.

    metrics.jsonl is the source of truth. The views, TensorBoard and CSV, are rebuilt from it when a
    run is resumed or rolled back, so that repeated steps appear once. They are opened after the
    first step, which does not wait for the import of TensorBoard.
    """

    def __init__(self, run_dir: RunDir, monitor: Monitor, *, active: bool):
        self._run_dir, self._monitor = run_dir, monitor
        self._file: Any = None
        self._views_open = False
        self._tensorboard: Any = None
        self._csv: Any = None
        self._csv_file: Any = None
        self._wandb: Any = None
        if not active:
            return
        self._file = open_to_append(run_dir.metrics)
        if monitor.wandb:
            import wandb  # an optional dependency

            self._wandb = wandb.init(project=monitor.wandb_project, dir=str(run_dir.path))

    def _open_views(self) -> None:
        """Build TensorBoard and CSV from the rows so far."""
        run_dir = self._run_dir
        self._views_open = True
        if self._monitor.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second, often not needed

            for old in run_dir.tensorboard.glob("events.*"):
                old.unlink()
            self._tensorboard = SummaryWriter(str(run_dir.tensorboard))
            config = run_dir.snapshot.read_text(encoding="utf-8")
            self._tensorboard.add_text("config", f"```yaml\n{config}\n```", 0)
        if self._monitor.csv:
            self._csv_file = (run_dir.path / "metrics.csv").open("w", newline="", buffering=1)
            self._csv = csv.writer(self._csv_file)
            self._csv.writerow(["step", "tokens", *CSV_COLUMNS])
        for row in [
            *read_metrics(run_dir.metrics),
            *select(read_metrics(run_dir.samples), SampleRow),
        ]:
            self._add_to_views(row)

    def write(self, row: Row) -> None:
        """Append a row to metrics.jsonl and to the views."""
        if self._file is None:
            return
        self._file.write(row.to_line())
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(_numbers(row), step=row.step)
        if isinstance(row, RollbackRow):  # views and generations are rolled back too
            if self._run_dir.samples.is_file():
                append_row(self._run_dir.samples, row)
            self._close_views()
            self._open_views()
        elif self._views_open:
            self._add_to_views(row)
        elif isinstance(row, StepRow):
            self._open_views()  # includes this row

    def write_all(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.write(row)

    def write_sample(self, row: SampleRow) -> None:
        """Append a row to samples.jsonl and to TensorBoard."""
        if self._file is not None:
            append_row(self._run_dir.samples, row)
            self._add_to_views(row)

    def _add_to_views(self, row: Row) -> None:
        if self._tensorboard is not None and isinstance(row, SampleRow):
            # Indented: TensorBoard renders Markdown.
            text = "".join(f"    {line}\n" for line in row.text.splitlines())
            self._tensorboard.add_text("sample", text, row.step)
        elif self._tensorboard is not None and not isinstance(row, SummaryRow):
            for key, value in _numbers(row).items():
                self._tensorboard.add_scalar(f"by_step/{key}", value, row.step)
                self._tensorboard.add_scalar(f"by_tokens/{key}", value, row.tokens)
        if self._csv is not None and isinstance(row, StepRow) and row.loss is not None:
            self._csv.writerow([row.step, row.tokens, *(getattr(row, key) for key in CSV_COLUMNS)])

    def close(self) -> None:
        """Flush and close all files."""
        if self._file is not None and not self._views_open:
            self._open_views()
        self._close_views()
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _close_views(self) -> None:
        for file in (self._tensorboard, self._csv_file):
            if file is not None:
                file.close()


def _numbers(row: Row) -> dict[str, float]:
    return {
        key: value
        for key, value in row.to_json().items()
        if isinstance(value, int | float) and key not in ("step", "tokens", "finished")
    }

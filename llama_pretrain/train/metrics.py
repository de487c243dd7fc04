"""Metrics of a run: metrics.jsonl always, TensorBoard, CSV and W&B as asked; rank 0 alone."""

import csv
import json
import re
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llama_pretrain.config.monitor import Monitor
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import read_metrics

PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.5,
    "H100": 989.4,
    "A100": 312.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
    "T4": 65.0,
    "4090": 165.2,
    "3090": 71.0,
}
"""Dense 16-bit tensor-core peaks with fp32 accumulation, from NVIDIA's data sheets."""


CSV_COLUMNS = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "memory_bytes")


class MetricsWriter:
    """Writes lines as they come. On other ranks than 0 it does nothing.

    metrics.jsonl is the truth: a resumed run makes its curves and its table anew from the lines
    up to its checkpoint, so that steps that are done again stand in them once. Any run begins them
    after its first step, which needn't wait for TensorBoard's import.
    """

    def __init__(self, run_dir: RunDir, monitor: Monitor, *, active: bool):
        self._run_dir, self._monitor = run_dir, monitor
        self._file: Any = None
        self._draws = False
        self._tensorboard: Any = None
        self._csv: Any = None
        self._table: Any = None
        self._wandb: Any = None
        if not active:
            return
        self._file = run_dir.metrics.open("a", encoding="utf-8")
        if monitor.wandb:
            import wandb

            self._wandb = wandb.init(project=monitor.wandb_project, dir=str(run_dir.path))

    def _start_drawing(self) -> None:
        """Make the curves and the table, from the lines that there are."""
        run_dir = self._run_dir
        self._draws = True
        if self._monitor.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            for old in run_dir.tensorboard.glob("events.*"):
                old.unlink()
            self._tensorboard = SummaryWriter(str(run_dir.tensorboard))
            config = run_dir.snapshot.read_text(encoding="utf-8")
            self._tensorboard.add_text("config", f"```yaml\n{config}\n```", 0)
        if self._monitor.csv:
            self._table = (run_dir.path / "metrics.csv").open("w", newline="", buffering=1)
            self._csv = csv.writer(self._table)
            self._csv.writerow(["step", "tokens", *CSV_COLUMNS])
        for row in read_metrics(run_dir.metrics):
            self._draw(row)
        for row in read_metrics(run_dir.samples):
            self._draw_sample(row)

    def write(self, row: dict[str, Any]) -> None:
        """One line, with at least `step` and `tokens`."""
        if self._file is None:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(_numbers(row), step=row["step"])
        if "rolled_back_from" in row:  # the curves and the samples go back too
            if self._run_dir.samples.is_file():
                back = ("step", "tokens", "rolled_back_from")
                self._append_sample({key: row[key] for key in back})
            self._stop_drawing()
            self._start_drawing()
        elif self._draws:
            self._draw(row)
        elif "loss" in row:
            self._start_drawing()  # this row too

    def write_all(self, rows: Iterable[dict[str, Any]]) -> None:
        """Several lines."""
        for row in rows:
            self.write(row)

    def write_sample(self, row: dict[str, Any]) -> None:
        """A line of samples.jsonl: `step`, `tokens`, `prompt` and `text`."""
        if self._file is not None:
            self._append_sample(row)
            self._draw_sample(row)

    def _append_sample(self, row: dict[str, Any]) -> None:
        with self._run_dir.samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _draw_sample(self, row: dict[str, Any]) -> None:
        """The text, indented: TensorBoard takes it for Markdown."""
        if self._tensorboard is not None and "text" in row:
            text = "".join(f"    {line}\n" for line in row["text"].splitlines())
            self._tensorboard.add_text("sample", text, row["step"])

    def _draw(self, row: dict[str, Any]) -> None:
        """Its numbers against steps and against tokens; a row of the table for a step."""
        if self._tensorboard is not None and "finished" not in row:
            for key, value in _numbers(row).items():
                self._tensorboard.add_scalar(f"by_step/{key}", value, row["step"])
                self._tensorboard.add_scalar(f"by_tokens/{key}", value, row["tokens"])
        if self._csv is not None and "loss" in row:
            self._csv.writerow([row["step"], row["tokens"], *(row[key] for key in CSV_COLUMNS)])

    def close(self) -> None:
        """Flush everything."""
        if self._file is not None and not self._draws:
            self._start_drawing()
        self._stop_drawing()
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _stop_drawing(self) -> None:
        for file in (self._tensorboard, self._table):
            if file is not None:
                file.close()


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in row.items()
        if isinstance(value, int | float) and key not in ("step", "tokens", "finished")
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # ru_maxrss would count the parent that forked this process
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_memory_bytes(device: torch.device) -> int:
    """Memory of this rank now: allocated on a GPU, resident on a CPU (0 where Linux is not)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize()


def compile_seconds() -> float:
    """What torch.compile has taken in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # it is slow to import, where nobody needs it
    spent: dict[str, int] = getattr(dynamo, "cumulative_time_spent_ns", {})
    return spent.get("entire_frame_compile", 0) / 1e9


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of this rank's device, or `None` for a GPU that isn't known.

    A CPU has no useful figure on paper: it is measured, as the best product of 2048 x 1024 x 1024
    in 0.2 s on this rank's threads.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((v for key, v in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name)), None)
        return None if known is None else known * 1e12
    left, right = torch.ones(2048, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = 0.0
    end = time.perf_counter() + 0.2  # long enough for a moment in which nobody disturbs
    while time.perf_counter() < end:
        started = time.perf_counter()
        left @ right
        best = max(best, 2 * 2048 * 1024 * 1024 / (time.perf_counter() - started))
    return best

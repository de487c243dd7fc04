"""Metrics of a run: metrics.jsonl always, TensorBoard, CSV and W&B as asked; rank 0 alone."""

import csv
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

from llama_pretrain.config.schema import Monitor
from llama_pretrain.runs.rundir import RunDir

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


class MetricsWriter:
    """Writes lines as they come. On other ranks than 0 it does nothing."""

    def __init__(self, run_dir: RunDir, monitor: Monitor, *, active: bool, first_step: int):
        self._file = run_dir.metrics.open("a", encoding="utf-8") if active else None
        self._tensorboard: Any = None
        self._csv: Any = None
        self._wandb: Any = None
        if not active:
            return
        if monitor.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Events after the step that a resumed run starts from are hidden: it makes them anew.
            purge = first_step + 1 if first_step else None
            self._tensorboard = SummaryWriter(str(run_dir.tensorboard), purge_step=purge)
            config = run_dir.snapshot.read_text(encoding="utf-8")
            self._tensorboard.add_text("config", f"```yaml\n{config}\n```", first_step)
        if monitor.csv:
            self._csv = _open_csv(run_dir.path / "metrics.csv", first_step=first_step)
        if monitor.wandb:
            import wandb

            self._wandb = wandb.init(project=monitor.wandb_project, dir=str(run_dir.path))

    def write(self, row: dict[str, Any], *, tokens: int) -> None:
        """One line. Numbers go to TensorBoard too, against steps and against tokens."""
        if self._file is None:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        numbers = {
            key: value
            for key, value in row.items()
            if isinstance(value, int | float) and key not in ("step", "tokens")
        }
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(f"by_step/{key}", value, row["step"])
                self._tensorboard.add_scalar(f"by_tokens/{key}", value, tokens)
        if self._csv is not None and "loss" in row:
            self._csv.writerow([row["step"], tokens, *(row[key] for key in CSV_COLUMNS)])
        if self._wandb is not None:
            self._wandb.log(numbers | {"tokens": tokens}, step=row["step"])

    def close(self) -> None:
        """Flush everything."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


CSV_COLUMNS = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "memory_bytes")


def _open_csv(path: Path, *, first_step: int) -> Any:
    """A writer after the row of `first_step`: later rows are of steps that are done again."""
    rows = list(csv.reader(path.open(newline="", encoding="utf-8"))) if path.exists() else []
    writer = csv.writer(path.open("w", newline="", buffering=1, encoding="utf-8"))
    writer.writerow(["step", "tokens", *CSV_COLUMNS])
    writer.writerows(row for row in rows[1:] if int(row[0]) <= first_step)
    return writer


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


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of this rank's device, or `None` for a GPU that isn't known.

    A CPU has no useful figure on paper: it is measured, as the best of a few products of
    2048 x 1024 x 1024 on this rank's threads.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
        return None if known is None else known * 1e12
    left, right = torch.ones(2048, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = 0.0
    for _ in range(6):
        started = time.perf_counter()
        left @ right
        best = max(best, 2 * 2048 * 1024 * 1024 / (time.perf_counter() - started))
    return best

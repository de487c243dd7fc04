"""TensorBoard's HParams page: one session a point, with its settings and what came of it."""

import shutil
from collections.abc import Sequence

from llama_pretrain.config.schema import Objective
from llama_pretrain.runs.sweep_report import value_of
from llama_pretrain.runs.sweepdir import Row, SweepDir, SweepRecord

NAMES = {
    Objective.eval_loss: "result/eval_loss",
    Objective.train_loss: "result/train_loss",
    Objective.tokens_per_s: "result/tokens_per_s",
    Objective.peak_memory_bytes: "result/peak_memory_mib",
}


def write_hparams(folder: SweepDir, record: SweepRecord, rows: Sequence[Row]) -> None:
    """Write the points that have a result, anew."""
    from torch.utils.tensorboard import SummaryWriter  # 2 s

    shutil.rmtree(folder.hparams, ignore_errors=True)
    for row in rows:
        values = {NAMES[key]: value_of(row, key) for key in Objective}
        metrics = {name: value for name, value in values.items() if value is not None}
        if row["objective"] is None or not metrics:
            continue
        settings = {key: to_value(row["settings"].get(key, "")) for key in record.swept}
        with SummaryWriter(str(folder.hparams)) as writer:
            writer.add_hparams(settings, metrics, run_name=row["run_dir"], global_step=row["steps"])


def to_value(text: str) -> float | str:
    """A number where it is one: the page draws an axis for it."""
    try:
        return float(text.replace("_", ""))
    except ValueError:
        return text

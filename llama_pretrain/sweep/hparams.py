"""TensorBoard's HParams page: one session per job, with its options and results."""

import shutil
from collections.abc import Sequence

from llama_pretrain.config.sweep import Objective
from llama_pretrain.runs.chart import to_number
from llama_pretrain.sweep.directory import Row, SweepDir, SweepRecord
from llama_pretrain.sweep.report import value_of

NAMES = {
    Objective.eval_loss: "result/eval_loss",
    Objective.train_loss: "result/train_loss",
    Objective.tokens_per_s: "result/tokens_per_s",
    Objective.peak_memory_bytes: "result/peak_memory_mib",
}


def write_hparams(folder: SweepDir, record: SweepRecord, rows: Sequence[Row]) -> None:
    """Rewrite the sessions of all jobs that have a result."""
    from torch.utils.tensorboard import SummaryWriter  # 2 s

    shutil.rmtree(folder.hparams, ignore_errors=True)
    results = [row for row in rows if row["objective"] is not None]
    if not results:
        return
    writer = SummaryWriter(str(folder.hparams))
    for row in results:
        values = {NAMES[key]: value_of(row, key) for key in Objective}
        metrics = {name: value for name, value in values.items() if value is not None}
        texts = {key: row["settings"].get(key, "") for key in record.swept}
        # The page draws an axis for a number.
        numbers = {key: to_number(text) for key, text in texts.items()}
        settings = {key: texts[key] if numbers[key] is None else numbers[key] for key in texts}
        writer.add_hparams(settings, metrics, run_name=row["run_dir"], global_step=row["steps"])
    writer.close()

"""The views of metrics.jsonl: TensorBoard, CSV, and samples after a rollback."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama_pretrain.config.monitor import Monitor
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.metrics import RollbackRow, SampleRow, read_metrics, select
from llama_pretrain.train.metrics import MetricsWriter
from tests.rows import evaluation_row, step_row


def sample_row(step: int, text: str) -> SampleRow:
    return SampleRow(step=step, tokens=step * 10, prompt="", text=text)


def test_a_rollback_removes_samples(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    writer = MetricsWriter(run_dir, Monitor(tensorboard=False), active=True)
    other_rank = MetricsWriter(run_dir, Monitor(tensorboard=False), active=False)
    for row in (sample_row(0, "a"), sample_row(2, "b"), sample_row(4, "removed\u2028")):
        writer.write_sample(row)
        other_rank.write_sample(row)
    rollback = RollbackRow(
        step=2, tokens=20, rolled_back_from=5, spike_loss=9.0, spike_z=7.0, skipped_batches=[3]
    )
    writer.write(rollback)
    writer.write_sample(sample_row(4, "c\u2028d"))
    writer.close()
    rows = select(read_metrics(run_dir.samples), SampleRow)
    assert [(row.step, row.text) for row in rows] == [(0, "a"), (2, "b"), (4, "c\u2028d")]


def test_views_open_after_the_first_step(tmp_path: Path) -> None:
    """TensorBoard is imported after it, and shows what was before."""
    run_dir = RunDir(tmp_path)
    run_dir.snapshot.write_text("seed: 1\n")
    writer = MetricsWriter(run_dir, Monitor(csv=True), active=True)
    writer.write(evaluation_row(0, 8.0))
    writer.write_sample(sample_row(0, "a"))
    assert not run_dir.tensorboard.exists()
    writer.write(step_row(1, tokens=10))
    writer.write(evaluation_row(1, 7.0, tokens=10))
    writer.close()
    events = EventAccumulator(str(run_dir.tensorboard))
    events.Reload()
    assert [event.step for event in events.Scalars("by_step/eval_loss")] == [0, 1]
    assert [event.step for event in events.Scalars("by_tokens/loss")] == [10]
    assert [event.step for event in events.Tensors("sample/text_summary")] == [0]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2


def test_a_run_without_a_step_has_views(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.snapshot.write_text("seed: 1\n")
    writer = MetricsWriter(run_dir, Monitor(), active=True)
    writer.write(evaluation_row(0, 8.0))
    writer.close()
    assert list(run_dir.tensorboard.iterdir())

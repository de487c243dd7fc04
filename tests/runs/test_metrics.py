"""Rows of metrics.jsonl: every kind survives the file, and what does not count is left out."""

import json
from pathlib import Path

import pytest

from llama_pretrain.runs.metrics import (
    KINDS,
    CheckpointRow,
    RollbackRow,
    Row,
    SampleRow,
    curve,
    initial_weights,
    last_value,
    median_value,
    parse_row,
    read_metrics,
    read_tail,
    seconds_by_step,
    truncate_metrics,
)
from tests.rows import evaluation_row, event_row, step_row, summary_row, write_rows

ROLLBACK = RollbackRow(
    step=1, tokens=1000, rolled_back_from=4, spike_loss=9.0, spike_z=7.0, skipped_batches=[3, 4]
)
ROWS: list[Row] = [
    event_row(0, initial_weights="abc"),
    evaluation_row(0, 8.0, by_source={"web <1>": 7.5, "code": 8.5}),
    step_row(1),
    event_row(1, start_seconds={"compose": 0.5}),
    step_row(2, loss=None, grad_norm=None, mfu=None, skipped="loss"),
    step_row(3, loss=12.0, skipped="spike", spike_z=9.5),
    CheckpointRow(step=3, tokens=3000, checkpoint="step-00000003", checkpoint_seconds=1.5),
    CheckpointRow(step=3, tokens=3000, checkpoint_error="no space"),
    SampleRow(step=3, tokens=3000, prompt="a", text="a\u2028b\n"),
    summary_row(4),
    ROLLBACK,
]


def test_every_kind_survives_the_file() -> None:
    assert {row.kind for row in ROWS} == {*KINDS}
    for row in ROWS:
        line = row.to_line()
        assert (line.count("\n"), parse_row(line)) == (1, row)
    values = json.loads(ROWS[1].to_line())
    assert list(values)[:3] == ["kind", "step", "tokens"]
    assert (values["eval_loss/web <1>"], values["eval_loss/code"]) == (7.5, 8.5)
    skipped = json.loads(ROWS[4].to_line())
    assert "loss" not in skipped
    assert "spike_z" not in skipped
    assert (skipped["grad_norm"], skipped["mfu"]) == (None, None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "has no known kind"),
        ('{"step": 1}', "has no known kind"),
        ('{"kind": "sample", "step": 1, "tokens": 1}', "missing 2 required"),
        ('{"kind": "event", "step": "x", "tokens": 1}', "step must be int"),
        ('{"kind": "event", "step": 1, "tokens": 1, "start_seconds": [1]}', "must be dict"),
    ],
)
def test_a_line_that_is_no_row_is_refused(line: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_row(line)


def test_the_reader_leaves_out_what_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    after = step_row(2, loss=5.0)
    write_rows(path, [*ROWS, after])
    with path.open("a") as file:
        file.write('no JSON\n[1]\n{"kind": "step", "step": 3')
    assert read_metrics(path) == [*ROWS[:4], ROLLBACK, after]
    assert read_tail(path) == read_metrics(path)


def test_a_resumed_run_drops_later_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [step_row(1), step_row(2), summary_row(2), step_row(3)]
    write_rows(path, rows)
    truncate_metrics(path, last_step=2)
    assert read_metrics(path) == rows[:2]


def test_the_tail_of_a_long_file_has_the_last_evaluation_that_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    early: list[Row] = [evaluation_row(1, 7.5), evaluation_row(2, 3.5)]
    write_rows(path, [*early, *(step_row(step) for step in range(3, 2000))])
    rows = read_tail(path)
    assert rows[0] == early[1]
    assert rows[-1] == step_row(1999)
    assert len(rows) < 200
    with path.open("a") as file:
        file.write(ROLLBACK.to_line())
    assert read_tail(path) == [early[0], ROLLBACK]


def test_values_of_curves() -> None:
    rows = [step_row(1), step_row(2, loss=float("nan"), tokens_per_s=0.0), step_row(3)]
    assert curve(rows, "loss", unit=2) == [(1000, 4.0), (3000, 3.0)]
    assert (last_value(rows, "loss"), last_value(rows, "eval_loss")) == (6.0, None)
    assert median_value(rows, "tokens_per_s") == 2000.0
    assert seconds_by_step(rows, tokens_per_step=1000) == {1: 0.5, 3: 0.5}
    assert seconds_by_step(rows, tokens_per_step=None) == {}
    assert (initial_weights(ROWS), initial_weights(rows)) == ("abc", None)

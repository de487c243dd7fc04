"""Spikes, rollbacks, and the batches that they exclude."""

from typing import Any

import pytest

from llama_pretrain.data.order import stretches
from llama_pretrain.train.progress import Progress, spike_score


def test_spikes_are_measured_against_a_full_window() -> None:
    window = [2.0, 4.0] * 5  # mean 3, sample deviation sqrt(10 / 9)
    assert spike_score(9.0, window, size=10) == pytest.approx(6 / (10 / 9) ** 0.5)
    assert spike_score(9.0, window[:9], size=10) == 0.0
    assert spike_score(2.0, [1.0] * 8, size=8) > 1e5  # without deviation, any increase is a spike


def test_rollbacks_accumulate_excluded_batches() -> None:
    """Three rollbacks to the checkpoint of step 30, whose next batch is 32."""
    saved: dict[str, Any] = {"step": 30, "next_batch": 32, "left_out": [7, 8], "window": [1.0]}
    progress = Progress(step=33, next_batch=35, left_out=[7, 8], window=[1.0, 2.0])
    assert progress.roll_back(Progress(**saved), spike_batch=34, num_batches=2) == [33, 34]
    assert (progress.step, progress.next_batch, progress.window) == (30, 32, [1.0])
    assert progress.take_batch() == 32
    # Never before the checkpoint, and only what is not excluded yet.
    assert progress.roll_back(Progress(**saved), spike_batch=32, num_batches=2) == [32]
    assert progress.take_batch() == 35
    assert progress.roll_back(Progress(**saved), spike_batch=35, num_batches=2) == [35]
    assert progress.left_out == [7, 8, 32, 33, 34, 35]
    assert progress.rollbacks == [30, 30, 30]
    assert progress.take_batch() == 36


def test_excluded_batches_are_never_taken() -> None:
    progress = Progress(next_batch=3, left_out=[3, 4, 6])
    assert [progress.take_batch() for _ in range(4)] == [5, 7, 8, 9]
    assert stretches(3, 4, left_out=[3, 4, 6]) == [range(5, 6), range(7, 10)]
    assert stretches(0, 5, left_out=[9]) == [range(5)]

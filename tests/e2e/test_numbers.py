"""Numbers that go wrong: steps that are skipped, spikes, and where a run gives up."""

import math
from shlex import split
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama_pretrain.checkpoint.manifest import read_manifest
from llama_pretrain.data.order import SampleOrder, hash_samples
from llama_pretrain.plan.plan import load_plan
from tests.conftest import Command, Runner
from tests.e2e.test_parity import at_stage

WINDOW, LIMIT, RATE = 8, 1.2, 1e-5
SPIKY = split(
    "train.max_steps=30 train.eval_every_steps=null schedule=constant schedule.warmup_steps=20"
    f" train.spike_window={WINDOW} train.spike_z={LIMIT} batch.global_batch_size=2 zero=stage2"
    f" optim.learning_rate={RATE} precision=fp32 checkpoint.every_steps=5"
)
"""So low a limit that ordinary batches spike."""


def z_score(loss: float, window: list[float]) -> float:
    mean = math.fsum(window) / len(window)
    variance = math.fsum((value - mean) ** 2 for value in window) / (len(window) - 1)
    return (loss - mean) / math.sqrt(variance)


@pytest.fixture(scope="module")
def calm(shared_runner: Runner) -> Command:
    return shared_runner(*(word for word in SPIKY if "spike" not in word))


@pytest.fixture(scope="module")
def skipping(shared_runner: Runner) -> Command:
    return shared_runner(*SPIKY, "train.spike=skip", "monitor=tensorboard")


def test_spikes_are_skipped(calm: Command, skipping: Command) -> None:
    """Those that an own calculation finds, and no others; the schedule counts applied steps."""
    rows = skipping.rows("loss")
    assert [row["sample_hash"] for row in rows] == [r["sample_hash"] for r in calm.rows("loss")]
    window: list[float] = []
    applied, skipped = 0, []
    for row in rows:
        # Warm-up of 20 applied steps.
        assert row["learning_rate"] == pytest.approx(RATE * min(applied + 1, 20) / 20)
        score = z_score(row["loss"], window) if len(window) == WINDOW else 0.0
        assert ("skipped" in row) == (score > LIMIT), row
        if "skipped" in row:
            skipped.append(row["step"])
            assert row["spike_z"] == pytest.approx(score)
            assert (row["skipped"], row["grad_norm"]) == ("spike", None)
        else:
            applied += 1
            window = [*window, row["loss"]][-WINDOW:]
    assert skipped  # else nothing was tried
    assert rows[-1]["skipped_steps"] == len(skipped)
    first = skipped[0]
    same = [row["loss"] for row in calm.rows("loss")][:first]
    assert [row["loss"] for row in rows][:first] == same  # nothing has happened before


def test_skips_are_seen(skipping: Command) -> None:
    events = EventAccumulator(str(skipping.run_dir.tensorboard))
    events.Reload()
    drawn = [event.step for event in events.Scalars("by_step/spike_z")]
    assert drawn == [row["step"] for row in skipping.rows("skipped")]
    report = skipping.run_dir.report.read_text()
    for row in skipping.rows("skipped"):
        assert f"step {row['step']}: skipped, the loss of {row['loss']:.4f} spiked" in report


def test_a_rollback_leaves_out_the_batches_of_the_spike(
    shared_runner: Runner, calm: Command
) -> None:
    done = shared_runner(*SPIKY, "train.spike=rollback")
    acts = done.rows("rolled_back_from")
    assert acts
    rows: list[dict[str, Any]] = done.rows("loss")
    assert [row["step"] for row in rows] == list(range(1, 31))  # each step stands there once
    left_out = sorted({batch for act in acts for batch in act["skipped_batches"]})
    for act in acts:
        assert act["step"] in (0, 5, 10, 15, 20, 25)  # a checkpoint
        assert act["spike_z"] > LIMIT
        assert len(act["skipped_batches"]) <= 2
    plan = load_plan(done.run_dir.plan)
    assert plan.corpus is not None
    num_sequences = [source.train_sequences for source in plan.corpus.sources]
    order = SampleOrder(plan.sampling, num_sequences=num_sequences, seed=1234)
    taken = [batch for batch in range(60) if batch not in left_out][:30]
    hashes = [f"{hash_samples(order.ids(2 * batch, 2).astype('int64')):016x}" for batch in taken]
    assert [row["sample_hash"] for row in rows] == hashes
    newest = read_manifest(sorted(done.run_dir.checkpoints.glob("step-*"))[-1])
    assert newest.consumed_samples == 2 * (taken[newest.step - 1] + 1)
    assert f"back from step {acts[0]['rolled_back_from']}" in done.run_dir.report.read_text()


@pytest.mark.parametrize(
    "stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))]
)
def test_a_run_without_numbers_ends_by_name(runner: Runner, stage: int) -> None:
    """A first update of 1e30: no gradient is a number after it, and no weight is touched again."""
    words = (
        "precision=fp32 train.max_steps=9 train.max_nonfinite_steps=3 train.eval_every_steps=null"
        " optim.learning_rate=1e30 schedule=constant schedule.warmup_steps=0 launch.max_restarts=2"
        " checkpoint.every_steps=1 checkpoint.keep_last=9"
    )
    done = runner(*at_stage(stage), *split(words), expect=1)
    text = "the gradient of step 4 is not finite (got 3 consecutive steps). No weight was changed."
    assert f"{text} Its batch: samples 12 to 15: text sequence " in done.output
    assert "restart 1 of 2" not in done.output  # it would end the same way
    rows = done.rows("skipped")
    assert [(row["step"], row["skipped"]) for row in rows] == [(2, "gradient"), (3, "gradient")]
    assert "step 3: skipped, its gradient is not finite" in done.output
    first, *others = [
        {name: digest for name, digest in read_manifest(folder).files.items() if "rank" in name}
        for folder in sorted(done.run_dir.checkpoints.glob("step-*"))
    ]
    assert len(others) == 2
    assert all(other == first for other in others)

"""The parts of benchmarks/throughput.py that start nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.throughput import check_losses
from benchmarks.throughput_report import BLOCKS, SIZES, render_table, write_result
from benchmarks.turns import ArmError, Step, StepLog, whole_steps


def result_of(**rates: list[float]) -> dict[str, Any]:
    arms = {
        name: {"tokens_per_s": rate, "peak_bytes": 3 * 2**20, "first_step_s": 4.5}
        for name, rate in rates.items()
    }
    measured = {"ceiling_gflops": [10.0, 10.0, 20.0], "largest_loss_difference": 0.001}
    block = {**measured, "tolerance": 0.03, "arms": arms}
    cell = {"size": "6m", "sequence_length": 512, "flops_per_token": 10_000_000}
    return {**cell, "blocks": {"defaults": block}}


def test_flops_of_a_token_are_the_products_and_half_the_attention() -> None:
    # by hand: 4 layers of 4 x 256^2 + 3 x 256 x 704, a head of 4096 x 256, attention 6 x 4 x 256
    matrices = 4 * (262_144 + 540_672) + 1_048_576
    for length in (512, 2048):
        assert SIZES["6m"].flops_per_token(length) == 6 * matrices + 6 * 4 * 256 * length


@pytest.mark.parametrize(("since", "whole"), [(11.0, (2, 2.5)), (14.0, (0, 0.0)), (20.0, (0, 0.0))])
def test_only_steps_that_began_in_the_turn_count(since: float, whole: tuple[int, float]) -> None:
    # the step that ends at 12 began before the arm was stopped
    steps = [Step(1.0, at) for at in (5.0, 6.0, 12.0, 13.0, 14.5)]
    assert whole_steps(steps, since=since) == whole


def test_a_log_takes_whole_lines_with_a_loss(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = StepLog(path)
    log.poll()  # not there yet
    path.write_text('{"step": 0, "eval_loss": 9.0}\n{"step": 1, "loss": 8.5}\n{"step": 2, "lo')
    log.poll()
    assert [step.loss for step in log.steps] == [8.5]
    with path.open("a") as file:
        file.write('ss": 8.25, "memory_bytes": 7}\n')
    log.poll()
    assert [(step.loss, step.gpu_bytes) for step in log.steps] == [(8.5, 0), (8.25, 7)]
    assert log.steps[0].seen_at < log.steps[1].seen_at


def test_ratios_are_medians_within_a_round() -> None:
    rates = {"ours": [200.0, 300, 400], "trainer": [100.0, 100, 400], "bare": [250.0, 250, 250]}
    ours, trainer = (line.split() for line in render_table(result_of(**rates)).splitlines()[2:4])
    # ratios of 2, 3 and 1 (of the medians 3), and of 0.8, 1.2 and 1.6; 0.2, 0.3 and 0.2 of ceilings
    assert ours == ["ours", "300", "0.20", "2.00", "1.20", "3", "4.5"]
    assert trainer[3] == "1.00"
    del rates["trainer"]
    assert render_table(result_of(**rates)).splitlines()[2].split()[3:5] == ["-", "1.20"]


def test_losses_are_compared_at_the_steps_that_all_have() -> None:
    near = {"ours": [8.0, 7.0, 1.0], "bare": [8.01, 7.0]}
    assert check_losses(near) == pytest.approx(0.01)
    with pytest.raises(ArmError, match="an arm has no steps"):
        check_losses({"ours": [8.0], "bare": []})


@pytest.mark.parametrize("wrong", [7.5, float("nan")])
def test_losses_that_differ_fail(wrong: float) -> None:
    with pytest.raises(ArmError, match=r"losses differ by .* at step 2.*something else"):
        check_losses({"ours": [8.0, 7.0], "bare": [8.0, wrong]})


def test_a_block_that_was_not_run_again_stays(tmp_path: Path) -> None:
    path = tmp_path / "results" / "throughput-6m-512.json"
    write_result(path, {"size": "6m", "blocks": {"defaults": 1, "best": 2}})
    write_result(path, {"size": "6m", "blocks": {"best": 3}})
    assert json.loads(path.read_text())["blocks"] == {"defaults": 1, "best": 3}


def test_each_arm_stands_in_one_block() -> None:
    names = [name for block in BLOCKS.values() for name in block]
    assert len(names) == len(set(names))

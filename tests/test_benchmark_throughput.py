"""The parts of benchmarks/throughput.py that start nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.throughput import SKIPPED, check_losses
from benchmarks.throughput_report import (
    BLOCKS,
    SIZES,
    flops_per_token,
    lines_of,
    render_plot,
    render_table,
    write_result,
)
from benchmarks.turns import ArmError, Step, StepLog, whole_steps


def arm(*rates: float) -> dict[str, Any]:
    return {"tokens_per_s": list(rates), "peak_bytes": 3 * 2**20, "first_step_s": 4.5}


def canned() -> dict[str, Any]:
    block = {
        "ceiling_gflops": [10.0, 10.0, 20.0],
        "largest_loss_difference": 0.001,
        "tolerance": 0.03,
        "arms": {
            "ours": arm(200, 300, 400),
            "trainer": arm(100, 100, 400),
            "bare": arm(250, 250, 250),
        },
    }
    return {"size": "6m", "row": 512, "flops_per_token": 10_000_000, "blocks": {"defaults": block}}


def test_flops_of_a_token_are_the_products_and_half_the_attention() -> None:
    # by hand: 4 layers of 4 x 256^2 + 3 x 256 x 704, a head of 4096 x 256, attention 6 x 4 x 256
    matrices = 4 * (262_144 + 540_672) + 1_048_576
    assert flops_per_token(SIZES["6m"], row=512) == 6 * matrices + 6 * 4 * 256 * 512
    longer = flops_per_token(SIZES["6m"], row=2048) - flops_per_token(SIZES["6m"], row=512)
    assert longer == 6 * 4 * 256 * 1536


def test_only_steps_that_began_in_the_turn_count() -> None:
    # the step that ends at 12 began before the arm was stopped
    steps = [Step(number, 1.0, at) for number, at in enumerate((5.0, 6.0, 12.0, 13.0, 14.5))]
    assert whole_steps(steps, resumed_at=11.0) == (2, 2.5)


@pytest.mark.parametrize("resumed_at", [14.0, 20.0])
def test_a_turn_with_fewer_than_two_steps_has_no_whole_one(resumed_at: float) -> None:
    steps = [Step(1, 1.0, 13.0), Step(2, 1.0, 14.5)]
    assert whole_steps(steps, resumed_at=resumed_at) == (0, 0.0)


def test_a_log_takes_whole_lines_with_a_loss(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = StepLog(path)
    log.look()  # not there yet
    path.write_text('{"step": 0, "eval_loss": 9.0}\n{"step": 1, "loss": 8.5}\n{"step": 2, "lo')
    log.look()
    assert [(step.number, step.loss) for step in log.steps] == [(1, 8.5)]
    with path.open("a") as file:
        file.write('ss": 8.25}\n')
    log.look()
    assert [(step.number, step.loss) for step in log.steps] == [(1, 8.5), (2, 8.25)]
    assert log.steps[0].seen_at < log.steps[1].seen_at


def test_ratios_are_medians_of_the_rounds_own() -> None:
    ours, trainer, bare = lines_of(canned())
    assert ours.tokens_per_s == 300
    assert ours.ratio_to_trainer == 2.0  # of 2, 3 and 1; of the medians it would be 3
    assert ours.ratio_to_bare == pytest.approx(1.2)
    assert ours.mfu == pytest.approx(0.2)  # 0.2, 0.3 and 0.2 of each round's ceiling
    assert (trainer.ratio_to_trainer, bare.ratio_to_bare) == (1.0, 1.0)


def test_an_arm_without_its_rival_has_no_ratio() -> None:
    result = canned()
    del result["blocks"]["defaults"]["arms"]["trainer"]
    assert lines_of(result)[0].ratio_to_trainer is None
    ours = render_table(result).splitlines()[2]
    assert ours.split() == ["ours", "300", "0.20", "-", "1.20", "3", "4.5"]


def test_losses_are_compared_at_the_steps_that_all_have() -> None:
    near = {"ours": [8.0, 7.0, 1.0], "bare": [8.01, 7.0]}
    assert check_losses(near) == pytest.approx(0.01)


@pytest.mark.parametrize("wrong", [7.5, float("nan")])
def test_losses_that_differ_fail(wrong: float) -> None:
    with pytest.raises(ArmError, match=r"losses differ by .* at step 2.*something else"):
        check_losses({"ours": [8.0, 7.0], "bare": [8.0, wrong]})


def test_a_block_that_was_not_run_again_stays(tmp_path: Path) -> None:
    path = tmp_path / "results" / "throughput-6m-512.json"
    write_result(path, {"size": "6m", "blocks": {"defaults": 1, "best": 2}})
    write_result(path, {"size": "6m", "blocks": {"best": 3}})
    assert json.loads(path.read_text())["blocks"] == {"defaults": 1, "best": 3}


def test_the_plot_names_every_bar() -> None:
    drawn = render_plot([canned()])
    assert all(word in drawn for word in ("6m parameters, rows of 512", "300 (2.00x)", ">bare<"))


def test_each_arm_stands_in_one_block() -> None:
    names = [name for block in BLOCKS.values() for name in block]
    assert len(names) == len(set(names))
    assert not set(names) & set(SKIPPED)

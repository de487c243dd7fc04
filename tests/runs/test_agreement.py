"""How far two runs agree, and the likeliest cause of a difference."""

import math
from dataclasses import replace
from typing import Any

import pytest

from llama_pretrain.runs.agreement import Agreement, compare_rows, likeliest_cause
from llama_pretrain.runs.drift import Drift, Kind
from llama_pretrain.runs.metrics import Row, parse_row
from tests.rows import evaluation_row, event_row, step_row


def steps(*losses: float, samples: str = "s", norm: float = 1.5) -> list[Row]:
    return [
        step_row(step, loss=loss, grad_norm=norm, sample_hash=f"{samples}{step}")
        for step, loss in enumerate(losses, start=1)
    ]


LOST: list[Row] = [step_row(1, loss=None, grad_norm=math.nan, sample_hash="s1")]
BIT = "loss 2 -> 2.00000095 (a difference of 9.5e-07, 4.8e-07 of it)"
COMPARED: dict[str, tuple[list[Row], list[Row], int, str | None]] = {
    "equal": (steps(3.0, 2.0), steps(3.0, 2.0), 2, None),
    "loss": (steps(4.0, 2.0, 1.0), steps(4.0, 2.0 + 2**-20, 1.0), 1, BIT),
    "one-bit": (steps(1.0), steps(math.nextafter(1.0, 2)), 0, "loss 1 -> 1 (a difference of"),
    "no-number": (LOST, [parse_row(LOST[0].to_line())], 1, None),
    "no-loss": (steps(1.0), LOST, 0, "loss 1 -> none"),
    "samples-before-loss": (steps(1.0), steps(2.0, samples="t"), 0, "sample ids s1 -> t1"),
    "norm": (steps(1.0), steps(1.0, norm=2.0), 0, "gradient norm 1.5 -> 2 (a difference of 0.5"),
    "shorter": (steps(3.0, 2.0, 1.0), steps(3.0), 1, None),
    "first-line-lost": (steps(3.0, 2.0, 1.0)[1:], steps(3.0, 2.0, 1.0), 2, None),
}


@pytest.mark.parametrize(("before", "now", "equal", "text"), COMPARED.values(), ids=COMPARED)
def test_the_first_difference(
    before: list[Row], now: list[Row], equal: int, text: str | None
) -> None:
    found = compare_rows(before, now)
    assert (found.equal_steps, found.is_equal) == (equal, text is None)
    assert str(found.difference).startswith(str(text))


def test_nothing_compared_is_not_equal() -> None:
    assert not compare_rows([], steps(3.0)).is_equal
    assert compare_rows(steps(3.0), steps(3.0)).digest != compare_rows(LOST, LOST).digest


def test_weights_and_evaluations_are_compared_too() -> None:
    def with_extra(weights: str, loss: float) -> list[Row]:
        return [event_row(0, initial_weights=weights), evaluation_row(0, loss), *steps(1.0)]

    assert compare_rows(with_extra("a", 5.0), with_extra("a", 5.0)).is_equal
    other = compare_rows(with_extra("a", 5.0), with_extra("b", 5.0))
    assert (other.initial_weights, other.is_equal) == (False, False)
    other = compare_rows(with_extra("a", 5.0), with_extra("a", 6.0))
    assert (other.evaluations, other.equal_evaluations, other.is_equal) == (1, 0, False)


def drift(kind: str, path: str, **more: Any) -> Drift:
    return Drift(kind=Kind(kind), path=path, before="1", now="2", **more)


ALL = [drift(kind.value, f"of {kind.value}") for kind in reversed(Kind)]


@pytest.mark.parametrize("gone", range(len(Kind)))
def test_causes_in_their_order(gone: int) -> None:
    """Config, data, code, versions, hardware, threads; a host is no cause."""
    kinds = list(Kind)[gone:]
    found = likeliest_cause(
        [d for d in ALL if d.kind in kinds], compare_rows(steps(1.0), steps(2.0))
    )
    wanted = None if kinds == [Kind.host] else kinds[0]
    assert (None if found is None else found.kind) is wanted


def test_what_differs_first_shows_where_to_look() -> None:
    config = drift("config", "optim.learning_rate")
    drifts = [config, drift("config", "seed"), drift("data", "a.txt"), drift("code", "run.py")]
    loss = compare_rows(steps(1.0), steps(2.0))
    samples = compare_rows(steps(1.0), steps(1.0, samples="t"))
    weights = replace(loss, initial_weights=False)

    def cause(given: list[Drift], agreement: Agreement) -> str:
        found = likeliest_cause(given, agreement)
        assert found is not None
        return found.path

    assert cause(drifts, loss) == "seed"
    assert cause([config, drift("data", "a.txt")], loss) == "optim.learning_rate"
    assert cause([config, drift("data", "a.txt")], samples) == "a.txt"
    assert cause([config, drift("config", "model.hidden_size")], weights) == "model.hidden_size"
    assert cause([config, drift("config", "batch.micro_batch_size")], samples).startswith("batch")
    quiet = [drift("config", "monitor.csv", harmless=True), drift("host", "host")]
    assert likeliest_cause(quiet, loss) is None

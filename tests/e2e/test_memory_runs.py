"""The plan's memory beside that of real runs: a few of benchmarks/memory.py's."""

import pytest

from benchmarks.memory import TOLERANCE, list_runs, measure

RUNS = dict(list_runs())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["19M stage1 fp32 4 x 128", "19M stage3 fp32 4 x 128", "19M stage2 bf16 1 x 64"]
)
def test_measured_memory_is_as_planned(name: str) -> None:
    predicted, measured, phase = measure(RUNS[name])
    assert predicted == pytest.approx(measured, rel=TOLERANCE), phase

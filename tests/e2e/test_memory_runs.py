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
    print(f"{name}: {predicted / measured - 1:+.1%}, {phase}")
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


def test_the_matrix_is_large_enough() -> None:
    assert len(RUNS) >= 24
    words = [word for overrides in RUNS.values() for word in overrides]
    for stage in ("stage0", "stage1", "stage2", "stage3", "stage2_offload", "stage3_offload"):
        assert f"zero={stage}" in words
    assert {"precision=fp32", "precision=bf16", "model=60m", "model=tiny"} <= set(words)

"""Which jobs run again, which fall behind, and their share of the machine."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llama_pretrain.plan.machine import Machine
from llama_pretrain.runs.layout import RunDir
from llama_pretrain.runs.status import Status, write_status
from llama_pretrain.sweep.job import falls_behind, has_finished
from llama_pretrain.sweep.placing import VISIBLE, claim_slot, count_slots, share
from tests.conftest import ROOT
from tests.sweep.test_jobs import MACHINE

GOOD = [(100, 5.0), (200, 4.0), (300, 3.0)]
BAD = [(100, 5.5), (200, 5.4), (300, 5.3)]


@pytest.mark.parametrize(
    ("curve", "others", "reason"),
    [
        pytest.param([(200, 4.6)], [GOOD, GOOD, BAD], "the others' median is 4.0", id="behind"),
        pytest.param([(200, 3.9)], [GOOD, GOOD, BAD], "", id="ahead"),
        pytest.param([(200, 4.0)], [GOOD, GOOD, BAD], "", id="level"),
        pytest.param([(200, 4.6)], [GOOD, BAD], "", id="too-few-others"),
        pytest.param([(100, 4.5), (200, 9.0)], [GOOD, BAD, BAD], "", id="its-best-counts"),
        pytest.param([(400, 4.6)], [GOOD, GOOD, GOOD], "", id="others-were-not-so-long"),
        pytest.param([(50, 9.0)], [GOOD, GOOD, GOOD], "", id="others-not-evaluated-yet"),
        pytest.param([(250, 4.6)], [GOOD, GOOD, BAD], "median is 4.0", id="between-evaluations"),
        pytest.param([], [GOOD, GOOD, GOOD], "", id="not-evaluated"),
    ],
)
def test_a_job_falls_behind_the_median_at_as_many_tokens(
    curve: list[tuple[int, float]], others: list[list[tuple[int, float]]], reason: str
) -> None:
    found = falls_behind(curve, others, at_least=3)
    assert bool(found) == bool(reason)
    assert reason in found


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (Status.failed, False),
        (Status.preempted, False),
        (Status.running, False),
        (Status.pruned, True),
        (Status.completed, True),
    ],
)
def test_a_finished_job_is_not_run_again(tmp_path: Path, status: Status, expected: bool) -> None:
    run_dir = RunDir(tmp_path)
    assert not has_finished(run_dir)
    run_dir.snapshot.touch()
    write_status(run_dir, status)
    assert has_finished(run_dir) == expected


GPUS = replace(MACHINE, cores=16, num_gpus=4)


@pytest.mark.parametrize(
    ("machine", "wanted", "slots"),
    [(MACHINE, 1, 1), (MACHINE, 9, 2), (MACHINE, -1, 2), (GPUS, -1, 4), (GPUS, 2, 2), (GPUS, 9, 4)],
)
def test_the_number_of_jobs_at_a_time(machine: Machine, wanted: int, slots: int) -> None:
    assert count_slots(machine, wanted) == slots
    own = share(machine, slots)
    assert own.cores == machine.cores // slots
    assert own.num_gpus == machine.num_gpus // slots
    assert own.memory_bytes == machine.memory_bytes // slots


SLOTTED = """
import os, sys
from pathlib import Path
from llama_pretrain.sweep.placing import claim_slot, share
from tests.sweep.test_job import GPUS, MACHINE
machine = share(GPUS if sys.argv[2] == "gpus" else MACHINE, 2)
with claim_slot(Path(sys.argv[1]), 2, machine) as number:
    print(number, sorted(os.sched_getaffinity(0)), os.environ.get("CUDA_VISIBLE_DEVICES"))
    sys.stdout.flush()
    sys.stdin.read()
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core to share")
def test_jobs_have_their_own_cores_and_gpus(tmp_path: Path) -> None:
    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", SLOTTED, str(tmp_path), "gpus"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {VISIBLE: "3,5,6,7"},
        )

    def line(process: "subprocess.Popen[str]") -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    first, second = start(), start()
    lines = sorted([line(first), line(second)])
    assert lines[0].startswith("0 ")
    assert lines[0].endswith("3,5")
    assert lines[1].startswith("1 ")
    assert lines[1].endswith("6,7")
    first.kill()  # its slot is free, however it ended
    third = start()
    assert line(third)[0] in "01"
    for process in (first, second, third):
        process.kill()
        process.communicate()


def test_a_single_job_has_the_whole_machine(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    with claim_slot(tmp_path, 1, MACHINE) as number:
        assert number is None
        assert os.sched_getaffinity(0) == before
    if len(before) > 1:
        with claim_slot(tmp_path, 2, share(MACHINE, 2)) as number:
            assert number == 0
            assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before

"""Binding ranks to cores, and output of rank 0."""

from dataclasses import replace
from pathlib import Path

import pytest

from llama_pretrain import distributed
from tests.train.engines import RANK


def test_cores_are_shared_out_by_socket_and_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sockets of two cores of two threads, numbered as Linux often does; one is unavailable."""
    for number in range(8):
        topology = tmp_path / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{number % 2}\n")
        (topology / "core_id").write_text(f"{number // 2 % 2}\n")
    monkeypatch.setattr(distributed, "CORES", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {*range(8)} - {5})
    bound: list[list[int]] = []
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cores: bound.append(cores))
    for index in range(3):
        distributed.keep_to_cores(index, num_ranks=3)
    assert bound == [[0, 4], [2, 6], [1, 3]]
    distributed.keep_to_cores(7, num_ranks=8)
    assert len(bound) == 3


def test_only_rank_0_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(2):
        distributed.print_rank_0("once", replace(RANK, index=index))
    assert capsys.readouterr().out == "once\n"

"""Which node this is: the variables of each platform, and hostfiles."""

from pathlib import Path

import pytest

from llama_pretrain.config.launch import Launch, Launcher
from llama_pretrain.config.problems import UserError
from llama_pretrain.plan.nodes import Host, count_nodes, list_hosts, master_of, node_rank

TORCHRUN = Launch(name=Launcher.torchrun)
KUBEFLOW_TRAINER = {
    "PET_NNODES": "4",
    "PET_NODE_RANK": "3",
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29400",
}
PYTORCH_JOB = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "MASTER_ADDR": "job-0",
    "MASTER_PORT": "23456",
}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5\n",
}
SRUN = {"SLURM_JOB_NUM_NODES": "3", "SLURM_NODEID": "2", "MASTER_ADDR": "n1"}


@pytest.mark.parametrize(
    ("environ", "nodes", "rank", "master"),
    [
        (KUBEFLOW_TRAINER, 4, 3, ("job-node-0-0.job", 29400)),
        (PYTORCH_JOB, 2, 1, ("job-0", 23456)),
        (SKYPILOT, 2, 1, ("10.0.0.4", 29500)),
        (SRUN, 3, 2, ("n1", 29500)),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"}, 2, 0, ("a", 29500)),
        ({"NNODES": "1"}, 1, 0, (None, 29500)),
    ],
)
def test_the_variables_of_platforms(
    environ: dict[str, str], nodes: int, rank: int, master: tuple[str | None, int]
) -> None:
    assert count_nodes(TORCHRUN, environ) == nodes
    assert node_rank(TORCHRUN, environ) == rank
    assert master_of(TORCHRUN, environ) == master


def test_settings_come_before_the_platform() -> None:
    launch = Launch(name=Launcher.torchrun, nodes=8, node_rank=7, master="10.0.0.1:1234")
    assert count_nodes(launch, SKYPILOT) == 8
    assert node_rank(launch, SKYPILOT) == 7
    assert master_of(launch, KUBEFLOW_TRAINER) == ("10.0.0.1", 1234)


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({}, "launch.nodes: is required: no platform has set it"),
        ({"NNODES": "two"}, r"launch.nodes: NNODES is no number \(got two\)"),
        ({"NNODES": "2"}, "launch.node_rank: is required: no platform has set it"),
        ({"NNODES": "2", "NODE_RANK": "2"}, r"must be below launch.nodes=2 \(got 2\)"),
    ],
)
def test_a_node_that_does_not_know_itself(environ: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        node_rank(TORCHRUN, environ)


def test_other_launchers_ignore_the_platform() -> None:
    assert count_nodes(Launch(), SKYPILOT) == 1
    assert node_rank(Launch(), SKYPILOT) == 0


def test_a_hostfile_of_deepspeed(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# two machines\nworker-1 slots=4\n\nworker-2 slots=4  # the new one\n")
    launch = Launch(name=Launcher.ssh, hostfile=str(file))
    assert list_hosts(launch) == [Host(name="worker-1", slots=4), Host(name="worker-2", slots=4)]
    assert count_nodes(launch) == 2


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("a slots=4\nb slots=8\n", r"different numbers of ranks \(got a 4, b 8\)"),
        ("a slots=four\n", r"line 1 must be HOST or HOST slots=N \(got a slots=four\)"),
        ("a\nb slots=4 gpu\n", "line 2 must be HOST"),
        ("a\na\n", "names a host twice"),
        ("\n", "is required"),
    ],
)
def test_a_hostfile_that_is_none(tmp_path: Path, lines: str, says: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(lines)
    with pytest.raises(UserError, match=says):
        list_hosts(Launch(name=Launcher.ssh, hostfile=str(file)))
    with pytest.raises(UserError, match="cannot be read"):
        list_hosts(Launch(name=Launcher.ssh, hostfile=str(tmp_path / "none")))

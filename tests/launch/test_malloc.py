"""The allocator settings of ranks: freed memory stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

from llama_pretrain.launch.environment import worker_environment
from llama_pretrain.plan.machine import detect_machine
from tests.machines import plan_for_cluster

FAULTS_OF_SECOND_USE = """
import resource, torch
torch.set_num_threads(1)
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Page faults when 64 MiB that were just freed are allocated again: at least 32 pages of 2 MiB."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="uses its tunables")
@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ([], True),
        (["kernels=plain"], False),
        (["launch.malloc_mmap_threshold=262144"], False),
    ],
)
def test_freed_memory_stays(words: list[str], kept: bool) -> None:
    run = plan_for_cluster("launch.device=cpu", *words, machine=detect_machine())
    command = [sys.executable, "-c", FAULTS_OF_SECOND_USE]
    output = subprocess.check_output(command, env=os.environ | worker_environment(run))
    assert (int(output) < 16) is kept, output

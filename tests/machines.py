"""Machines that tests plan for."""

from dataclasses import replace

from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.plan.machine import Machine, detect_machine
from llama_pretrain.plan.resolve import resolve
from tests.conftest import ROOT, compose_run

LAPTOP = Machine(
    cores=8,
    memory_bytes=16 << 30,
    num_gpus=0,
    gpu_name=None,
    gpu_memory_bytes=None,
    gpu_capability=None,
    cpu_bf16=False,
    cpu_intel=False,
    cpu_fast_bf16=True,
    has_compiler=False,
    has_libaio=False,
)
CLUSTER = Machine(
    cores=64,
    memory_bytes=1 << 40,
    num_gpus=8,
    gpu_name="NVIDIA H100 80GB HBM3",
    gpu_memory_bytes=80 << 30,
    gpu_capability=(9, 0),
    cpu_bf16=True,
    cpu_intel=False,
    cpu_fast_bf16=True,
    has_compiler=True,
    has_libaio=True,
)
MACHINES = {
    "laptop": LAPTOP,
    "builder": replace(LAPTOP, has_compiler=True, has_libaio=True),
    "cluster": CLUSTER,
    "v100": replace(CLUSTER, gpu_name="Tesla V100-SXM2-32GB", gpu_capability=(7, 0)),
    "no_aio": replace(CLUSTER, has_libaio=False),
}


def resolve_for(*overrides: str, machine: Machine | None = None) -> ResolvedRun:
    """The resolved run that overrides compose to, on this machine unless another is given."""
    return resolve(compose_run(overrides), machine or detect_machine())


def list_options() -> list[str]:
    """`group=option` for every YAML of every group."""
    files = [path for path in sorted(ROOT.glob("conf/*/*.yaml")) if path.parent.name != "hydra"]
    files += sorted(ROOT.glob("sweeps/sweep/*.yaml"))
    return [f"{path.parent.name}={path.stem}" for path in files]


def plan_for_cluster(*overrides: str, machine: Machine = CLUSTER) -> ResolvedRun:
    """The resolved run that overrides compose to, with task=plan, on the cluster."""
    return resolve(compose_run(["task=plan", *overrides]), machine)

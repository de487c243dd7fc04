"""Hours, energy and money of a run, from a measured or given throughput."""

from dataclasses import dataclass

from llama_pretrain.config.launch import Device
from llama_pretrain.config.resolved import ResolvedRun


@dataclass(frozen=True, kw_only=True)
class CostPlan:
    """Cost of the steps of a run, without evaluations and checkpoints."""

    tokens_per_s: float
    """Over all ranks."""
    hours: float
    device_hours: float
    """Hours times GPUs, or times nodes on a CPU."""
    kilowatt_hours: float | None
    """`None` without a power."""
    price: float | None
    """In the currency of plan.price_per_device_hour; `None` without one."""


def estimate_cost(run: ResolvedRun, *, tokens: int, tokens_per_s: float) -> CostPlan:
    """Cost of `tokens` at a throughput."""
    launch, asked = run.launch, run.plan
    devices = launch.nodes * (launch.num_processes if launch.device is Device.cuda else 1)
    hours = tokens / tokens_per_s / 3600
    device_hours = hours * devices
    watts, price = asked.watts_per_device, asked.price_per_device_hour
    return CostPlan(
        tokens_per_s=tokens_per_s,
        hours=hours,
        device_hours=device_hours,
        kilowatt_hours=None if watts is None else device_hours * watts / 1000,
        price=None if price is None else device_hours * price,
    )

"""Parameter groups, the optimizers by name, and the learning rate of each step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llama_pretrain.config.schema import Optim, OptimName, Schedule, ScheduleName
from llama_pretrain.plan.plan import Steps

DECAYED_MODULES = (nn.Linear, nn.Embedding)


def get_optimizer_grouped_parameters(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights of linear and embedding layers decay; norms and biases never do.

    The kind of module decides, not its name: lists of names have missed LLaMA's norms before
    (DeepSpeedExamples #755). A tied matrix is one parameter and stands in one group.

    Raises:
        ValueError: if a trainable parameter is in no group or in two.
    """
    decayed: dict[nn.Parameter, None] = {}
    plain: dict[nn.Parameter, None] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                decays = isinstance(module, DECAYED_MODULES) and name == "weight"
                (decayed if decays else plain)[parameter] = None
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    if decayed.keys() & plain.keys() or decayed.keys() | plain.keys() != trainable:
        raise ValueError("a trainable parameter is in no optimizer group or in two")
    return [
        {"params": list(decayed), "weight_decay": weight_decay},
        {"params": list(plain), "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimizer that the parent chose."""
    groups = get_optimizer_grouped_parameters(model, optim.weight_decay)
    options: dict[str, Any] = {
        "lr": optim.learning_rate,
        "betas": tuple(optim.betas),
        "eps": optim.eps,
    }
    if optim.name is OptimName.torch_adamw:
        return torch.optim.AdamW(groups, fused=True, **options)
    # DeepSpeed's two import, and on a CPU compile, their kernels only when they are asked for.
    if optim.name is OptimName.cpu_adam:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)  # type: ignore[no-any-return]
    if optim.name is OptimName.fused_adam:
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **options)  # type: ignore[no-any-return]
    raise ValueError(f"the parent left {optim.name} open")


def learning_rate_factor(schedule: Schedule, steps: Steps) -> Callable[[int], float]:
    """The share of the peak learning rate at each step, counted from 0.

    Warm-up is linear and reaches the peak at its last step; the last step of the run has
    `min_learning_rate_ratio` (arXiv 1608.03983 for the cosine).
    """
    least = schedule.min_learning_rate_ratio
    decay_start = steps.total - steps.decay

    def factor(step: int) -> float:
        if step < steps.warmup:
            return (step + 1) / steps.warmup
        if schedule.name is ScheduleName.constant or step < decay_start or steps.decay == 0:
            return 1.0
        progress = min(1.0, (step - decay_start + 1) / steps.decay)
        if schedule.name is ScheduleName.cosine:
            return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - (1 - least) * progress

    return factor

"""Parameter groups, the optimizers by name, and the learning rate of each step."""

import importlib
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
    rate, betas, eps = optim.learning_rate, tuple(optim.betas), optim.eps
    # DeepSpeed's import, and on a CPU compile, their kernels only when they are asked for.
    ops = importlib.import_module("deepspeed.ops")
    match optim.name:
        case OptimName.torch_adamw:
            return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True)
        case OptimName.cpu_adam:
            built = ops.adam.DeepSpeedCPUAdam(groups, lr=rate, betas=betas, eps=eps)
        case OptimName.fused_adam:
            built = ops.adam.FusedAdam(groups, lr=rate, betas=betas, eps=eps)
        case OptimName.cpu_lion:
            built = ops.lion.DeepSpeedCPULion(groups, lr=rate, betas=betas)
        case OptimName.fused_lion:
            built = ops.lion.FusedLion(groups, lr=rate, betas=betas)
        case OptimName.cpu_adagrad:
            built = ops.adagrad.DeepSpeedCPUAdagrad(groups, lr=rate, eps=eps)
        case OptimName.lamb:
            built = ops.lamb.FusedLamb(groups, lr=rate, betas=betas, eps=eps)
        case OptimName.muon:
            built = _build_muon(model, groups, optim)
        case _:
            raise ValueError(f"the parent left {optim.name} open")
    return built  # type: ignore[no-any-return]  # DeepSpeed has no types


def _build_muon(model: nn.Module, groups: list[dict[str, Any]], optim: Optim) -> Any:
    """Muon for the matrices of linear layers but the head, AdamW for everything else."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    head = model.get_output_embeddings().weight  # type: ignore[operator]  # transformers' model
    matrices = {
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight is not head
    }
    for parameter in model.parameters():  # ZeRO reads this mark too
        parameter.use_muon = parameter in matrices  # type: ignore[attr-defined]
    halves: list[dict[str, Any]] = []
    for group in groups:
        for use_muon in (False, True):  # AdamW's first: its rate is the one that metrics show
            members = [p for p in group["params"] if p.use_muon is use_muon]
            own = {"lr": optim.learning_rate, "betas": tuple(optim.betas), "eps": optim.eps}
            if use_muon:
                own = {"lr": optim.muon_learning_rate, "momentum": optim.muon_momentum}
            if members:
                halves.append({**group, "params": members, "use_muon": use_muon, **own})
    return MuonWithAuxAdam(halves)


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

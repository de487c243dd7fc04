"""Parameter groups and their audit, the optimizers by name, and each step's learning rate."""

import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama_pretrain.config.optim import Optim, OptimName
from llama_pretrain.config.schedule import Schedule, ScheduleName
from llama_pretrain.plan.model_size import ModelSize
from llama_pretrain.plan.plan import Steps

Groups = list[dict[str, Any]]

DECAYED_MODULES = (nn.Linear, nn.Embedding)
PLAIN_MODULES = (LlamaRMSNorm, nn.RMSNorm, nn.LayerNorm)


def get_optimizer_grouped_parameters(model: nn.Module, weight_decay: float) -> Groups:
    """Two groups: weights of linear and embedding layers decay; norms and biases never do.

    The kind of module decides, not its name: lists of names have missed LLaMA's norms before
    (DeepSpeedExamples #755). A tied matrix is one parameter and stands in one group.

    Raises:
        ValueError: if a trainable parameter is in no group or in two.
    """
    decayed: dict[nn.Parameter, str] = {}
    plain: dict[nn.Parameter, str] = {}
    homeless: list[str] = []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            full_name = f"{path}.{name}".removeprefix(".")
            if isinstance(module, DECAYED_MODULES) and name == "weight":
                decayed[parameter] = full_name
            elif isinstance(module, DECAYED_MODULES + PLAIN_MODULES):
                plain[parameter] = full_name
            else:
                homeless.append(f"{full_name} (of {type(module).__name__})")
    double = [f"{decayed[p]} = {plain[p]}" for p in decayed if p in plain]
    mistakes = [f"{', '.join(homeless)} in no optimizer group"] if homeless else []
    mistakes += [f"{', '.join(double)} in two optimizer groups"] if double else []
    if mistakes:
        raise ValueError(f"trainable parameters: {'; '.join(mistakes)}")
    return [
        {"params": list(decayed), "weight_decay": weight_decay},
        {"params": list(plain), "weight_decay": 0.0},
    ]


def audit_groups(groups: Groups, *, planned: ModelSize) -> str:
    """What decays in the real model and what doesn't, in a line.

    Raises:
        ValueError: if the plan, from the shapes in the config, counted otherwise.
    """
    decayed, plain = (group["params"] for group in groups)
    counted = _count_elements(decayed), _count_elements(plain)
    if counted != (planned.decayed, planned.not_decayed):
        raise ValueError(
            f"of the model's parameters {counted[0]:,} decay and {counted[1]:,} don't; the plan"
            f" has {planned.decayed:,} and {planned.not_decayed:,}"
        )
    return (
        f"weight decay: {counted[0]:,} parameters in {len(decayed)} tensors with,"
        f" {counted[1]:,} in {len(plain)} without, as planned"
    )


def _count_elements(parameters: Iterable[nn.Parameter]) -> int:
    # A parameter that zero.Init has sharded holds nothing, and knows what it would hold.
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def build_optimizer(model: nn.Module, groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    """The optimizer that the parent chose."""
    rate, eps = optim.learning_rate, optim.eps
    betas = optim.betas[0], optim.betas[1]
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


def _build_muon(model: nn.Module, groups: Groups, optim: Optim) -> Any:
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
    halves: Groups = []
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

"""Parameter groups and their audit, optimizers by name, and the learning-rate schedule."""

from collections.abc import Callable, Iterable
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama_pretrain.config.optim import LIONS, Optim, OptimName
from llama_pretrain.plan.model_size import ModelSize

Groups = list[dict[str, Any]]

DECAYED_MODULES = (nn.Linear, nn.Embedding)
PLAIN_MODULES = (LlamaRMSNorm, nn.RMSNorm, nn.LayerNorm)


def get_optimizer_grouped_parameters(model: nn.Module, weight_decay: float) -> Groups:
    """Two groups: weights of linear and embedding layers decay; norms and biases never do.

    The type of the module decides, not its name: lists of names have missed LLaMA's norms before
    (DeepSpeedExamples #755). A tied matrix is one parameter, in one group.

    Raises:
        ValueError: if a trainable parameter is in no group or in two.
    """
    decayed: dict[nn.Parameter, str] = {}
    plain: dict[nn.Parameter, str] = {}
    ungrouped: list[str] = []
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
                ungrouped.append(f"{full_name} (of {type(module).__name__})")
    double = [f"{decayed[p]} = {plain[p]}" for p in decayed if p in plain]
    mistakes = [f"{', '.join(ungrouped)} in no optimizer group"] if ungrouped else []
    mistakes += [f"{', '.join(double)} in two optimizer groups"] if double else []
    if mistakes:
        raise ValueError(f"trainable parameters: {'; '.join(mistakes)}")
    return [
        {"params": list(decayed), "weight_decay": weight_decay},
        {"params": list(plain), "weight_decay": 0.0},
    ]


def audit_groups(groups: Groups, *, planned: ModelSize) -> str:
    """A one-line summary of what decays in the real model.

    Raises:
        ValueError: if the plan, from the shapes in the config, has other counts.
    """
    decayed, plain = (group["params"] for group in groups)
    counted = _count_elements(decayed), _count_elements(plain)
    if counted != (planned.decayed, planned.not_decayed):
        raise ValueError(
            f"weight decay: the plan has {planned.decayed:,} parameters with and"
            f" {planned.not_decayed:,} without (got {counted[0]:,} and {counted[1]:,})"
        )
    return (
        f"weight decay: {counted[0]:,} parameters in {len(decayed)} tensors with,"
        f" {counted[1]:,} in {len(plain)} without, as planned"
    )


def _count_elements(parameters: Iterable[nn.Parameter]) -> int:
    # A parameter sharded by zero.Init is empty; ds_numel has its full size.
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def build_optimizer(model: nn.Module, groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    """The optimizer of a resolved run."""
    settings: dict[str, Any] = {"lr": optim.learning_rate}
    if optim.name is not OptimName.cpu_adagrad:
        settings["betas"] = (optim.betas[0], optim.betas[1])
    if optim.name.value not in LIONS:
        settings["eps"] = optim.eps
    if optim.name is OptimName.torch_adamw:
        return torch.optim.AdamW(groups, **settings, fused=True)
    if optim.name is OptimName.muon:
        return _build_muon(model, groups, optim)
    ops = deepspeed.ops
    classes: dict[OptimName, Callable[..., torch.optim.Optimizer]] = {
        OptimName.cpu_adam: ops.adam.DeepSpeedCPUAdam,
        OptimName.fused_adam: ops.adam.FusedAdam,
        OptimName.cpu_lion: ops.lion.DeepSpeedCPULion,
        OptimName.fused_lion: ops.lion.FusedLion,
        OptimName.cpu_adagrad: ops.adagrad.DeepSpeedCPUAdagrad,
        OptimName.lamb: ops.lamb.FusedLamb,
    }
    return classes[optim.name](groups, **settings)


def _build_muon(model: nn.Module, groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    """Muon for the matrices of linear layers except the head, AdamW for everything else."""
    # Imports torch's compiler, which takes seconds and is used only here.
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    head = model.get_output_embeddings().weight  # type: ignore[operator]  # transformers' model
    matrices = {
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight is not head
    }
    for parameter in model.parameters():  # ZeRO reads this attribute too
        parameter.use_muon = parameter in matrices  # type: ignore[attr-defined]
    split: Groups = []
    for group in groups:
        for use_muon in (False, True):  # AdamW first: metrics show the first group's rate
            members = [p for p in group["params"] if p.use_muon is use_muon]
            own = {"lr": optim.learning_rate, "betas": tuple(optim.betas), "eps": optim.eps}
            if use_muon:
                own = {"lr": optim.muon_learning_rate, "momentum": optim.muon_momentum}
            if members:
                split.append({**group, "params": members, "use_muon": use_muon, **own})
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(split)
    return optimizer

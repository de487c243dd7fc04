"""What DeepSpeed's engine does that a run must not notice."""

from typing import Any

import torch


def undo_initial_step(engine: Any) -> None:
    """Take back the step on zero gradients that DeepSpeed takes at stage 0 in 16 bits.

    To allocate its state early, FP16_UnfusedOptimizer (and the fused one) steps once while it is
    built: weight decay shrinks the fp32 weights and Adam's count starts at 1. Clear the state and
    copy the 16-bit weights, which the step left alone, back into the fp32 ones.
    """
    if engine.zero_optimization_stage() != 0:
        return
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_groups"):  # FP16_UnfusedOptimizer: lists of tensors
        masters = [tensor for group in wrapper.fp32_groups for tensor in group]
        halves = [tensor for group in wrapper.fp16_groups for tensor in group]
    elif hasattr(wrapper, "fp16_groups_flat"):  # FP16_Optimizer, for FusedAdam
        masters, halves = wrapper.fp32_groups_flat, wrapper.fp16_groups_flat
    else:
        return
    wrapper.optimizer.state.clear()
    for group in wrapper.optimizer.param_groups:
        if "step" in group:  # DeepSpeed's FusedAdam counts here
            group["step"] = 0
    with torch.no_grad():
        for master, half in zip(masters, halves, strict=True):
            master.copy_(half)

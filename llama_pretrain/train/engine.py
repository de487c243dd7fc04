"""What DeepSpeed's engine does that a run must not notice."""

import math
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


def apply_update(engine: Any, *, skip: bool) -> float | None:
    """Take the optimizer step of a whole gradient. Returns its norm; `None` if it was skipped.

    A step is skipped on request (the caller has made the gradient NaN), or because the gradient
    isn't finite. DeepSpeed does that, counts it, and leaves the schedule alone; but not in fp32 at
    stage 0, where it has no check, and not in bf16 with check_grad_overflow=false.
    """
    wrapper = engine.optimizer
    if not hasattr(wrapper, "overflow"):  # torch's own optimizer
        return _update_plain(engine, skip=skip)
    checked = getattr(wrapper, "check_grad_overflow", True)
    if skip and not checked:
        wrapper.check_grad_overflow = True
    before = engine.skipped_steps
    engine.step()
    if skip and not checked:
        wrapper.check_grad_overflow = False
    if engine.skipped_steps > before:
        return None
    norm = engine.get_global_grad_norm()
    return float(norm)


def _update_plain(engine: Any, *, skip: bool) -> float | None:
    norm = _plain_grad_norm(engine)
    if math.isfinite(norm) and not skip:
        engine.step()
        return norm
    if engine.torch_autocast_z0_gradscaler is not None:  # it looks at the gradient by itself
        engine.optimizer.overflow = True  # what the engine asks before it moves the schedule
        engine.step()
        del engine.optimizer.overflow
        return None
    engine.module.zero_grad(set_to_none=True)
    engine.skipped_steps += 1
    engine.global_steps += 1
    engine.micro_steps += 1
    engine.global_samples += engine.train_batch_size()
    return None


def _plain_grad_norm(engine: Any) -> float:
    """Norm of the gradients that stage 0 has reduced, where they are the parameters' own."""
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    scaler = engine.torch_autocast_z0_gradscaler  # autocast to float16: they are scaled until step
    scale = 1.0 if scaler is None else scaler.get_scale()
    return float(torch.nn.utils.get_total_norm(gradients)) / scale

"""The training engine: how it is built, and what DeepSpeed does that a run must not notice."""

import math
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils.logging import set_log_level_from_string
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer

from llama_pretrain.config.run import Run
from llama_pretrain.distributed import Rank, print_rank_0
from llama_pretrain.plan.plan import Plan
from llama_pretrain.train.kernels.install import compile_layers, install_kernels
from llama_pretrain.train.model import Digest, build_llama_config, build_model, restore_rotary
from llama_pretrain.train.optimizer import (
    audit_groups,
    build_optimizer,
    get_optimizer_grouped_parameters,
    learning_rate_factor,
)
from llama_pretrain.train.recompute import recompute_activations


def build_engine(
    run: Run,
    plan: Plan,
    ds_config: dict[str, Any],
    rank: Rank,
    *,
    tokenizer_dir: Path,
    digest: Digest | None = None,
) -> Any:
    """Model, optimizer and schedule in a DeepSpeed engine, its weights as they were drawn.

    Args:
        digest: takes in the weights.
    """
    if "log_level" not in ds_config:
        # DeepSpeed hides what steps_per_print, dump_state and comms_logger ask it to say.
        set_log_level_from_string("info")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = build_llama_config(
        run.model,
        vocab_size=plan.vocab_size,
        special_ids={
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
    )
    weights = None if run.model.path is None else Path(run.model.path)
    model = build_model(config, seed=run.seed, weights=weights, ds_config=ds_config, digest=digest)
    install_kernels(model, run.kernels)
    rank.phases.end("model")
    if run.train.gradient_checkpointing:
        recompute_activations(model, ds_config)
    groups = get_optimizer_grouped_parameters(model, run.optim.weight_decay)
    print_rank_0(audit_groups(groups, planned=plan.parameters), rank)
    optimizer = build_optimizer(model, groups, run.optim)
    factor = learning_rate_factor(run.schedule, plan.steps)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=LambdaLR(optimizer, factor),
        config=ds_config,
        dist_init_required=False,
    )
    undo_initial_step(engine)
    if run.precision.buffer_dtype is None:  # else they are asked for in another type
        restore_rotary(engine.module, config, rank.device)
    compile_layers(engine.module, run.kernels.compile)
    engine.train()
    return engine


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

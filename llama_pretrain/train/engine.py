"""The training engine: construction, and corrections of DeepSpeed that keep runs reproducible."""

import math
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils.logging import set_log_level_from_string
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM

from llama_pretrain.checkpoint.engine_state import replicated_weights
from llama_pretrain.checkpoint.huggingface import load_tokenizer
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.distributed import Rank, print_rank_0
from llama_pretrain.plan.plan import TrainingPlan
from llama_pretrain.plan.schedule import learning_rate_factor
from llama_pretrain.train.kernels.install import compile_layers, install_kernels
from llama_pretrain.train.model import Digest, build_llama_config, build_model, restore_rotary
from llama_pretrain.train.optimizer import (
    audit_groups,
    build_optimizer,
    get_optimizer_grouped_parameters,
)
from llama_pretrain.train.sequence import SequenceGroup


def build_engine(
    run: ResolvedRun,
    plan: TrainingPlan,
    ds_config: dict[str, Any],
    rank: Rank,
    *,
    tokenizer_dir: Path,
    digest: Digest | None = None,
) -> tuple[Any, SequenceGroup | None]:
    """Model, optimizer and schedule in a DeepSpeed engine, with unchanged initial weights.

    Args:
        digest: updated with the initial weights.

    Returns:
        The engine, and the ranks that share each sequence, if several do.
    """
    if "log_level" not in ds_config:
        # DeepSpeed prints steps_per_print, dump_state and comms_logger at this level only.
        set_log_level_from_string("info")
    tokenizer = load_tokenizer(tokenizer_dir)
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
    sequence = None
    if rank.sequence_size > 1:
        sequence = SequenceGroup(rank, config, timeout_s=run.launch.timeout_s + 60)
    install_kernels(model, run.kernels, sequence=sequence)
    rank.phases.end("model")
    if run.train.gradient_checkpointing:
        enable_activation_checkpointing(model, ds_config)
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
    if run.precision.buffer_dtype is None:
        restore_rotary(engine.module, config, rank.device)
    compile_layers(engine.module, run.kernels.compile)
    engine.train()
    return engine, sequence


def enable_activation_checkpointing(model: LlamaForCausalLM, ds_config: dict[str, Any]) -> None:
    """Recompute activations in the backward pass from each layer's inputs.

    With a section activation_checkpointing, DeepSpeed's own checkpointing does it, which its engine
    leaves to the script to configure.
    """
    model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]  # transformers
        {"use_reentrant": False}
    )
    if "activation_checkpointing" not in ds_config:
        return
    section = ds_config["activation_checkpointing"]
    num_checkpoints = section.get("number_checkpoints", model.config.num_hidden_layers)
    deepspeed.checkpointing.configure(
        None, deepspeed_config=ds_config, num_checkpoints=num_checkpoints
    )
    # transformers has no public way to set another function than torch's.
    model._set_gradient_checkpointing(
        gradient_checkpointing_func=deepspeed.checkpointing.checkpoint
    )


def undo_initial_step(engine: Any) -> None:
    """Undo the step on zero gradients that DeepSpeed takes at stage 0 in 16 bits.

    To allocate its state early, FP16_UnfusedOptimizer (and the fused one) steps once when it is
    built: weight decay shrinks the fp32 weights, and Adam's count starts at 1. Clear the state and
    copy the 16-bit weights, which the step did not change, into the fp32 ones.
    """
    if engine.zero_optimization_stage() != 0:
        return
    masters = [weight for weight in replicated_weights(engine) if weight[0] is not weight[1]]
    if not masters:  # fp32: torch's own optimizer
        return
    inner = engine.optimizer.optimizer
    inner.state.clear()
    for group in inner.param_groups:
        if "step" in group:  # DeepSpeed's FusedAdam counts here
            group["step"] = 0
    with torch.no_grad():
        for parameter, master, offset in masters:
            master.view(-1).narrow(0, offset, parameter.numel()).copy_(parameter.view(-1))


def apply_update(engine: Any, *, skip: bool) -> float | None:
    """Take the optimizer step of an accumulated gradient. Returns its norm; `None` if skipped.

    A step is skipped on request (the caller has made the gradient NaN), or because the gradient is
    not finite. DeepSpeed then counts it and does not advance the schedule. It has no such check in
    fp32 at stage 0, nor in bf16 with check_grad_overflow=false.
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
    return float(engine.get_global_grad_norm())


def _update_plain(engine: Any, *, skip: bool) -> float | None:
    norm = _plain_grad_norm(engine)
    if math.isfinite(norm) and not skip:
        engine.step()
        return norm
    if engine.torch_autocast_z0_gradscaler is not None:  # checks the gradient itself
        engine.optimizer.overflow = True  # read before the schedule advances
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
    """Norm of the gradients that stage 0 has reduced, where parameters hold them."""
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    scaler = engine.torch_autocast_z0_gradscaler  # autocast to float16: scaled until the step
    scale = 1.0 if scaler is None else scaler.get_scale()
    return float(torch.nn.utils.get_total_norm(gradients)) / scale

"""Activations that are recomputed in the backward pass: torch's way, or DeepSpeed's."""

from typing import Any

import deepspeed
from transformers import LlamaForCausalLM


def recompute_activations(model: LlamaForCausalLM, ds_config: dict[str, Any]) -> None:
    """Keep the inputs of each layer alone, and run the layer again in the backward pass.

    A section activation_checkpointing asks for DeepSpeed's own checkpointing, which its engine
    leaves to the script; it is configured from that section.
    """
    model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]  # transformers
        {"use_reentrant": False}
    )
    if "activation_checkpointing" not in ds_config:
        return
    section = ds_config["activation_checkpointing"]
    deepspeed.checkpointing.configure(
        None,
        deepspeed_config=ds_config,
        num_checkpoints=section.get("number_checkpoints", model.config.num_hidden_layers),
    )
    # transformers has no public way to another function than torch's.
    model._set_gradient_checkpointing(
        gradient_checkpointing_func=deepspeed.checkpointing.checkpoint
    )

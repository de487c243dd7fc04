"""Save a training engine's model in Hugging Face format, at any ZeRO stage."""

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
from transformers import AutoTokenizer, PreTrainedModel


def save_hf_format(
    model: PreTrainedModel, target: Path, *, tokenizer_dir: Path, sharded: bool, is_first: bool
) -> None:
    """Gather the weights on rank 0, parameter by parameter, and write them with the tokenizer.

    Every rank calls it. A tied head is written once. The weights keep the precision that they
    were trained in, and config.json says so.
    """
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():  # a tied matrix comes once
        gather = deepspeed.zero.GatheredParameters([parameter]) if sharded else nullcontext()
        with gather:
            if is_first:
                state[name] = parameter.detach().cpu().clone()
    if not is_first:
        return
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.config.dtype = next(iter(state.values())).dtype
    model.save_pretrained(temporary, state_dict=state)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(temporary)
    if target.exists():  # from before a resume
        shutil.rmtree(target)
    os.rename(temporary, target)

"""The model of a rank: built empty, then initialized parameter by parameter.

Each parameter is drawn from its own generator, seeded by the run's seed and the parameter's name,
or read from a checkpoint. So the weights do not depend on ZeRO stage, number of ranks, or order of
construction, and no rank ever holds a second copy of the model.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_pretrain.checkpoint.manifest import STATE
from llama_pretrain.checkpoint.tensors import StoredState
from llama_pretrain.config.model import SHAPE, Model
from llama_pretrain.config.snapshot import to_plain
from llama_pretrain.files import read_json

COPIED_FIELDS = (*SHAPE, "attention_dropout", "initializer_range")
"""Fields of the config group `model` that transformers has under the same name."""


class Digest(Protocol):
    """A hash object of hashlib."""

    def update(self, data: Any, /) -> None: ...


def build_llama_config(
    model: Model, *, vocab_size: int, special_ids: dict[str, int | None]
) -> LlamaConfig:
    """Transformers' config of a model with `vocab_size` embeddings."""
    rope = to_plain(model.rope_parameters)
    settings: dict[str, Any] = {name: getattr(model, name) for name in COPIED_FIELDS}
    settings["rope_parameters"] = {key: value for key, value in rope.items() if value is not None}
    settings |= {"vocab_size": vocab_size, "attn_implementation": "sdpa", **special_ids}
    return LlamaConfig(**settings)


def build_model(
    config: LlamaConfig,
    *,
    seed: int,
    weights: Path | None,
    ds_config: dict[str, Any],
    digest: Digest | None = None,
) -> LlamaForCausalLM:
    """A model whose parameters are fp32 and whole, or sharded by `ds_config` at stage 3.

    All ranks call it.

    Args:
        weights: a Hugging Face model or one of our checkpoints to read parameters from; `None`
            draws all of them.
        digest: updated with every parameter's initial value.
    """
    sharded = ds_config["zero_optimization"]["stage"] == 3
    init = deepspeed.zero.Init(config_dict_or_path=ds_config) if sharded else nullcontext()
    with no_init_weights(), init:
        model = LlamaForCausalLM(config)
    model.tie_weights()
    with nullcontext() if weights is None else open_weights(weights) as read:
        for name, parameter in model.named_parameters():
            gather = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
            with gather if sharded else nullcontext(), torch.no_grad():
                if parameter.numel() == 0:  # rank 0 has gathered it
                    continue
                value = _initial_value(model, name, parameter, seed=seed, read=read)
                # In fp32: at stage 3 the parameter may have 16 bits already.
                if digest is not None:
                    hash_tensor(digest, name, value)
                parameter.copy_(value)
    return model


def _initial_value(
    model: LlamaForCausalLM,
    name: str,
    parameter: nn.Parameter,
    *,
    seed: int,
    read: Callable[[str], Tensor] | None,
) -> Tensor:
    """One parameter's initial value on the CPU; drawn ones in fp32, as LlamaForCausalLM does."""
    value = None if read is None else read(name)
    if value is not None and value.shape == parameter.shape:
        return value
    if name.endswith("bias"):
        drawn = torch.zeros(parameter.shape)
    elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear | nn.Embedding):
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        std = model.config.initializer_range
        drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
    else:  # a norm
        drawn = torch.ones(parameter.shape)
    if value is not None:  # embeddings were resized: keep those that exist
        drawn[: value.shape[0]] = value
    return drawn


@contextmanager
def open_weights(folder: Path) -> Iterator[Callable[[str], Tensor]]:
    """A function that reads one parameter of a Hugging Face model or of one of our checkpoints.

    It returns the parameter on the CPU in its stored type, and raises KeyError if it is missing.
    """
    with ExitStack() as stack:
        if (folder / STATE).is_file():
            stored = stack.enter_context(StoredState(folder))
            readers = dict.fromkeys(stored.shapes, stored.weight)
        else:
            index, readers = folder / "model.safetensors.index.json", {}
            weight_map = (read_json(index) or {}).get("weight_map", {"": "model.safetensors"})
            for name in set(weight_map.values()):
                file = stack.enter_context(safe_open(folder / name, framework="pt"))
                readers |= dict.fromkeys(file.keys(), file.get_tensor)

        def read(name: str) -> Tensor:
            if name not in readers:
                raise KeyError(f"model.path: has no weights for {name} (got {folder})")
            return readers[name](name)

        yield read


def restore_rotary(model: nn.Module, config: LlamaConfig, device: torch.device) -> None:
    """Restore the fp32 rotary frequencies.

    zero.Init computes them in 16 bits. Rounded frequencies rotate distant positions by wrong
    angles, and the export would differ from the trained model.
    """
    exact = LlamaRotaryEmbedding(config)
    for module in model.modules():
        if isinstance(module, LlamaRotaryEmbedding):
            module.register_buffer("inv_freq", exact.inv_freq.to(device), persistent=False)
            original = exact.original_inv_freq.to(device)
            module.register_buffer("original_inv_freq", original, persistent=False)


def hash_tensor(digest: Digest, name: str, tensor: Tensor) -> None:
    """Update a digest with a tensor's name and its values in fp32."""
    digest.update(name.encode())
    digest.update(tensor.detach().float().cpu().contiguous().numpy())

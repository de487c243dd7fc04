"""The model of a rank: built empty, then filled parameter by parameter.

Each parameter is drawn from a generator of its own, seeded by the run's seed and the parameter's
name, or read from a checkpoint. So the weights depend on neither stage, nor ranks, nor the order
of construction, and no rank ever holds a second copy of the model.
"""

import hashlib
import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_pretrain.checkpoint.tensors import STATE, StoredState
from llama_pretrain.config.model import Model
from llama_pretrain.config.snapshot import to_plain


class Digest(Protocol):
    """What hashlib makes."""

    def update(self, data: Any, /) -> None: ...


def build_llama_config(
    model: Model, *, vocab_size: int, special_ids: dict[str, int | None]
) -> LlamaConfig:
    """Transformers' config of a model whose embeddings have `vocab_size` rows."""
    rope = {
        key: value for key, value in to_plain(model.rope_parameters).items() if value is not None
    }
    settings: dict[str, Any] = {"attn_implementation": "sdpa", **special_ids}
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.rms_norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=model.tie_word_embeddings,
        attention_bias=model.attention_bias,
        mlp_bias=model.mlp_bias,
        attention_dropout=model.attention_dropout,
        initializer_range=model.initializer_range,
        **settings,
    )


def build_model(
    config: LlamaConfig,
    *,
    seed: int,
    weights: Path | None,
    ds_config: dict[str, Any],
    digest: Digest | None = None,
) -> LlamaForCausalLM:
    """A model whose parameters are fp32 and whole, or sharded as `ds_config` has it at stage 3.

    Args:
        weights: a Hugging Face model or one of our checkpoints to read parameters from; `None`
            draws all of them.
        digest: takes in every parameter's first value.
    """
    sharded = ds_config["zero_optimization"]["stage"] == 3
    init = deepspeed.zero.Init(config_dict_or_path=ds_config) if sharded else nullcontext()
    with no_init_weights(), init:
        model = LlamaForCausalLM(config)
    model.tie_weights()
    fill_parameters(model, seed=seed, weights=weights, sharded=sharded, digest=digest)
    return model


def fill_parameters(
    model: LlamaForCausalLM,
    *,
    seed: int,
    weights: Path | None,
    sharded: bool,
    digest: Digest | None = None,
) -> None:
    """Give every parameter its first value; all ranks call it.

    Args:
        digest: takes in the values in fp32, before a parameter rounds them: at stage 3 it may have
            16 bits already. Of a sharded model rank 0 alone has them.
    """
    modules = dict(model.named_modules())
    with nullcontext() if weights is None else Weights(weights) as source:
        for name, parameter in model.named_parameters():
            gather = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
            with gather if sharded else nullcontext(), torch.no_grad():
                if parameter.numel() == 0:  # gathered on rank 0 alone
                    continue
                value = None if source is None else source.read(name)
                if value is None or value.shape != parameter.shape:
                    owner = modules[name.rpartition(".")[0]]
                    std = model.config.initializer_range
                    drawn = _draw(owner, name, parameter, seed=seed, std=std)
                    if value is not None:  # the first rows: embeddings have grown
                        drawn[: value.shape[0]] = value
                    value = drawn
                if digest is not None:
                    hash_tensor(digest, name, value)
                parameter.copy_(value)


def _draw(
    owner: nn.Module, name: str, parameter: nn.Parameter, *, seed: int, std: float
) -> torch.Tensor:
    """One parameter's initial value in fp32 on the CPU, as LlamaForCausalLM initialises it."""
    if name.endswith("bias"):
        return torch.zeros(parameter.shape)
    if not isinstance(owner, (nn.Linear, nn.Embedding)):  # a norm
        return torch.ones(parameter.shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(parameter.shape).normal_(0.0, std, generator=generator)


class Weights:
    """Tensors of a Hugging Face model or of one of our checkpoints, read one at a time.

    Use it in a `with` block: it keeps files of a checkpoint open.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._stored: StoredState | None = None
        self._files: dict[str, str] = {}
        index = folder / "model.safetensors.index.json"
        if (folder / STATE).is_file():
            self._stored = StoredState(folder)
        elif index.is_file():
            self._files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), "model.safetensors")

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *error: object) -> None:
        if self._stored is not None:
            self._stored.__exit__(*error)

    def read(self, name: str) -> torch.Tensor:
        """A parameter on the CPU, in the type that it is stored in.

        Raises:
            KeyError: if the folder lacks it.
        """
        names = self._files if self._stored is None else self._stored.shapes
        if name not in names:
            raise KeyError(f"{self._folder} has no weights for {name}")
        if self._stored is not None:
            return self._stored.weight(name)
        with safe_open(self._folder / self._files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def restore_rotary(model: nn.Module, config: LlamaConfig, device: torch.device) -> None:
    """Put the rotary frequencies back into fp32.

    zero.Init computes them in 16 bits; rounded frequencies turn far positions by the wrong angle,
    and the export would differ from what was trained.
    """
    exact = LlamaRotaryEmbedding(config)
    for module in model.modules():
        if isinstance(module, LlamaRotaryEmbedding):
            module.register_buffer("inv_freq", exact.inv_freq.to(device), persistent=False)
            original = exact.original_inv_freq.to(device)
            module.register_buffer("original_inv_freq", original, persistent=False)


def hash_parameters(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of named tensors, to show that weights are what they should be."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        hash_tensor(digest, name, tensor)
    return digest.hexdigest()


def hash_tensor(digest: Digest, name: str, tensor: torch.Tensor) -> None:
    """Let a digest take in a tensor's name and its values in fp32."""
    digest.update(name.encode())
    digest.update(tensor.detach().float().cpu().contiguous().numpy())

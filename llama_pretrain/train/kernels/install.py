"""A model with the kernels that its run has chosen.

The modules of transformers stay what they are, with their parameters and names: each is given a
class that computes the same in another way.
"""

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from llama_pretrain.config.kernels import CompiledPart, Kernels, LayerKernel, LossKernel, Matmul
from llama_pretrain.train.kernels.attention import blocked_attention
from llama_pretrain.train.kernels.cross_entropy import linear_cross_entropy
from llama_pretrain.train.kernels.elementwise import RmsNorm, Rotate, SwiGlu
from llama_pretrain.train.kernels.matmul import WideLinear

INTERFACES: Any = AttentionInterface()  # type: ignore[no-untyped-call]  # transformers'
"""Attention by name: transformers', and `blocked`."""
LIGER = "liger_kernel.transformers.functional"


def install_kernels(model: LlamaForCausalLM, kernels: Kernels) -> None:
    """Let a model compute as its run has chosen; no choice is open any more."""
    model.config._attn_implementation = kernels.attention.value
    wide = kernels.matmul is Matmul.fp32
    if kernels.loss is not LossKernel.plain:
        model.__class__ = LlamaWithLoss
        head: Any = model.lm_head
        head.__class__, head.losses = LossHead, _loss_function(kernels.loss, wide=wide)
    normalize = _layer_function(kernels.rms_norm, fused=RmsNorm.apply, liger="liger_rms_norm")
    swiglu = _layer_function(kernels.swiglu, fused=SwiGlu.apply, liger="liger_swiglu")
    rotate = _rotation(kernels.rotary)
    for module in list(model.modules()):
        changed: Any = module
        if isinstance(module, LlamaRMSNorm) and normalize is not None:
            changed.__class__, changed.normalize = Norm, normalize
        elif isinstance(module, LlamaMLP) and swiglu is not None:
            changed.__class__, changed.swiglu = Mlp, swiglu
        elif isinstance(module, LlamaAttention):
            changed.__class__, changed.rotate, changed.wide = Attention, rotate, wide
        elif type(module) is nn.Linear and wide:
            changed.__class__ = Linear


def compile_layers(model: LlamaForCausalLM, part: CompiledPart) -> None:
    """Mark what torch.compile is to make kernels of; it does when they are first run."""
    parts: list[nn.Module] = []
    if part is CompiledPart.layers:
        parts = [*model.model.layers, model.model.norm]
    elif part is CompiledPart.model:
        parts = [model.model]
    for module in parts:
        module.compile(dynamic=False)


def without_compilation() -> AbstractContextManager[Any]:
    """Where compiled modules run as they are written: for what isn't of the shape of a step."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and it takes a second to import
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


class Linear(nn.Linear):
    """A product with its operands in fp32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype is torch.float32:
            return super().forward(input)
        apply: Any = WideLinear.apply
        out: torch.Tensor = apply(input, self.weight, self.bias)
        return out


class Norm(LlamaRMSNorm):
    """RMSNorm, by the kernel that was chosen."""

    normalize: Callable[..., torch.Tensor]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.normalize(hidden_states, self.weight, self.variance_epsilon)


class Mlp(LlamaMLP):
    """The feed-forward layer, with SwiGLU by the kernel that was chosen."""

    swiglu: Callable[..., torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


class Attention(LlamaAttention):
    """transformers' attention, with a choice of rotation, and of fp32 within."""

    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    wide: bool

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D), and weights where the implementation has them."""
        rows, tokens, _ = hidden_states.shape
        query, key, value = (
            project(hidden_states).view(rows, tokens, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.rotate(query, key, *position_embeddings)
        value = value.transpose(1, 2)
        if self.wide:
            query, key, value = query.float(), key.float(), value.float()
        name = self.config._attn_implementation
        attend = INTERFACES.get_interface(name, eager_attention_forward)
        kwargs.pop("cache", None)
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        mixed = mixed.reshape(rows, tokens, -1).to(hidden_states.dtype)
        out: torch.Tensor = self.o_proj(mixed)
        return out, weights


def _layer_function(kernel: LayerKernel, *, fused: Any, liger: str) -> Any:
    """The function of a kernel; `None` leaves transformers' module."""
    if kernel is LayerKernel.fused:
        return fused
    if kernel is LayerKernel.liger:
        return getattr(importlib.import_module(LIGER), liger)
    return None


def _rotation(kernel: LayerKernel) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """(B, T, H, D) queries and (B, T, K, D) keys, cos, sin -> (B, H, T, D) and (B, K, T, D)."""
    turn: Any = Rotate.apply
    heads_first = _layer_function(kernel, fused=None, liger="liger_rope") or apply_rotary_pos_emb

    def rotate(
        query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if kernel is LayerKernel.fused:
            return turn(query, cos, sin), turn(key, cos, sin)
        turned: tuple[torch.Tensor, torch.Tensor]
        turned = heads_first(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
        return turned

    return rotate


def _attend_blocked(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: (B, H, T, D) -> (B, T, H, D)."""
    mixed = blocked_attention(query, key, value, attention_mask, scaling)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register("blocked", _attend_blocked)
AttentionMaskInterface.register("blocked", sdpa_mask)


class LossHead(nn.Linear):
    """The head of a model: logits as ever, or with `targets` the losses alone."""

    losses: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if targets is None:
            return super().forward(hidden)
        return self.losses(hidden.flatten(0, 1), self.weight, targets.flatten())


class LlamaWithLoss(LlamaForCausalLM):  # type: ignore[no-untyped-call]  # transformers'
    """A LLaMA whose forward pass ends in logits, or with `targets` in losses.

    The head is called as a module, for DeepSpeed gathers its weights then.
    """

    def forward(
        self, input_ids: torch.Tensor, *, targets: torch.Tensor | None = None, **inputs: Any
    ) -> Any:
        """`targets` (B, T): their sum, which has a gradient, and each one's loss, (B * T,)."""
        if targets is None:
            return super().forward(input_ids, **inputs)
        hidden = self.model(input_ids=input_ids, **inputs).last_hidden_state
        return self.lm_head(hidden, targets)


def _loss_function(
    kernel: LossKernel, *, wide: bool
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    if kernel is LossKernel.chunked:
        return partial(linear_cross_entropy, wide=wide)
    theirs = importlib.import_module(LIGER)

    def losses(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():
            total = theirs.liger_fused_linear_cross_entropy(
                hidden, weight, targets, reduction="sum"
            )
            return total, total.detach()[None]
        logits = functional.linear(hidden, weight).float()
        each = functional.cross_entropy(logits, targets, reduction="none")
        return each.sum(), each

    return losses

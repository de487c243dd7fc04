"""Installs the kernels that a run has chosen into its model.

Modules of transformers keep their parameters and names; each gets a class that computes the same in
another way. Axes: B batch, T sequence, H query heads, K key heads, D width of a head.
"""

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
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
from llama_pretrain.train.kernels.elementwise import RmsNorm, Rotate, SwiGlu, WideLinear
from llama_pretrain.train.sequence import SequenceGroup

Pair = tuple[Tensor, Tensor]
INTERFACES: Any = AttentionInterface()  # type: ignore[no-untyped-call]  # transformers'
"""Attention by name: transformers', and `blocked`."""
LIGER = "liger_kernel.transformers.functional"


def install_kernels(
    model: LlamaForCausalLM, kernels: Kernels, *, sequence: SequenceGroup | None = None
) -> None:
    """Install the kernels of a resolved run.

    Args:
        sequence: the ranks that share each sequence.
    """
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
            changed.sequence = sequence
        elif type(module) is nn.Linear and wide:
            changed.__class__ = Linear


def compile_layers(model: LlamaForCausalLM, part: CompiledPart) -> None:
    """Mark what torch.compile compiles when it is first called."""
    parts: list[nn.Module] = []
    if part is CompiledPart.layers:
        parts = [*model.model.layers, model.model.norm]
    elif part is CompiledPart.model:
        parts = [model.model]
    for module in parts:
        module.compile(dynamic=False)


def without_compilation() -> AbstractContextManager[Any]:
    """Run compiled modules eagerly: for inputs with another shape than a training step's."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


class Linear(nn.Linear):
    """A product with fp32 operands."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype is torch.float32:
            return super().forward(input)
        apply: Any = WideLinear.apply
        out: Tensor = apply(input, self.weight, self.bias)
        return out


class Norm(LlamaRMSNorm):
    """RMSNorm by the chosen kernel."""

    normalize: Callable[..., Tensor]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.normalize(hidden_states, self.weight, self.variance_epsilon)


class Mlp(LlamaMLP):
    """The feed-forward layer, with SwiGLU by the chosen kernel."""

    swiglu: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


class Attention(LlamaAttention):
    """transformers' attention, with a choice of rotation and of fp32 operands."""

    rotate: Callable[..., Pair]
    wide: bool
    sequence: SequenceGroup | None = None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Pair,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, H * D) -> (B, T, H * D), and weights if the implementation returns them."""
        batch, tokens, _ = hidden_states.shape
        query, key, value = (
            project(hidden_states).view(batch, tokens, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.rotate(query, key, *position_embeddings)
        value = value.transpose(1, 2)
        if self.sequence is not None and self.sequence.active:
            query, key, value = self.sequence.to_heads(query, key, value)
            kwargs = self.sequence.whole_positions(kwargs)
        if self.sequence is not None:
            self.num_key_value_groups = query.shape[1] // key.shape[1]
        if self.wide:
            query, key, value = query.float(), key.float(), value.float()
        name = self.config._attn_implementation
        attend = INTERFACES.get_interface(name, eager_attention_forward)
        kwargs.pop("cache", None)
        dropout = self.attention_dropout if self.training else 0.0
        options = {"dropout": dropout, "scaling": self.scaling, **kwargs}
        mixed, weights = attend(self, query, key, value, attention_mask, **options)
        if self.sequence is not None and self.sequence.active:
            mixed = self.sequence.to_tokens(mixed.to(hidden_states.dtype))
        mixed = mixed.reshape(batch, tokens, -1).to(hidden_states.dtype)
        out: Tensor = self.o_proj(mixed)
        return out, weights


def _layer_function(kernel: LayerKernel, *, fused: Any, liger: str) -> Any:
    """The function of a kernel; `None` for transformers' module."""
    if kernel is LayerKernel.fused:
        return fused
    if kernel is LayerKernel.liger:
        return getattr(importlib.import_module(LIGER), liger)
    return None


def _rotation(kernel: LayerKernel) -> Callable[..., Pair]:
    """(B, T, H, D) queries and (B, T, K, D) keys, cos, sin -> (B, H, T, D) and (B, K, T, D)."""
    fused: Any = Rotate.apply
    heads_first = _layer_function(kernel, fused=None, liger="liger_rope") or apply_rotary_pos_emb

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        if kernel is LayerKernel.fused:
            return fused(query, cos, sin), fused(key, cos, sin)
        rotated: Pair = heads_first(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
        return rotated

    return rotate


def _attend_blocked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Blocked attention with the parameters of transformers' interface: -> (B, T, H, D)."""
    mixed = blocked_attention(query, key, value, attention_mask, scaling)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register("blocked", _attend_blocked)
AttentionMaskInterface.register("blocked", sdpa_mask)


class LossHead(nn.Linear):
    """The head of a model: logits, or with `targets` the losses."""

    losses: Callable[..., Pair]

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None = None
    ) -> Tensor | Pair:
        if targets is None:
            return super().forward(hidden)
        return self.losses(hidden.flatten(0, 1), self.weight, targets.flatten())


class LlamaWithLoss(LlamaForCausalLM):  # type: ignore[no-untyped-call]  # transformers'
    """A LLaMA that returns logits, or with `targets` losses.

    The head is called as a module, so that DeepSpeed gathers its weights.
    """

    def forward(self, input_ids: Tensor, *, targets: Tensor | None = None, **inputs: Any) -> Any:
        """With `targets` (B, T): the differentiable sum of losses, and each loss, (B * T,)."""
        if targets is None:
            return super().forward(input_ids, **inputs)
        hidden = self.model(input_ids=input_ids, **inputs).last_hidden_state
        return self.lm_head(hidden, targets)


def _loss_function(kernel: LossKernel, *, wide: bool) -> Callable[..., Pair]:
    if kernel is LossKernel.chunked:
        return partial(linear_cross_entropy, wide=wide)
    fused_loss = importlib.import_module(LIGER).liger_fused_linear_cross_entropy

    def losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Pair:
        if torch.is_grad_enabled():
            total = fused_loss(hidden, weight, targets, reduction="sum")
            return total, total.detach()[None]
        logits = functional.linear(hidden, weight).float()
        each = functional.cross_entropy(logits, targets, reduction="none")
        return each.sum(), each

    return losses

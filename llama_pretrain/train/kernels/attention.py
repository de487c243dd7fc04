"""Causal attention by blocks of queries: fast on a CPU, and without (T, T) scores in memory.

Axes: B batch, H query heads, K key heads, G = H / K, T sequence, D width of a head.

PyTorch's flash attention multiplies through MKL, which reaches a tenth of the 16-bit throughput of
processors that are not Intel's; `torch.bmm` goes through oneDNN. As in LLaMA's own code
(github.com/meta-llama/llama, model.py) and transformers' eager attention, scores are rounded to the
precision of the model, and their softmax is in fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SCORES = 1 << 20
"""Scores computed at once: 2 MiB in 16 bits, about a core's cache."""


def block_length(tokens: int) -> int:
    """Queries per block. Short sequences waste less on masked scores; long ones have fewer blocks
    (measured at T from 256 to 4096; docs/performance.md)."""
    return 128 if tokens <= 512 else 256


@torch.library.custom_op("llama_pretrain::blocked_attention", mutates_args=())
def blocked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """softmax(query key^T scale) value, where each token sees itself and earlier ones.

    Args:
        query: (B, H, T, D).
        key: (B, K, T, D), like `value`.
        mask: (B or 1, 1, T, T) bool, true where a query sees a key; includes the causal mask.

    Returns:
        (B, H, T, D).
    """
    q, k, v = _group(query, key, value, masked=mask is not None)
    out = torch.empty_like(q)
    for block, probabilities in _blocks(q, k, mask, scale):
        block.set_queries(out, torch.bmm(probabilities, block.keys(v)))
    return out.view(query.shape)


@torch.library.custom_op("llama_pretrain::blocked_attention_backward", mutates_args=())
def blocked_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; recomputes the probabilities."""
    q, k, v = _group(query, key, value, masked=mask is not None)
    grad = gradient.reshape(q.shape)
    grad_q = torch.empty_like(q)
    # Summed over blocks in fp32.
    grad_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    grad_v = torch.zeros_like(grad_k)
    for block, probabilities in _blocks(q, k, mask, scale):
        grad_out = block.queries(grad)
        block.keys(grad_v).add_(torch.bmm(probabilities.transpose(1, 2), grad_out))
        grad_p = torch.bmm(grad_out, block.keys(v).transpose(1, 2))
        # (grad_p - sum(grad_p * p)) * p, internally in fp32.
        grad_s = torch._softmax_backward_data(grad_p, probabilities, -1, grad_p.dtype)
        block.set_queries(grad_q, torch.bmm(grad_s, block.keys(k)))
        block.keys(grad_k).add_(torch.bmm(grad_s.transpose(1, 2), block.queries(q)))
    return (
        grad_q.mul_(scale).view(query.shape),
        grad_k.mul_(scale).to(key.dtype).view(key.shape),
        grad_v.to(value.dtype).view(value.shape),
    )


@dataclass(frozen=True)
class _Block:
    """Some key heads of a sequence, a block of their queries, and the keys up to its end."""

    sequence: int
    heads: slice
    tokens: slice

    def queries(self, tensor: Tensor) -> Tensor:
        """The queries' part of (N, K, G, T, D): (heads, G * block, D)."""
        part = tensor[self.sequence, self.heads, :, self.tokens]
        return part.reshape(len(part), -1, tensor.shape[-1])

    def set_queries(self, tensor: Tensor, values: Tensor) -> None:
        """Write (heads, G * block, D) where `queries` reads."""
        part = tensor[self.sequence, self.heads, :, self.tokens]
        part.copy_(values.view(part.shape))

    def keys(self, tensor: Tensor) -> Tensor:
        """The part of (N, K, T, D) that the queries see: (heads, keys, D)."""
        return tensor[self.sequence, self.heads, : self.tokens.stop]


def _group(
    query: Tensor, key: Tensor, value: Tensor, *, masked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, K, G, T, D) queries and (N, K, T, D) keys and values, contiguous.

    Without a mask, the heads of all sequences are treated as those of one.
    """
    batch, heads, tokens, width = query.shape
    groups = heads // key.shape[1]
    shape = (batch, key.shape[1]) if masked else (1, batch * key.shape[1])
    return (
        query.reshape(*shape, groups, tokens, width).contiguous(),
        key.reshape(*shape, tokens, width).contiguous(),
        value.reshape(*shape, tokens, width).contiguous(),
    )


def _blocks(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float
) -> Iterator[tuple[_Block, Tensor]]:
    """Each block and its probabilities (heads, G * block, keys), valid until the next one."""
    batch, heads, groups, tokens, _ = q.shape
    length = block_length(tokens)
    size = max(SCORES, groups * min(length, tokens) * tokens)
    scores, probabilities = (torch.empty(size, dtype=q.dtype, device=q.device) for _ in range(2))
    causal = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    nothing = torch.zeros((), dtype=q.dtype, device=q.device).expand(1, 1, 1)
    for sequence in range(batch):
        visible = None if mask is None else mask[min(sequence, len(mask) - 1), 0]
        for start in range(0, tokens, length):
            end = min(tokens, start + length)
            num_heads = max(1, SCORES // (groups * (end - start) * end))
            for first in range(0, heads, num_heads):
                block = _Block(sequence, slice(first, first + num_heads), slice(start, end))
                queries, keys = block.queries(q), block.keys(k).transpose(1, 2)
                shape = (len(queries), queries.shape[1], end)
                count = shape[0] * shape[1] * shape[2]
                s, p = scores[:count].view(shape), probabilities[:count].view(shape)
                torch.baddbmm(nothing, queries, keys, beta=0, alpha=scale, out=s)
                by_query = s.view(shape[0], groups, end - start, end)
                if visible is None:
                    by_query[..., start:].add_(causal[: end - start, : end - start])
                else:
                    by_query.masked_fill_(~visible[start:end, :end], -torch.inf)
                torch._softmax(s, -1, False, out=p)
                yield block, p


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, mask, scale = inputs
    ctx.save_for_backward(query, key, value, mask)
    ctx.scale = scale


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    query, key, value, mask = ctx.saved_tensors
    return (*blocked_attention_backward(gradient, query, key, value, mask, ctx.scale), None, None)


blocked_attention.register_fake(lambda query, *_: query.new_empty(query.shape))
blocked_attention_backward.register_fake(
    lambda gradient, query, key, value, *_: tuple(x.new_empty(x.shape) for x in (query, key, value))
)
blocked_attention.register_autograd(_backward, setup_context=_save)

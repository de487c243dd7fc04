"""Causal attention by blocks of queries: the products of a CPU's oneDNN, and no (T, T) in memory.

Letters: B rows, H query heads, K key heads, G = H / K, T tokens, D width of a head.

PyTorch's flash attention multiplies through MKL, which runs at a tenth of the processor's 16-bit
speed where it isn't Intel's; products of `torch.bmm` go through oneDNN. As in LLaMA's own code
(github.com/meta-llama/llama, model.py) and transformers' eager attention, scores are rounded to the
precision of the model, and their softmax is in fp32.
"""

from collections.abc import Iterator
from typing import Any

import torch

SCORES = 1 << 20
"""Scores that are worked on at once: 2 MiB in 16 bits, about a core's cache."""


def block_length(tokens: int) -> int:
    """Queries of a block: short rows waste less on scores that are masked, long ones have fewer
    (measured at T from 256 to 4096; docs/performance.md)."""
    return 128 if tokens <= 512 else 256


@torch.library.custom_op("llama_pretrain::blocked_attention", mutates_args=())
def blocked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """softmax(query key^T scale) value, each token seeing itself and those before it.

    Args:
        query: (B, H, T, D).
        key: (B, K, T, D), and so is `value`.
        mask: (B or 1, 1, T, T) bool, true where a query may see a key, causal as well.

    Returns:
        (B, H, T, D).
    """
    q, k, v = _group(query, key, value, masked=mask is not None)
    out = torch.empty_like(q)
    for part, probabilities in _blocks(q, k, mask, scale):
        part.set(out, torch.bmm(probabilities, part.seen(v)))
    return out.view(query.shape)


@torch.library.custom_op("llama_pretrain::blocked_attention_backward", mutates_args=())
def blocked_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value; probabilities are computed again."""
    q, k, v = _group(query, key, value, masked=mask is not None)
    grad = gradient.reshape(q.shape)
    grad_q = torch.empty_like(q)
    # Added up over blocks, in more digits than they are made with.
    grad_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    grad_v = torch.zeros_like(grad_k)
    for part, probabilities in _blocks(q, k, mask, scale):
        grad_out = part.own(grad)
        part.seen(grad_v).add_(torch.bmm(probabilities.transpose(1, 2), grad_out))
        grad_p = torch.bmm(grad_out, part.seen(v).transpose(1, 2))
        # Of the probabilities: grad_p - their sum, times the probabilities, in fp32 within.
        grad_s = torch._softmax_backward_data(grad_p, probabilities, -1, grad_p.dtype)
        part.set(grad_q, torch.bmm(grad_s, part.seen(k)))
        part.seen(grad_k).add_(torch.bmm(grad_s.transpose(1, 2), part.own(q)))
    return (
        grad_q.mul_(scale).view(query.shape),
        grad_k.mul_(scale).to(key.dtype).view(key.shape),
        grad_v.to(value.dtype).view(value.shape),
    )


class Part:
    """Some key heads of a row, a block of their queries, and the keys up to its end."""

    def __init__(self, row: int, heads: slice, queries: slice):
        self.row, self.heads, self.queries = row, heads, queries

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of (N, K, G, T, D) the block of queries: (heads, G * block, D)."""
        block = tensor[self.row, self.heads, :, self.queries]
        return block.reshape(len(block), -1, tensor.shape[-1])

    def seen(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of (N, K, T, D) the keys that the block may see: (heads, keys, D)."""
        return tensor[self.row, self.heads, : self.queries.stop]

    def set(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Put (heads, G * block, D) where `own` reads."""
        block = tensor[self.row, self.heads, :, self.queries]
        block.copy_(values.view(block.shape))


def _group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, masked: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, K, G, T, D) queries and (N, K, T, D) keys and values, contiguous.

    Without a mask all rows are alike, and their heads are one row's.
    """
    rows, heads, tokens, width = query.shape
    groups = heads // key.shape[1]
    shape = (rows, key.shape[1]) if masked else (1, rows * key.shape[1])
    return (
        query.reshape(*shape, groups, tokens, width).contiguous(),
        key.reshape(*shape, tokens, width).contiguous(),
        value.reshape(*shape, tokens, width).contiguous(),
    )


def _blocks(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> Iterator[tuple[Part, torch.Tensor]]:
    """Each part and its probabilities (heads, G * block, keys), which live until the next one."""
    rows, heads, groups, tokens, _ = q.shape
    length = block_length(tokens)
    size = max(SCORES, groups * min(length, tokens) * tokens)
    scores, probabilities = (torch.empty(size, dtype=q.dtype, device=q.device) for _ in range(2))
    above = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    nothing = torch.zeros((), dtype=q.dtype, device=q.device).expand(1, 1, 1)
    for row in range(rows):
        seen = None if mask is None else mask[min(row, len(mask) - 1), 0]
        for start in range(0, tokens, length):
            end = min(tokens, start + length)
            at_once = max(1, SCORES // (groups * (end - start) * end))
            for first in range(0, heads, at_once):
                part = Part(row, slice(first, first + at_once), slice(start, end))
                own = part.own(q)
                shape = (len(own), own.shape[1], end)
                count = shape[0] * shape[1] * shape[2]
                s, p = scores[:count].view(shape), probabilities[:count].view(shape)
                torch.baddbmm(
                    nothing, own, part.seen(k).transpose(1, 2), beta=0, alpha=scale, out=s
                )
                by_query = s.view(shape[0], groups, end - start, end)
                if seen is None:
                    by_query[..., start:].add_(above[: end - start, : end - start])
                else:
                    by_query.masked_fill_(~seen[start:end, :end], -torch.inf)
                torch._softmax(s, -1, False, out=p)
                yield part, p


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    return query.new_empty(query.shape)


def _fake_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    query, key, value, mask, scale = inputs
    ctx.save_for_backward(query, key, value, mask)
    ctx.scale = scale


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    query, key, value, mask = ctx.saved_tensors
    return (*blocked_attention_backward(gradient, query, key, value, mask, ctx.scale), None, None)


blocked_attention.register_fake(_fake)
blocked_attention_backward.register_fake(_fake_backward)
blocked_attention.register_autograd(_backward, setup_context=_save)

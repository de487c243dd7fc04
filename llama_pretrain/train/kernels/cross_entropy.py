"""The loss of a model's head in chunks of tokens, without all logits in memory.

Axes: N tokens, D model width, V vocabulary. As in Liger's fused linear cross entropy (arXiv
2410.10989, section 3.2), the forward pass computes the gradient from each chunk of logits, and the
backward pass only scales it.
"""

from typing import Any

import torch
from torch import Tensor

from llama_pretrain.data.dataset import IGNORED
from llama_pretrain.plan.activations import loss_chunk

LOGITS_PER_THREAD = 1 << 18
"""Logits that one thread works on at once: 1 MiB in fp32, about a core's cache."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, wide: bool = False
) -> tuple[Tensor, Tensor]:
    """Cross entropy of softmax(hidden weight^T) in nats; the softmax is in fp32.

    Args:
        hidden: (N, D).
        weight: (V, D), of the same type.
        targets: (N,) int64; IGNORED ones have no loss.
        wide: multiply in fp32 and keep fp32 logits.

    Returns:
        The sum, a differentiable float32 scalar, and each token's loss, (N,) float32, which is not
        differentiable.
    """
    # Inside of `forward`, requires_grad is always true and gradients are always disabled.
    needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    apply: Any = _LinearCrossEntropy.apply
    losses: tuple[Tensor, Tensor] = apply(hidden, weight, targets, wide, needed)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, wide: bool, needed: bool
    ) -> tuple[Tensor, Tensor]:
        count, length = len(hidden), loss_chunk(wide=wide)
        losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needed else None
        grad_weight: Tensor | None = None
        if needed and count > length:  # summed over chunks in fp32
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        matrix = weight.float() if wide else weight
        buffer = matrix.new_empty(min(count, length), len(weight))
        for start in range(0, count, length):
            chunk = slice(start, min(start + length, count))
            tokens = hidden[chunk].to(matrix.dtype)
            logits = torch.mm(tokens, matrix.t(), out=buffer[: len(tokens)])
            losses[chunk] = _losses(logits, targets[chunk], gradient=needed)
            if grad_hidden is None:
                continue
            if wide:
                grad_hidden[chunk] = torch.mm(logits, matrix)
            else:
                torch.mm(logits, matrix, out=grad_hidden[chunk])
            if grad_weight is None:
                grad_weight = torch.mm(logits.t(), tokens)
            else:
                grad_weight += torch.mm(logits.t(), tokens)
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = gradients[0]
        return grad_hidden * scale, grad_weight * scale, None, None, None


def _losses(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """Each token's loss, (N,) float32; with `gradient`, overwrites logits (N, V) with theirs."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    step = len(logits)
    if logits.device.type == "cpu":
        step = max(1, LOGITS_PER_THREAD * torch.get_num_threads() // logits.shape[1])
    ignored = targets == IGNORED
    labels = targets.masked_fill(ignored, 0)[:, None]
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        logs = torch.log_softmax(logits[part].float(), -1)
        losses[part] = -logs.gather(1, labels[part])[:, 0]
        if gradient:  # probabilities, minus 1 at the label
            probabilities = logs.exp_()
            minus = torch.full_like(labels[part], -1, dtype=torch.float32)
            logits[part] = probabilities.scatter_add_(1, labels[part], minus)
    if gradient:
        logits.masked_fill_(ignored[:, None], 0.0)
    return losses.masked_fill_(ignored, 0.0)

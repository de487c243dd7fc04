"""The loss of a model's head by chunks of tokens: logits are never all there, nor in fp32.

Letters: N tokens, D model width, V vocabulary. The idea is that of Liger's fused linear cross
entropy (arXiv 2410.10989, section 3.2): the gradient is made where the logits are, in the forward
pass, and the backward pass only scales it.
"""

from typing import Any

import torch

from llama_pretrain.data.dataset import IGNORED
from llama_pretrain.plan.memory import loss_chunk

NUMBERS = 1 << 18
"""Logits that one thread works on at once: 1 MiB in fp32, about a core's cache."""


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, wide: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of softmax(hidden weight^T), in nats; its softmax is in fp32.

    Args:
        hidden: (N, D).
        weight: (V, D), of the same type.
        targets: (N,) int64; IGNORED ones have no loss.
        wide: multiply in fp32, and keep logits in it.

    Returns:
        The sum, a float32 scalar that has a gradient, and each token's loss, (N,) float32, which
        has none.
    """
    # Within `forward` gradients look wanted, and are off, whatever is outside.
    needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    apply: Any = _LinearCrossEntropy.apply
    losses: tuple[torch.Tensor, torch.Tensor] = apply(hidden, weight, targets, wide, needed)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        wide: bool,
        needed: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count, length = len(hidden), loss_chunk(wide=wide)
        losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needed else None
        grad_weight: torch.Tensor | None = None
        # Added up over chunks, in more digits than they are made with.
        if needed and count > length:
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        matrix = weight.float() if wide else weight
        buffer = matrix.new_empty(min(count, length), len(weight))
        for start in range(0, count, length):
            rows = slice(start, min(start + length, count))
            tokens = hidden[rows].to(matrix.dtype)
            logits = torch.mm(tokens, matrix.t(), out=buffer[: len(tokens)])
            losses[rows] = _losses(logits, targets[rows], gradient=needed)
            if grad_hidden is None:
                continue
            if wide:
                grad_hidden[rows] = torch.mm(logits, matrix)
            else:
                torch.mm(logits, matrix, out=grad_hidden[rows])
            if grad_weight is None:
                grad_weight = torch.mm(logits.t(), tokens)
            else:
                grad_weight += torch.mm(logits.t(), tokens)
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = gradients[0]
        return grad_hidden * scale, grad_weight * scale, None, None, None


def _losses(logits: torch.Tensor, targets: torch.Tensor, *, gradient: bool) -> torch.Tensor:
    """Each token's loss, (N,) float32; with `gradient`, logits (N, V) become their gradient."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    step = len(logits)
    if logits.device.type == "cpu":
        step = max(1, NUMBERS * torch.get_num_threads() // logits.shape[1])
    ignored = targets == IGNORED
    labels = targets.masked_fill(ignored, 0)[:, None]
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        logs = torch.log_softmax(logits[rows].float(), -1)
        losses[rows] = -logs.gather(1, labels[rows])[:, 0]
        if gradient:  # probabilities, less 1 at the label
            probabilities = logs.exp_()
            minus = torch.full_like(labels[rows], -1, dtype=torch.float32)
            logits[rows] = probabilities.scatter_add_(1, labels[rows], minus)
    if gradient:
        logits.masked_fill_(ignored[:, None], 0.0)
    return losses.masked_fill_(ignored, 0.0)

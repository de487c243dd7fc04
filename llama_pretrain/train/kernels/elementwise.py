"""RMSNorm, rotary embedding and SwiGLU in fewer passes over memory, and with less of it kept.

Tensors are worked through a few rows at a time, so that what lies between two operations stays in
a core's cache. Roundings are those of transformers' modules, or fewer.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional

NUMBERS = 1 << 16
"""Numbers that one thread works on at once: 256 KiB in fp32."""


def _slices(tensor: torch.Tensor) -> Iterator[slice]:
    """The rows of (N, D), a few at a time; on a GPU all at once."""
    rows, width = tensor.shape
    step = rows
    if tensor.device.type == "cpu":
        step = max(1, NUMBERS * torch.get_num_threads() // width)
    for start in range(0, rows, max(1, step)):
        yield slice(start, start + step)


class RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) (arXiv 1910.07467): (..., D) -> (..., D).

    Keeps the input and one fp32 number a row; transformers' keeps an fp32 copy and two more.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(flat)
        inverse = torch.empty(len(flat), 1, dtype=torch.float32, device=x.device)
        for rows in _slices(flat):
            values = flat[rows].float()
            scale = (values * values).mean(-1, keepdim=True).add_(eps).rsqrt_()
            inverse[rows] = scale
            out[rows] = values.mul(scale)
            out[rows].mul_(weight)
        ctx.save_for_backward(flat, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        flat, weight, inverse = ctx.saved_tensors
        (gradient,) = gradients
        grad_out = gradient.reshape(flat.shape)
        grad_x = torch.empty_like(flat)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        wide = weight.float()
        for rows in _slices(flat):
            normed = flat[rows].float().mul_(inverse[rows])
            grad = grad_out[rows].float()
            product = grad * normed
            grad_weight += product.sum(0)
            mean = torch.mv(product, wide)[:, None] / flat.shape[1]
            grad_x[rows] = grad.mul_(wide).addcmul_(normed, mean, value=-1).mul_(inverse[rows])
        return grad_x.view(gradient.shape), grad_weight.to(weight.dtype), None


class Rotate(torch.autograd.Function):
    """Rotary embedding (arXiv 2104.09864) of (B, T, H, D), as attention reads it: (B, H, T, D).

    cos and sin are (B or 1, T, D), their halves alike, as transformers makes them.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        cos, sin = cos[..., None, :half], sin[..., None, :half]
        ctx.save_for_backward(cos, sin)
        rows, tokens, heads, width = x.shape
        out = x.new_empty(rows, heads, tokens, width)
        _rotate(x, cos, sin, out.transpose(1, 2), sign=1)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        gradient = gradients[0].transpose(1, 2)
        out = gradient.new_empty(gradient.shape)
        _rotate(gradient, cos, sin, out, sign=-1)
        return out, None, None


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, *, sign: int
) -> None:
    """Turn each pair (first half, second half) by its angle, or back with sign = -1."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202): (..., F) -> (..., F). silu(gate) is not kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        flat_gate, flat_up = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
        out = torch.empty_like(flat_gate)
        for rows in _slices(out):
            torch.mul(functional.silu(flat_gate[rows]), flat_up[rows], out=out[rows])
        return out.view(gate.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        gate, up, gradient = (x.reshape(-1, x.shape[-1]) for x in (*ctx.saved_tensors, *gradients))
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        for rows in _slices(gate):
            grad = gradient[rows]
            torch.mul(functional.silu(gate[rows]), grad, out=grad_up[rows])
            grad_gate[rows] = torch.ops.aten.silu_backward(grad * up[rows], gate[rows])
        shape = gradients[0].shape
        return grad_gate.view(shape), grad_up.view(shape)

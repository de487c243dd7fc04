"""RMSNorm, rotary embedding and SwiGLU with fewer passes over memory and fewer saved activations.

Tensors are processed in slices, so that intermediate results stay in a core's cache. Results are
rounded as often as in transformers' modules, or less.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

ELEMENTS_PER_THREAD = 1 << 16
"""Elements that one thread works on at once: 256 KiB in fp32."""


def _slices(tensor: Tensor) -> Iterator[slice]:
    """Slices of the first axis of (N, D); a single one on a GPU."""
    count, width = tensor.shape
    step = count
    if tensor.device.type == "cpu":
        step = max(1, ELEMENTS_PER_THREAD * torch.get_num_threads() // width)
    for start in range(0, count, max(1, step)):
        yield slice(start, start + step)


class RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) (arXiv 1910.07467): (..., D) -> (..., D).

    Saves the input and one fp32 number per token; transformers' saves an fp32 copy and two more.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(flat)
        inverse = torch.empty(len(flat), 1, dtype=torch.float32, device=x.device)
        for part in _slices(flat):
            values = flat[part].float()
            scale = (values * values).mean(-1, keepdim=True).add_(eps).rsqrt_()
            inverse[part] = scale
            out[part] = values.mul(scale)
            out[part].mul_(weight)
        ctx.save_for_backward(flat, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        flat, weight, inverse = ctx.saved_tensors
        (gradient,) = gradients
        grad_out = gradient.reshape(flat.shape)
        grad_x = torch.empty_like(flat)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        wide = weight.float()
        for part in _slices(flat):
            normed = flat[part].float().mul_(inverse[part])
            grad = grad_out[part].float()
            product = grad * normed
            grad_weight += product.sum(0)
            mean = torch.mv(product, wide)[:, None] / flat.shape[1]
            grad_x[part] = grad.mul_(wide).addcmul_(normed, mean, value=-1).mul_(inverse[part])
        return grad_x.view(gradient.shape), grad_weight.to(weight.dtype), None


class Rotate(torch.autograd.Function):
    """Rotary embedding (arXiv 2104.09864) of (B, T, H, D), transposed to (B, H, T, D).

    cos and sin are (B or 1, T, D) with equal halves, as in transformers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        cos, sin = cos[..., None, :half], sin[..., None, :half]
        ctx.save_for_backward(cos, sin)
        out = x.new_empty(x.transpose(1, 2).shape)
        _rotate(x, cos, sin, out.transpose(1, 2), sign=1)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        gradient = gradients[0].transpose(1, 2)
        out = gradient.new_empty(gradient.shape)
        _rotate(gradient, cos, sin, out, sign=-1)
        return out, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, sign: int) -> None:
    """Rotate each pair (first half, second half) by its angle; backwards with sign = -1."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202): (..., F) -> (..., F). Does not save silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        flat_gate, flat_up = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
        out = torch.empty_like(flat_gate)
        for part in _slices(out):
            torch.mul(functional.silu(flat_gate[part]), flat_up[part], out=out[part])
        return out.view(gate.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        gate, up, gradient = (x.reshape(-1, x.shape[-1]) for x in (*ctx.saved_tensors, *gradients))
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        for part in _slices(gate):
            grad = gradient[part]
            torch.mul(functional.silu(gate[part]), grad, out=grad_up[part])
            grad_gate[part] = torch.ops.aten.silu_backward(grad * up[part], gate[part])
        shape = gradients[0].shape
        return grad_gate.view(shape), grad_up.view(shape)


class WideLinear(torch.autograd.Function):
    """x weight^T + bias with fp32 operands, for CPUs with slow 16-bit products.

    (..., I), (O, I), (O) -> (..., O), all of one 16-bit type. 16-bit operands are exact in fp32 and
    sums are in fp32 either way, so only the order of a sum differs from the 16-bit product. Saves
    what a plain linear layer saves: x and the weight, in 16 bits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide_bias = None if bias is None else bias.float()
        return functional.linear(x.float(), weight.float(), wide_bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        wide = gradient.reshape(-1, gradient.shape[-1]).float()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(wide, weight.float()).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            inputs = x.reshape(-1, x.shape[-1]).float()
            grad_weight = torch.mm(wide.t(), inputs).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = wide.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias

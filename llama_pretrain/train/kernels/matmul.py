"""Products of 16-bit matrices with their operands in fp32, for CPUs that are slow in 16 bits.

An operand of 16 bits is exact in fp32; the sum is in fp32 in either way; and the result is rounded
once: what differs from the 16-bit product is the order of a sum.
"""

from typing import Any

import torch
import torch.nn.functional as functional


class WideLinear(torch.autograd.Function):
    """x weight^T + bias: (..., I), (O, I), (O) -> (..., O), all of one 16-bit type.

    Keeps what a plain one keeps: x and the weight, in 16 bits.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        wide_bias = None if bias is None else bias.float()
        return functional.linear(x.float(), weight.float(), wide_bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        wide = gradient.reshape(-1, gradient.shape[-1]).float()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(wide, weight.float()).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            rows = x.reshape(-1, x.shape[-1]).float()
            grad_weight = torch.mm(wide.t(), rows).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = wide.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias

"""Each kernel compared with plain PyTorch and with a reference in fp32."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from llama_pretrain.data.dataset import IGNORED
from llama_pretrain.plan import activations
from llama_pretrain.train.kernels import attention, cross_entropy
from llama_pretrain.train.kernels.attention import blocked_attention, blocked_attention_backward
from llama_pretrain.train.kernels.cross_entropy import linear_cross_entropy
from llama_pretrain.train.kernels.elementwise import RmsNorm, Rotate, SwiGlu, WideLinear

fused_norm: Any = RmsNorm.apply
rotate: Any = Rotate.apply
swiglu: Any = SwiGlu.apply
wide_linear: Any = WideLinear.apply


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def run(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The result of a function and the gradients of its inputs, all in fp32."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    (out.float() * weights).sum().backward()
    found = [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    return [tensor.detach().float() for tensor in found]


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error, in the norm, of any of several tensors."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    pairs = zip(found, expected, strict=True)
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def check(kernel: Callable[..., Any], plain: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """Equal up to rounding in fp32; in bf16 at most twice the error of the plain function."""
    assert error(run(kernel, inputs), run(plain, inputs)) < 2e-6
    halves = [x.bfloat16() for x in inputs]
    exact = run(plain, [x.float() for x in halves])
    found = error(run(kernel, halves), exact)
    assert found < 1e-2
    assert found < 2 * error(run(plain, halves), exact)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Any:
    return blocked_attention(query, key, value, mask, query.shape[-1] ** -0.5)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


@pytest.mark.parametrize(
    ("batch", "heads", "keys", "tokens", "width"),
    [(2, 4, 4, 300, 16), (1, 4, 2, 700, 32), (3, 6, 1, 40, 8), (1, 2, 2, 2, 16), (2, 2, 2, 128, 4)],
)
def test_blocked_attention(batch: int, heads: int, keys: int, tokens: int, width: int) -> None:
    shapes = [(batch, count, tokens, width) for count in (heads, keys, keys)]
    check(attend, sdpa, [torch.randn(shape) for shape in shapes])


def test_blocked_attention_with_few_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [torch.randn(2, 6, 300, 8) for _ in range(3)]
    whole = run(attend, inputs)
    monkeypatch.setattr(attention, "SCORES", 128 * 300 * 4)  # four heads of the last block
    assert error(run(attend, inputs), whole) < 1e-6


def test_blocked_attention_with_a_mask() -> None:
    ends = torch.tensor([[10, 150, 200], [1, 64, 200]])
    document = (torch.arange(200)[None, :, None] >= ends[:, None]).sum(-1)  # (2, 200)
    mask = (document[:, :, None] == document[:, None]) & torch.ones(200, 200).tril().bool()
    mask = mask[:, None]
    inputs = [torch.randn(2, 4, 200, 16) for _ in range(3)]
    check(partial(attend, mask=mask), partial(sdpa, mask=mask), inputs)


def test_blocked_attention_is_an_operator() -> None:
    """torch.compile infers its shapes, strides and gradient correctly."""
    query, key, value = (
        torch.randn(2, 20, count, 8).transpose(1, 2).requires_grad_() for count in (4, 2, 2)
    )
    torch.library.opcheck(blocked_attention, (query, key, value, None, 0.3))
    gradient = torch.randn(2, 4, 20, 8)
    plain = [tensor.detach() for tensor in (gradient, query, key, value)]
    torch.library.opcheck(blocked_attention_backward, (*plain, None, 0.3))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 50, 130])
def test_linear_cross_entropy(tokens: int, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several chunks, whole and partial."""
    monkeypatch.setattr(activations, "LOSS_CHUNK", 50)
    monkeypatch.setattr(cross_entropy, "LOGITS_PER_THREAD", 700)
    hidden, weight = torch.randn(tokens, 16), torch.randn(97, 16)
    targets = torch.randint(0, 97, (tokens,))
    targets[1::5] = IGNORED

    def plain(hidden: Tensor, weight: Tensor) -> Any:
        logits = functional.linear(hidden, weight).float()
        return functional.cross_entropy(logits, targets, reduction="sum")[None] * 0.3

    def kernel(hidden: Tensor, weight: Tensor) -> Any:
        return linear_cross_entropy(hidden, weight, targets, wide=wide)[0][None] * 0.3

    check(kernel, plain, [hidden, weight])
    total, each = linear_cross_entropy(hidden, weight, targets, wide=wide)
    expected = functional.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    assert torch.allclose(each, expected, atol=1e-5)
    assert torch.equal(total, each.sum())
    # An evaluation computes no gradient, although its weights require one.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        again = linear_cross_entropy(hidden, weight.requires_grad_(), targets, wide=wide)[1]
    assert torch.equal(again, each)
    assert counter.get_total_flops() == 2 * hidden.numel() * len(weight)


def test_linear_cross_entropy_of_extreme_logits() -> None:
    """A loss of thousands of nats is exact, and NaN is propagated."""
    weight = torch.eye(4) * 1000
    total, _ = linear_cross_entropy(torch.eye(4)[:1], weight, torch.tensor([2]))
    assert total == 1000
    hidden = torch.full((1, 4), torch.nan)
    assert linear_cross_entropy(hidden, weight, torch.tensor([2]))[0].isnan()


def test_rms_norm() -> None:
    module = LlamaRMSNorm(96, eps=1e-5)

    def plain(x: Tensor, weight: Tensor) -> Any:
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    inputs = [torch.randn(3, 1000, 96), torch.randn(96)]
    check(lambda *x: fused_norm(*x, 1e-5), plain, inputs)


def test_rotate() -> None:
    angles = torch.rand(2, 50, 8) * 6
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))

    def plain(x: Tensor) -> Any:
        heads_first = x.transpose(1, 2)
        return apply_rotary_pos_emb(heads_first, heads_first, cos.to(x.dtype), sin.to(x.dtype))[0]

    inputs = [torch.randn(2, 50, 3, 16)]
    check(lambda x: rotate(x, cos.to(x.dtype), sin.to(x.dtype)), plain, inputs)


def test_swiglu() -> None:
    inputs = [torch.randn(2, 700, 100), torch.randn(2, 700, 100)]
    check(swiglu, lambda gate, up: functional.silu(gate) * up, inputs)


@pytest.mark.parametrize("biased", [False, True])
def test_wide_linear(biased: bool) -> None:
    """Its result is that of fp32, rounded once."""
    inputs = [torch.randn(3, 40, 96), torch.randn(64, 96), torch.randn(64)][: 2 + biased]

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return wide_linear(x, weight, bias)

    check(kernel, functional.linear, inputs)
    halves = [x.bfloat16() for x in inputs]
    exact = functional.linear(*[x.float() for x in halves])
    assert torch.equal(kernel(*halves), exact.bfloat16())

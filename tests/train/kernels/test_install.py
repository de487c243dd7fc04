"""Models with kernels installed, compared with transformers' model in fp32."""

import sys
import types
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from llama_pretrain.config.kernels import (
    AttentionKernel,
    CompiledPart,
    Kernels,
    LayerKernel,
    Matmul,
)
from llama_pretrain.config.kernels import LossKernel as Loss
from llama_pretrain.data.dataset import IGNORED
from llama_pretrain.train.kernels import attention, cross_entropy, install
from llama_pretrain.train.kernels.elementwise import RmsNorm, Rotate, SwiGlu, WideLinear
from llama_pretrain.train.loss import sum_of_losses, token_losses
from tests.train.kernels.test_functions import error, fused_norm, seeded, wide_linear

__all__ = ["seeded"]  # a fixture


def of_layers(kernel: LayerKernel) -> dict[str, Any]:
    return dict.fromkeys(("rms_norm", "rotary", "swiglu"), kernel)


SDPA, BLOCKED = AttentionKernel.sdpa, AttentionKernel.blocked
BASE = Kernels(attention=SDPA, loss=Loss.plain, matmul=Matmul.plain)
PLAIN = replace(BASE, **of_layers(LayerKernel.plain))
WIDE = replace(BASE, loss=Loss.chunked, matmul=Matmul.fp32, **of_layers(LayerKernel.fused))
FAST = replace(WIDE, attention=BLOCKED, matmul=Matmul.plain)


def build(kernels: Kernels, dtype: torch.dtype, **changes: int | bool) -> Any:
    torch.manual_seed(1)
    shape: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, **changes}
    config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=160, **shape)
    model: Any = LlamaForCausalLM(config)
    for module in model.modules():  # weights of 1 would hide a missing factor
        if isinstance(module, LlamaRMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    model = model.to(dtype)
    install.install_kernels(model, kernels)
    return model


def random_batch(size: int = 2, tokens: int = 200) -> dict[str, Tensor]:
    drawn = torch.randint(0, 300, (size, tokens + 1))
    batch = {"input_ids": drawn[:, :-1], "shift_labels": drawn[:, 1:].clone()}
    batch["shift_labels"][0, :5] = IGNORED
    return batch


def gradients(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """The sum of losses, and the gradients of all weights."""
    model.zero_grad()
    total: Any = sum_of_losses(model, batch)
    total.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return [total.detach()[None].float(), *(g.float() for g in grads.values() if g is not None)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kernels", [FAST, WIDE])
def test_a_model_with_all_kernels(kernels: Kernels, tied: bool, documents: bool) -> None:
    batch = random_batch()
    if documents:
        batch["position_ids"] = torch.cat([torch.arange(70), torch.arange(130)]).expand(2, -1)
    plain, fast = (
        build(chosen, torch.float32, tie_word_embeddings=tied) for chosen in (PLAIN, kernels)
    )
    exact = gradients(plain, batch)
    assert error(gradients(fast, batch), exact) < 1e-5
    with torch.no_grad():
        losses = token_losses(plain, batch)
        assert torch.allclose(token_losses(fast, batch), losses, atol=1e-5)
        inputs = {"input_ids": batch["input_ids"], "use_cache": False}
        assert torch.allclose(fast(**inputs).logits, plain(**inputs).logits, atol=1e-5)
    assert list(fast.state_dict()) == list(plain.state_dict())
    plain, fast = plain.bfloat16(), fast.bfloat16()
    exact = gradients(plain.float(), batch)
    of_plain, of_fast = (error(gradients(m.bfloat16(), batch), exact) for m in (plain, fast))
    assert of_fast < 1.5 * of_plain


KERNELS = {
    "attention": (attention, "_blocks"),
    "loss": (cross_entropy, "_losses"),
    "rms_norm": (RmsNorm, "forward"),
    "rotary": (Rotate, "forward"),
    "swiglu": (SwiGlu, "forward"),
}
"""A function that each kernel calls."""


@pytest.mark.parametrize("name", KERNELS)
def test_a_model_with_one_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel requires another, and the chosen one runs."""
    batch = random_batch()
    kernels = replace(PLAIN, **{name: getattr(FAST, name)})
    plain, fast = (build(chosen, torch.float32) for chosen in (PLAIN, kernels))
    exact = gradients(plain, batch)
    used = {other: MagicMock(side_effect=getattr(*place)) for other, place in KERNELS.items()}
    for other, (place, function) in KERNELS.items():
        monkeypatch.setattr(place, function, used[other])
    assert error(gradients(fast, batch), exact) < 1e-5
    assert {other for other, called in used.items() if called.called} == {name}


@pytest.mark.parametrize("attention", [SDPA, BLOCKED])
def test_wide_products(attention: AttentionKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closer to fp32 than the same kernels without, and used for every product."""
    batch = random_batch()
    plain, wide, exact = (
        build(replace(PLAIN, **changes), torch.bfloat16, attention_bias=True)
        for changes in (
            {"attention": attention},
            {"attention": attention, "matmul": Matmul.fp32},
            {},
        )
    )
    apply = MagicMock(side_effect=wide_linear)
    monkeypatch.setattr(WideLinear, "apply", apply)
    found = gradients(wide, batch)
    assert apply.call_count == 2 * 7 + 1
    halves, wanted = gradients(plain, batch), gradients(exact.float(), batch)
    assert error(found, wanted) < error(halves, wanted) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("part", [CompiledPart.layers, CompiledPart.model])
@pytest.mark.parametrize("kernels", [FAST, WIDE])
def test_a_compiled_model(kernels: Kernels, part: CompiledPart) -> None:
    batch = random_batch()
    layers = replace(kernels, **of_layers(LayerKernel.plain))
    plain, compiled = (build(kernels, torch.float32) for kernels in (PLAIN, layers))
    install.compile_layers(compiled, part)
    exact = gradients(plain, batch)
    assert error(gradients(compiled, batch), exact) < 1e-5
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with install.without_compilation(), torch.no_grad():
        for tokens in (3, 4, 5):
            compiled(batch["input_ids"][:, :tokens], use_cache=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before > 0


def test_liger_kernels_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """They need a GPU: here functions with the same signatures and results replace them."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, reduction: str) -> Tensor:
        return functional.cross_entropy(hidden @ weight.t(), targets, reduction=reduction)

    called = {
        "liger_rms_norm": MagicMock(side_effect=lambda x, weight, eps: fused_norm(x, weight, eps)),
        "liger_swiglu": MagicMock(side_effect=lambda gate, up: functional.silu(gate) * up),
        "liger_rope": MagicMock(side_effect=apply_rotary_pos_emb),
        "liger_fused_linear_cross_entropy": MagicMock(side_effect=loss),
    }
    module = types.ModuleType("functional")
    module.__dict__.update(called)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, install.LIGER, module)
    kernels = replace(PLAIN, loss=Loss.liger, **of_layers(LayerKernel.liger))
    batch = random_batch()
    plain, liger = (build(chosen, torch.float32) for chosen in (PLAIN, kernels))
    assert error(gradients(liger, batch), gradients(plain, batch)) < 1e-5
    assert [each.call_count for each in called.values()] == [5, 2, 2, 1]
    with torch.no_grad():
        assert torch.allclose(token_losses(liger, batch), token_losses(plain, batch), atol=1e-5)


ON_GPU = {
    "chunked": {"loss": Loss.chunked},
    "fused": of_layers(LayerKernel.fused),
    "flex": {"attention": AttentionKernel.flex_attention},
    "liger": {"loss": Loss.liger, **of_layers(LayerKernel.liger)},
    "compiled": {},
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ON_GPU)
def test_a_model_on_a_gpu(name: str) -> None:
    """Equal to the plain model in fp32; in bf16 at most 1.5 times its error."""
    if name == "liger":
        pytest.importorskip("liger_kernel")
    batch = {key: value.cuda() for key, value in random_batch(tokens=256).items()}
    plain, fast = (
        build(kernels, torch.float32).cuda() for kernels in (PLAIN, replace(PLAIN, **ON_GPU[name]))
    )
    if name == "compiled":
        install.compile_layers(fast, CompiledPart.layers)
    exact = gradients(plain, batch)
    assert error(gradients(fast, batch), exact) < 1e-4
    plain, fast = plain.bfloat16(), fast.bfloat16()
    exact = gradients(build(PLAIN, torch.bfloat16).cuda().float(), batch)
    of_plain, of_fast = (error(gradients(model, batch), exact) for model in (plain, fast))
    assert of_fast < 1.5 * of_plain

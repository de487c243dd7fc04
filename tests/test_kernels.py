"""Each kernel beside the plain path and a reference in fp32."""

import os
import platform
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch.utils.flop_counter import FlopCounterMode
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
from llama_pretrain.launch.environment import worker_environment
from llama_pretrain.plan import memory
from llama_pretrain.plan.machine import detect_machine
from llama_pretrain.plan.resolve import resolve_choices
from llama_pretrain.train.kernels import attention, cross_entropy, install
from llama_pretrain.train.kernels.attention import blocked_attention, blocked_attention_backward
from llama_pretrain.train.kernels.cross_entropy import linear_cross_entropy
from llama_pretrain.train.kernels.elementwise import RmsNorm, Rotate, SwiGlu
from llama_pretrain.train.kernels.matmul import WideLinear
from llama_pretrain.train.loss import sum_of_losses, token_losses
from tests.conftest import compose_run

PLAIN = Kernels(
    attention=AttentionKernel.sdpa,
    loss=Loss.plain,
    rms_norm=LayerKernel.plain,
    rotary=LayerKernel.plain,
    swiglu=LayerKernel.plain,
    matmul=Matmul.plain,
)
FAST = Kernels(
    attention=AttentionKernel.blocked,
    loss=Loss.chunked,
    rms_norm=LayerKernel.fused,
    rotary=LayerKernel.fused,
    swiglu=LayerKernel.fused,
    matmul=Matmul.plain,
)
WIDE = replace(FAST, attention=AttentionKernel.sdpa, matmul=Matmul.fp32)
Tensors = Sequence[torch.Tensor]
fused_norm: Any = RmsNorm.apply
rotate: Any = Rotate.apply
swiglu: Any = SwiGlu.apply
wide_linear: Any = WideLinear.apply


def of_layers(kernel: LayerKernel) -> dict[str, Any]:
    return dict.fromkeys(("rms_norm", "rotary", "swiglu"), kernel)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def run(function: Callable[..., Any], inputs: Tensors) -> list[torch.Tensor]:
    """What a function gives, and the gradients of its inputs, all in fp32."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    (out.float() * weights).sum().backward()
    found = [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    return [tensor.detach().float() for tensor in found]


def error(found: Tensors, wanted: Tensors) -> float:
    """The largest relative error, in the norm, of any of several tensors."""
    assert [x.shape for x in found] == [x.shape for x in wanted]
    pairs = zip(found, wanted, strict=True)
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def check(kernel: Callable[..., Any], plain: Callable[..., Any], inputs: Tensors) -> None:
    """In fp32 equal to rounding; in bf16 as near to fp32 as the plain path, or nearly."""
    exact = run(plain, inputs)
    assert error(run(kernel, inputs), exact) < 2e-6
    halves = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
    exact = run(plain, [x.float() if x.is_floating_point() else x for x in halves])
    wrong = error(run(kernel, halves), exact)
    assert wrong < 1e-2
    assert wrong < 2 * error(run(plain, halves), exact)


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )


def blocked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
    return blocked_attention(query, key, value, None, query.shape[-1] ** -0.5)


@pytest.mark.parametrize(
    ("rows", "heads", "keys", "tokens", "width"),
    [(2, 4, 4, 300, 16), (1, 4, 2, 700, 32), (3, 6, 1, 40, 8), (1, 2, 2, 2, 16), (2, 2, 2, 128, 4)],
)
def test_blocked_attention(rows: int, heads: int, keys: int, tokens: int, width: int) -> None:
    shapes = [(rows, count, tokens, width) for count in (heads, keys, keys)]
    check(blocked, sdpa, [torch.randn(shape) for shape in shapes])


def test_blocked_attention_takes_few_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [torch.randn(2, 6, 300, 8) for _ in range(3)]
    whole = run(blocked, inputs)
    monkeypatch.setattr(attention, "SCORES", 128 * 300 * 4)  # of the last block four heads fit
    assert error(run(blocked, inputs), whole) < 1e-6


def test_blocked_attention_obeys_a_mask() -> None:
    ends = torch.tensor([[10, 150, 200], [1, 64, 200]])
    document = (torch.arange(200)[None, :, None] >= ends[:, None]).sum(-1)  # (2, 200)
    mask = (document[:, :, None] == document[:, None]) & torch.ones(200, 200).tril().bool()
    mask = mask[:, None]
    inputs = [torch.randn(2, 4, 200, 16) for _ in range(3)]

    def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return blocked_attention(query, key, value, mask, 0.25)

    check(ours, masked, inputs)


def test_blocked_attention_is_an_operator() -> None:
    """Its shapes, strides and gradient are as torch.compile will believe them to be."""
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
    """Over several chunks, and parts of them."""
    monkeypatch.setattr(memory, "LOSS_CHUNK", 50)
    monkeypatch.setattr(cross_entropy, "NUMBERS", 700)
    hidden, weight = torch.randn(tokens, 16), torch.randn(97, 16)
    targets = torch.randint(0, 97, (tokens,))
    targets[1::5] = IGNORED

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        logits = functional.linear(hidden, weight).float()
        return functional.cross_entropy(logits, targets, reduction="sum")[None] * 0.3

    def ours(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        return linear_cross_entropy(hidden, weight, targets, wide=wide)[0][None] * 0.3

    check(ours, plain, [hidden, weight])
    total, each = linear_cross_entropy(hidden, weight, targets, wide=wide)
    wanted = functional.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    assert torch.allclose(each, wanted, atol=1e-5)
    assert torch.equal(total, each.sum())
    # An evaluation makes no gradient, though its weights would want one.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        again = linear_cross_entropy(hidden, weight.requires_grad_(), targets, wide=wide)[1]
    assert torch.equal(again, each)
    assert counter.get_total_flops() == 2 * hidden.numel() * len(weight)


def test_linear_cross_entropy_of_unlikely_and_of_broken_tokens() -> None:
    """A loss of thousands of nats is one, and a NaN shows."""
    weight = torch.eye(4) * 1000
    total, _ = linear_cross_entropy(torch.eye(4)[:1], weight, torch.tensor([2]))
    assert total == 1000
    hidden = torch.full((1, 4), torch.nan)
    assert linear_cross_entropy(hidden, weight, torch.tensor([2]))[0].isnan()


def test_rms_norm() -> None:
    module = LlamaRMSNorm(96, eps=1e-5)

    def plain(x: torch.Tensor, weight: torch.Tensor) -> Any:
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    def ours(x: torch.Tensor, weight: torch.Tensor) -> Any:
        return fused_norm(x, weight, 1e-5)

    check(ours, plain, [torch.randn(3, 1000, 96), torch.randn(96)])


def test_rotate() -> None:
    angles = torch.rand(2, 50, 8) * 6
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))

    def plain(x: torch.Tensor) -> Any:
        turned, _ = apply_rotary_pos_emb(
            x.transpose(1, 2), x.transpose(1, 2), cos.to(x.dtype), sin.to(x.dtype)
        )
        return turned

    def ours(x: torch.Tensor) -> Any:
        return rotate(x, cos.to(x.dtype), sin.to(x.dtype))

    check(ours, plain, [torch.randn(2, 50, 3, 16)])


def test_swiglu() -> None:
    def plain(gate: torch.Tensor, up: torch.Tensor) -> Any:
        return functional.silu(gate) * up

    check(swiglu, plain, [torch.randn(2, 700, 100), torch.randn(2, 700, 100)])


@pytest.mark.parametrize("biased", [False, True])
def test_wide_linear(biased: bool) -> None:
    """Its result is that of fp32, rounded once."""
    inputs = [torch.randn(3, 40, 96), torch.randn(64, 96), torch.randn(64)][: 2 + biased]

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        return functional.linear(x, weight, bias)

    def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        return wide_linear(x, weight, bias)

    check(ours, plain, inputs)
    halves = [x.bfloat16() for x in inputs]
    assert torch.equal(ours(*halves), plain(*[x.float() for x in halves]).bfloat16())


def build(kernels: Kernels, dtype: torch.dtype, **changes: int | bool) -> Any:
    torch.manual_seed(1)
    shape: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, **changes}
    config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=160, **shape)
    model: Any = LlamaForCausalLM(config)
    for module in model.modules():  # norms of one would hide a missing weight
        if isinstance(module, LlamaRMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    model = model.to(dtype)
    install.install_kernels(model, kernels)
    return model


def a_batch(rows: int = 2, tokens: int = 200) -> dict[str, torch.Tensor]:
    drawn = torch.randint(0, 300, (rows, tokens + 1))
    batch = {"input_ids": drawn[:, :-1], "shift_labels": drawn[:, 1:].clone()}
    batch["shift_labels"][0, :5] = IGNORED
    return batch


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
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
    batch = a_batch()
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
"""Something that each calls."""


def noting(function: Any, used: set[str], name: str) -> Any:
    def noted(*args: Any, **more: Any) -> Any:
        used.add(name)
        return function(*args, **more)

    return noted


@pytest.mark.parametrize("name", KERNELS)
def test_a_model_with_one_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None needs another, and it is the one that runs."""
    batch = a_batch()
    kernels = replace(PLAIN, **{name: getattr(FAST, name)})
    plain, fast = (build(chosen, torch.float32) for chosen in (PLAIN, kernels))
    exact = gradients(plain, batch)
    used: set[str] = set()
    for other, (place, function) in KERNELS.items():
        monkeypatch.setattr(place, function, noting(getattr(place, function), used, other))
    assert error(gradients(fast, batch), exact) < 1e-5
    assert used == {name}


@pytest.mark.parametrize("attention", [AttentionKernel.sdpa, AttentionKernel.blocked])
def test_wide_products_alone(attention: AttentionKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the same kernels without: nearer to fp32, and every product is one."""
    batch = a_batch()
    kernels = replace(PLAIN, attention=attention)
    plain, wide = (
        build(chosen, torch.bfloat16, attention_bias=True)
        for chosen in (kernels, replace(kernels, matmul=Matmul.fp32))
    )
    products = []

    def noted(*inputs: torch.Tensor) -> Any:
        products.append(inputs[1].shape)
        return wide_linear(*inputs)

    monkeypatch.setattr(WideLinear, "apply", noted)
    found = gradients(wide, batch)
    assert len(products) == 2 * 7 + 1
    halves = gradients(plain, batch)
    exact = gradients(build(PLAIN, torch.bfloat16, attention_bias=True).float(), batch)
    assert error(found, exact) < error(halves, exact) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("part", [CompiledPart.layers, CompiledPart.model])
@pytest.mark.parametrize("kernels", [FAST, WIDE])
def test_a_compiled_model(kernels: Kernels, part: CompiledPart) -> None:
    batch = a_batch()
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


def test_liger_is_asked_for_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a GPU: here stand functions of the same signatures and results."""
    asked = []

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        asked.append("rms_norm")
        return fused_norm(x, weight, eps)

    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        asked.append("swiglu")
        return functional.silu(gate) * up

    def rope(*inputs: torch.Tensor) -> Any:
        asked.append("rope")
        return apply_rotary_pos_emb(*inputs)

    def loss(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, reduction: str
    ) -> torch.Tensor:
        asked.append("loss")
        return functional.cross_entropy(hidden @ weight.t(), targets, reduction=reduction)

    module = types.ModuleType("functional")
    module.__dict__.update(
        liger_rms_norm=rms_norm,
        liger_swiglu=swiglu,
        liger_rope=rope,
        liger_fused_linear_cross_entropy=loss,
    )
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, install.LIGER, module)
    kernels = replace(
        PLAIN,
        loss=Loss.liger,
        **of_layers(LayerKernel.liger),
    )
    batch = a_batch()
    plain, theirs = (build(chosen, torch.float32) for chosen in (PLAIN, kernels))
    assert error(gradients(theirs, batch), gradients(plain, batch)) < 1e-5
    assert sorted(asked) == ["loss"] + ["rms_norm"] * 5 + ["rope"] * 2 + ["swiglu"] * 2
    with torch.no_grad():
        assert torch.allclose(token_losses(theirs, batch), token_losses(plain, batch), atol=1e-5)


FAULTS_OF_SECOND_USE = """
import resource, torch
torch.set_num_threads(1)
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Pages that the system has to find for 64 MiB that were just freed: 32 of 2 MiB at the least."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its tunables do it")
@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ((), True),
        (("kernels=plain",), False),
        (("launch.malloc_mmap_threshold=262144",), False),
    ],
)
def test_freed_memory_stays(words: tuple[str, ...], kept: bool) -> None:
    run = resolve_choices(compose_run(["launch.device=cpu", *words]), detect_machine())
    done = subprocess.run(
        [sys.executable, "-c", FAULTS_OF_SECOND_USE],
        env={**os.environ, **worker_environment(run)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert (int(done.stdout) < 16) is kept, done.stdout


ON_GPU = {
    "chunked": {"loss": Loss.chunked},
    "fused": of_layers(LayerKernel.fused),
    "flex": {"attention": AttentionKernel.flex_attention},
    "liger": {"loss": Loss.liger, **of_layers(LayerKernel.liger)},
    "compiled": {},
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("name", ON_GPU)
def test_a_model_on_a_gpu(name: str) -> None:
    """Equal to the plain path in fp32; in bf16 as near to fp32 as it is, or nearly."""
    if name == "liger":
        pytest.importorskip("liger_kernel")
    batch = {key: value.cuda() for key, value in a_batch(tokens=256).items()}
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

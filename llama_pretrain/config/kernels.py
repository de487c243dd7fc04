"""The config group `kernels`: how the model is computed."""

from enum import Enum

from llama_pretrain.config.fields import schema


class AttentionKernel(str, Enum):
    auto = "auto"
    sdpa = "sdpa"
    eager = "eager"
    blocked = "blocked"
    flash_attention_2 = "flash_attention_2"
    flex_attention = "flex_attention"


class LossKernel(str, Enum):
    auto = "auto"
    plain = "plain"
    chunked = "chunked"
    liger = "liger"


class LayerKernel(str, Enum):
    auto = "auto"
    plain = "plain"
    fused = "fused"
    liger = "liger"


class CompiledPart(str, Enum):
    none = "none"
    layers = "layers"
    model = "model"


class Matmul(str, Enum):
    auto = "auto"
    plain = "plain"
    fp32 = "fp32"


class Allocator(str, Enum):
    auto = "auto"
    plain = "plain"
    keep = "keep"


@schema
class Kernels:
    """How the model is computed, not what: losses differ by rounding alone (docs/performance.md).
    `auto` takes the fastest that is sound on the device; `liger` needs CUDA and the extra `liger`.
    """

    attention: AttentionKernel = AttentionKernel.auto
    """`sdpa` = PyTorch's; `blocked` = products by blocks, for CPUs whose MKL is slow; `eager` =
    with all scores in memory; `flash_attention_2` needs CUDA and its package, `flex_attention`
    CUDA. `auto` = `blocked` in bf16 on a CPU that isn't Intel's, `flash_attention_2` on CUDA where
    it is installed, else `sdpa`."""
    loss: LossKernel = LossKernel.auto
    """`plain` = all logits, and fp32 copies of them; `chunked` = 1,024 tokens' at a time (512 with
    matmul=fp32), with the gradient made in the forward pass (arXiv 2410.10989). `auto` = `chunked`,
    but for fp16 and autocast."""
    rms_norm: LayerKernel = LayerKernel.auto
    """`plain` = transformers' module; `fused` = fewer passes over memory, less of it kept. `auto` =
    `fused` on a CPU, `liger` on CUDA where it is installed, `plain` in what is compiled
    and under autocast."""
    rotary: LayerKernel = LayerKernel.auto
    """Rotary embedding, as rms_norm."""
    swiglu: LayerKernel = LayerKernel.auto
    """The feed-forward layer's activation, as rms_norm."""
    compile: CompiledPart = CompiledPart.none
    """What torch.compile makes kernels of, at the first step: each of the `layers`, or the `model`
    but its head. Needs a C++ compiler on a CPU; not at ZeRO stage 3."""
    matmul: Matmul = Matmul.auto
    """Products of 16-bit matrices: `fp32` = with their operands in fp32, which is exact, and the
    result rounded as ever. `auto` = `fp32` on a CPU that is slow in 16 bits: Intel's without AMX,
    and all without instructions for it; else `plain`."""
    allocator: Allocator = Allocator.auto
    """On a CPU: `keep` = memory that was freed stays with the process (glibc's tunables), for to
    get it back takes up to a fifth of a step; `plain` = glibc's own ways. `auto` = `keep` on a CPU,
    unless launch.malloc_mmap_threshold says otherwise."""

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
    """How the model is computed, not what: losses differ only by rounding (docs/performance.md).
    `auto` takes the fastest that is sound on the device; `liger` needs CUDA and the extra `liger`.
    """

    attention: AttentionKernel = AttentionKernel.auto
    """`sdpa` = PyTorch's; `blocked` = matrix products by blocks, for CPUs whose MKL is slow;
    `eager` = all scores in memory; `flash_attention_2` needs CUDA and its package,
    `flex_attention` CUDA. `auto` = `blocked` in bf16 on a CPU that is not Intel's,
    `flash_attention_2` on CUDA if it is installed, else `sdpa`."""
    loss: LossKernel = LossKernel.auto
    """`plain` = all logits and fp32 copies of them; `chunked` = 1,024 tokens at a time (512 with
    matmul=fp32), with the gradient computed in the forward pass (arXiv 2410.10989). `auto` =
    `chunked`, except for fp16 and autocast."""
    rms_norm: LayerKernel = LayerKernel.auto
    """`plain` = transformers' module; `fused` = fewer passes over memory and fewer saved tensors.
    `auto` = `fused` on a CPU, `liger` on CUDA if it is installed, `plain` in compiled parts
    and under autocast."""
    rotary: LayerKernel = LayerKernel.auto
    """Rotary embedding; values as for rms_norm."""
    swiglu: LayerKernel = LayerKernel.auto
    """Activation of the feed-forward layer; values as for rms_norm."""
    compile: CompiledPart = CompiledPart.none
    """What torch.compile compiles, at the first step: each of the `layers`, or the `model` except
    its head. Needs a C++ compiler on a CPU; not supported at ZeRO stage 3."""
    matmul: Matmul = Matmul.auto
    """Products of 16-bit matrices: `fp32` = with operands converted to fp32, which is exact, and
    the result rounded as usual. `auto` = `fp32` on a CPU that is slow in 16 bits (Intel's without
    AMX, and all without bf16 instructions), else `plain`."""
    allocator: Allocator = Allocator.auto
    """On a CPU: `keep` = freed memory stays with the process, because page faults of memory that is
    requested again take up to 20% of a step; `plain` = glibc's default. `auto` = `keep` on a CPU,
    unless launch.malloc_mmap_threshold is set."""

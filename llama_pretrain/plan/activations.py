"""Memory of what a forward pass saves for its backward pass, and of the loss.

Activations are the tensors that autograd saves for transformers' LLaMA layer. Symbols: B sequences
of a micro batch, T tokens, V vocabulary.
"""

from llama_pretrain.config.kernels import (
    AttentionKernel,
    CompiledPart,
    LayerKernel,
    LossKernel,
    Matmul,
)
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.plan.batch import BatchPlan
from llama_pretrain.plan.model_size import head_width

NUM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

LOSS_CHUNK = 1024
"""Tokens whose logits the chunked loss holds at a time (train/kernels/cross_entropy.py)."""


def loss_chunk(*, wide: bool) -> int:
    """Tokens whose logits exist at a time; `wide` = in fp32 when everything else has 16 bits."""
    return LOSS_CHUNK // 2 if wide else LOSS_CHUNK


def number_width(run: ResolvedRun) -> int:
    """Bytes of a number in the precision of the forward pass."""
    return NUM_BYTES[run.precision.name.value]


def local_tokens(run: ResolvedRun, batch: BatchPlan) -> int:
    """Tokens of a micro batch that a rank has."""
    length = run.data.sequence_length // run.launch.sequence_parallel_size
    return batch.micro_batch_size * length


def activation_bytes(run: ResolvedRun, batch: BatchPlan) -> tuple[int, int]:
    """What the forward pass saves, and what recomputing one layer adds to it.

    A norm saves its fp32 input, the normalized input and its output, a fused one its input and its
    output; attention saves q, k, v and its output; SwiGLU saves gate, its activation, up and the
    product, a fused one all but the activation. Counted with autograd's saved-tensor hooks
    (tests/plan/test_memory.py). In compiled parts torch decides; it saves about as little.
    """
    model, width = run.model, number_width(run)
    autocast = run.precision.torch_autocast.enabled
    if autocast:  # matrix products save 16-bit copies of their operands
        width = 2
    tokens = local_tokens(run, batch)
    heads = model.num_attention_heads
    groups = heads if model.num_key_value_heads is None else model.num_key_value_heads
    groups = max(groups, run.launch.sequence_parallel_size)  # each rank has at least one
    queries, keys = heads * head_width(model), groups * head_width(model)
    norm = tokens * model.hidden_size * (2 * width if _is_lean(run, "rms_norm") else 4 + 2 * width)
    inner = 3 if _is_lean(run, "swiglu") else 4
    outputs = 1
    if run.kernels.rotary is LayerKernel.fused:  # heads first: the output is transposed into a copy
        outputs = 1 if run.kernels.attention is AttentionKernel.blocked else 2
    attention = (1 + outputs) * queries + 2 * keys
    if run.kernels.matmul is Matmul.fp32:  # everything that attention saves has twice the width
        kept_outputs = 0 if run.kernels.attention is AttentionKernel.blocked else 1
        attention = 2 * ((1 + kept_outputs) * queries + 2 * keys) + queries
    products = attention + inner * model.intermediate_size
    layer = 2 * norm + tokens * width * products
    if not run.train.gradient_checkpointing:
        return model.num_hidden_layers * layer + norm, 0
    kept = model.num_hidden_layers * tokens * model.hidden_size * width
    # The gradients of two of SwiGLU's tensors exist along with the layer.
    gradients = 2 * tokens * width * model.intermediate_size
    return kept + norm, layer + gradients - norm


def _is_lean(run: ResolvedRun, name: str) -> bool:
    """Whether a kernel of a layer saves less than transformers' module."""
    chosen: LayerKernel = getattr(run.kernels, name)
    return chosen is not LayerKernel.plain or run.kernels.compile is not CompiledPart.none


def logits_bytes(run: ResolvedRun, batch: BatchPlan) -> tuple[int, int]:
    """What the loss needs at the end of the forward pass and at the start of the backward pass.

    Plain: the log-softmax, its gradient and that of the logits, each (B * T, V) float32.
    Chunked: 16-bit logits of one chunk (or fp32 ones of half as many tokens, and the head in fp32),
    and the gradients of the hidden states and of the head, summed over chunks in fp32; then both
    are scaled.
    """
    model, width = run.model, number_width(run)
    tokens = local_tokens(run, batch)
    if run.kernels.loss is LossKernel.plain:
        return tokens * model.vocab_size * 2 * 4, tokens * model.vocab_size * 3 * 4
    hidden, head = tokens * model.hidden_size, model.vocab_size * model.hidden_size
    wide = run.kernels.matmul is Matmul.fp32
    length = loss_chunk(wide=wide)
    chunk = min(tokens, length) * model.vocab_size * (4 if wide else width)
    sums = head * width
    if tokens > length:  # the sum in fp32, beside a chunk's share or the rounded sum
        sums = head * (8 if wide else 4 + width)
    elif wide:
        sums = head * (4 + width)
    copy = head * 4 if wide else 0
    return chunk + hidden * width + sums + copy, 2 * (hidden + head) * width

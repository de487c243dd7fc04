"""Peak memory of a rank, by part: an estimate from the config alone.

Letters: P parameters, W ranks, B rows of a micro batch, T tokens, D model width, F feed-forward
width, V vocabulary, L layers. Weights, gradients and optimizer follow the ZeRO paper (arXiv
1910.02054, section 3); activations count the tensors that autograd keeps for LLaMA's layer.
"""

from dataclasses import asdict, dataclass

from llama_pretrain.config.deepspeed import OffloadDevice
from llama_pretrain.config.schema import PrecisionName, Run
from llama_pretrain.plan.batch import BatchPlan
from llama_pretrain.plan.model_size import count_parameters, head_width


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one rank's device, by part; `host` lies in the machine's memory."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    host: int

    @property
    def total(self) -> int:
        """All of it but what is offloaded."""
        return int(sum(asdict(self).values())) - self.host


def estimate_memory(run: Run, batch: BatchPlan, *, world_size: int) -> MemoryPlan:
    """Estimate the peak of one rank.

    The allocator's overhead and the libraries themselves are not in it.
    """
    zero, size = run.zero, count_parameters(run.model)
    width = 4 if run.precision.name is PrecisionName.fp32 else 2
    params = size.total
    weights = params * width
    gradients = params * width
    # fp32 master weights (a copy of their own only beside 16-bit ones, or as ZeRO's flat
    # partition) and two moments.
    optimizer = params * 8 if zero.stage == 0 and width == 4 else params * 12
    if zero.stage >= 1:
        optimizer //= world_size
    if zero.stage >= 2:
        gradients //= world_size
    if zero.stage >= 3:
        weights //= world_size
    host = 0
    if zero.offload_optimizer.device is not OffloadDevice.none:
        host, optimizer = host + optimizer + gradients, 0
    if zero.offload_param.device is not OffloadDevice.none:
        host, weights = host + weights, 0
    return MemoryPlan(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=_activation_bytes(run, batch, width=width),
        logits=_logits_bytes(run, batch, width=width),
        buffers=_buffer_bytes(run, width=width, world_size=world_size),
        host=host,
    )


def _activation_bytes(run: Run, batch: BatchPlan, *, width: int) -> int:
    """What the backward pass needs of the decoder layers."""
    model = run.model
    tokens = batch.micro_batch_size * run.data.sequence_length
    heads = model.num_attention_heads
    groups = heads if model.num_key_value_heads is None else model.num_key_value_heads
    queries, keys = heads * head_width(model), groups * head_width(model)
    # A norm keeps its fp32 input and its normalised output, twice; attention keeps q, k (before
    # and after rotation), v and its output; SwiGLU keeps gate, its activation, up and product.
    elements = 2 * model.hidden_size + 3 * queries + 3 * keys + 4 * model.intermediate_size
    layer = tokens * (elements * width + 2 * model.hidden_size * (4 + width))
    if not run.train.gradient_checkpointing:
        return model.num_hidden_layers * layer
    return model.num_hidden_layers * tokens * model.hidden_size * width + layer


def _logits_bytes(run: Run, batch: BatchPlan, *, width: int) -> int:
    """Logits, their fp32 copy, its log-softmax and gradient, each (B * T, V)."""
    rows = batch.micro_batch_size * run.data.sequence_length
    return rows * run.model.vocab_size * (2 * width + 3 * 4)


def _buffer_bytes(run: Run, *, width: int, world_size: int) -> int:
    """Communication buckets, as far as they can be filled."""
    zero, size = run.zero, count_parameters(run.model)
    if world_size == 1 or zero.stage == 0:
        return 0
    if zero.stage < 3:
        return min(size.total, max(zero.reduce_bucket_size, zero.allgather_bucket_size)) * width
    live = min(size.total, zero.stage3_prefetch_bucket_size + size.embedding)
    return (live + min(size.total, zero.reduce_bucket_size)) * width

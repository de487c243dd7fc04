"""Bytes that ranks exchange in an optimizer step, by arithmetic.

Symbols: P parameters, W ranks, A micro batches of a step. A ring moves (W - 1) / W of a buffer in
and out of each rank for an all-gather or a reduce-scatter, and twice that for an all-reduce (ZeRO
paper, arXiv 1910.02054, section 7: 2P for stages 0 to 2, 3P for stage 3).
"""

from dataclasses import dataclass

from llama_pretrain.config.precision import Dtype
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.plan.activations import NUM_BYTES, local_tokens
from llama_pretrain.plan.batch import BatchPlan
from llama_pretrain.plan.model_size import count_parameters, head_width


@dataclass(frozen=True, kw_only=True)
class TrafficPlan:
    """Bytes that one rank sends in an optimizer step; it receives the same number."""

    gather: int
    """Parameters, gathered before they are used (stage 3) or after they are updated."""
    reduce: int
    """Gradients."""
    heads: int = 0
    """Queries, keys, values and outputs of attention, between ranks that share a sequence."""
    between_machines: int
    """The part of both that leaves the node, if each rank has its own link."""
    volume: float
    """Parameters and gradients a micro batch, in parameters, as the paper counts: 2 for stages 0 to
    2, 3 for stage 3."""

    @property
    def total(self) -> int:
        return self.gather + self.reduce + self.heads


def count_traffic(run: ResolvedRun, batch: BatchPlan) -> TrafficPlan:
    """Count the collectives of a step, as DeepSpeed issues them.

    Stage 1 reduces once a step, stage 2 with each micro batch (its gradients are sharded at once),
    stage 3 gathers each layer for the forward and again for the backward pass. ZeRO++ (arXiv
    2306.10209, table 1) gathers weights in 8 bits, does the backward gather from a copy inside the
    node, and reduces gradients in 4 bits.
    """
    zero, size = run.zero, count_parameters(run.model).total
    share = (run.num_ranks - 1) / run.num_ranks
    width = NUM_BYTES[run.precision.name.value]
    reduced = run.precision.communication_data_type or Dtype(run.precision.name.value)
    reduce_width: float = NUM_BYTES[reduced.value]
    micro = batch.gradient_accumulation_steps
    if zero.stage < 3:
        reductions = micro if zero.stage == 2 else 1
        # Stage 0 reduces to all ranks at once, which is a reduce-scatter and a gather of gradients.
        gather_width = reduce_width if zero.stage == 0 else width
        gather = share * size * gather_width
        reduce = share * size * reduce_width * reductions
        return _plan(run, batch, gather, reduce, local_gather=0.0, volume=2.0)
    gather_width = 1 if zero.zero_quantized_weights else width
    if zero.zero_quantized_gradients:
        reduce_width = 0.5
    group = zero.zero_hpz_partition_size
    one = share * size * gather_width * micro
    # The secondary copy is stored in the precision of the weights, by the ranks of one group.
    second = (group - 1) / group * size * width * micro if group > 1 else one
    reduce = share * size * reduce_width * micro
    inside = second if group > 1 else 0.0
    volume = (gather_width + (0 if group > 1 else gather_width) + reduce_width) / width
    return _plan(run, batch, one + second, reduce, local_gather=inside, volume=volume)


def _plan(
    run: ResolvedRun,
    batch: BatchPlan,
    gather: float,
    reduce: float,
    *,
    local_gather: float,
    volume: float,
) -> TrafficPlan:
    between, heads = 0.0, _head_bytes(run, batch)
    if run.launch.nodes > 1:
        between = gather - local_gather + reduce
        if run.launch.num_processes % run.launch.sequence_parallel_size:
            between += heads
    return TrafficPlan(
        gather=round(gather),
        reduce=round(reduce),
        heads=heads,
        between_machines=round(between),
        volume=volume,
    )


def _head_bytes(run: ResolvedRun, batch: BatchPlan) -> int:
    """What a rank sends to those with which it shares sequences, in both passes of each layer.

    All but its own part of queries, keys, values and outputs, and of their gradients; recomputation
    repeats the forward pass.
    """
    size, model = run.launch.sequence_parallel_size, run.model
    heads = model.num_attention_heads
    keys = max(model.num_key_value_heads or heads, size)
    numbers = local_tokens(run, batch) * (2 * heads + 2 * keys) * head_width(model)
    passes = 3 if run.train.gradient_checkpointing else 2
    passes *= model.num_hidden_layers * batch.gradient_accumulation_steps
    return numbers * NUM_BYTES[run.precision.name.value] * passes * (size - 1) // size

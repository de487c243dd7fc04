"""The config group `batch`: micro batch, gradient accumulation and global batch."""

from llama_pretrain.config.fields import PositiveInt, schema


@schema
class Batch:
    """global_batch_size = micro_batch_size x gradient_accumulation_steps x ranks, exactly."""

    global_batch_size: PositiveInt | None = None
    """Sequences of one optimizer step, over all ranks; `null` = derived from the others; all four
    `null` = 16, or the next number that the ranks divide."""
    global_batch_tokens: PositiveInt | None = None
    """The same in tokens: a multiple of data.sequence_length."""
    micro_batch_size: PositiveInt | None = None
    """Sequences of one forward pass on one rank; `null` = derived."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Forward passes of one rank before an optimizer step; `null` = derived, or 1."""

"""The loss of a micro batch. Axes: B batch, T sequence, V vocabulary."""

from typing import Any

import torch.nn.functional as functional
from torch import Tensor

from llama_pretrain.data.dataset import IGNORED
from llama_pretrain.train.kernels.install import LlamaWithLoss


def sum_of_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy of a micro batch in nats, summed over its targets: a float32 scalar."""
    losses = _losses(model, batch)
    return losses[0] if isinstance(losses, tuple) else losses.sum()


def token_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy of each position in nats: (B * T,) float32, 0 at ignored targets.

    With a loss kernel it has no gradient; use `sum_of_losses` for training.
    """
    losses = _losses(model, batch)
    return losses[1] if isinstance(losses, tuple) else losses


def _losses(model: Any, batch: dict[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """The loss of each position, or the sum and each, from a DeepSpeed engine or a model.

    Logits are (B, T, V) in the model's precision; the softmax is in fp32. Documents of a sequence
    attend to each other unless `position_ids` restart with each document: transformers then masks
    them, but only without a KV cache.
    """
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    inputs |= {key: batch[key] for key in ("position_ids", "attention_mask") if key in batch}
    labels = batch["shift_labels"]
    if isinstance(getattr(model, "module", model), LlamaWithLoss):
        found: tuple[Tensor, Tensor] = model(**inputs, targets=labels)
        return found
    logits = model(**inputs).logits.float().flatten(0, 1)
    return functional.cross_entropy(
        logits, labels.flatten(), ignore_index=IGNORED, reduction="none"
    )

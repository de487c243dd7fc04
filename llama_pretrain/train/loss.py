"""The loss of a micro batch. Letters: B rows, T tokens of a row, V vocabulary."""

from typing import Any

import torch
import torch.nn.functional as functional

from llama_pretrain.data.dataset import IGNORED
from llama_pretrain.train.kernels.install import LlamaWithLoss


def sum_of_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of a micro batch in nats, summed over its targets: a float32 scalar."""
    losses = _losses(model, batch)
    return losses[0] if isinstance(losses, tuple) else losses.sum()


def token_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of each position of a micro batch in nats: (B * T,) float32, 0 if unlabelled.

    Of a model whose head ends in losses they have no gradient: `sum_of_losses` has.
    """
    losses = _losses(model, batch)
    return losses[1] if isinstance(losses, tuple) else losses


def _losses(
    model: Any, batch: dict[str, torch.Tensor]
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Each position's loss, or their sum and each one, from a DeepSpeed engine or a model.

    Logits are (B, T, V) in the model's precision and the softmax is in fp32.
    Documents of a row see each other across the end-of-text token, unless `position_ids` begin anew
    with each: then transformers masks them, but only without a cache to fill.
    """
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"]
    if isinstance(getattr(model, "module", model), LlamaWithLoss):
        found: tuple[torch.Tensor, torch.Tensor] = model(**inputs, targets=batch["shift_labels"])
        return found
    logits = model(**inputs).logits
    return functional.cross_entropy(
        logits.float().flatten(0, 1),
        batch["shift_labels"].flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )

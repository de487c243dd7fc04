"""The loss of a micro batch. Letters: B rows, T tokens of a row, V vocabulary."""

from typing import Any

import torch
import torch.nn.functional as functional

from llama_pretrain.data.dataset import IGNORED


def token_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of each position of a micro batch in nats: (B * T,) float32, 0 if unlabelled.

    Logits are (B, T, V) in the model's precision and the softmax is in fp32.
    Documents of a row see each other across the end-of-text token, unless `position_ids` begin anew
    with each: then transformers masks them, but only without a cache to fill.
    """
    positions = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
    logits = model(input_ids=batch["input_ids"], use_cache=False, **positions).logits
    return functional.cross_entropy(
        logits.float().flatten(0, 1),
        batch["shift_labels"].flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )

"""Evaluation: each held-out token counted once, whatever the ranks and the micro batch."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from llama_pretrain.data.dataset import IGNORED
from llama_pretrain.train.distributed import Rank, sum_over_ranks
from llama_pretrain.train.loss import token_losses


@torch.no_grad()
def evaluate(
    engine: Any, loader: Iterable[dict[str, torch.Tensor]], rank: Rank, *, bytes_per_token: float
) -> dict[str, float]:
    """Mean loss in nats a token, perplexity, and bits a byte of text.

    Bits per byte take the held-out split's bytes a token, so they are exact where all of it is
    evaluated and close where only its first rows are.
    """
    engine.eval()
    loss_sum, num_tokens = 0.0, 0
    for cpu_batch in loader:
        batch = {key: value.to(rank.device) for key, value in cpu_batch.items()}
        loss_sum += token_losses(engine, batch).double().sum().item()
        num_tokens += int((cpu_batch["shift_labels"] != IGNORED).sum())
    engine.train()
    loss_sum, total = sum_over_ranks([loss_sum, num_tokens], rank)
    loss = loss_sum / total
    return {
        "eval_loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
    }

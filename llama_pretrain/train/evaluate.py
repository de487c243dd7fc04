"""Evaluation: each held-out token counted once, whatever the ranks and the micro batch."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from llama_pretrain.data.dataset import IGNORED
from llama_pretrain.plan.plan import SourceTokens
from llama_pretrain.train.distributed import Rank, sum_over_ranks
from llama_pretrain.train.loss import token_losses


@torch.no_grad()
def evaluate(
    engine: Any,
    loader: Iterable[dict[str, torch.Tensor]],
    rank: Rank,
    *,
    sources: Sequence[SourceTokens],
    ends: Sequence[int],
) -> dict[str, float]:
    """Mean loss in nats a token, perplexity, bits a byte of text, and each source's loss.

    Bits per byte take the held-out split's bytes a token, so they are exact where all of it is
    evaluated and close where only its first rows are.

    Args:
        ends: where each source's rows end in the row numbers.
    """
    engine.eval()
    loss_sums, counts = [0.0] * len(sources), [0] * len(sources)
    bounds = torch.tensor(ends)
    for cpu_batch in loader:
        batch = {key: value.to(rank.device) for key, value in cpu_batch.items()}
        losses = token_losses(engine, batch).double().view(len(cpu_batch["input_ids"]), -1)
        labelled = (cpu_batch["shift_labels"] != IGNORED).sum(dim=1)
        owners = torch.bucketize(cpu_batch["sample_id"].clamp(min=0), bounds, right=True)
        for owner, loss, count in zip(owners, losses.sum(dim=1), labelled, strict=True):
            loss_sums[int(owner)] += loss.item()
            counts[int(owner)] += int(count)
    engine.train()
    sums = sum_over_ranks([*loss_sums, *counts], rank)
    loss_sums, totals = sums[: len(sources)], sums[len(sources) :]
    num_bytes = sum(
        total * source.heldout_bytes_per_token
        for total, source in zip(totals, sources, strict=True)
    )
    loss = sum(loss_sums) / sum(totals)
    result = {
        "eval_loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": sum(loss_sums) / math.log(2) / num_bytes,
    }
    if len(sources) > 1:
        for source, loss_sum, total in zip(sources, loss_sums, totals, strict=True):
            if total:
                result[f"eval_loss/{source.name}"] = loss_sum / total
    return result

"""Evaluation: each held-out token counted once, whatever the ranks and the micro batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llama_pretrain.checkpoint.tensors import LOGITS, tensor_parts
from llama_pretrain.data.dataset import IGNORED, EvalSampler, PretrainDataset, build_loader
from llama_pretrain.distributed import Rank, signal_of_any, sum_over_ranks
from llama_pretrain.plan.plan import SourceTokens
from llama_pretrain.train.kernels.install import without_compilation
from llama_pretrain.train.loss import token_losses

PROBED_TOKENS = 32
"""Tokens whose logits go into a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """What all ranks have added up, by source."""

    sources: Sequence[SourceTokens]
    sums: list[float]
    """Losses in nats."""
    tokens: list[float]
    """Targets that they are of; a target that a document mask leaves out is none."""

    def describe(self) -> dict[str, float]:
        """Mean loss in nats a token, perplexity, bits a byte of text, and each source's loss.

        Bits per byte take the held-out split's bytes a token, so they are exact where all of it is
        evaluated and close where only its first rows are.
        """
        num_bytes = sum(
            total * source.heldout_bytes_per_token
            for total, source in zip(self.tokens, self.sources, strict=True)
        )
        loss = sum(self.sums) / sum(self.tokens)
        result = {
            "eval_loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": sum(self.sums) / math.log(2) / num_bytes,
        }
        if len(self.sources) > 1:
            for source, part, total in zip(self.sources, self.sums, self.tokens, strict=True):
                if total:
                    result[f"eval_loss/{source.name}"] = part / total
        return result


def evaluate(
    engine: Any,
    rows: PretrainDataset,
    rank: Rank,
    *,
    micro_batch_size: int,
    sources: Sequence[SourceTokens],
) -> dict[str, float] | None:
    """The loss of held-out rows, as `LossSums.describe` has it.

    `None` where a rank was asked to stop.
    """
    found = sum_losses(engine, rows, rank, micro_batch_size=micro_batch_size, sources=sources)
    return None if found is None else found.describe()


@torch.no_grad()
def sum_losses(
    engine: Any,
    rows: PretrainDataset,
    rank: Rank,
    *,
    micro_batch_size: int,
    sources: Sequence[SourceTokens],
) -> LossSums | None:
    """Run all rows through the engine, each once. `None` where a rank was asked to stop."""
    sampler = EvalSampler(
        num_rows=len(rows),
        micro_batch_size=micro_batch_size,
        rank=rank.index,
        world_size=rank.world_size,
    )
    loader = build_loader(rows, sampler, micro_batch_size=micro_batch_size, num_workers=0)
    engine.eval()
    loss_sums, counts = [0.0] * len(sources), [0] * len(sources)
    bounds = torch.tensor(rows.ends)
    for cpu_batch in loader:
        if signal_of_any(rank):
            engine.train()
            return None
        batch = {key: value.to(rank.device) for key, value in cpu_batch.items()}
        with without_compilation():
            losses = token_losses(engine, batch).double().view(len(cpu_batch["input_ids"]), -1)
        labelled = (cpu_batch["shift_labels"] != IGNORED).sum(dim=1)
        owners = torch.bucketize(cpu_batch["sample_id"].clamp(min=0), bounds, right=True)
        for owner, loss, count in zip(owners, losses.sum(dim=1), labelled, strict=True):
            loss_sums[int(owner)] += loss.item()
            counts[int(owner)] += int(count)
        rank.beat()
    engine.train()
    sums = sum_over_ranks([*loss_sums, *counts], rank)
    return LossSums(sources=sources, sums=sums[: len(sources)], tokens=sums[len(sources) :])


@torch.no_grad()
def probe_logits(engine: Any, rows: PretrainDataset, rank: Rank) -> dict[str, bytes]:
    """What the engine says to the first held-out tokens: a file, to prove an export by.

    `input_ids` (1, T) int64 and `logits` (1, T, V) float32. All ranks call it, and compute it.
    """
    tokens = torch.as_tensor(rows[0]["input_ids"])[None, :PROBED_TOKENS]
    engine.eval()
    with without_compilation():
        logits = engine(input_ids=tokens.to(rank.device), use_cache=False).logits.float()
    engine.train()
    return {LOGITS: b"".join(tensor_parts({"input_ids": tokens, "logits": logits.cpu()}))}

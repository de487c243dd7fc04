"""Evaluation: held-out loss, logits for the check of an export, and the check of document masks.

Every rank calls each function: at ZeRO stage 3 all ranks gather the weights together.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from llama_pretrain.checkpoint.tensors import LOGITS
from llama_pretrain.config.resolved import ResolvedRun
from llama_pretrain.data.dataset import (
    IGNORED,
    PretrainDataset,
    create_pretrain_dataset,
    document_positions,
)
from llama_pretrain.data.loader import EvalSampler, build_loader
from llama_pretrain.distributed import Rank, signal_of_any, sum_over_ranks
from llama_pretrain.plan.plan import SourceTokens, TrainingPlan
from llama_pretrain.runs.metrics import EvaluationRow
from llama_pretrain.train.kernels.install import without_compilation
from llama_pretrain.train.loss import token_losses
from llama_pretrain.train.sequence import SequenceGroup

PROBED_TOKENS = 32
"""Tokens whose logits are saved in a checkpoint."""
FIRST_LENGTH, SECOND_LENGTH = 12, 16
"""Tokens of the two documents that the document mask is checked with."""


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """Losses summed over all ranks, by source."""

    sources: Sequence[SourceTokens]
    sums: list[float]
    """Losses in nats."""
    tokens: list[float]
    """Number of targets, without those that a document mask ignores."""

    def to_row(self, *, step: int, tokens: int, checkpoint: str = "") -> EvaluationRow:
        """Mean loss in nats per token, perplexity, bits per byte of text, and loss by source.

        Bits per byte use the held-out split's bytes per token: exact when the whole split is
        evaluated, approximate when only its first sequences are.

        Args:
            checkpoint: with task=evaluate, the checkpoint's name.
        """
        num_bytes = sum(
            total * source.heldout_bytes_per_token
            for total, source in zip(self.tokens, self.sources, strict=True)
        )
        loss = sum(self.sums) / sum(self.tokens)
        by_source = {
            source.name: part / total
            for source, part, total in zip(self.sources, self.sums, self.tokens, strict=True)
            if total and len(self.sources) > 1
        }
        return EvaluationRow(
            step=step,
            tokens=tokens,
            eval_loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            bits_per_byte=sum(self.sums) / math.log(2) / num_bytes,
            by_source=by_source,
            checkpoint=checkpoint,
            eval_tokens=int(sum(self.tokens)) if checkpoint else 0,
            finished=bool(checkpoint),
        )


def open_split(run: ResolvedRun, plan: TrainingPlan, split: str) -> PretrainDataset:
    """The `train` or the `heldout` dataset of a run."""
    limits: Sequence[int | None] = plan.steps.eval_sequences_by_source
    if split == "train":
        limits = [run.data.limit_train_sequences] * len(plan.corpus.sources)
    return create_pretrain_dataset(
        plan.corpus,
        split,
        sequence_length=run.data.sequence_length,
        limits=limits,
        document_mask=run.data.document_mask,
    )


@torch.no_grad()
def sum_losses(
    engine: Any,
    dataset: PretrainDataset,
    plan: TrainingPlan,
    rank: Rank,
    sequence: SequenceGroup | None = None,
) -> LossSums | None:
    """Evaluate each sequence once. `None` if a signal has interrupted it.

    Each token counts once, whatever the number of ranks and the micro batch size.

    Args:
        sequence: the ranks that share each sequence, if several do.
    """
    size, sources = plan.batch.micro_batch_size, plan.corpus.sources
    sampler = EvalSampler(
        num_sequences=len(dataset),
        micro_batch_size=size,
        rank=rank.index if sequence is None else rank.data_index,
        world_size=rank.world_size if sequence is None else rank.data_size,
    )
    loader = build_loader(dataset, sampler, micro_batch_size=size, num_workers=0)
    engine.eval()
    loss_sums, counts = [0.0] * len(sources), [0] * len(sources)
    bounds = torch.tensor(dataset.ends)
    for cpu_batch in loader:
        if signal_of_any(rank):
            engine.train()
            return None
        batch = {key: value.to(rank.device) for key, value in cpu_batch.items()}
        split = nullcontext(batch) if sequence is None else sequence.split(batch)
        with split as part, without_compilation():
            losses = token_losses(engine, part).double().view(len(cpu_batch["input_ids"]), -1)
        labelled = (part["shift_labels"] != IGNORED).sum(dim=1)
        owners = torch.bucketize(cpu_batch["sample_id"].clamp(min=0), bounds, right=True)
        for owner, loss, count in zip(owners, losses.sum(dim=1), labelled, strict=True):
            loss_sums[int(owner)] += loss.item()
            counts[int(owner)] += int(count)
        rank.beat()
    engine.train()
    sums = sum_over_ranks([*loss_sums, *counts], rank)
    return LossSums(sources=sources, sums=sums[: len(sources)], tokens=sums[len(sources) :])


@torch.no_grad()
def probe_logits(engine: Any, dataset: PretrainDataset, rank: Rank) -> dict[str, bytes]:
    """The engine's logits for the first held-out tokens, as a file that exports are checked with.

    `input_ids` (1, T) int64 and `logits` (1, T, V) float32.
    """
    tokens = torch.as_tensor(dataset[0]["input_ids"])[None, :PROBED_TOKENS].contiguous()
    engine.eval()
    with without_compilation():
        logits = engine(input_ids=tokens.to(rank.device), use_cache=False).logits.float()
    engine.train()
    tensors = {"input_ids": tokens, "logits": logits.cpu().contiguous()}
    return {LOGITS: safetensors.torch.save(tensors)}


@torch.no_grad()
def verify_document_mask(engine: Any, *, eos_id: int, rank: Rank) -> str:
    """Check that changing one document does not change the next one's logits. Returns a summary.

    Raises:
        RuntimeError: if it does, or if nothing changes without the mask either.
    """
    vocab_size = engine.module.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    firsts = torch.randint(0, vocab_size, (2, FIRST_LENGTH), generator=generator)
    second = torch.randint(0, vocab_size, (1, SECOND_LENGTH), generator=generator).expand(2, -1)
    tokens = torch.cat([firsts, second], dim=1)
    tokens = torch.where(tokens == eos_id, (tokens + 1) % vocab_size, tokens)
    tokens[:, FIRST_LENGTH - 1] = eos_id
    positions = torch.from_numpy(document_positions(tokens[0].numpy(), eos_id=eos_id))
    engine.eval()

    def difference(**mask: torch.Tensor) -> float:
        inputs = {"input_ids": tokens, **mask}
        on_device = {name: value.to(rank.device) for name, value in inputs.items()}
        with without_compilation():
            logits = engine(**on_device, use_cache=False).logits[:, FIRST_LENGTH:].float()
        return float((logits[0] - logits[1]).abs().max())

    masked, unmasked = difference(position_ids=positions.expand(2, -1)), difference()
    engine.train()
    if not masked <= 1e-3 * unmasked:
        raise RuntimeError(
            "data.document_mask: documents of a sequence attend to each other (got a change of"
            f" {masked:.3g} in the second's logits with the first; {unmasked:.3g} without the mask)"
        )
    return f"document mask: logits change by {masked:.3g}, without it by {unmasked:.3g}"

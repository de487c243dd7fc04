"""The proof that documents of a row don't see each other, made before the first step."""

from typing import Any

import torch

from llama_pretrain.data.dataset import document_positions
from llama_pretrain.distributed import Rank
from llama_pretrain.train.kernels.install import without_compilation

FIRST, SECOND = 12, 16
"""Tokens of the two documents."""


@torch.no_grad()
def prove_document_mask(engine: Any, *, eos_id: int, rank: Rank) -> str:
    """Change one document and look whether the next one's logits change. Returns what was seen.

    Every rank calls it: at ZeRO stage 3 they gather the weights together.

    Raises:
        RuntimeError: if they do, or if nothing changes without the mask either.
    """
    vocab_size = engine.module.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    firsts = torch.randint(0, vocab_size, (2, FIRST), generator=generator)
    second = torch.randint(0, vocab_size, (1, SECOND), generator=generator).expand(2, -1)
    rows = torch.cat([firsts, second], dim=1)
    rows = torch.where(rows == eos_id, (rows + 1) % vocab_size, rows)
    rows[:, FIRST - 1] = eos_id
    positions = torch.from_numpy(document_positions(rows[0].numpy(), eos_id=eos_id))
    positions = positions.expand(2, -1)
    engine.eval()

    def difference(**more: torch.Tensor) -> float:
        inputs = {"input_ids": rows, **more}
        on_device = {name: value.to(rank.device) for name, value in inputs.items()}
        with without_compilation():
            logits = engine(**on_device, use_cache=False).logits[:, FIRST:].float()
        return float((logits[0] - logits[1]).abs().max())

    masked, open_ = difference(position_ids=positions), difference()
    engine.train()
    if not masked <= 1e-3 * open_:
        raise RuntimeError(
            f"documents leak into each other: the second's logits change by {masked:.3g} with the"
            f" first one, by {open_:.3g} without the mask"
        )
    return f"document mask: logits change by {masked:.3g}, without it by {open_:.3g}"

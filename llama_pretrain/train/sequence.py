"""Sequence parallelism: several ranks share each sequence (Ulysses, arXiv 2309.14509).

Each rank computes its part of the tokens; for attention the ranks of a group exchange, so that each
has all tokens of its share of the heads. DeepSpeed is not told: to it every rank is data-parallel,
and the mean over ranks of losses that are divided by a rank's share of the targets is right at
every ZeRO stage.

Axes: B batch, T sequence, S ranks of a group, t = T / S, H query heads, K key heads, h = H / S, D
width of a head.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from llama_pretrain.distributed import Rank


class SequenceGroup:
    """The ranks that share a sequence, and what their attention needs of a whole one."""

    def __init__(self, rank: Rank, config: LlamaConfig, *, timeout_s: int):
        self.size, self._index, self._config = rank.sequence_size, rank.sequence_index, config
        subgroups: Any = dist.new_subgroups
        self._group, _ = subgroups(group_size=self.size, timeout=timedelta(seconds=timeout_s))
        self.active = False
        """Whether sequences are split; otherwise a rank computes whole ones by itself."""
        self._positions: Tensor | None = None

    @contextmanager
    def split(self, batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """This rank's part of a micro batch (B, T): (B, t), while the model is called with it."""
        rows, tokens = batch["input_ids"].shape
        places = torch.arange(tokens, device=batch["input_ids"].device).expand(rows, tokens)
        positions = batch.get("position_ids", places)
        mask = self._mask(positions)
        values = {**batch, "position_ids": positions}
        part = {
            key: value.chunk(self.size, dim=1)[self._index].contiguous()
            for key, value in values.items()
            if value.dim() == 2
        }
        self.active, self._positions = True, positions
        try:
            yield part if mask is None else {**part, "attention_mask": mask}
        finally:
            self.active, self._positions = False, None

    def _mask(self, positions: Tensor) -> Any:
        """The mask of whole sequences as transformers builds it, for the kernel in use."""
        dtype: Any = self._config.dtype
        shape = torch.empty(*positions.shape, 0, dtype=dtype, device=positions.device)
        others: dict[str, Any] = dict.fromkeys(("cache", "past_key_values"))
        others["cache_position"] = torch.arange(positions.shape[1], device=positions.device)
        known = inspect.signature(create_causal_mask).parameters
        others = {name: value for name, value in others.items() if name in known}
        return create_causal_mask(self._config, shape, None, position_ids=positions, **others)

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, t, D) queries and (B, K, t, D) keys and values -> the same with (h, T).

        With fewer key heads than ranks, several ranks get the same one.
        """
        batch, _, tokens, width = query.shape
        if (repeats := self.size // key.shape[1]) > 1:
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        parts = [x.reshape(batch, self.size, -1, tokens, width) for x in (query, key, value)]
        counts = [part.shape[2] for part in parts]
        mine = _exchange(torch.cat(parts, dim=2).transpose(0, 1), self._group)  # (S, B, ..., t, D)
        whole = mine.permute(1, 2, 0, 3, 4).reshape(batch, -1, self.size * tokens, width)
        query, key, value = torch.split(whole, counts, dim=1)
        return query, key, value

    def to_tokens(self, mixed: Tensor) -> Tensor:
        """What attention returns, (B, T, h, D) -> (B, t, H, D)."""
        batch, tokens, _, width = mixed.shape
        parts = mixed.reshape(batch, self.size, tokens // self.size, -1, width)
        mine = _exchange(parts.transpose(0, 1), self._group)  # (S, B, t, h, D)
        return mine.permute(1, 2, 0, 3, 4).reshape(batch, tokens // self.size, -1, width)

    def whole_positions(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options of an attention kernel, with the positions of whole sequences."""
        return {**options, "position_ids": self._positions}


class _Exchange(torch.autograd.Function):
    """Send the parts of dimension 0 to the ranks of a group, and receive theirs."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradients[0], ctx.group), None


def _exchange(parts: Tensor, group: Any) -> Tensor:
    apply: Any = _Exchange.apply
    received: Tensor = apply(parts.contiguous(), group)
    return received

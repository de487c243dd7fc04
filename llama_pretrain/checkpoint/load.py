"""Restore an engine from a checkpoint, all ranks together."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from llama_pretrain.checkpoint.engine_state import restore
from llama_pretrain.checkpoint.tensors import StoredState
from llama_pretrain.distributed import Rank


class CheckpointError(Exception):
    """A checkpoint could not be written, and `checkpoint.on_error` is `stop`."""


def load_checkpoint(engine: Any, folder: Path, rank: Rank) -> dict[str, Any]:
    """Restore a checkpoint whose files the parent has verified. Returns the run's progress."""
    with StoredState(folder) as stored:
        restore(engine, stored, rank)
        progress: dict[str, Any] = stored.values["progress"]
    dist.barrier()  # no rank trains, and saves, while another still reads
    return progress

"""Settings of a sweep (`-m`): what its jobs are ranked by, and when one is stopped early."""

from enum import Enum
from typing import Annotated

from llama_pretrain.config.fields import PositiveInt, UsedWhen, schema


class Objective(str, Enum):
    eval_loss = "eval_loss"
    train_loss = "train_loss"
    tokens_per_s = "tokens_per_s"
    peak_memory_bytes = "peak_memory_bytes"

    @property
    def more_is_better(self) -> bool:
        """Whether the largest value is the best."""
        return self is Objective.tokens_per_s


@schema
class SweepSettings:
    """What a sweep (`-m`) does with its jobs; a single run ignores it."""

    objective: Objective = Objective.eval_loss
    """What jobs are ranked by and what Optuna optimizes: the last evaluation's loss, the mean
    training loss of the last steps, the median throughput, or the peak memory of the largest rank.
    """
    prune: bool = False
    """Stop a job whose evaluation loss is worse than the median of the finished jobs' at the same
    number of tokens."""
    prune_after: Annotated[PositiveInt, UsedWhen("sweep.prune", (True,))] = 4
    """Jobs that must have finished before one is stopped."""

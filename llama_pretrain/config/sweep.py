"""Settings of a sweep: its objective and pruning."""

from enum import Enum

from llama_pretrain.config.fields import PositiveInt, schema


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
    """What a sweep, with `-m`, does with its points; no single run has a use for it."""

    objective: Objective = Objective.eval_loss
    """What points are ranked by, and what Optuna is told: the last evaluation's loss, the mean loss
    of the last steps, the median throughput (the most is best) or the largest rank's peak memory.
    """
    prune: bool = False
    """End a point whose evaluation loss is worse than the median of the finished points' at as many
    tokens."""
    prune_after: PositiveInt = 4
    """`prune`: points that must have finished before one is ended."""

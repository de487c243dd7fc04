"""The learning rate of each step, as a fraction of the peak."""

import math
from collections.abc import Callable
from typing import Protocol

from llama_pretrain.config.schedule import Schedule, ScheduleName


class ScheduleLength(Protocol):
    """The lengths of a run in steps, as its plan has them."""

    @property
    def total(self) -> int: ...
    @property
    def warmup(self) -> int: ...
    @property
    def decay(self) -> int: ...


def learning_rate_factor(schedule: Schedule, length: ScheduleLength) -> Callable[[int], float]:
    """The fraction of the peak learning rate at each step, counted from 0.

    Warmup is linear and reaches the peak at its last step; the last step of the run has
    `min_learning_rate_ratio` (arXiv 1608.03983 for the cosine).
    """
    least = schedule.min_learning_rate_ratio
    decay_start = length.total - length.decay

    def factor(step: int) -> float:
        if step < length.warmup:
            return (step + 1) / length.warmup
        if schedule.name is ScheduleName.constant or step < decay_start or length.decay == 0:
            return 1.0
        progress = min(1.0, (step - decay_start + 1) / length.decay)
        if schedule.name is ScheduleName.cosine:
            return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - (1 - least) * progress

    return factor

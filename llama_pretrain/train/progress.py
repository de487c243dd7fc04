"""Progress of a run: the part of its state that is neither weights nor random generators."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_ROLLBACKS = 3
"""To one checkpoint; after that, excluding data does not stop the spikes."""
RECENT = 20
"""Number of losses that the run's final training loss is the mean of."""


@dataclass
class Progress:
    """Saved in every checkpoint, and equal on all ranks."""

    step: int = 0
    """Completed steps, including skipped ones."""
    next_batch: int = 0
    """Index of the next global batch in the order of the data."""
    left_out: list[int] = field(default_factory=list)
    """Global batches that rollbacks have excluded."""
    evaluated: int = -1
    """The last step that was evaluated."""
    nonfinite_in_a_row: int = 0
    """Consecutive steps, up to now, that were skipped for a loss or gradient that is not finite."""
    rollbacks: list[int] = field(default_factory=list)
    """Steps that the run has returned to."""
    window: list[float] = field(default_factory=list)
    """Losses of the last applied steps, which a spike is measured against."""
    recent: list[float] = field(default_factory=list)
    """Losses of the last steps."""

    def to_json(self) -> dict[str, Any]:
        """Values for state.json."""
        return asdict(self)

    def take_batch(self) -> int:
        """Advance to the next global batch that is not excluded. Returns its index."""
        taken = self.next_batch
        while taken in self.left_out:
            taken += 1
        self.next_batch = taken + 1
        return taken

    def add_loss(self, loss: float, *, applied: bool, window: int) -> None:
        """Record the loss of a step."""
        self.recent = [*self.recent, loss][-RECENT:]
        if applied:
            self.window = [*self.window, loss][-window:]

    def roll_back(self, to: "Progress", *, spike_batch: int, num_batches: int) -> list[int]:
        """Return to the state of a checkpoint and exclude the batches up to a spike's.

        Returns the newly excluded ones.
        """
        first = max(to.next_batch, spike_batch - num_batches + 1)
        new = [batch for batch in range(first, spike_batch + 1) if batch not in self.left_out]
        left_out, rollbacks = sorted({*self.left_out, *new}), [*self.rollbacks, to.step]
        vars(self).update(asdict(to))
        self.left_out, self.rollbacks = left_out, rollbacks
        return new


def spike_score(loss: float, window: list[float], *, size: int) -> float:
    """Standard deviations by which a loss exceeds the mean of a full window; 0 until it is full."""
    if len(window) < size:
        return 0.0
    mean = sum(window) / len(window)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in window) / (len(window) - 1))
    return (loss - mean) / max(deviation, 1e-6 * abs(mean), 1e-12)

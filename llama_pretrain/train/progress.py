"""What a run has done so far: the part of its state that is neither weights nor generators."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_ROLLBACKS = 3
"""To one checkpoint; a run that spikes after that is not mended by leaving out data."""
RECENT = 20
"""Losses that the run's final training loss is the mean of."""


@dataclass
class Progress:
    """A checkpoint keeps it whole. The same on all ranks."""

    step: int = 0
    """Steps done: updates that were applied, and those that were skipped."""
    next_batch: int = 0
    """Number of the global batch that comes next in the order of the data."""
    left_out: list[int] = field(default_factory=list)
    """Global batches that a rollback has taken out."""
    evaluated: int = -1
    """The last step that was evaluated."""
    nonfinite_in_a_row: int = 0
    """Steps that were skipped, one after another up to now, for a loss or gradient not finite."""
    rollbacks: list[int] = field(default_factory=list)
    """Steps that the run has gone back to."""
    window: list[float] = field(default_factory=list)
    """Losses of the last applied steps: what a spike is measured against."""
    recent: list[float] = field(default_factory=list)
    """Losses of the last steps."""

    def to_json(self) -> dict[str, Any]:
        """For state.json."""
        return asdict(self)

    def take_batch(self) -> int:
        """The next global batch's number; the one after it comes next."""
        taken = self.next_batch
        while taken in self.left_out:
            taken += 1
        self.next_batch = taken + 1
        return taken

    def add_loss(self, loss: float, *, applied: bool, window: int) -> None:
        """Remember a step's loss."""
        self.recent = [*self.recent, loss][-RECENT:]
        if applied:
            self.window = [*self.window, loss][-window:]

    def go_back(self, to: "Progress", *, spiked: int, batches: int) -> list[int]:
        """Become what a checkpoint has kept, without the batches that end with a spike's.

        Returns the numbers of those that were still in.
        """
        first = max(to.next_batch, spiked - batches + 1)
        out = [number for number in range(first, spiked + 1) if number not in self.left_out]
        left_out, rollbacks = sorted({*self.left_out, *out}), [*self.rollbacks, to.step]
        vars(self).update(asdict(to))
        self.left_out, self.rollbacks = left_out, rollbacks
        return out


def spike_score(loss: float, window: list[float], *, size: int) -> float:
    """How many standard deviations a loss lies above the mean of a full window; else 0."""
    if len(window) < size:
        return 0.0
    mean = sum(window) / len(window)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in window) / (len(window) - 1))
    return (loss - mean) / max(deviation, 1e-6 * abs(mean), 1e-12)

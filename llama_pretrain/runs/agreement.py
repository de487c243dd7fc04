"""How far two runs agree, step by step and to the bit, and the likeliest cause of a difference."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llama_pretrain.files import hash_text
from llama_pretrain.runs.drift import Drift, Group, Kind
from llama_pretrain.runs.metrics import Row, StepRow, evaluations, initial_weights, steps

QUANTITIES = {"sample_hash": "sample ids", "loss": "loss", "grad_norm": "gradient norm"}
"""What is compared in a step, the cause before its effect."""
OF_SAMPLES = ("seed", "data.", "batch.", "train.max_", "tokenizer.")
"""Settings that decide which samples a step has."""
OF_WEIGHTS = ("seed", "model.", "tokenizer.", "data.")
"""Settings that decide the initial weights."""


class DivergedError(Exception):
    """A reproduction ended and differs from the original run."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first difference: one quantity of one step."""

    step: int
    quantity: str
    before: float | str | None
    now: float | str | None

    def __str__(self) -> str:
        text = f"{self.quantity} {_show(self.before)} -> {_show(self.now)}"
        if not isinstance(self.before, int | float) or not isinstance(self.now, int | float):
            return text
        size = abs(self.now - self.before)
        relative = f", {size / abs(self.before):.2g} of it" if self.before else ""
        return f"{text} (a difference of {size:.2g}{relative})"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The result of comparing the steps of two runs."""

    steps_before: int
    """Steps of the original run."""
    steps_now: int
    equal_steps: int
    """Steps that are equal, counted from the first."""
    digest: str
    """SHA-256 over the hashes of those steps: loss, gradient norm and sample ids."""
    difference: Difference | None
    initial_weights: bool | None
    """Whether the initial weights are equal; `None` if a run does not record them."""
    evaluations: int
    """Evaluations that both runs have."""
    equal_evaluations: int

    @property
    def compared(self) -> int:
        return min(self.steps_before, self.steps_now)

    @property
    def is_equal(self) -> bool:
        """Whether everything comparable is equal, and at least one step is comparable."""
        same = self.difference is None and self.initial_weights is not False
        return same and self.compared > 0 and self.evaluations == self.equal_evaluations


def compare_rows(before: Sequence[Row], now: Sequence[Row]) -> Agreement:
    """Compare the rows of two metrics.jsonl."""
    old, new = ({row.step: row for row in steps(rows)} for rows in (before, now))
    digest, equal = hashlib.sha256(), 0
    difference = None
    for step in sorted({*old} & {*new}):
        if step_hash(old[step]) != step_hash(new[step]):
            difference = _first_difference(old[step], new[step])
            break
        digest.update(step_hash(new[step]).encode())
        equal += 1
    weights = [initial_weights(rows) for rows in (before, now)]
    first, second = (
        {row.step: json.dumps(row.eval_loss) for row in evaluations(rows)} for rows in (before, now)
    )
    shared = {*first} & {*second}
    return Agreement(
        steps_before=len(old),
        steps_now=len(new),
        equal_steps=equal,
        digest=digest.hexdigest(),
        difference=difference,
        initial_weights=None if None in weights else weights[0] == weights[1],
        evaluations=len(shared),
        equal_evaluations=sum(first[step] == second[step] for step in shared),
    )


def step_hash(row: StepRow) -> str:
    """SHA-256 of a step's sample ids, loss and gradient norm; JSON keeps every bit of a number."""
    return hash_text(json.dumps([getattr(row, name) for name in QUANTITIES]))


def likeliest_cause(drifts: Iterable[Drift], agreement: Agreement) -> Drift | None:
    """The drift that most likely explains a difference; `None` if none can.

    What differs first shows where to look: other samples point to the data and its settings, other
    initial weights to the seed and the model.
    """
    order = list(Kind)
    deciding: tuple[str, ...] = ("",)
    first = agreement.difference
    if first is not None and first.quantity == QUANTITIES["sample_hash"]:
        deciding = OF_SAMPLES
    elif agreement.initial_weights is False:
        deciding = OF_WEIGHTS

    def score(drift: Drift) -> tuple[bool, int, bool]:
        fits = drift.kind is Kind.data or drift.path.startswith(deciding)
        return not fits, order.index(drift.kind), drift.path != "seed"

    candidates = [drift for drift in drifts if drift.group is not Group.harmless]
    return min(candidates, key=score, default=None)


def _first_difference(old: StepRow, new: StepRow) -> Difference:
    pairs = {name: (getattr(old, name), getattr(new, name)) for name in QUANTITIES}
    name = next(name for name, (was, now) in pairs.items() if json.dumps(was) != json.dumps(now))
    was, now = pairs[name]
    return Difference(step=old.step, quantity=QUANTITIES[name], before=was, now=now)


def _show(value: float | str | None) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.9g}"
    return "none" if value is None else str(value)[:16]

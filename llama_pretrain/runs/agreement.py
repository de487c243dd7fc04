"""How far two runs are equal, step by step and to the bit, and what the likeliest cause is."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_pretrain.runs.drift import Drift, Group, Kind

QUANTITIES = {"sample_hash": "sample ids", "loss": "loss", "grad_norm": "gradient norm"}
"""What is compared of a step, the cause before its effect."""
OF_SAMPLES = ("seed", "data.", "batch.", "train.max_", "tokenizer.")
"""Settings that decide which samples a step has."""
OF_WEIGHTS = ("seed", "model.", "tokenizer.", "data.")
"""Settings that decide the initial weights."""


class DivergedError(Exception):
    """A run that was to equal another has ended, and doesn't."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first one: of a quantity of a step."""

    step: int
    quantity: str
    before: float | str | None
    now: float | str | None

    @property
    def absolute(self) -> float | None:
        """`None` where the values are no numbers."""
        if isinstance(self.before, int | float) and isinstance(self.now, int | float):
            return abs(self.now - self.before)
        return None

    @property
    def relative(self) -> float | None:
        """To the earlier value."""
        size = abs(self.before) if isinstance(self.before, int | float) else 0.0
        return None if self.absolute is None or not size else self.absolute / size

    def __str__(self) -> str:
        text = f"{self.quantity} {_show(self.before)} -> {_show(self.now)}"
        if self.absolute is None:
            return text
        relative = "" if self.relative is None else f", {self.relative:.2g} of it"
        return f"{text} (a difference of {self.absolute:.2g}{relative})"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What a comparison of the steps of two runs has found."""

    steps_before: int
    """Steps of the earlier run."""
    steps_now: int
    equal_steps: int
    """Steps from the first on that are equal."""
    digest: str
    """SHA-256 of those steps' hashes: of loss, gradient norm and sample ids."""
    difference: Difference | None
    initial_weights: bool | None
    """Whether the initial weights are the same; `None` where one run doesn't tell."""
    evaluations: int
    """Evaluations that both have."""
    equal_evaluations: int

    @property
    def compared(self) -> int:
        return min(self.steps_before, self.steps_now)

    @property
    def is_equal(self) -> bool:
        """Whether all that can be compared is the same; something must be comparable."""
        same = self.difference is None and self.initial_weights is not False
        return same and self.compared > 0 and self.evaluations == self.equal_evaluations


def compare_rows(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> Agreement:
    """Compare the lines of two metrics.jsonl."""
    old, new = _steps(before), _steps(now)
    digest, equal = hashlib.sha256(), 0
    difference = None
    for step in sorted({*old} & {*new}):
        if step_hash(old[step]) != step_hash(new[step]):
            difference = _first_quantity(step, old[step], new[step])
            break
        digest.update(step_hash(new[step]).encode())
        equal += 1
    weights = [_first(rows, "initial_weights") for rows in (before, now)]
    evaluations = [_evaluations(rows) for rows in (before, now)]
    shared = {*evaluations[0]} & {*evaluations[1]}
    return Agreement(
        steps_before=len(old),
        steps_now=len(new),
        equal_steps=equal,
        digest=digest.hexdigest(),
        difference=difference,
        initial_weights=None if None in weights else weights[0] == weights[1],
        evaluations=len(shared),
        equal_evaluations=sum(evaluations[0][step] == evaluations[1][step] for step in shared),
    )


def step_hash(row: Mapping[str, Any]) -> str:
    """SHA-256 of a step's loss, gradient norm and sample ids; JSON keeps every bit of a number."""
    values = [row.get(name) for name in QUANTITIES]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def likeliest_cause(drifts: Iterable[Drift], agreement: Agreement) -> Drift | None:
    """The drift that a difference is most likely due to; `None` where none can be.

    What differs first says where to look: other samples come of the data and its settings, other
    initial weights of the seed and the model.
    """
    candidates = [drift for drift in drifts if drift.group is not Group.harmless]
    order = list(Kind)

    def score(drift: Drift) -> tuple[int, int, int]:
        fits = 1
        first = agreement.difference
        if first is not None and first.quantity == QUANTITIES["sample_hash"]:
            fits = 0 if drift.kind is Kind.data or drift.path.startswith(OF_SAMPLES) else 1
        elif agreement.initial_weights is False:
            fits = 0 if drift.kind is Kind.data or drift.path.startswith(OF_WEIGHTS) else 1
        return fits, order.index(drift.kind), 0 if drift.path == "seed" else 1

    return min(candidates, key=score, default=None)


def _steps(rows: Iterable[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    return {row["step"]: row for row in rows if "sample_hash" in row and "step" in row}


def _evaluations(rows: Iterable[Mapping[str, Any]]) -> dict[int, Any]:
    return {
        row["step"]: json.dumps(row["eval_loss"])
        for row in rows
        if "eval_loss" in row and "step" in row
    }


def _first(rows: Iterable[Mapping[str, Any]], key: str) -> Any:
    return next((row[key] for row in rows if key in row), None)


def _first_quantity(step: int, old: Mapping[str, Any], new: Mapping[str, Any]) -> Difference:
    key = next(
        name for name in QUANTITIES if json.dumps(old.get(name)) != json.dumps(new.get(name))
    )
    return Difference(step=step, quantity=QUANTITIES[key], before=old.get(key), now=new.get(key))


def _show(value: float | str | None) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.9g}"
    return "none" if value is None else str(value)[:16]

"""What every class of the schema is made with: the decorator, ranges that recur, and sizes."""

import bisect
import math
import re
from dataclasses import dataclass, field
from typing import Annotated, TypeVar, dataclass_transform

from annotated_types import Ge, Gt, Interval

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
def schema(cls: type[T]) -> type[T]:
    """A keyword-only dataclass that pydantic checks without accepting unknown keys."""
    config = {"extra": "forbid", "allow_inf_nan": False}
    cls.__pydantic_config__ = config  # type: ignore[attr-defined]  # pydantic's hook
    return dataclass(kw_only=True)(cls)


PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as 80GiB (1024-based) or 24GB (1000-based).

    Raises:
        ValueError: if it is none.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(text)
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** (" KMGT".index(match[2].upper())))


def divisors_near(number: int, wanted: int) -> list[int]:
    """The largest divisor up to `wanted` and the smallest above it, as far as there are any.

    Above 10^12, where not every divisor is looked for, a nearer one may be missed.
    """
    small = [d for d in range(1, min(math.isqrt(number), 1_000_000) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    split = bisect.bisect_right(divisors, wanted)
    return divisors[max(0, split - 1) : split + 1]


def _name_near(number: int, wanted: int) -> str:
    """The divisors near a number that is none."""
    return ", ".join(str(divisor) for divisor in divisors_near(number, wanted))

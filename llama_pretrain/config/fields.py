"""What every class of the schema is made with: the decorator, ranges that recur, and sizes."""

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

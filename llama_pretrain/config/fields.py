"""What schema classes are built from: the decorator, common ranges, and marks on fields."""

import bisect
import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args

from annotated_types import Ge, Gt, Interval

T = TypeVar("T")

PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", re.IGNORECASE)


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
def schema(cls: type[T]) -> type[T]:
    """A keyword-only dataclass that pydantic validates, refusing unknown keys."""
    config = {"extra": "forbid", "allow_inf_nan": False, "use_attribute_docstrings": True}
    cls.__pydantic_config__ = config  # type: ignore[attr-defined]  # pydantic's hook
    return dataclass(kw_only=True)(cls)


NUMBER = "a number"
"""Among the values of a mark: any number other than 0."""
PATH = "a path"
"""Among the values of a mark: any text."""


@dataclass(frozen=True)
class UsedWhen:
    """Marks a setting, or a section, that has no effect unless another setting allows it.

    A value other than the default is reported as ignored then (config/ignored.py).
    """

    setting: str | tuple[str, ...]
    """Dotted path of the other setting; with a leading dot, a field of the same section. Of
    several it is enough that one has one of the values."""
    values: tuple[Any, ...]
    """Values, enums by their text, with which the marked setting has an effect."""

    def allows(self, value: Any) -> bool:
        """Whether the marked setting has an effect with this value of the other."""
        number = isinstance(value, int | float) and bool(value) and NUMBER in self.values
        return value in self.values or number or (isinstance(value, str) and PATH in self.values)


@dataclass(frozen=True)
class IsPath:
    """Marks a setting that names files: a snapshot has it as an absolute path."""

    must_exist: bool = False
    """Only an existing directory is a path; other text is something else, as a hub's name is."""
    keep_home: bool = False
    """A leading `~` stays: each user who reads the snapshot has their own."""


def path_mark(item: "Field[Any]") -> IsPath | None:
    """The mark on a field that names files."""
    return next((mark for mark in get_args(item.type) if isinstance(mark, IsPath)), None)


def marks_of(item: "Field[Any]") -> list[UsedWhen]:
    """The marks on a field."""
    return [mark for mark in get_args(item.type) if isinstance(mark, UsedWhen)]


def type_of(item: "Field[Any]") -> Any:
    """The type of a field without ranges and marks."""
    return get_args(item.type)[0] if hasattr(item.type, "__metadata__") else item.type


def default_of(item: "Field[Any]") -> Any:
    """The default of a field."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def plain_value(value: Any) -> Any:
    """A value with enums replaced by their text, nested ones too."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_value(item) for item in value]
    return value


def yaml_text(value: Any) -> str:
    """A value as a person writes it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def walk_fields(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, "Field[Any]"]]:
    """Dotted path and field of every setting of a schema class, those of sections inside it too."""
    for item in fields(cls):
        path, kind = f"{prefix}{item.name}", type_of(item)
        if isinstance(kind, type) and is_dataclass(kind):
            yield from walk_fields(kind, f"{path}.")
        else:
            yield path, item


def parse_size(text: str) -> int:
    """Bytes of a size such as 80GiB (1024-based) or 24GB (1000-based).

    Raises:
        ValueError: if it is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(text)
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** (" KMGT".index(match[2].upper())))


def divisors_near(number: int, wanted: int) -> list[int]:
    """The largest divisor up to `wanted` and the smallest above it, where they exist.

    Above 10^12 not every divisor is tried, so a nearer one may be missed.
    """
    small = [d for d in range(1, min(math.isqrt(number), 1_000_000) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    split = bisect.bisect_right(divisors, wanted)
    return divisors[max(0, split - 1) : split + 1]

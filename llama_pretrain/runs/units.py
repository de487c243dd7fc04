"""Numbers as people read them."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

GIB = 1 << 30
MIB = 1 << 20


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from a file is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def format_number(value: Any, form: str, *, absent: str = "") -> str:
    """A number in a format such as `,.0f`; `absent` if it is none."""
    return format(value, form) if is_number(value) else absent


def printable(text: str, *, keep: str = "") -> str:
    """Text of a file or a user on a terminal: `?` in place of escapes and control characters.

    Args:
        keep: characters that stay, such as line breaks.
    """
    return "".join(each if each.isprintable() or each in keep else "?" for each in text)


def elide(text: str, width: int) -> str:
    """A path in so many columns: its middle goes first, its end stays longest."""
    if len(text) <= width:
        return text
    head = max(0, (width - 3) // 3)
    return f"{text[:head]}...{text[len(text) - max(0, width - 3 - head) :]}"


def format_value(value: Any, *, max_length: int | None = None) -> str:
    """A value of a file on one printable line; a hash by its first 12 digits."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        text = ", ".join(map(format_value, value))
        text = f"[{text}]"
    elif isinstance(value, Mapping):
        text = ", ".join(f"{key}: {format_value(item)}" for key, item in value.items())
        text = f"{{{text}}}"
    elif re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", str(value)):
        text = str(value)[:12]
    else:
        text = printable(str(value))
    cut = max_length is not None and len(text) > max_length
    return f"{text[:max_length]}..." if cut else text


def format_seconds(seconds: float) -> str:
    """Seconds in the unit that fits: `0.42 s`, `12.3 s`, `4 min 5 s`, `3 h 20 min`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def format_size(num_bytes: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"

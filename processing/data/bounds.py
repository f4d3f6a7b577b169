"""Range checks for dataclasses of arguments: each class lists its intervals in `BOUNDS`.

    BOUNDS: ClassVar = {"epochs": "(0, inf)", "crop_scale": "(0, 1]"}

Field names map to intervals in mathematical notation, which apply to every number in a list or a mapping. Numbers
without an interval must be finite: NaN and infinity are never allowed.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any


def bounds_of(kind: type) -> dict[str, str]:
    """Field -> interval, for a dataclass and its bases."""
    merged: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        merged |= vars(base).get("BOUNDS", {})
    return merged


def check_bounds(part: Any) -> None:
    """Raises `ValueError` naming the first field of a dataclass with a number outside its interval."""
    bounds = bounds_of(type(part))
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        interval = bounds.get(field.name, "(-inf, inf)")
        if not all(_inside(number, interval) for number in _numbers(value)):
            also = ", or none" if field.default is None else ""
            raise ValueError(f"{field.name} is {value}; expected {_told(interval)}{also}")


def _numbers(value: Any) -> Iterator[float]:
    """Yields all numbers in a nested value, except booleans."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def _inside(number: float, interval: str) -> bool:
    if not math.isfinite(number):
        return False
    low, high = _ends(interval)
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)


def _told(interval: str) -> str:
    low, high = _ends(interval)
    if math.isinf(low):
        return "a finite number"
    if math.isinf(high):
        least = f"{low:g}"
        return f"more than {least}" if interval[0] == "(" else f"{least} or more" if low == 0 else f"at least {least}"
    return f"a number in {interval}"

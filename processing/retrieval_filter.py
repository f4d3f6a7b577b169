"""Conditions on the columns of indexed items: the `where` of a search.

    licence=MIT    licence!=MIT    licence=MIT|BSD    year>=2020

The columns of an item are its keys if it is a mapping; any other item has the single column `item`, its own value.
`=` and `!=` compare numbers as numbers, booleans with true and false, and texts exactly; `<`, `<=`, `>`, `>=` compare
numbers only, and integers of any size exactly. An item that lacks a column meets no condition on it. If several
conditions are given, all must be met.
"""

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

ORDERS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
CONDITION = re.compile(r"\s*([^=!<>]+?)\s*(!=|<=|>=|=|<|>)(?![=<>])\s*(.*?)\s*", re.DOTALL)
OWN_COLUMN = "item"

Where = str | Sequence[str] | Mapping[str, Any] | None


@dataclass(frozen=True)
class Condition:
    """
    Attributes:
        column: Name of the column to test.
        operator: "=", "!=", "<", "<=", ">" or ">=".
        values: Texts, one of which must be equal ("="), or none ("!="); for other operators, a single number.
    """

    column: str
    operator: str
    values: tuple[str, ...]

    def admits(self, value: Any) -> bool:
        """Whether an item with this value in the column meets the condition."""
        if value is None:
            return False
        if self.operator in ORDERS:
            return is_number(value) and ORDERS[self.operator](value, number_of(self.values[0]))
        return any(equals(value, text) for text in self.values) == (self.operator == "=")


def read_where(where: Where) -> tuple[Condition, ...]:
    """Parses conditions: one text, several texts, or {column: value or list of values}.

    Raises:
        ValueError: a text is not a condition, an order comparison has no number, or a value is not a text, a number or
            a boolean.
    """
    if where is None:
        return ()
    if isinstance(where, Mapping):
        return tuple(Condition(str(column), "=", _texts(value)) for column, value in where.items())
    return tuple(_condition(text) for text in ([where] if isinstance(where, str) else where))


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    # None or a mapping would be compared as its str, which no value equals
    if wrong := [one for one in values if not isinstance(one, (str, Real))]:
        raise ValueError(f"a value to compare with is a text, a number or a boolean, got {wrong[0]!r:.80}")
    return tuple(str(one).lower() if isinstance(one, bool) else str(one) for one in values)


def _condition(text: str) -> Condition:
    if not isinstance(text, str) or not (found := CONDITION.fullmatch(text)):
        raise ValueError(f"expected a condition such as licence=MIT, licence!=MIT|BSD or year>=2020, got {text!r}")
    column, sign, right = found.groups()
    if sign not in ORDERS:
        return Condition(column, sign, tuple(one.strip() for one in right.split("|")))
    if number_of(right) is None:
        raise ValueError(f"{sign} compares numbers, got {text!r}")
    return Condition(column, sign, (right,))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number_of(text: str) -> int | float | None:
    """The finite number in a text, or None. Integers are parsed exactly, as 64-bit ids need."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if kind is int or math.isfinite(value) else None
    return None


def equals(value: Any, text: str) -> bool:
    """Whether an item's value equals the value that a text stands for."""
    if isinstance(value, bool):
        return text == str(value).lower()
    return number_of(text) == value if is_number(value) else value == text


def columns_of(item: Any) -> Mapping[str, Any]:
    """The columns of an item, by name."""
    return item if isinstance(item, Mapping) else {OWN_COLUMN: item}


def rows_admitted(conditions: Sequence[Condition], items: Sequence[Any]) -> torch.Tensor:
    """Indices (m,) int64, ascending, of the n items that meet all conditions."""
    met = [
        place
        for place, item in enumerate(items)
        if all(one.admits(columns_of(item).get(one.column)) for one in conditions)
    ]
    return torch.tensor(met, dtype=torch.int64)  # (m,)


__all__ = ["Condition", "Where", "columns_of", "read_where", "rows_admitted"]

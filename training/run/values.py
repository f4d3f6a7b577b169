"""Converts values of a YAML file or command line to the types of dataclass fields."""

import json
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def fit(name: str, value: Any, hint: Any, file: str) -> Any:
    """
    Converts a value to its field's type: YAML reads 1e-4 as text and `no` as false, and a single value may stand for a
    list.

    Raises:
        ValueError: the value cannot be converted; names the file, the field, the value and the expected type.
    """
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in alternatives:
        return None
    kind = alternatives[0]  # of `str | None`; a dict may also be given as JSON
    if get_origin(kind) is Literal:
        return _one_of(name, "no" if value is False else value, get_args(kind), file)

    # a list takes its items' type; one value stands for a list of one
    is_list = get_origin(kind) is list
    item = get_args(kind)[0] if is_list else kind
    try:
        if is_list:
            return [_scalar(one, item) for one in (value if isinstance(value, list) else [value])]
        return _scalar(value, item)
    except (TypeError, ValueError) as error:
        expected = f"a list of {item.__name__}" if is_list else item.__name__
        raise ValueError(f"{file}: {name} is {value!r}; expected {expected}") from error


def _one_of(name: str, value: Any, choices: tuple, file: str) -> Any:
    if value not in choices:
        raise ValueError(f"{file}: {name} is {value!r}; expected {' or '.join(map(repr, choices))}")
    return value


def _scalar(value: Any, kind: type) -> Any:
    # True is an int in Python, but not a number here
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and kind in (int, float):
        return kind(value)
    if isinstance(value, str) and kind is dict:
        return value  # JSON, read later
    raise TypeError(f"got {type(value).__name__}")


def read_json(name: str, text: str) -> dict[str, Any]:
    """Parses the JSON object in an argument. Raises `ValueError`."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}; expected a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {text!r}; expected a JSON object")
    return value

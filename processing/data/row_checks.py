"""Checks the cells of rows, column by column, before any image is decoded."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oner.processing.vl_captions import MAX_CAPTION_LENGTH, MAX_TEXT_LENGTH, caption_reason

from .places import PairDataError as PairDataError  # re-exported
from .places import located

Kind = Literal["pairs", "images", "texts"]
# columns of each kind of rows, besides an id
ROLES: dict[Kind, tuple[str, ...]] = {"pairs": ("image", "text"), "images": ("image",), "texts": ("text",)}
SHOWN = 10  # rows named in an error
CHUNK = 1024  # rows checked at a time; small, because rows of a selection are copied


class TextRule(NamedTuple):
    """Name of a text in messages, and its maximum number of characters."""

    what: str
    longest: int


CAPTION = TextRule("caption", MAX_CAPTION_LENGTH)
TEXT = TextRule("text", MAX_TEXT_LENGTH)  # without an image; may be long enough to be read in windows


def kind_of(roles: Iterable[str]) -> Kind:
    """The kind of rows with these roles. Raises `ValueError` if there is none."""
    wanted = set(roles) - {"id"}
    for kind, known in ROLES.items():
        if wanted == set(known):
            return kind
    raise ValueError(f"no kind of rows has {sorted(wanted)}; expected those of {ROLES}")


def rule_of(roles: Iterable[str]) -> TextRule:
    """The rule for texts: with an image, a text is a caption."""
    return CAPTION if "image" in roles else TEXT


def plain_texts(cell: Any) -> Any:
    """The texts of a cell; objects that hold a text, as in COCO's `sentences`, become that text."""
    if isinstance(cell, Mapping) and "raw" in cell:
        return cell["raw"]  # a text, or a list of texts in data sets written by columns
    if isinstance(cell, (list, tuple)) and any(isinstance(one, Mapping) for one in cell):
        return [plain_texts(one) for one in cell]
    return cell


def find_bad_rows(
    data: datasets.Dataset,
    columns: dict[str, str],
    folder: str | None,
    most: int | None = None,
    known: Mapping[int, str] | None = None,
) -> tuple[dict[int, str], int]:
    """Checks all columns in one pass: {row number: reason why it is bad}, and the number of bad rows.

    Args:
        data: a data set of n rows, with images not decoded.
        columns: column name of each role that this kind of rows has: "image", "text", "id".
        folder: folder that image paths are relative to.
        most: maximum number of rows for which reasons are given, from the first; None for all.
        known: {row number: reason} of rows already known to be bad.
    """
    problems: dict[int, str] = {}
    total = start = 0
    rule = rule_of(columns)
    known = known or {}
    faulty = np.array(sorted(known), dtype=np.int64)
    for table in data.with_format("arrow").iter(CHUNK):
        # vectorised by column: which rows are bad
        bad = np.zeros(len(table), dtype=bool)  # (CHUNK,)
        bad[faulty[np.searchsorted(faulty, start) : np.searchsorted(faulty, start + len(table))] - start] = True
        for role, column in columns.items():
            bad |= _bad_cells(role, table[column].combine_chunks(), folder, rule)

        # row by row: the reasons
        for place in np.flatnonzero(bad)[: None if most is None else most - len(problems)]:
            row = start + int(place)
            cells = {role: _value(table[column][int(place)]) for role, column in columns.items()}
            problems[row] = known.get(row) or row_reason(cells, folder)
        total += int(bad.sum())
        start += len(table)
    return problems, total


def row_reason(cells: Mapping[str, Any], folder: str | None) -> str | None:
    """All reasons why the cells of a row, by role, are bad; None if they are good."""
    reasons = []
    if "text" in cells:
        reasons.append(text_reason(plain_texts(cells["text"]), rule_of(cells)))
    if "image" in cells:
        reasons.append(image_reason(cells["image"], folder))
    if "id" in cells:
        reasons.append(id_reason(cells["id"]))
    return "; ".join(filter(None, reasons)) or None


def _bad_cells(role: str, array: pa.Array, folder: str | None, rule: TextRule) -> np.ndarray:
    """Mask of the bad cells of a role, (n,) bool."""
    if role == "text":
        return _bad_texts(array, rule)
    return _bad_images(array, folder) if role == "image" else _bad_ids(array)


def _value(scalar: pa.Scalar) -> Any:
    """Python value of a cell, or its decoding error; `datasets` stores columns of mixed types as JSON text."""
    try:
        value = scalar.as_py()
    except UnicodeDecodeError as error:  # parquet writers need not check that text is UTF-8
        return error
    return json.loads(value) if isinstance(scalar, pa.ExtensionScalar) and value is not None else value


def _by_reason(array: pa.Array, reason: Any) -> np.ndarray:
    """Slow check, cell by cell, for types without a vectorised one."""
    return np.array([reason(_value(scalar)) is not None for scalar in array], dtype=bool)


def _bad_strings(array: pa.Array, rule: TextRule) -> np.ndarray:
    """Where `caption_reason` finds something, (n,) bool."""
    try:
        empty = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(array)), 0)
    except pa.ArrowInvalid:  # not UTF-8
        return _by_reason(array, lambda text: text_reason(text, rule))
    long = pc.greater(pc.utf8_length(array), rule.longest)
    bad = pc.or_(pc.or_(empty, long), pc.match_substring(array, "\0"))
    return pc.fill_null(bad, True).to_numpy(zero_copy_only=False)


def is_text(kind: pa.DataType) -> bool:
    """Whether cells of this type are texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _bad_texts(array: pa.Array, rule: TextRule) -> np.ndarray:
    if is_text(array.type):
        return _bad_strings(array, rule)
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)) or not is_text(array.type.value_type):
        return _by_reason(array, lambda text: text_reason(plain_texts(text), rule))
    bad = pc.fill_null(pc.equal(pc.list_value_length(array), 0), True).to_numpy(zero_copy_only=False).copy()
    bad[pc.list_parent_indices(array).to_numpy()[_bad_strings(pc.list_flatten(array), rule)]] = True
    return bad


def text_reason(text: Any, rule: TextRule = CAPTION) -> str | None:
    """Why a cell of the text column is bad; None if it is good."""
    if isinstance(text, UnicodeDecodeError):
        return f"the {rule.what} is not UTF-8 (byte {text.object[text.start]:#04x} at {text.start})"
    if not isinstance(text, (list, tuple)):
        return caption_reason(text, *rule)
    if not text:
        return f"the list of {rule.what}s is empty"
    wrong = [caption_reason(one, *rule) if one is None or isinstance(one, str) else "not a string" for one in text]
    return next((f"{rule.what} {i} of the list: {reason}" for i, reason in enumerate(wrong) if reason), None)


def _bad_images(array: pa.Array, folder: str | None) -> np.ndarray:
    kind = array.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pc.fill_null(pc.equal(pc.binary_length(array), 0), True).to_numpy(zero_copy_only=False)
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return _by_reason(array, lambda image: image_reason(image, folder))
    # most rows hold bytes; only the others are checked one by one. A null struct has null fields
    content = pc.struct_field(array, "bytes")
    empty = _bad_images(content.cast(pa.binary()) if pa.types.is_null(content.type) else content, folder)
    for place in np.flatnonzero(empty):
        empty[place] = image_reason(_value(array[int(place)]), folder) is not None
    return empty


def image_reason(image: Any, folder: str | None) -> str | None:
    """Why a cell of the image column is bad, without decoding it; None if it is good."""
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if image is None:
        return "the picture is null"
    if isinstance(image, bytes):
        return None if image else "the picture has 0 bytes"
    if not isinstance(image, str):
        return f"the picture must be bytes, a path or {{bytes, path}}, got {type(image).__name__}"
    path = os.path.join(folder or "", image)
    if os.path.isfile(located(path)):
        return None
    return f"no picture file {path}" + (" (nor with / for its \\)" if "\\" in image else "")


def _bad_ids(array: pa.Array) -> np.ndarray:
    if is_text(array.type) or (pa.types.is_integer(array.type) and array.type != pa.uint64()):
        return pc.is_null(array).to_numpy(zero_copy_only=False)
    return _by_reason(array, id_reason)


def id_reason(identity: Any) -> str | None:
    if isinstance(identity, str) or (isinstance(identity, int) and not isinstance(identity, bool)):
        fits = isinstance(identity, str) or -(2**63) <= identity < 2**63
        return None if fits else f"the id {identity} does not fit into 64 bits"
    return f"the id must be an int or a string, got {'null' if identity is None else type(identity).__name__}"


def report(name: str, problems: list[tuple[int, str]], total: int, of: int | None) -> str:
    share = f"{total} of {of} rows" if of is not None else f"{total} row" + "s" * (total > 1)
    lines = [f"{name}: {share} cannot be used (row numbers count from 0)"]
    lines += [f"  row {row}: {reason}" for row, reason in problems]
    if total > len(problems):
        lines.append(f"  ... and {total - len(problems)} more")
    return "\n".join(lines)

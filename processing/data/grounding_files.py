"""Referring expressions with boxes: RefCOCO+ in the files used by ALBEF's and SIMLA's evaluation.

- `refcoco+_train.json`, `refcoco+_val.json`, `refcoco+_test.json` (ALBEF's download): a list of
  {"image": path in the folder of pictures, "text": expression, "ref_id": int}.
- `refs(unc).json`: the list that REFER ships as `refs(unc).p`, one entry per referred object, of which "ref_id",
  "ann_id", "image_id" and "split" (train, val, testA, testB) are read. REFER's own file is a pickle, which can run any
  code and is not read here. If you trust your copy, convert it once, outside of this package:

      python -c "import json, pickle; json.dump(pickle.load(open('refs(unc).p', 'rb')), open('refs(unc).json', 'w'))"

- `instances.json` (REFER): COCO's annotations; "images" give "id", "height", "width", "annotations" give "id", "bbox".
- `dets.json` (ALBEF's download): the detector's boxes, {str(image_id): [[x, y, width, height, ...], ...]}.

A box is (x, y, width, height) in pixels. Training needs the first file only: no box is ever shown to the model.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from oner.processing.grounding_boxes import box_reason
from oner.processing.vl_captions import caption_reason

from .listed_rows import ListedRows
from .row_checks import PairDataError
from .task_files import read_json

__all__ = ["open_grounding", "read_boxes"]

EVALUATED = ("val", "testA", "testB")


def read_top(path: str | os.PathLike, kind: type, what: str) -> Any:
    """The content of a JSON file whose top level is a `kind`.

    Raises:
        PairDataError: the file does not exist, is a pickle, is not JSON, or has another type at its top level.
    """
    # a pickle is never opened
    if Path(path).suffix in (".p", ".pkl", ".pickle"):
        raise PairDataError(
            f"{path}: a pickle can run any code, so it is not read; expected the same list as JSON "
            f"(the head of oner/processing/data/grounding_files.py says how to make it)"
        )
    content = read_json(str(path))
    if not isinstance(content, kind):
        expected = {list: "a list", dict: "an object"}[kind]
        raise PairDataError(f"{path}: {what} should be JSON with {expected} at its top, got {type(content).__name__}")
    return content


def _by_key(entries: Sequence[Any], key: str, needed: Sequence[str], name: str) -> dict[Any, Mapping[str, Any]]:
    for number, entry in enumerate(entries):
        missing = [field for field in (key, *needed) if not isinstance(entry, Mapping) or field not in entry]
        if missing:
            raise PairDataError(f"{name}: entry {number} lacks {', '.join(missing)}")
        for field in (key, *needed):
            kinds = (list, tuple) if field == "bbox" else (int, float, str)
            if not isinstance(entry[field], kinds):
                raise PairDataError(f"{name}: entry {number} has {entry[field]!r:.40} as its {field}")
    return {entry[key]: entry for entry in entries}


def read_boxes(
    refs: str | os.PathLike, instances: str | os.PathLike, detections: str | os.PathLike
) -> dict[int, dict[str, Any]]:
    """
    The object of each expression: ref_id -> {"split", "box", "size": (height, width), "boxes": the detector's boxes,
    or None if it has none for the image}.

    Raises:
        PairDataError: a file has the wrong content, or an entry refers to a missing one.
    """
    # three files, indexed by the keys that link them
    objects = read_top(refs, list, "the referred objects")
    objects = _by_key(objects, "ref_id", ("ann_id", "image_id", "split"), str(refs))
    content = read_top(instances, dict, "COCO's instances")
    for field in ("images", "annotations"):
        if not isinstance(content.get(field), list):
            raise PairDataError(f"{instances}: COCO's instances should hold a list {field!r}, got {sorted(content)}")
    pictures = _by_key(content["images"], "id", ("height", "width"), f"{instances}, images")
    boxes = _by_key(content["annotations"], "id", ("bbox",), f"{instances}, annotations")
    detected = read_top(detections, dict, "the detector's boxes")

    # join them for each expression's object
    objects_known = {}
    for ref_id, ref in objects.items():
        if ref["ann_id"] not in boxes or ref["image_id"] not in pictures:
            lost = f"ann_id {ref['ann_id']}" if ref["ann_id"] not in boxes else f"image_id {ref['image_id']}"
            raise PairDataError(f"{refs}: ref_id {ref_id} names {lost}, which {instances} does not have")
        picture = pictures[ref["image_id"]]
        objects_known[ref_id] = {
            "split": ref["split"],
            "box": tuple(boxes[ref["ann_id"]]["bbox"]),
            "size": (picture["height"], picture["width"]),
            "boxes": detected.get(str(ref["image_id"])),
        }
    return objects_known


def open_grounding(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    image_folder: str | os.PathLike | None = None,
    boxes: Mapping[int, Mapping[str, Any]] | None = None,
    clean: Callable[[str], str] | None = None,
    bad_rows: Literal["raise", "skip"] = "raise",
) -> ListedRows:
    """
    Expressions as rows {"image": path, "captions": [text], "id": file name of the image, "ref_id"}; expressions of one
    image share an id, so that none is a negative of another (ALBEF's code).

    Args:
        sources: one or several of ALBEF's lists.
        image_folder: folder that "image" is relative to; the folder of each list by default.
        boxes: from `read_boxes`; rows then also have "split", "box", "size" and "boxes", and none may be missing.
        clean: rewrites each expression, for example `pre_caption`.

    Raises:
        PairDataError: a file does not exist or is not a list, or rows are bad (with `bad_rows="raise"`).
    """
    # one or several lists, each with its own folder
    paths = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    rows: list[dict[str, Any]] = []
    for path in paths:
        # an entry that is not an object becomes an empty row, which the check reports
        folder = Path(path).parent if image_folder is None else image_folder
        for entry in read_top(path, list, "the list of expressions"):
            entry = entry if isinstance(entry, Mapping) else {}
            image, text, ref_id = entry.get("image"), entry.get("text"), entry.get("ref_id")
            row = {
                "image": os.path.join(folder, image) if isinstance(image, str) else image,
                "captions": [clean(text) if clean is not None and isinstance(text, str) else text],
                "id": os.path.basename(image) if isinstance(image, str) else image,
                "ref_id": ref_id,
            }

            # its object, if boxes are given
            known = boxes.get(ref_id) if boxes is not None and isinstance(ref_id, (int, str)) else None
            rows.append(row | dict(known or {}))

    # all expressions are checked together, so that the error can count bad ones
    name = ", ".join(map(str, paths[:2])) + (f" (+{len(paths) - 2})" if len(paths) > 2 else "")
    return ListedRows(rows, name, _reason_with_boxes if boxes is not None else _reason, bad_rows)


def _reason(row: Mapping[str, Any]) -> str | None:
    return caption_reason(row["captions"][0])


def _reason_with_boxes(row: Mapping[str, Any]) -> str | None:
    if "box" not in row:
        return f"ref_id {row['ref_id']!r} is not among the referred objects"

    # all reasons, the expression's first
    wrong = [_reason(row), f"its object: {reason}" if (reason := box_reason(row["box"])) else None]
    if not row["boxes"]:
        wrong.append("the detector has no boxes for its picture")
    else:
        detected = next((reason for reason in map(box_reason, row["boxes"]) if reason), None)
        wrong.append(f"the detector: {detected}" if detected else None)
    return "; ".join(filter(None, wrong)) or None

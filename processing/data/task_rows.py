"""Reads rows of three tasks from their published annotation files, and from ALBEF's merged files.

Questions (VQA v2, Visual Genome)  {"image", "text", "answers": as given, "weight": their total weight, "kind"}
Entailment (SNLI-VE)               {"image", "text", "label"}, an index into `ENTAILMENT_LABELS`
Reasoning (NLVR2)                  {"image", "second_image", "text", "label"}, an index into `REASONING_LABELS`

Every row also has an "id": that of the question, pair or sentence, else its row number. Images are paths.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from oner.processing.vl_captions import caption_reason

from .listed_rows import ListedRows
from .row_checks import PairDataError
from .task_files import Broken, RowFault, field, find_file, first_field, forget_files, is_file, listed, read_json
from .text_tables import is_utf8

ENTAILMENT_LABELS = ("contradiction", "neutral", "entailment")
REASONING_LABELS = ("False", "True")
VISUAL_GENOME_WEIGHT = 0.5  # weight of an answer by one annotator, relative to those of ten (ALBEF's code)
CHUNK = 65_536  # rows converted at a time

QUESTION_COLUMNS = pa.schema(
    {
        "image": pa.string(),
        "text": pa.string(),
        "answers": pa.list_(pa.string()),
        "weight": pa.float64(),
        "kind": pa.string(),
        "id": pa.int64(),
        "fault": pa.string(),
    }
)

Clean = Callable[[str], str] | None
Draft = dict[str, Any]
EMPTY_QUESTION: Draft = {"image": None, "text": "", "answers": [], "weight": 0.0, "kind": None, "id": None}


class TableRows(Sequence):
    """Rows stored as columns and converted to mappings on access: VQA v2 with Visual Genome has two million."""

    def __init__(self, drafts: Iterable[Draft], schema: pa.Schema):
        # a chunk at a time, to avoid holding two million mappings
        drafts = iter(drafts)
        chunks: list[pa.Table] = []
        while chunk := list(islice(drafts, CHUNK)):
            chunks.append(pa.Table.from_pylist(chunk, schema))
        self.table = pa.concat_tables(chunks) if chunks else schema.empty_table()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Draft:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.table.slice(index % len(self), 1).to_pylist()[0]

    def __iter__(self) -> Iterator[Draft]:
        for start in range(0, len(self), 1024):
            yield from self.table.slice(start, 1024).to_pylist()


def open_questions(
    sources: Sequence[str],
    folder: str | None = None,
    genome_folder: str | None = None,
    answered: bool = True,
    clean: Clean = None,
    bad_rows: Literal["raise", "skip"] = "raise",
) -> ListedRows:
    """
    Questions about images.

    Args:
        sources: JSON files of four kinds, recognised by their content: VQA v2's questions and annotations (matched by
            question_id across all files), Visual Genome's question_answers, and ALBEF's lists of
            {"image", "question", "answer", "dataset": "vqa" | "vg", "question_id"}.
        folder: folder that image paths are relative to; by default that of the file. COCO's images are in subfolders
            such as `train2014/`, or directly in it.
        genome_folder: the same for Visual Genome; defaults to `folder`.
        answered: whether every row must have answers, as in training; otherwise "answers" may be empty.
        clean: rewrites each question; `pre_question` follows ALBEF.
        bad_rows: as in `ListedRows`.

    Raises:
        PairDataError: a file is none of these, or rows are bad; the message gives their numbers.
    """
    forget_files()

    annotations, asking = _told_apart(sources)

    # questions may come without annotations, but not annotations without questions
    if not asking:
        raise PairDataError(f"{_named(sources)}: annotations without the questions they are about")

    def drafts() -> Iterator[Draft]:
        for source, content in asking:
            home = folder or str(Path(source).parent)
            if isinstance(content, dict):
                subtype = str(content.get("data_subtype", "")).replace("-dev", "")
                records = listed(content, "questions", source)
                make = partial(_coco_question, home=home, subtype=subtype, annotations=annotations)
            else:
                records = _genome_questions(content)
                make = partial(_merged_question, home=home, genome=genome_folder or home)
            for record in records:
                yield _drafted(record, make, EMPTY_QUESTION, ("image",), clean, answered)

    # a question without an id gets its row number, negative to differ from all question ids
    numbered = (one if one["id"] is not None else {**one, "id": -1 - row} for row, one in enumerate(drafts()))
    return _opened(TableRows(numbered, QUESTION_COLUMNS), sources, bad_rows, ("image",))


def _told_apart(sources: Sequence[str]) -> tuple[dict[Any, dict[str, Any]] | None, list[tuple[str, Any]]]:
    """Sorts files by their content: annotations by question id, None if there are none, and files of questions."""
    annotations: dict[Any, dict[str, Any]] | None = None
    asking: list[tuple[str, Any]] = []
    for source in sources:
        content = read_json(source)
        if isinstance(content, dict) and "annotations" in content:
            found = listed(content, "annotations", source)
            known = (one for one in found if isinstance(one, dict) and isinstance(one.get("question_id"), int))
            annotations = {**(annotations or {}), **{one["question_id"]: one for one in known}}
        elif isinstance(content, list) or (isinstance(content, dict) and "questions" in content):
            asking.append((source, content))
        else:
            fields = sorted(content)[:8] if content and isinstance(content, dict) else "nothing"
            raise PairDataError(
                f"{source}: expected VQA v2's questions or annotations, Visual Genome's question_answers or a list of "
                f"questions, got {type(content).__name__} with {fields}"
            )
    return annotations, asking


def open_entailment(
    sources: Sequence[str],
    folder: str | None = None,
    clean: Clean = None,
    bad_rows: Literal["raise", "skip"] = "raise",
) -> ListedRows:
    """
    Premises and hypotheses: SNLI-VE's jsonl (Flickr30K_ID, sentence2, gold_label) or ALBEF's lists of {"image",
    "sentence", "label"}. Images are Flickr30k's, in `folder` or its subfolder `flickr30k-images`. Arguments and errors
    are those of `open_questions`.
    """

    def make(record: Mapping[str, Any], home: str) -> Draft:
        # SNLI-VE's files have three spellings of this field
        name = str(first_field(record, ("Flickr30K_ID", "Flickr30kID", "Flikr30kID", "image"), (str, int)))
        name = name.removesuffix(".jpg") + ".jpg"
        return {
            "image": find_file(home, name, f"flickr30k-images/{name}"),
            "text": first_field(record, ("sentence2", "sentence"), (str,)),
            "label": _label(first_field(record, ("gold_label", "label"), (str,)), ENTAILMENT_LABELS),
            "id": first_field(record, ("pairID",), (str,), None),
        }

    return _open_sentences(sources, folder, make, ("image",), clean, bad_rows)


def open_reasoning(
    sources: Sequence[str],
    folder: str | None = None,
    clean: Clean = None,
    bad_rows: Literal["raise", "skip"] = "raise",
) -> ListedRows:
    """
    Sentences about two images: NLVR2's jsonl (identifier, sentence, label) or ALBEF's lists of {"images", "sentence",
    "label"}. Images are named `{identifier without its last number}-img0.png` and are in `folder`, in the subfolder of
    their split, or in that of their directory there. Arguments and errors are those of `open_questions`.
    """

    def make(record: Mapping[str, Any], home: str) -> Draft:
        # ALBEF's lists give image paths, NLVR2's files an identifier
        if "images" in record:
            names = field(record, "images", (list,))
            if len(names) != 2 or not all(isinstance(name, str) for name in names):
                raise RowFault(f"'images' must be two paths, got {names!r:.80}")
            first, second = (find_file(home, name) for name in names)
        else:
            first, second = _reasoning_pictures(record, home)
        label = first_field(record, ("label",), (str, bool))
        return {
            "image": first,
            "second_image": second,
            "text": field(record, "sentence", (str,)),
            "label": _label(str(label), REASONING_LABELS),
            "id": first_field(record, ("identifier",), (str,), None),
        }

    return _open_sentences(sources, folder, make, ("image", "second_image"), clean, bad_rows)


def read_answer_list(path: str) -> list[str]:
    """The candidate answers, a JSON list. Raises `PairDataError` if it is not a list, or has duplicates."""
    # a list of distinct texts
    answers = read_json(path)
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) and one for one in answers):
        raise PairDataError(f"{path}: expected a list of answers, one string at least, none of them empty")
    if len(set(answers)) < len(answers):
        twice = next(one for place, one in enumerate(answers) if one in answers[:place])
        raise PairDataError(f"{path}: {twice!r} stands there twice; expected each answer once")
    return answers


def _coco_question(
    record: Mapping[str, Any], home: str, subtype: str, annotations: Mapping[Any, Mapping[str, Any]] | None
) -> Draft:
    # the question, and COCO's image, named by number
    number = field(record, "question_id", (int,))
    picture = field(record, "image_id", (int,))
    name = f"COCO_{subtype}_{picture:012d}.jpg"
    draft = {
        "image": find_file(home, f"{subtype}/{name}", name),
        "text": field(record, "question", (str,)),
        "answers": [],
        "weight": 1.0,
        "kind": None,
        "id": number,
    }

    # its answers, if there are annotations
    if annotations is not None:
        if number not in annotations:
            raise RowFault(f"question {number} has no annotation")
        annotation = annotations[number]
        draft |= {
            "answers": _answers(field(annotation, "answers", (list,))),
            "kind": field(annotation, "answer_type", (str,), None),
        }
    return draft


def _merged_question(record: Mapping[str, Any], home: str, genome: str) -> Draft:
    """A question of ALBEF's merged files, or one of Visual Genome's."""
    # the data set: a single answer means Visual Genome
    one = isinstance(record.get("answer"), str)
    kind = record.get("dataset", "vg" if one else "vqa")
    if kind not in ("vqa", "vg"):
        raise RowFault(f"'dataset' must be 'vqa' or 'vg', got {kind!r:.40}")

    # its image, by path or by number
    if "image" in record:
        image = find_file(genome if kind == "vg" else home, field(record, "image", (str,)))
    else:
        name = f"{first_field(record, ('image_id', 'id'), (int,))}.jpg"
        image = find_file(genome, f"VG_100K/{name}", f"VG_100K_2/{name}", name)
    answers = record.get("answer", [])
    return {
        "image": image,
        "text": field(record, "question", (str,)),
        "answers": _answers([answers] if one else answers),
        "weight": VISUAL_GENOME_WEIGHT if kind == "vg" else 1.0,
        "kind": field(record, "answer_type", (str,), None),
        "id": first_field(record, ("question_id", "qa_id"), (int, type(None)), None),
    }


def _genome_questions(content: list[Any]) -> Iterator[Any]:
    """Yields the records of a list; those of Visual Genome's files are split into single questions."""
    for record in content:
        questions = record.get("qas") if isinstance(record, dict) else None
        if not isinstance(questions, list):
            yield record
            continue
        picture = {"image_id": record.get("id", record.get("image_id"))}
        yield from ({**picture, **one} if isinstance(one, dict) else one for one in questions)


def _answers(values: Any) -> list[str]:
    if not isinstance(values, list):
        raise RowFault(f"the answers must be a list, got {type(values).__name__} {values!r:.40}")
    # VQA v2 has one mapping per annotator, ALBEF's lists have only the answers
    answers = [one.get("answer") if isinstance(one, dict) else one for one in values]
    if wrong := [one for one in answers if not isinstance(one, str) or not is_utf8(one)]:
        raise RowFault(f"an answer must be a string, got {type(wrong[0]).__name__} {wrong[0]!r:.40}")
    return answers


def _reasoning_pictures(record: Mapping[str, Any], home: str) -> tuple[str, str]:
    identifier = field(record, "identifier", (str,))
    pair = re.fullmatch(r"((?P<split>[^-]+)-.+)-\d+", identifier)
    if pair is None:
        raise RowFault(f"'identifier' must read like 'train-10171-0-0', got {identifier!r:.40}")

    # possible locations of the images, as distributed or unpacked
    split = pair["split"]
    directory = record.get("directory")
    places = ["", f"{split}/", f"{split}/{directory}/", f"images/{split}/", f"images/{split}/{directory}/"]
    first, second = (
        find_file(home, *(f"{place}{pair[1]}-img{number}.png" for place in places)) for number in range(2)
    )
    return first, second


def _label(name: str, names: Sequence[str]) -> int:
    if name not in names:
        raise RowFault(f"the label must be one of {', '.join(names)}, got {name!r:.40}")
    return names.index(name)


def _open_sentences(
    sources: Sequence[str],
    folder: str | None,
    make: Callable[[Mapping[str, Any], str], Draft],
    images: tuple[str, ...],
    clean: Clean,
    bad_rows: Literal["raise", "skip"],
) -> ListedRows:
    forget_files()
    empty = {**dict.fromkeys(images), "text": "", "label": -1, "id": None}

    def drafts() -> Iterator[Draft]:
        for source in sources:
            content = read_json(source)
            home = folder or str(Path(source).parent)
            if not isinstance(content, list):
                raise PairDataError(f"{source}: expected a list of sentences, got {type(content).__name__}")
            for record in content:
                yield _drafted(record, partial(make, home=home), empty, images, clean, answered=False)

    # a sentence without an id gets its row number
    numbered = (one if one["id"] is not None else {**one, "id": f"row {row}"} for row, one in enumerate(drafts()))
    text = ("text", "id", "fault")
    columns = pa.schema({**dict.fromkeys((*images, *text), pa.string()), "label": pa.int64()})
    return _opened(TableRows(numbered, columns), sources, bad_rows, images)


def _drafted(
    record: Any,
    make: Callable[[Mapping[str, Any]], Draft],
    empty: Draft,
    images: Sequence[str],
    clean: Clean,
    answered: bool,
) -> Draft:
    """The row of a record; for a bad record, an empty row whose "fault" gives the reason."""
    # a draft, if the record is an object with the fields of its task
    try:
        if isinstance(record, Broken):
            raise RowFault(record)
        if not isinstance(record, dict):
            raise RowFault(f"a row must be an object, got {type(record).__name__} {record!r:.40}")
        draft = make(record)

        # its text, before and after cleaning
        if reason := caption_reason(draft["text"]):
            raise RowFault(reason.replace("the caption", "the text", 1))
        if clean is not None:
            original = draft["text"]
            draft["text"] = clean(original)
            if not draft["text"]:
                raise RowFault(f"no word is left of the text {original!r:.40}")
        if answered and not any(answer.strip() for answer in draft["answers"]):
            raise RowFault("there is no answer")
        if wrong := [name for name, one in draft.items() if isinstance(one, str) and not is_utf8(one)]:
            raise RowFault(f"its {wrong[0]} holds a lone surrogate, which is no text")
    except RowFault as fault:
        return {**empty, "fault": str(fault).encode("utf-8", "backslashreplace").decode()}

    # all missing images
    missing = (f"no picture file {draft[name]}" for name in images if not is_file(draft[name]))
    return {**draft, "fault": "; ".join(missing) or None}


def _opened(
    rows: TableRows, sources: Sequence[str], bad_rows: Literal["raise", "skip"], images: Sequence[str]
) -> ListedRows:
    # image files were already checked; rows with other faults may have no image name
    return ListedRows(rows, _named(sources), lambda row: row["fault"], bad_rows, images, looked_for=True)


def _named(sources: Sequence[str]) -> str:
    return str(sources[0]) + (f" (+{len(sources) - 1})" if len(sources) > 1 else "")


__all__ = [
    "ENTAILMENT_LABELS",
    "REASONING_LABELS",
    "TableRows",
    "open_entailment",
    "open_questions",
    "open_reasoning",
    "read_answer_list",
]

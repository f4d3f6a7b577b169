"""Fine-tuning tasks on scenes, in the file format of each published benchmark.

    coco/dataset_coco.json                      Karpathy's JSON: retrieval, and assignment of texts to images
    vqa/v2_*_questions.json, *_annotations.json, answer_list.json                        VQA v2
    snli_ve/snli_ve_{train,dev,test}.jsonl      SNLI-VE
    nlvr2/{train,dev,test1}.json                NLVR2, images in nlvr2/images
    refcoco+/refcoco+_{train,val,test}.json, refs(unc).json, instances.json, dets.json   RefCOCO+

Folders and files have the names that `examples/configs/finetune_*.yaml` expect. Training data come from the split
"train", val or dev from "unseen_pairs", and test from "unseen_style".
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from scenes_captions import draw_captions
from scenes_drawing import pixel_box, render
from scenes_layout import draw_layout, generator
from scenes_questions import QUESTIONS, answer_list, draw_entailment, draw_expression, draw_questions
from scenes_reasoning import draw_pair
from scenes_rows import in_order
from tqdm.auto import tqdm

CAPTIONS = 5  # per image, as in COCO
QUESTIONS_EACH = 3
HYPOTHESES_EACH = 2
ANSWERERS = 10
LICENCE = "drawings of several emoji sets: see ATTRIBUTION.md beside the embedded emoji"


@dataclass(frozen=True)
class Part:
    """One part of every task, and its name in each benchmark."""

    split: str
    coco: str
    karpathy: str
    entailment: str
    reasoning: str
    grounding: str
    refs: str
    first: int


PARTS = (
    Part("train", "train2014", "train", "train", "train", "train", "train", 1),
    Part("unseen_pairs", "val2014", "val", "dev", "dev", "val", "val", 1_000_001),
    Part("unseen_style", "test2015", "test", "test", "test1", "test", "testA", 2_000_001),
)


def write_tasks(folder: Path, seed: int, size: int, training: int, evaluating: int, workers: int) -> None:
    """Writes all tasks: `training` scenes for training, and `evaluating` in each of the other two parts."""
    karpathy: list[dict[str, Any]] = []
    grounding: dict[str, list] = {"refs": [], "images": [], "annotations": []}
    detections: dict[str, list] = {}
    for part in PARTS:
        total = training if part is PARTS[0] else evaluating
        made = in_order(partial(_examples, seed=seed, part=part, size=size), total, workers)
        # Scenes that several tasks share.
        examples = list(tqdm(made, f"tasks, {part.karpathy}", total, unit=" scenes", mininterval=1))
        for number, example in enumerate(examples, part.first):
            _write_pictures(folder, part, number, example["jpeg"])
            karpathy.append(_karpathy_entry(part, number, example))
        _write_questions(folder / "vqa", part, examples)
        _write_entailment(folder / "snli_ve", part, examples)
        _add_grounding(folder / "refcoco+", part, examples, grounding, detections)
        # Pairs of scenes.
        pairs = in_order(partial(_pair, seed=seed, part=part, size=size), max(total // 2, 1), workers)
        _write_reasoning(folder / "nlvr2", part, pairs)
    # Files that hold all parts.
    write_json(folder / "coco" / "dataset_coco.json", {"images": karpathy, "dataset": "coco"})
    write_json(folder / "vqa" / "answer_list.json", answer_list())
    write_json(folder / "refcoco+" / "refs(unc).json", grounding["refs"])
    instances = {"images": grounding["images"], "annotations": grounding["annotations"], "licenses": [LICENCE]}
    write_json(folder / "refcoco+" / "instances.json", instances)
    write_json(folder / "refcoco+" / "dets.json", detections)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, and creates its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def as_jpeg(image: Image.Image) -> bytes:
    """An image as JPEG, with colours at full resolution, because 64 pixels are few."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _examples(index: int, seed: int, part: Part, size: int) -> dict[str, Any]:
    """Scene `index` of a part, with its examples for each task."""
    rng = generator("tasks", seed, part.split, index)
    layout = draw_layout(seed, part.split, index, None if rng.random() < 0.5 else rng.choice((2, 3, 4)))
    boxes = [(number, pixel_box(box, size)) for number, group in enumerate(layout.groups) for box in group.boxes]
    return {
        "jpeg": as_jpeg(render(layout, size)),
        "size": size,
        "captions": [caption.text for caption in draw_captions(rng, layout, CAPTIONS)],
        "questions": draw_questions(rng, layout, part.split, QUESTIONS_EACH),
        "hypotheses": [draw_entailment(rng, layout, part.split) for _ in range(HYPOTHESES_EACH)],
        "expression": draw_expression(rng, layout) if len(layout.groups) > 1 else None,
        "boxes": boxes,
    }


def _pair(index: int, seed: int, part: Part, size: int) -> tuple[list[bytes], str, str]:
    pair = draw_pair(seed, part.split, index)
    return [as_jpeg(render(layout, size)) for layout in pair.pictures], pair.true, pair.false


def coco_name(part: Part, number: int) -> str:
    """'val2014/COCO_val2014_000001000001.jpg'."""
    return f"{part.coco}/COCO_{part.coco}_{number:012d}.jpg"


def _write_pictures(folder: Path, part: Part, number: int, jpeg: bytes) -> None:
    """Writes the image under COCO's name and, as a hard link if possible, under Flickr30k's."""
    path = folder / "coco" / coco_name(part, number)
    other = folder / "flickr30k" / "flickr30k-images" / f"{number}.jpg"
    for place in (path, other):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
    path.write_bytes(jpeg)
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def _karpathy_entry(part: Part, number: int, example: dict[str, Any]) -> dict[str, Any]:
    path = Path(coco_name(part, number))
    sentences = [
        {"raw": text, "tokens": text.split(), "imgid": number, "sentid": 10 * number + place}
        for place, text in enumerate(example["captions"])
    ]
    return {
        "filepath": path.parent.as_posix(),
        "filename": path.name,
        "imgid": number,
        "cocoid": number,
        "split": part.karpathy,
        "sentences": sentences,
    }


def _write_questions(folder: Path, part: Part, examples: list[dict[str, Any]]) -> None:
    """VQA v2, with ten equal answers per question."""
    questions, annotations = [], []
    for number, example in enumerate(examples, part.first):
        for place, asked in enumerate(example["questions"]):
            about = {"image_id": number, "question_id": 10 * number + place}
            questions.append(about | {"question": asked.text})
            given = [
                {"answer": asked.answer, "answer_confidence": "yes", "answer_id": one + 1} for one in range(ANSWERERS)
            ]
            annotations.append(
                about
                | {
                    "question_type": asked.form,
                    "answer_type": QUESTIONS[asked.form],
                    "multiple_choice_answer": asked.answer,
                    "answers": given,
                }
            )
    head = {"info": {}, "license": {"name": LICENCE}, "data_type": "mscoco", "data_subtype": part.coco}
    asked_in = head | {"task_type": "Open-Ended", "questions": questions}
    write_json(folder / f"v2_OpenEnded_mscoco_{part.coco}_questions.json", asked_in)
    write_json(folder / f"v2_mscoco_{part.coco}_annotations.json", head | {"annotations": annotations})


def _write_entailment(folder: Path, part: Part, examples: list[dict[str, Any]]) -> None:
    lines = []
    for number, example in enumerate(examples, part.first):
        for place, (hypothesis, label) in enumerate(example["hypotheses"]):
            record = {
                "annotator_labels": [label],
                "captionID": f"{number}.jpg#0",
                "gold_label": label,
                "pairID": f"{number}.jpg#0r{place}",
                "sentence1": example["captions"][0],
                "sentence2": hypothesis,
                "Flickr30K_ID": str(number),
            }
            lines.append(json.dumps(record) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"snli_ve_{part.entailment}.jsonl").write_text("".join(lines), encoding="utf-8")


def _write_reasoning(folder: Path, part: Part, pairs: Iterable[tuple[list[bytes], str, str]]) -> None:
    """NLVR2's jsonl; a pair's two sentences share its images, and the true one comes first in every other pair."""
    lines = []
    pictures = folder / "images" / part.reasoning
    pictures.mkdir(parents=True, exist_ok=True)
    for number, (jpegs, true, false) in enumerate(pairs):
        pair = f"{part.reasoning}-{number}-0"
        for place, jpeg in enumerate(jpegs):
            Image.open(BytesIO(jpeg)).save(pictures / f"{pair}-img{place}.png", compress_level=1)
        sentences = [(true, "True"), (false, "False")]
        for place, (sentence, label) in enumerate(sentences if number % 2 else reversed(sentences)):
            lines.append(json.dumps({"identifier": f"{pair}-{place}", "sentence": sentence, "label": label}) + "\n")
    (folder / f"{part.reasoning}.json").write_text("".join(lines), encoding="utf-8")


def _add_grounding(
    folder: Path, part: Part, examples: list[dict[str, Any]], known: dict[str, list], detections: dict[str, list]
) -> None:
    """ALBEF's list of expressions; REFER's objects and COCO's boxes of all parts; all drawn things as detections."""
    expressions = []
    for number, example in enumerate(examples, part.first):
        if example["expression"] is None:
            continue
        group, text = example["expression"]
        # Each object is referred to once, so one number identifies reference, box and image.
        box = next(box for place, box in example["boxes"] if place == group)
        expressions.append({"image": coco_name(part, number), "text": text, "ref_id": number})
        known["refs"].append({"ref_id": number, "ann_id": number, "image_id": number, "split": part.refs})
        known["images"].append({"id": number, "height": example["size"], "width": example["size"]})
        known["annotations"].append({"id": number, "image_id": number, "bbox": list(box)})
        detections[str(number)] = [list(box) for _, box in example["boxes"]]
    write_json(folder / f"refcoco+_{part.grounding}.json", expressions)

"""Annotation files of three tasks as they are published, about pictures of a few pixels.

Four pictures, one colour each; questions, hypotheses and sentences ask which.
"""

import json
from pathlib import Path

from PIL import Image

COLOURS = ("red", "green", "blue", "white")
RGB = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
PEOPLE = 10


def paint(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 24), RGB[colour]).save(path)


def dump(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def dump_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def said(number: int) -> list[str]:
    """Ten people's answers to question `number`: seven name the colour, two another, one says something else."""
    right, wrong = COLOURS[number % 4], COLOURS[(number + 1) % 4]
    return [right] * 4 + [wrong] * 2 + [right] * 3 + ["a car"]


def question(number: int) -> str:
    return f"What colour is picture {number}?"


def write_vqa(folder: Path, split: str = "train2014", count: int = 16) -> tuple[Path, Path]:
    """VQA v2's questions and annotations, four questions a picture, and COCO's pictures in a folder of the split."""
    for number, colour in enumerate(COLOURS):
        paint(folder / split / f"COCO_{split}_{number + 7:012d}.jpg", colour)
    questions = [
        {"image_id": number % 4 + 7, "question": question(number), "question_id": (number % 4 + 7) * 1000 + number}
        for number in range(count)
    ]
    annotations = [
        {
            "question_id": one["question_id"],
            "image_id": one["image_id"],
            "question_type": "what colour",
            "answer_type": "other" if number % 2 else "yes/no",
            "multiple_choice_answer": said(number)[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": place + 1}
                for place, answer in enumerate(said(number))
            ],
        }
        for number, one in enumerate(questions)
    ]
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": split}
    first = dump(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {**head, "questions": questions})
    return first, dump(folder / f"v2_mscoco_{split}_annotations.json", {**head, "annotations": annotations})


def write_genome(folder: Path) -> Path:
    """Visual Genome's question_answers.json: two questions of each of two pictures, in its two folders of pictures."""
    records = []
    for number, colour in enumerate(COLOURS[:2]):
        paint(folder / ("VG_100K" if number else "VG_100K_2") / f"{number + 50}.jpg", colour)
        questions = [
            {
                "qa_id": 10 * number + place,
                "question": question(place),
                "answer": f"{colour}.",
                "image_id": number + 50,
            }
            for place in range(2)
        ]
        records.append({"id": number + 50, "qas": questions})
    return dump(folder / "question_answers.json", records)


def write_merged_vqa(folder: Path, count: int = 16) -> Path:
    """ALBEF's list: the questions of `write_vqa`, every fourth as one of Visual Genome's."""
    write_vqa(folder)
    records = []
    for number in range(count):
        genome = number % 4 == 3
        record = {
            "question_id": number,
            "question": question(number),
            "answer": said(number)[0] if genome else said(number),
            "image": f"train2014/COCO_train2014_{number % 4 + 7:012d}.jpg",
            "dataset": "vg" if genome else "vqa",
        }
        records.append(record)
    return dump(folder / "vqa_train.json", records)


def write_answer_list(folder: Path) -> Path:
    return dump(folder / "answer_list.json", [*COLOURS, "a car"])


LABELS = ("contradiction", "neutral", "entailment")


def hypothesis(number: int) -> tuple[str, str]:
    """A sentence and its label."""
    shown, label = COLOURS[number % 4], LABELS[number % 3]
    colour = {"entailment": shown, "contradiction": COLOURS[(number + 1) % 4], "neutral": "bright"}[label]
    return f"The picture is {colour}, no. {number}", label


def write_entailment(folder: Path, count: int = 16) -> tuple[Path, Path]:
    """SNLI-VE's jsonl and ALBEF's list of the same rows."""
    for number, colour in enumerate(COLOURS):
        paint(folder / "flickr30k-images" / f"{1000 + number}.jpg", colour)
    rows = [(f"{1000 + number % 4}", *hypothesis(number), number) for number in range(count)]
    lines = [
        {
            "annotator_labels": [label],
            "captionID": f"{picture}.jpg#0",
            "gold_label": label,
            "pairID": f"{picture}.jpg#0r{number}",
            "sentence1": "a caption of the picture",
            "sentence2": sentence,
            "Flickr30K_ID": picture,
        }
        for picture, sentence, label, number in rows
    ]
    merged = [{"image": picture, "sentence": sentence, "label": label} for picture, sentence, label, _ in rows]
    return dump_lines(folder / "snli_ve_train.jsonl", lines), dump(folder / "ve_train.json", merged)


def write_reasoning(folder: Path, count: int = 16) -> tuple[Path, Path]:
    """NLVR2's jsonl and ALBEF's list of the same rows; the first half of the pictures lie by directory."""
    lines, merged = [], []
    for number in range(count):
        pair = number // 2
        colours = [COLOURS[pair % 4], COLOURS[(pair + 1) % 4]]
        place = Path("train") / (str(pair % 5) if pair < count // 4 else "")
        for picture, colour in enumerate(colours):
            paint(folder / place / f"train-{pair}-0-img{picture}.png", colour)
        sentence, label = f"One is {colours[number % 2]}, no. {number}", "True" if number % 2 else "False"
        identifier = f"train-{pair}-0-{number % 2}"
        lines.append({"identifier": identifier, "sentence": sentence, "label": label, "directory": pair % 5})
        images = [f"{(place / f'train-{pair}-0-img{picture}.png').as_posix()}" for picture in range(2)]
        merged.append({"sentence": sentence, "label": label, "images": images})
    return dump_lines(folder / "train.jsonl", lines), dump(folder / "nlvr_train.json", merged)

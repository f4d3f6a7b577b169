"""Small sets for `compare_runs.py` out of the embedded pairs, in the formats of pretraining and of each task.

They are written once, beside the recording, so that what is compared later reads the same bytes.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

PICTURES = 24
ROWS = 40
EVALUATED = 8


def write_sets(tree: Path, folder: Path) -> None:
    """All sets into `folder`, from the emoji of the checkout `tree`."""
    table = pq.read_table(tree / "examples" / "data" / "emoji" / "train.parquet")
    pictures = table.take(list(range(0, 200 * PICTURES, 200))).to_pylist()
    folder.mkdir(parents=True)
    # rows of one concept, drawn in several styles, are positives of each other
    concepts = table["hexcode"].to_pylist()
    drawn = {concepts[number] for number in range(0, 1200, 30)}  # 40 of them
    several = [number for number, concept in enumerate(concepts) if concept in drawn]
    pq.write_table(table.take(several), folder / "pairs.parquet")
    pq.write_table(table.slice(3000, 96), folder / "more_pairs.parquet")
    named = []
    for number, row in enumerate(pictures):
        path = folder / "pictures" / f"{number:012d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(row["image"]["bytes"])
        named.append((path.name, row["captions"]))
    for write in (write_karpathy, write_questions, write_entailment, write_reasoning, write_expressions):
        write(folder, named)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def split_of(number: int) -> str:
    """The rows after `ROWS` are for evaluation."""
    return "train" if number < ROWS else "val"


def write_karpathy(folder: Path, named: list[tuple[str, list[str]]]) -> None:
    """Karpathy's dataset_coco.json: two captions a picture, every fourth picture for the test."""
    images = [
        {
            "filename": name,
            "filepath": "pictures",
            "imgid": number,
            "split": "test" if number % 4 == 3 else "train",
            "sentences": [{"raw": text, "sentid": 2 * number + place} for place, text in enumerate(captions[:2])],
        }
        for number, (name, captions) in enumerate(named)
    ]
    write_json(folder / "karpathy.json", {"images": images, "dataset": "coco"})


def write_questions(folder: Path, named: list[tuple[str, list[str]]]) -> None:
    """VQA v2's questions and annotations, yes or no and open ones by turns, and the list of answers."""
    questions: dict[str, list] = {"train": [], "val": []}
    annotations: dict[str, list] = {"train": [], "val": []}
    for number in range(ROWS + EVALUATED):
        place, split = number % len(named), split_of(number)
        name, captions = named[place]
        coco = folder / f"COCO_{split}2014_{place:012d}.jpg"
        coco.write_bytes((folder / "pictures" / name).read_bytes())
        asked = {"image_id": place, "question_id": 1000 + number}
        text = f"Is this {captions[0]}?" if number % 2 else "What is this?"
        people = ["yes"] * 6 + ["no"] * 4 if number % 2 else [captions[0]] * 8 + ["nothing"] * 2
        answers = [{"answer": answer, "answer_id": one + 1} for one, answer in enumerate(people)]
        questions[split].append({**asked, "question": text})
        answer_type = "yes/no" if number % 2 else "other"
        annotations[split].append(
            {**asked, "answers": answers, "answer_type": answer_type, "multiple_choice_answer": people[0]}
        )
    for split in questions:
        subtype = f"{split}2014"
        write_json(folder / f"vqa_{split}.json", {"questions": questions[split], "data_subtype": subtype})
        write_json(folder / f"vqa_{split}_people.json", {"annotations": annotations[split], "data_subtype": subtype})
    write_json(folder / "answers.json", ["yes", "no", *dict.fromkeys(captions[0] for _, captions in named)])


def write_entailment(folder: Path, named: list[tuple[str, list[str]]]) -> None:
    """SNLI-VE's JSON lines: one hypothesis of each class by turns."""
    lines: dict[str, list] = {"train": [], "val": []}
    for number in range(ROWS + EVALUATED):
        name, captions = named[number % len(named)]
        shown = folder / "pictures" / name
        shown.with_suffix(".jpg").write_bytes(shown.read_bytes())
        hypotheses = {"entailment": captions[0], "neutral": "something new", "contradiction": f"no {captions[0]}"}
        label = list(hypotheses)[number % 3]
        line = {"Flickr30K_ID": shown.stem, "sentence2": f"There is {hypotheses[label]}.", "gold_label": label}
        lines[split_of(number)].append({**line, "pairID": f"{name}#{number}"})
    for split, content in lines.items():
        write_lines(folder / f"entailment_{split}.jsonl", content)


def write_reasoning(folder: Path, named: list[tuple[str, list[str]]]) -> None:
    """NLVR2's JSON lines, and its two pictures of each sentence."""
    lines: dict[str, list] = {"train": [], "dev": []}
    for number in range(ROWS + EVALUATED):
        split = "train" if number < ROWS else "dev"
        home = folder / "nlvr2" / split
        home.mkdir(parents=True, exist_ok=True)
        both = [named[number % len(named)], named[(number + 7) % len(named)]]
        for side, (name, _) in enumerate(both):
            content = (folder / "pictures" / name).read_bytes()
            (home / f"{split}-{number}-0-img{side}.png").write_bytes(content)
        spoken = both[number % 2][1][0]
        sentence, label = f"The left one is {spoken}.", "False" if number % 2 else "True"
        lines[split].append({"identifier": f"{split}-{number}-0-0", "sentence": sentence, "label": label})
    for split, content in lines.items():
        write_lines(folder / f"nlvr2_{split}.jsonl", content)


def write_expressions(folder: Path, named: list[tuple[str, list[str]]]) -> None:
    """RefCOCO+ in ALBEF's lists, with REFER's references, boxes and a detector's boxes for the evaluation."""
    entries, refs, annotations = [], [], []
    for number in range(ROWS + EVALUATED):
        place = number % len(named)
        name, captions = named[place]
        entries.append({"image": f"pictures/{name}", "ref_id": number, "text": f"the {captions[number % 2]}, left"})
        split = "train" if number < ROWS else ("val", "testA", "testB")[number % 3]
        refs.append({"ref_id": number, "ann_id": number, "image_id": place, "split": split})
        annotations.append({"id": number, "bbox": [4 * (number % 3), 2, 30, 30]})
    places = range(len(named))
    sizes = [{"id": place, "height": 64, "width": 64} for place in places]
    write_json(folder / "expressions_train.json", entries[:ROWS])
    write_json(folder / "expressions_val.json", entries[ROWS:])
    write_json(folder / "refs(unc).json", refs)
    write_json(folder / "instances.json", {"images": sizes, "annotations": annotations})
    write_json(folder / "dets.json", {place: [[0, 0, 30, 30, 0.9], [30, 30, 30, 30, 0.8]] for place in places})

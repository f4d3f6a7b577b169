"""A pretrained SIMLA of some thousand weights on disk, and each task's data in its official format."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tiny_oner import randomised
from tiny_pretraining import ROOT

from oner import (
    CodisForPreTraining,
    MomoForPreTraining,
    OneRForPreTraining,
    SimlaForPreTraining,
    VisionLanguageImageProcessor,
    VisionLanguageProcessor,
    train_tokenizer,
)
from oner.training.publishing.hub import export_model

PICTURES = 12


def emoji(count: int = PICTURES) -> list[tuple[bytes, str]]:
    """Pictures, encoded, with a caption of each."""
    table = pq.read_table(ROOT / "examples" / "data" / "emoji" / "test_style.parquet").slice(0, count)
    return [
        (cell["bytes"], captions[0])
        for cell, captions in zip(table["image"].to_pylist(), table["captions"].to_pylist(), strict=True)
    ]


def write_pictures(folder: Path) -> list[tuple[str, str]]:
    """File names in `folder`, with a caption of each."""
    folder.mkdir(parents=True, exist_ok=True)
    named = []
    for number, (content, caption) in enumerate(emoji()):
        (folder / f"{number:04d}.png").write_bytes(content)
        named.append((f"{number:04d}.png", caption))
    return named


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def tiny_processor(joint_layout: bool = False) -> VisionLanguageProcessor:
    texts = [caption for _, caption in emoji()] + ["yes no is it the one left right and same what in a"]
    tokenizer = train_tokenizer(texts, vocab_size=250, max_text_length=12)
    image_processor = VisionLanguageImageProcessor(size={"height": 16, "width": 16}, patch_size=4)
    return VisionLanguageProcessor(image_processor, tokenizer, max_text_length=12, joint_layout=joint_layout)


def write_pretrained(directory: Path, kind: type = SimlaForPreTraining, **fields) -> Path:
    """A model directory of 16-pixel pictures as pretraining leaves it, weights drawn."""
    processor = tiny_processor(kind.config_class.pair_layout == "joint")
    tokenizer = processor.tokenizer
    torch.manual_seed(3)
    config = kind.config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        max_text_length=12,
        projection_dim=8,
        pad_token_id=tokenizer.pad_token_id,
        image_token_id=tokenizer.image_token_id,
        cls_token_id=tokenizer.cls_token_id,
        mask_token_id=tokenizer.mask_token_id,
        **fields,
    )
    return export_model(randomised(kind(config)), processor, directory)


def write_simla(directory: Path) -> Path:
    """Of SIMLA, whose answers end in [SEP] where the vocabulary has it."""
    small = {"num_text_layers": 2, "max_position_embeddings": 64, "num_visual_codes": 16}
    heads = {"answer_decoder_layers": 1, "grounding_layer": 1}
    return write_pretrained(directory, **small, **heads, sep_token_id=tiny_processor().tokenizer.sep_token_id)


def write_codis(directory: Path) -> Path:
    """Of CODIS, with a codebook that no task uses."""
    small = {"num_text_layers": 1, "num_fusion_layers": 2, "max_position_embeddings": 64, "num_codes": 8}
    heads = {"answer_decoder_layers": 1, "grounding_layer": 2}
    sep = tiny_processor().tokenizer.sep_token_id
    return write_pretrained(directory, CodisForPreTraining, **small, **heads, sep_token_id=sep)


def write_momo(directory: Path) -> Path:
    """Of MoMo, without decoders."""
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    return write_pretrained(directory, MomoForPreTraining, **decoder)


def write_oner(directory: Path) -> Path:
    """Of OneR."""
    return write_pretrained(directory, OneRForPreTraining, projection_hidden_size=16)


def karpathy(folder: Path) -> dict[str, object]:
    """dataset_coco.json: eight pictures to train on, one of them in restval, and four to test."""
    images = [
        {
            "filename": name,
            "filepath": "val2014",
            "imgid": number,
            "split": "test" if number >= 8 else "restval" if number == 7 else "train",
            "sentences": [{"raw": caption, "sentid": 2 * number}, {"raw": f"A {caption}.", "sentid": 2 * number + 1}],
        }
        for number, (name, caption) in enumerate(write_pictures(folder / "val2014"))
    ]
    path = write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    told = {"train_data": path, "split": "train", "eval_data": path, "eval_split": "test", "queue_size": 20}
    return {**told, "image_folder": folder}


def pairs_alone(folder: Path) -> dict[str, object]:
    """The same, for a task without a queue."""
    return {name: value for name, value in karpathy(folder).items() if name != "queue_size"}


def questions(folder: Path) -> dict[str, object]:
    """VQA v2's questions and annotations: sixteen about eight pictures, six to be answered out of a list."""
    named = write_pictures(folder / "pictures")
    told: dict[str, object] = {"image_folder": folder / "pictures", "answer_folder": folder / "answers"}
    for subtype, rows in (("train2014", range(16)), ("val2014", range(16, 22))):
        asked, given = [], []
        for number in rows:
            place, (name, caption) = number % 12, named[number % 12]
            (folder / "pictures" / f"COCO_{subtype}_{place:012d}.jpg").write_bytes(
                (folder / "pictures" / name).read_bytes()
            )
            text = f"Is it the {caption}?" if number % 2 else "What is it?"
            asked.append({"image_id": place, "question": text, "question_id": 1000 + number})
            people = ["yes"] * 7 + ["no"] * 3 if number % 2 else [caption] * 10
            given.append(
                {
                    "question_id": 1000 + number,
                    "image_id": place,
                    "answers": [{"answer": answer, "answer_id": one + 1} for one, answer in enumerate(people)],
                    "answer_type": "yes/no" if number % 2 else "other",
                    "multiple_choice_answer": people[0],
                }
            )
        told[subtype] = [
            write_json(folder / f"{subtype}_questions.json", {"questions": asked, "data_subtype": subtype}),
            write_json(folder / f"{subtype}_annotations.json", {"annotations": given, "data_subtype": subtype}),
        ]
    candidates = ["yes", "no", *dict.fromkeys(caption for _, caption in named)]
    told["answer_list"] = write_json(folder / "answer_list.json", candidates)
    told["train_data"], (told["eval_data"], annotations) = told.pop("train2014"), told.pop("val2014")
    return {**told, "eval_annotations": annotations, "answers_in_full": 3}


def listed_questions(folder: Path) -> dict[str, object]:
    """The same, each answer of the list a class."""
    return {name: value for name, value in questions(folder).items() if name != "answers_in_full"}


def entailments(folder: Path) -> dict[str, object]:
    """SNLI-VE's jsonl: sixteen hypotheses to train on, six to evaluate on."""
    named = write_pictures(folder / "flickr30k-images")
    classes = ("contradiction", "neutral", "entailment")
    for split, rows in (("train", range(16)), ("dev", range(16, 22))):
        lines = []
        for number in rows:
            name, caption = named[number % 12]
            source = folder / "flickr30k-images" / name
            source.with_suffix(".jpg").write_bytes(source.read_bytes())
            lines.append(
                {
                    "Flickr30K_ID": name.removesuffix(".png"),
                    "sentence2": f"It is the {caption}.",
                    "gold_label": classes[number % 3],
                    "pairID": f"{name}#{number}",
                }
            )
        write_lines(folder / f"snli_ve_{split}.jsonl", lines)
    return {
        "train_data": folder / "snli_ve_train.jsonl",
        "eval_data": folder / "snli_ve_dev.jsonl",
        "image_folder": folder / "flickr30k-images",
    }


def sentences(folder: Path) -> dict[str, object]:
    """NLVR2's JSON lines, called .json: sixteen sentences about two pictures to train on, six to evaluate on."""
    content = [picture for picture, _ in emoji()]
    for split, rows in (("train", range(16)), ("dev", range(16, 22))):
        lines = []
        for number in rows:
            (folder / "images" / split).mkdir(parents=True, exist_ok=True)
            for side in range(2):
                path = folder / "images" / split / f"{split}-{number}-0-img{side}.png"
                path.write_bytes(content[(number + 5 * side) % len(content)])
            lines.append(
                {
                    "identifier": f"{split}-{number}-0-0",
                    "sentence": "Left and right it is the same.",
                    "label": "True" if number % 2 else "False",
                }
            )
        write_lines(folder / f"{split}.json", lines)
    return {
        "train_data": folder / "train.json",
        "eval_data": folder / "dev.json",
        "image_folder": folder / "images",
    }


def expressions(folder: Path) -> dict[str, object]:
    """RefCOCO+ as ALBEF lists it: sixteen expressions of eight pictures to train on, six of four to evaluate on."""
    named = write_pictures(folder / "train2014")
    entries = [
        {"image": f"train2014/{named[number % 8 if number < 16 else 8 + number % 4][0]}", "ref_id": number,
         "text": f"The {named[number % 12][1]}, left!"} for number in range(22)
    ]  # fmt: skip
    pictures = [int(Path(entry["image"]).stem) for entry in entries]
    boxes = [[4 * (number % 3), 2, 20, 20] for number in range(22)]
    splits = ["train"] * 16 + ["val", "val", "testA", "testA", "testB", "testB"]
    refs = [{"ref_id": n, "ann_id": 50 + n, "image_id": pictures[n], "split": splits[n]} for n in range(22)]
    instances = {
        "images": [{"id": number, "height": 64, "width": 64} for number in range(len(named))],
        "annotations": [{"id": 50 + number, "bbox": box} for number, box in enumerate(boxes)],
    }
    detected = {str(number): [[0, 0, 30, 30, 0.9], [30, 30, 30, 30, 0.8]] for number in range(len(named))}
    return {
        "train_data": write_json(folder / "refcoco+_train.json", entries[:16]),
        "eval_data": write_json(folder / "refcoco+_test.json", entries[16:]),
        "image_folder": folder,
        "refs": write_json(folder / "refs(unc).json", refs),
        "instances": write_json(folder / "instances.json", instances),
        "detections": write_json(folder / "dets.json", detected),
        "queue_size": 20,
    }


def composed(folder: Path) -> dict[str, object]:
    """CIRR's JSON: sixteen queries to train on, six to evaluate on, each from a picture to the one behind it."""
    content = [picture for picture, _ in emoji()]
    for split, rows in (("train", range(16)), ("dev", range(16, 22))):
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(content):
            (folder / "images" / split / f"{split}-{number}.png").write_bytes(picture)
        queries = [
            {
                "pairid": number,
                "reference": f"{split}-{number % 12}",
                "target_hard": f"{split}-{(number + 1) % 12}",
                "caption": emoji()[(number + 1) % 12][1],
            }
            for number in rows
        ]
        write_json(folder / f"cap.{split}.json", queries)
    return {
        "train_data": folder / "cap.train.json",
        "eval_data": folder / "cap.dev.json",
        "image_folder": folder / "images",
    }


def texts(folder: Path) -> dict[str, object]:
    """RTE's TSV files: sixteen pairs of texts to train on, six to evaluate on."""
    named = emoji()
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", range(16)), ("dev", range(16, 22))):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for number in rows:
            first, second = named[number % 12][1], named[(number + number % 2) % 12][1]
            label = "not_entailment" if number % 2 else "entailment"
            lines.append(f'{number}\tIt is the {first}, "so\tIs it the {second}?\t{label}')
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"train_data": folder / "train.tsv", "eval_data": folder / "dev.tsv", "glue_task": "rte"}


def write_lines(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


# tasks that no family with a text tower of its own has
ONE_TOWER_ALONE = ("answers", "cir")
# task -> writes its data into a folder and returns the arguments that name them; sixteen rows to train on
DATA = {
    "retrieval": karpathy,
    "cir": composed,
    "vqa": questions,
    "answers": listed_questions,
    "entailment": entailments,
    "assignment": pairs_alone,
    "nlvr2": sentences,
    "grounding": expressions,
    "glue": texts,
}

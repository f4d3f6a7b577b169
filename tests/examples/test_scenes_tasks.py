"""Tasks about scenes: right answers, nothing to be had from the words alone, files that the readers and runs take."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from scenes_reader import NAMES, NUMBERS, SCENES, Seen, colours, stand, wrong
from test_finetune_example import as_line
from tiny_finetuning import write_oner, write_simla
from tiny_pretraining import ROOT, forget_accelerator, load_example, read_log

from oner.processing.data.grounding_files import open_grounding, read_boxes
from oner.processing.data.karpathy import open_karpathy
from oner.processing.data.task_rows import open_entailment, open_questions, open_reasoning, read_answer_list
from oner.training.run.parsing import read_config

sys.path.insert(0, str(SCENES))

import scenes  # noqa: E402
from scenes_layout import draw_layout, generator  # noqa: E402
from scenes_questions import UNKNOWN, answer_list, draw_entailment, draw_expression, draw_questions  # noqa: E402
from scenes_reasoning import draw_pair  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerator"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # the tiny model's vocabulary is of other texts, and a run says so
    pytest.mark.filterwarnings("ignore:the tokenizer of .* does not know:UserWarning"),
]
COMPOSED = ROOT / "examples" / "configs" / "finetune_scenes_cir.yaml"  # over queries, which are no task's files
RECIPES = sorted({*(ROOT / "examples" / "configs").glob("finetune_scenes_*.yaml")} - {COMPOSED})
TRAINING, EVALUATING = 16, 4
TRAINING_FILES = ("OpenEnded_mscoco_train2014_questions", "mscoco_train2014_annotations")


@pytest.fixture(scope="module")
def made() -> list[scenes.Scene]:
    return [scenes.scene(11, "train", index) for index in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All tasks of twenty-four scenes."""
    output = tmp_path_factory.mktemp("scenes")
    scenes.main([str(output), "--pairs", "1", "--tasks", str(TRAINING)])
    return output / "tasks"


def plain(name: str) -> str:
    """The singular of a name of a thing."""
    return NAMES[name][0]


def test_answers_are_right(made):
    forms, replies = Counter(), {}
    for number, one in enumerate(made):
        seen = Seen.of(one)
        for asked in draw_questions(generator("test", 0, "train", number), one.layout, "train", 4):
            assert asked.answer in answer_list()
            assert asked.answer == answer(asked.text, seen), f"{one.id}: {asked.text} {asked.answer}"
            forms[asked.form] += 1
            replies.setdefault(asked.form, set()).add(asked.answer)
    assert len(forms) == 7 and min(forms.values()) > 30
    assert replies["how many"] == set("01234")


def test_the_form_of_a_question_does_not_answer_it():
    replies: dict[str, Counter] = {}
    for number in range(1000):
        layout = draw_layout(0, "train", number)
        for asked in draw_questions(generator("balance", 0, "train", number), layout, "train", 3):
            replies.setdefault(asked.form, Counter())[asked.answer] += 1
    for form, one in (("is there", "yes"), ("is it beside", "yes"), ("which side", "left")):
        assert 0.43 < replies[form][one] / replies[form].total() < 0.57


def answer(question: str, seen: Seen) -> str:
    """What a person would answer who sees the boxes; the colour and what stands beside, by the answers given."""
    beside = r"(to the left of|to the right of|above|below)"
    side = seen.image.width
    if match := re.fullmatch(r"is there an? (.+) in the picture\?", question):
        return "yes" if plain(match[1]) in seen.boxes else "no"
    if match := re.fullmatch(r"how many (.+) are there\?", question):
        return str(len(seen.boxes.get(plain(match[1]), [])))
    if match := re.fullmatch(r"what size (?:is|are) the (.+)\?", question):
        return "big" if max(seen.boxes[plain(match[1])][0][2:]) > 0.35 * side else "small"
    if match := re.fullmatch(r"(?:is|are) the (.+) on the left or on the right\?", question):
        boxes = seen.boxes[plain(match[1])]
        return "left" if sum(box[0] + box[2] / 2 for box in boxes) / len(boxes) < side / 2 else "right"
    if match := re.fullmatch(rf"(?:is|are) the (.+) {beside} the (.+)\?", question):
        one, other = seen.boxes[plain(match[1])], seen.boxes[plain(match[3])]
        return "yes" if stand(one, direction(match[2]), other) else "no"
    if match := re.fullmatch(rf"what is {beside} the (.+)\?", question):
        other = seen.boxes[plain(match[2])]
        found = [name for name, boxes in seen.boxes.items() if stand(boxes, direction(match[1]), other)]
        found = [name for name in found if name != plain(match[2])]
        assert len(found) == 1
        return found[0]
    assert question == "what color is the background?"
    return colours(seen)[0]


def direction(words: str) -> str:
    return next(word for word in words.split() if word in ("left", "right", "above", "below"))


def test_entailment_is_what_the_picture_says(made):
    for number, one in enumerate(made):
        sentence, label = draw_entailment(generator("entailment", 0, "train", number), one.layout, "train")
        seen, unknown = Seen.of(one), is_unknown(sentence)
        if unknown:
            thing = sentence.removesuffix(unknown).strip().removeprefix("the ")
            assert label == ("neutral" if holds(thing, seen) else "contradiction"), sentence
        else:
            assert label == ("contradiction" if wrong(sentence, seen) else "entailment"), sentence


def test_no_word_gives_a_label_away():
    labels = Counter()
    for number in range(1600):
        layout = draw_layout(1, "train", number)
        sentence, label = draw_entailment(generator("balance", 0, "train", number), layout, "train")
        labels[bool(is_unknown(sentence)), label] += 1
    for unknown, other in ((True, "neutral"), (False, "entailment")):
        both = labels[unknown, "contradiction"] + labels[unknown, other]
        assert 0.44 < labels[unknown, other] / both < 0.56 and 0.44 < both / 1600 < 0.56


def is_unknown(sentence: str) -> str | None:
    """What the sentence says that no picture shows."""
    return next((words for pair in UNKNOWN for words in pair if sentence.endswith(words)), None)


def holds(thing: str, seen: Seen) -> bool:
    """Whether 'small dogs' or 'dog' is there, as many as its number says."""
    size = next((word for word in ("big", "small") if thing.startswith(f"{word} ")), None)
    name, plural = NAMES[thing.removeprefix(f"{size} ") if size else thing]
    boxes = seen.boxes.get(name, [])
    if not boxes:
        return False
    return size is None or (max(boxes[0][2:]) > 0.35 * seen.image.width) == (size == "big")


def test_sentences_about_two_pictures_are_right():
    forms = Counter()
    for index in range(150):
        pair = draw_pair(2, "train", index)
        pictures = [
            {one.name: [two.box for two in things if two.name == one.name] for one in things}
            for things in (scenes.things(layout, 64) for layout in pair.pictures)
        ]
        grounds = [layout.background.colour for layout in pair.pictures]
        for sentence, expected in ((pair.true, True), (pair.false, False)):
            judged = judge(sentence, pictures, grounds)
            assert judged is None or judged is expected, f"{index}: {sentence}"
            forms[pair.form] += judged is not None
    assert len(forms) >= 9 and forms.total() >= 250


def judge(sentence: str, pictures: list[dict], grounds: list[str]) -> bool | None:
    """Whether a sentence about two pictures is true; None if it is of a form that is not judged here."""
    counts = {plural: [len(one.get(name, [])) for one in pictures] for plural, (name, _) in NAMES.items()}
    if match := re.fullmatch(r"both pictures show at least one (.+)", sentence):
        return min(counts[match[1]]) > 0
    if match := re.fullmatch(r"exactly one of the pictures shows an? (.+)", sentence):
        return sum(count > 0 for count in counts[match[1]]) == 1
    if match := re.fullmatch(r"neither of the pictures shows an? (.+)", sentence):
        return max(counts[match[1]]) == 0
    if match := re.fullmatch(r"the (left|right) picture shows (a single|two|three|four) (.+)", sentence):
        return counts[match[3]][match[1] == "right"] == NUMBERS[match[2]]
    if match := re.fullmatch(r"there (?:is|are) (\w+) (.+) in the two pictures together", sentence):
        numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
        return sum(counts[match[2]]) == numbers.index(match[1])
    if match := re.fullmatch(r"there are more (.+) in the (left|right) picture than in the \w+ one", sentence):
        left, right = counts[match[1]]
        return left > right if match[2] == "left" else right > left
    if match := re.fullmatch(r"(both|only one of the) pictures ha(?:s|ve) a background that is (\w+)", sentence):
        return grounds.count(match[2]) == (2 if match[1] == "both" else 1)
    if match := re.fullmatch(
        r"in the (left|right) picture (.+) (?:is|are) (to the \w+ of|above|below) (.+)", sentence
    ):
        boxes = pictures[match[1] == "right"]
        one, other = (boxes[plain(re.sub(r"^(an?|two|three|four) ", "", match[part]))] for part in (2, 4))
        return stand(one, direction(match[3]), other)
    return None


def test_expressions_name_one_thing(made):
    found = 0
    for number, one in enumerate(made):
        expression = draw_expression(generator("expression", 0, "train", number), one.layout)
        if expression is None:
            continue
        group, text = expression
        boxes = [thing for thing in one.objects if thing.group == group]
        assert len(boxes) == 1 and text.startswith(("the big ", "the small ", "the "))
        name = re.split(r" (?:to the )?(?:left of|right of|above|below) ", text.removeprefix("the "))[0]
        assert boxes[0].name in (name, name.removeprefix("big "), name.removeprefix("small "))
        found += 1
    assert found > 100


def test_the_readers_take_the_files(folder):
    for split, count in (("train", TRAINING), ("val", EVALUATING), ("test", EVALUATING)):
        rows = open_karpathy(folder / "coco" / "dataset_coco.json", folder / "coco", split)
        assert len(rows) == count and len(rows[0]["captions"]) == 5
    answers = set(read_answer_list(str(folder / "vqa" / "answer_list.json")))
    for part, count in (("train2014", TRAINING), ("val2014", EVALUATING), ("test2015", EVALUATING)):
        names = (f"v2_OpenEnded_mscoco_{part}_questions.json", f"v2_mscoco_{part}_annotations.json")
        asked = open_questions([str(folder / "vqa" / name) for name in names], str(folder / "coco"))
        assert 2 * count < len(asked) <= 3 * count
        assert all(set(row["answers"]) <= answers for row in asked.rows)
    for part, count in (("train", TRAINING), ("dev", EVALUATING), ("test", EVALUATING)):
        path = str(folder / "snli_ve" / f"snli_ve_{part}.jsonl")
        assert len(open_entailment([path], str(folder / "flickr30k" / "flickr30k-images"))) == 2 * count
    for part, count in (("train", TRAINING), ("dev", EVALUATING), ("test1", EVALUATING)):
        rows = open_reasoning([str(folder / "nlvr2" / f"{part}.json")], str(folder / "nlvr2" / "images"))
        assert len(rows) == count and sum(row["label"] for row in rows.rows) == count / 2
    files = [folder / "refcoco+" / name for name in ("refs(unc).json", "instances.json", "dets.json")]
    for part in ("train", "val", "test"):
        rows = open_grounding(folder / "refcoco+" / f"refcoco+_{part}.json", folder / "coco", read_boxes(*files))
        assert all(list(row["box"]) in row["boxes"] and len(row["boxes"]) > 1 for row in rows.rows)


def arguments(task: str, folder) -> dict[str, object]:
    """What names the data of a task, as docs/scenes.md has it."""
    coco, vqa, refcoco = folder / "coco", folder / "vqa", folder / "refcoco+"
    karpathy = {"train_data": coco / "dataset_coco.json", "split": "train", "image_folder": coco}
    karpathy |= {"eval_data": coco / "dataset_coco.json", "eval_split": "val"}
    return {
        "retrieval": karpathy | {"rerank_k": 2, "queue_size": 20},
        "assignment": karpathy,
        "vqa": {
            "train_data": [vqa / f"v2_{name}.json" for name in TRAINING_FILES],
            "eval_data": vqa / "v2_OpenEnded_mscoco_val2014_questions.json",
            "eval_annotations": vqa / "v2_mscoco_val2014_annotations.json",
            "answer_list": vqa / "answer_list.json",
            "image_folder": coco,
        },
        "entailment": {
            "train_data": folder / "snli_ve" / "snli_ve_train.jsonl",
            "eval_data": folder / "snli_ve" / "snli_ve_dev.jsonl",
            "image_folder": folder / "flickr30k" / "flickr30k-images",
        },
        "nlvr2": {
            "train_data": folder / "nlvr2" / "train.json",
            "eval_data": folder / "nlvr2" / "dev.json",
            "image_folder": folder / "nlvr2" / "images",
        },
        "grounding": {
            "train_data": refcoco / "refcoco+_train.json",
            "eval_data": refcoco / "refcoco+_val.json",
            "image_folder": coco,
            "refs": refcoco / "refs(unc).json",
            "instances": refcoco / "instances.json",
            "detections": refcoco / "dets.json",
            "queue_size": 20,
        },
    }[task]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return write_simla(tmp_path_factory.mktemp("pretrained") / "model")


@pytest.mark.parametrize("task", ["retrieval", "assignment", "vqa", "entailment", "nlvr2", "grounding"])
def test_every_task_trains_and_evaluates(task, folder, pretrained, tmp_path):
    forget_accelerator()
    told = {
        "task": task,
        "initial_model": pretrained,
        "batch_size": 4,
        "max_steps": 2,
        "warmup_steps": 1,
        "base_learning_rate": 0.01,
        "num_workers": 0,
        "mixed_precision": "no",
        "eval_every_epochs": 0,
        "output_dir": tmp_path / "run",
    }
    metrics = load_example("finetune").main(as_line(told | arguments(task, folder)))
    assert metrics and all(value == value for value in metrics.values())
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["model_type"] == "simla"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_the_files_that_are_made_and_takes_two_steps(path, folder, pretrained, tmp_path):
    said = moved(read_config(path), folder)
    assert path.stem == f"finetune_scenes_{said['task']}"
    # the model is one that ships, or what another recipe leaves
    left = [Path(read_config(other)["output_dir"]) / "model" for other in RECIPES]
    initial = Path(said["initial_model"])
    assert (ROOT / initial / "model.safetensors").is_file() or initial in left
    assert (ROOT / said["attribution"]).is_file()
    named = (
        "train_data",
        "eval_data",
        "eval_annotations",
        "image_folder",
        "answer_list",
        "refs",
        "instances",
        "detections",
    )
    files = [file for name in named for file in flat(said.get(name))]
    assert len(files) >= 3 and all(Path(file).exists() and Path(file).is_relative_to(folder) for file in files)

    # nothing is changed but sizes and places
    small = {"initial_model": str(pretrained), "output_dir": str(tmp_path / "run"), "batch_size": 4, "max_steps": 2}
    small |= {"queue_size": 8} if "queue_size" in said else {}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**said, **small, "log_every": 1}), encoding="utf-8")
    forget_accelerator()
    metrics = load_example("finetune").main(["--config", str(tmp_path / "small.yaml")])
    assert metrics and all(value == value for value in metrics.values())
    assert [line["step"] for line in read_log(tmp_path / "run") if "loss" in line] == [1, 2]


def test_composed_queries_with_their_targets_are_trained_on(tmp_path):
    written = tmp_path / "scenes"
    scenes.main([str(written), "--pairs", "0", "--triples", "12"])
    scenes.main([str(written), "--pairs", "0", "--queries", "3", "--split", "unseen_pairs", "unseen_style"])
    rows = pq.read_table(written / "train_triples.parquet").to_pylist()
    assert len(rows) == 12 and all(row["image"]["bytes"] != row["target_image"]["bytes"] for row in rows)
    # the very queries that the longer form writes
    scenes.main([str(tmp_path / "long"), "--pairs", "0", "--queries", "2"])
    queries = pq.read_table(tmp_path / "long" / "train_queries.parquet").to_pylist()
    gallery = pq.read_table(tmp_path / "long" / "train_gallery.parquet").to_pylist()
    for row, query in zip(rows, queries, strict=False):
        assert (row["text"], row["image"]) == (query["text"], query["image"])
        assert row["target_image"]["bytes"] == gallery[query["target"]]["image"]["bytes"]

    said = {name: moved(value, written, "runs/scenes") for name, value in read_config(COMPOSED).items()}
    small = {"initial_model": str(write_oner(tmp_path / "oner")), "output_dir": str(tmp_path / "run")}
    small |= {"batch_size": 4, "max_steps": 2, "log_every": 1}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**said, **small}), encoding="utf-8")
    forget_accelerator()
    metrics = load_example("finetune").main(["--config", str(tmp_path / "small.yaml")])
    assert {name.split("/")[0] for name in metrics} == {"unseen_pairs_queries", "unseen_style_queries"}


def flat(value) -> list[str]:
    return value if isinstance(value, list) else [] if value is None else [value]


def moved(value, folder: Path, place: str = "runs/scenes/tasks"):
    """What `make scenes` leaves at `place` lies in `folder` instead."""
    if isinstance(value, dict):
        return {name: moved(one, folder, place) for name, one in value.items()}
    if isinstance(value, list):
        return [moved(one, folder, place) for one in value]
    return value.replace(place, str(folder)) if isinstance(value, str) else value

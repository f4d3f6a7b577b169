"""VQA accuracy by the official rules; evaluators of answers and classes on models that say what they are told."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_task_data import COLOURS, said, write_entailment, write_genome, write_merged_vqa, write_reasoning, write_vqa

from oner import VisionLanguageImageProcessor, VisionLanguageProcessor, train_tokenizer
from oner.processing.data.task_rows import (
    ENTAILMENT_LABELS,
    REASONING_LABELS,
    open_entailment,
    open_questions,
    open_reasoning,
)
from oner.processing.image_processing_vl import ImageDecodeError
from oner.training.evaluation.answers import CONTRACTIONS, AnswerEvaluator, answer_accuracy, normalise_answer
from oner.training.evaluation.classification import ClassificationEvaluator, task_inputs

TEXTS = ["What colour is picture 0 ?", "The picture is bright no. 1", "One is it", "a car", " ".join(COLOURS), "0 1 2"]


@pytest.fixture(scope="module")
def processor():
    tokenizer = train_tokenizer(TEXTS * 2, vocab_size=200, min_frequency=1)
    return VisionLanguageProcessor(
        VisionLanguageImageProcessor(size={"height": 16, "width": 16}, patch_size=8), tokenizer
    )


# the official rules, from the text of the evaluation's description; examples worked out by hand


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("a red car", "red car"),
        ("two dogs and an owl", "2 dogs and owl"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("1,000-ish", "1000ish"),
        ("black-white", "black white"),
        ("black - white", "black white"),
        ("black- white/grey", "black white grey"),
        ("4.5 ft.", "4.5 ft"),
        ("p.m.", "pm"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("its a well", "its well"),
        ("who's there?", "who's there"),
        ("yes!", "yes"),
        ("", ""),
    ],
)
def test_answers_are_normalised(answer, expected):
    assert normalise_answer(answer) == expected


def test_contractions_leave_other_words_alone():
    for word in ("its", "were", "well", "shed", "wed", "ill", "hell", "id"):
        assert word not in CONTRACTIONS
    assert CONTRACTIONS["dont"] == "don't" and CONTRACTIONS["yall'd've"] == "y'all'd've"


@pytest.mark.parametrize(
    ("agree", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)]
)
def test_accuracy_of_ten_people(agree, expected):
    """One left out at a time: of k who agree, k ways leave k - 1 of them, and 10 - k ways leave k."""
    assert answer_accuracy("blue", ["blue"] * agree + ["red"] * (10 - agree)) == pytest.approx(expected)


def test_accuracy_normalises_only_where_people_differ():
    given = ["The blue"] * 10
    assert answer_accuracy("the blue", given) == 1.0 and answer_accuracy("blue", given) == 0.0
    assert answer_accuracy("blue", [*given[:9], "red"]) == 1.0
    assert answer_accuracy("Two\n", ["2"] * 5 + ["3"] * 5) == 1.0
    with pytest.raises(ValueError, match="there are no human answers"):
        answer_accuracy("blue", [])


class Ranker(torch.nn.Module):
    """Says candidate `say(number)` to its question of that number, and keeps what it was asked."""

    config = SimpleNamespace(cls_token_id=3, sep_token_id=None, pad_token_id=0)

    def __init__(self, say):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.say, self.asked, self.batches = say, 0, []

    def rank_answers(self, input_ids, attention_mask, pixel_values, candidate_ids, candidate_mask, **options):
        assert not self.training and not torch.is_grad_enabled()
        self.batches.append((input_ids, pixel_values, candidate_ids, options))
        numbers = range(self.asked, self.asked + len(input_ids))
        self.asked += len(input_ids)
        return SimpleNamespace(indices=torch.tensor([[self.say(number), 0] for number in numbers]))

    def generate_answers(self, input_ids, attention_mask, pixel_values, num_beams):
        words = [7, 8, 3, 9] if num_beams == 2 else [7, 0, 0, 0]
        return SimpleNamespace(sequences=torch.tensor([words] * len(input_ids)))


CANDIDATES = [*COLOURS, "a car"]


def test_answers_are_scored_by_kind_and_written(tmp_path, processor):
    rows = open_questions([str(path) for path in write_vqa(tmp_path)])
    # even questions right (7 people), odd ones as the two people who are wrong
    model = Ranker(lambda number: (number if number % 2 == 0 else number + 1) % 4).train()
    evaluator = AnswerEvaluator(rows, CANDIDATES, "val", 5, k=3, folder=str(tmp_path / "out"))
    values = dict(evaluator.run(model, processor))
    assert values == pytest.approx(
        {"val/accuracy": 0.8, "val/accuracy_yes_no": 1.0, "val/accuracy_other": 0.6, "val/questions": 16}
    )
    assert model.training and [len(batch[0]) for batch in model.batches] == [5, 5, 5, 1]
    _, pixels, tokens, options = model.batches[0]
    assert pixels.shape == (5, 3, 16, 16) and options == {"k": 3, "count_first_token_twice": True}
    words = processor.tokenizer("a car", add_special_tokens=False)["input_ids"]
    assert tokens[4].tolist() == [3, *words, 3] and tokens.shape[0] == 5
    written = json.loads((tmp_path / "out" / "val.answers.json").read_text())
    assert written[1] == {"question_id": rows[1]["id"], "answer": COLOURS[2]} and len(written) == 16
    assert evaluator.protocol["answers"] == "ranked out of 5, 3 of them in full"


def test_answers_in_the_models_own_words_end_at_the_end(tmp_path, processor):
    rows = open_questions([str(write_genome(tmp_path))])
    expected = processor.tokenizer.decode([7, 8])
    evaluator = AnswerEvaluator(rows.take(range(4)), None, "own", 4, num_beams=2, folder=str(tmp_path))
    assert dict(evaluator.run(Ranker(None), processor))["own/accuracy"] == 0.0
    written = json.loads((tmp_path / "own.answers.json").read_text())
    assert {one["answer"] for one in written} == {expected}
    assert list(dict(AnswerEvaluator(rows, None).run(Ranker(None), processor))) == ["eval/accuracy", "eval/questions"]


def test_a_test_set_without_answers_is_written_only(tmp_path, processor):
    rows = open_questions([str(write_vqa(tmp_path)[0])], answered=False)
    values = dict(AnswerEvaluator(rows, CANDIDATES, "test", folder=str(tmp_path)).run(Ranker(lambda _: 1), processor))
    assert values == {"test/questions": 16.0} and (tmp_path / "test.answers.json").is_file()
    with pytest.raises(ValueError, match="no question has answers for scoring, and there is no folder"):
        AnswerEvaluator(rows, CANDIDATES)
    with pytest.raises(ValueError, match="no rows"):
        AnswerEvaluator([], CANDIDATES)


def test_only_rows_with_answers_are_scored(tmp_path, processor):
    rows = open_questions([str(write_merged_vqa(tmp_path))]).take(range(4))
    rows[1]["answers"] = []
    values = dict(AnswerEvaluator(rows, CANDIDATES).run(Ranker(lambda number: number), processor))
    assert rows[0]["answers"] == said(0) and values["eval/questions"] == 4
    # questions 0 and 2 of ten people are right, and so is question 3 of one
    assert values["eval/accuracy"] == answer_accuracy("white", ["white"]) == 1


class Classifier(torch.nn.Module):
    """Says class `say(number)` of row `number`, of `classes`."""

    def __init__(self, say, classes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.say, self.classes, self.rows, self.pixels = say, classes, 0, []

    def forward(self, input_ids, attention_mask, pixel_values):
        self.pixels.append(pixel_values)
        said_ = torch.tensor([self.say(number) for number in range(self.rows, self.rows + len(input_ids))])
        self.rows += len(input_ids)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(said_, self.classes).float())


def test_classes(tmp_path, processor):
    rows = open_entailment([str(write_entailment(tmp_path)[0])])  # labels 0, 1, 2, 0, ...: six of the first
    evaluator = ClassificationEvaluator(rows, ENTAILMENT_LABELS, "dev", batch_size=6)
    values = dict(evaluator.run(Classifier(lambda number: 0 if number < 8 else number % 3, 3), processor))
    assert values == pytest.approx(
        {
            "dev/accuracy": 11 / 16,
            "dev/recall_contradiction": 1.0,
            "dev/recall_neutral": 2 / 5,
            "dev/recall_entailment": 3 / 5,
            "dev/chance": 6 / 16,
        }
    )
    with pytest.raises(ValueError, match="the model has 2 classes; expected 3"):
        list(evaluator.run(Classifier(lambda number: 0, 2), processor))
    with pytest.raises(ValueError, match="label 2 is not one of the 2 classes False, True"):
        ClassificationEvaluator(rows, REASONING_LABELS)


def test_two_pictures_come_in_their_order(tmp_path, processor):
    rows = open_reasoning([str(write_reasoning(tmp_path)[0])])
    model = Classifier(lambda number: 1, 2)
    evaluator = ClassificationEvaluator(rows, REASONING_LABELS, "nlvr2", images=("image", "second_image"))
    values = dict(evaluator.run(model, processor))
    assert values["nlvr2/accuracy"] == values["nlvr2/chance"] == 0.5 and values["nlvr2/recall_True"] == 1.0
    (pixels,) = model.pixels
    first, second = (
        processor.image_processor([rows[0][name]])["pixel_values"][0] for name in ("image", "second_image")
    )
    assert torch.equal(pixels[0, 0], first) and torch.equal(pixels[0, 1], second) and not torch.equal(first, second)


def test_a_picture_that_cannot_be_read_is_named(tmp_path, processor):
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(ImageDecodeError, match="picture .*no.png"):
        task_inputs(processor, [{"image": str(tmp_path / "no.png"), "text": "red"}])

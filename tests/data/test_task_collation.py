"""Rows of tasks to batches: the joint layout, one picture or two, labels, and answers with what they weigh."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_loading import special_of
from tiny_task_data import COLOURS, said, write_entailment, write_merged_vqa, write_reasoning

from oner.processing.data.augmentation import TrainingImageTransform
from oner.processing.data.chunks import split_pairs
from oner.processing.data.collation import Collator, Reader
from oner.processing.data.layouts import JointLayout
from oner.processing.data.quarantine import BadRow, BadRowsError
from oner.processing.data.sampling import RowKey
from oner.processing.data.task_collation import (
    AnswerClasses,
    Answers,
    Labels,
    encode_answers,
    vote_accuracy,
    weigh_answers,
)
from oner.processing.data.task_rows import open_entailment, open_questions, open_reasoning
from oner.processing.vl_tokenizer import train_tokenizer
from oner.training.evaluation.answers import answer_accuracy, normalise_answer

TEXTS = ["What colour is picture 0 ?", "The picture is bright no. 1", "One is it", "a car", " ".join(COLOURS), "0 1 2"]
END = 3  # this vocabulary has no [SEP]: [CLS] ends an answer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 2, vocab_size=200, min_frequency=1)


def made(tokenizer, targets, images=("image",)):
    reader = Reader(tokenizer, TrainingImageTransform(16), images=images, text="text")
    return Collator(reader, JointLayout(special_of(tokenizer), 8), None, targets, seed=5, source="it")


def labelled(tokenizer, images=("image",)):
    return made(tokenizer, Labels(), images)


def answered(tokenizer):
    return made(tokenizer, Answers(tokenizer, special_of(tokenizer), END))


def items_of(rows, numbers, epoch=0):
    return [(RowKey(number, epoch, 0.0), row) for number, row in zip(numbers, rows.take(numbers), strict=True)]


def test_entailment(tmp_path, tokenizer):
    rows = open_entailment([str(write_entailment(tmp_path)[0])])
    collator = labelled(tokenizer)
    batch = collator(items_of(rows, [4, 0, 9]))
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "ids", "rows", "labels"}
    assert batch["labels"].tolist() == [rows[number]["label"] for number in (4, 0, 9)] == [1, 0, 0]
    assert batch["rows"].tolist() == [4, 0, 9] and batch["pixel_values"].shape == (3, 3, 16, 16)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids[:, :5].tolist() == [[3, 1, 1, 1, 1]] * 3  # [CLS] and four patches
    for row, number in enumerate((4, 0, 9)):
        words = tokenizer(rows[number]["text"], add_special_tokens=False)["input_ids"]
        assert ids[row, 5 : 5 + len(words)].tolist() == words
        assert mask[row].sum() == 5 + len(words) and not ids[row, 5 + len(words) :].any()


def test_a_row_does_not_depend_on_its_batch(tmp_path, tokenizer):
    rows = open_reasoning([str(write_reasoning(tmp_path)[0])])
    collator = labelled(tokenizer, images=("image", "second_image"))
    together, alone = collator(items_of(rows, [3, 7])), collator(items_of(rows, [7]))
    assert together["pixel_values"].shape == (2, 2, 3, 16, 16)
    torch.testing.assert_close(together["pixel_values"][1], alone["pixel_values"][0], rtol=0, atol=0)
    again, later = collator(items_of(rows, [7])), collator(items_of(rows, [7], epoch=1))
    assert torch.equal(again["pixel_values"], alone["pixel_values"])
    # pictures of one colour: crops differ in nothing, so the draws themselves are asked
    assert not np.array_equal(RowKey(7, 0, 0.0).generator(5).random(3), RowKey(7, 1, 0.0).generator(5).random(3))
    assert later["labels"].tolist() == [1]


def test_two_pictures_keep_their_order(tmp_path, tokenizer):
    rows = open_reasoning([str(write_reasoning(tmp_path)[1])])
    batch = labelled(tokenizer, images=("image", "second_image"))(items_of(rows, [0]))
    red, green = batch["pixel_values"][0].mean(dim=(2, 3))
    assert red.argmax() == 0 and green.argmax() == 1
    swapped = labelled(tokenizer, images=("second_image", "image"))(items_of(rows, [0]))
    torch.testing.assert_close(swapped["pixel_values"].flip(1), batch["pixel_values"], rtol=0, atol=0)


def test_questions_bring_every_different_answer(tmp_path, tokenizer):
    rows = open_questions([str(write_merged_vqa(tmp_path))])
    batch = answered(tokenizer)(items_of(rows, [0, 3, 5]))
    assert batch["answers_per_question"].tolist() == [3, 1, 3] and "labels" not in batch
    torch.testing.assert_close(batch["answer_weights"], torch.tensor([0.7, 0.2, 0.1, 0.5, 0.7, 0.2, 0.1]))
    expected = ["red", "green", "a car", "white", "green", "blue", "a car"]
    for row, answer in enumerate(expected):
        words = tokenizer(answer, add_special_tokens=False)["input_ids"]
        length = len(words) + 2
        assert batch["answer_ids"][row, :length].tolist() == [3, *words, END]
        assert batch["answer_mask"][row].tolist() == [1] * length + [0] * (batch["answer_ids"].shape[1] - length)


def test_weights_of_answers():
    assert weigh_answers(said(0)) == pytest.approx({"red": 0.7, "green": 0.2, "a car": 0.1})
    assert list(weigh_answers(["b", "a", "b"])) == ["b", "a"]
    assert weigh_answers(["yes"], 0.5) == {"yes": 0.5}
    assert weigh_answers(["yes", " ", "yes", ""]) == {"yes": 0.5}


def test_an_answer_reads_no_special_token(tokenizer):
    ids, mask = encode_answers(tokenizer, ["[MASK] red", "red"], 3, END, 0)
    assert 4 not in ids and mask.sum(1).tolist() == (ids != 0).sum(1).tolist()
    longer = encode_answers(tokenizer, ["red green blue white"], 3, END, 0, max_length=2)[0]
    assert longer.shape == (1, 4) and longer[0, -1] == END
    with pytest.raises(ValueError, match="no token is left of the answer ''"):
        encode_answers(tokenizer, ["red", ""], 3, END, 0)


def test_bad_rows_are_replaced_and_listed(tmp_path, tokenizer):
    rows = open_questions([str(write_merged_vqa(tmp_path))])
    good, silent = rows[1], {**rows[2], "answers": [" "]}
    blind = {**rows[3], "image": str(tmp_path / "vqa_train.json")}
    collator = answered(tokenizer)
    stand_in = (RowKey(1, 0, 0.0), good)
    batch = collator(
        [
            (RowKey(2, 0, 0.0), silent, [(RowKey(3, 0, 0.0), blind), stand_in]),
            (RowKey(0, 0, 0.0), rows[0], []),
            (RowKey(9, 0, 0.0), BadRow("known before", known=True), [stand_in]),
        ]
    )
    assert batch["rows"].tolist() == [1, 0, 1]
    first, second = batch["quarantine"]
    assert (first["row"], first["reason"], first["replaced_by"]) == (2, "there is no answer to learn", 1)
    assert second["row"] == 3 and "cannot read the picture" in second["reason"]
    with pytest.raises(ValueError, match="row 3 of it: cannot read the picture"):
        collator([(RowKey(3, 0, 0.0), blind)])
    with pytest.raises(BadRowsError, match="row 3 of it cannot be used"):
        collator([(RowKey(3, 0, 0.0), blind, [])])
    with pytest.raises(ValueError, match="an empty batch"):
        collator([])


def test_chunks_hold_their_own_answers(tmp_path, tokenizer):
    rows = open_questions([str(write_merged_vqa(tmp_path))])
    batch = answered(tokenizer)(items_of(rows, [0, 3, 5, 7, 2]))
    chunks = split_pairs(batch, 3)
    assert [len(chunk["input_ids"]) for chunk in chunks] == [1, 2, 2]
    assert [chunk["answers_per_question"].tolist() for chunk in chunks] == [[3], [1, 3], [1, 3]]
    for name, value in batch.items():
        assert torch.equal(torch.cat([chunk[name] for chunk in chunks]), value)
        assert all(len(chunk["answer_ids"]) == chunk["answers_per_question"].sum() for chunk in chunks)
    with pytest.raises(ValueError, match="5 rows to split into 6 chunks"):
        split_pairs(batch, 6)


def test_answers_of_a_list_are_as_right_as_they_score(tokenizer):
    """The official evaluation's own number for each answer, of ten people; of one person, what they said."""
    classes = ["blue", "red car", "7", "the blue", "green"]
    collator = AnswerClasses(classes, normalise_answer)
    people = ["Blue."] * 3 + ["a red car"] * 2 + ["seven"] * 4 + ["pink"]
    rows = [
        {"answers": people, "weight": 1.0},
        {"answers": ["green"], "weight": 0.5},
        {"answers": ["pink"] * 10, "weight": 1.0},
    ]
    labels = collator([SimpleNamespace(row=row) for row in rows])["labels"]
    expected = [answer_accuracy(answer, people) for answer in ("blue", "red car", "7")]
    torch.testing.assert_close(labels[0], torch.tensor([*expected, 0.0, 0.0]))
    assert labels[1].tolist() == [0, 0, 0, 0, 0.5] and labels[2].sum() == 0
    assert [vote_accuracy(votes, 10) for votes in range(5)] == pytest.approx([0, 0.3, 0.6, 0.9, 1])
    assert collator.reason(rows[2]) is None and "no answer" in collator.reason({"answers": [" "]})

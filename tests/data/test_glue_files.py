"""GLUE's TSV files as they are published, what is wrong with a row of one, and two texts in one row of tokens."""

import numpy as np
import pytest

from oner import train_tokenizer
from oner.processing.data.collation import joined_ids, token_ids
from oner.processing.data.glue_files import TEXT_TASKS, open_text_task
from oner.processing.data.row_checks import PairDataError
from oner.processing.vl_captions import pre_caption

# task -> the columns of its train.tsv, one row of it, and what is read
OFFICIAL = {
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t31\t31n\tgov\t( a )\t( b )\t(R a)\t(R b)\tA first.\tA second.\tneutral\tneutral",
        ("A first.", "A second.", 1),
    ),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t70\t71\tHe said "no .\tHe refused .',
        ('He said "no .', "He refused .", 1),
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "5\t1\t2\tHow so?\tWhy?\t0",
        ("How so?", "Why?", 0),
    ),
    "sst2": ("sentence\tlabel", "hide new secretions \t0", ("hide new secretions ", None, 0)),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        "0\tWhen?\tThen it was.\tnot_entailment",
        ("When?", "Then it was.", 1),
    ),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\tIt is.\tIs it?\tentailment", ("It is.", "Is it?", 0)),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSR\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t4.750",
        ("A plane.", "An air plane.", 4.75),
    ),
}


def write(path, *lines: str, end: str = "\n") -> str:
    path.write_text(end.join(lines) + end, encoding="utf-8", newline="")
    return str(path)


@pytest.mark.parametrize("task", OFFICIAL)
def test_an_official_file(task, tmp_path):
    header, line, (first, second, label) = OFFICIAL[task]
    for end in ("\n", "\r\n"):
        (row,) = open_text_task([write(tmp_path / "train.tsv", header, line, end=end)], task).take([0])
        assert (row["text"], row["second_text"], row["label"]) == (first, second, label)
        assert type(row["label"]) is type(label)


def test_the_tasks_are_those_of_the_paper():
    assert set(TEXT_TASKS) - {"hypernym", "supersense"} == set(OFFICIAL)
    assert {name for name, task in TEXT_TASKS.items() if task.metric == "f1"} == {"mrpc", "qqp"}
    assert len(TEXT_TASKS["supersense"].labels) == len(set(TEXT_TASKS["supersense"].labels)) == 45


def test_bad_rows_keep_their_numbers(tmp_path):
    lines = ["good words\t1", "no label", "\t0", "words\t2", "more\twords\t1", "fine\t0"]
    source = write(tmp_path / "train.tsv", "sentence\tlabel", *lines)
    rows = open_text_task([source], "sst2", bad_rows="skip")
    assert len(rows) == 6 and sorted(rows.bad) == [1, 2, 3, 4]
    assert rows.bad[1] == "has 1 fields where the header has 2" and rows.bad[2] == "the text is empty"
    assert rows.bad[3] == "the label must be one of 0, 1, got '2'"
    with pytest.raises(PairDataError, match="has 1 fields where the header has 2"):
        open_text_task([source], "sst2")
    source = write(tmp_path / "scores.tsv", OFFICIAL["stsb"][0], OFFICIAL["stsb"][1].replace("4.750", "nan"))
    with pytest.raises(PairDataError, match="the score must be a number, got 'nan'"):
        open_text_task([source], "stsb")


def test_files_that_are_none(tmp_path):
    with pytest.raises(PairDataError, match="no column 'label'; found index, sentence; expected the official TSV"):
        open_text_task([write(tmp_path / "test.tsv", "index\tsentence", "0\twords")], "sst2")
    with pytest.raises(PairDataError, match="cannot be read"):
        open_text_task([str(tmp_path / "missing.tsv")], "sst2")
    with pytest.raises(ValueError, match="unknown task of texts 'cola'; expected one of mnli, mrpc"):
        open_text_task(["x"], "cola")


def test_several_files_are_one_after_the_other_and_cleaned(tmp_path):
    sources = [write(tmp_path / f"{n}.tsv", "sentence\tlabel", f"Word, {n}!\t{n}") for n in range(2)]
    rows = open_text_task(sources, "sst2", clean=pre_caption).take([0, 1])
    assert [(row["text"], row["label"], row["id"]) for row in rows] == [("word 0", 0, 0), ("word 1", 1, 1)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three four five six seven eight"] * 3, vocab_size=100)


def test_two_texts_stand_behind_each_other(tokenizer):
    first, second = token_ids(tokenizer, ["one two", "three"])
    joined, alone = joined_ids(tokenizer, ["one two", "one two"], ["three", None], 10)
    # a vocabulary without [SEP] has [CLS] there again
    assert joined.tolist() == [*first, tokenizer.cls_token_id, *second] and alone.tolist() == first.tolist()
    longest = joined_ids(tokenizer, ["one two"], ["three"])[0]
    assert np.array_equal(longest, joined)


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        ("one two three four five six", "seven", (5, 1)),
        ("seven", "one two three four five six", (1, 5)),
        ("one two three four five", "one two three four five", (3, 3)),
        ("one two three", "four five six", (3, 3)),
    ],
)
def test_the_longer_of_two_is_cut_first(tokenizer, first, second, kept):
    (ids,) = joined_ids(tokenizer, [first], [second], 7)
    place = ids.tolist().index(tokenizer.cls_token_id)
    assert (place, len(ids) - place - 1) == kept

"""Rows of questions, entailment and reasoning out of the files that they are published in."""

import json
from functools import partial
from pathlib import Path

import pytest
from tiny_task_data import (
    COLOURS,
    LABELS,
    dump,
    dump_lines,
    hypothesis,
    question,
    said,
    write_answer_list,
    write_entailment,
    write_genome,
    write_merged_vqa,
    write_reasoning,
    write_vqa,
)

from oner.modeling import modeling_simla_tasks
from oner.processing.data.row_checks import PairDataError
from oner.processing.data.task_rows import (
    ENTAILMENT_LABELS,
    REASONING_LABELS,
    open_entailment,
    open_questions,
    open_reasoning,
    read_answer_list,
)
from oner.processing.vl_captions import pre_caption, pre_question


def rows_of(opened) -> list[dict]:
    return opened.take(range(len(opened)))


def test_questions_of_vqa_meet_their_annotations(tmp_path):
    questions, annotations = write_vqa(tmp_path)
    for sources in ([questions, annotations], [annotations, questions]):
        rows = rows_of(open_questions([str(one) for one in sources]))
        assert len(rows) == 16
        for number, row in enumerate(rows):
            assert row["text"] == question(number) and row["answers"] == said(number) and row["weight"] == 1
            assert row["image"] == str(tmp_path / f"train2014/COCO_train2014_{number % 4 + 7:012d}.jpg")
            assert row["id"] == (number % 4 + 7) * 1000 + number
            assert row["kind"] == ("other" if number % 2 else "yes/no")


def test_questions_of_several_files_are_matched_by_number(tmp_path):
    train, val = write_vqa(tmp_path, "train2014", 4), write_vqa(tmp_path, "val2014", 8)
    content = json.loads(val[0].read_text())
    content["questions"] = [{**one, "question_id": one["question_id"] + 500_000} for one in content["questions"]]
    told = json.loads(val[1].read_text())
    told["annotations"] = [{**one, "question_id": one["question_id"] + 500_000} for one in told["annotations"]][::-1]
    dump(val[0], content), dump(val[1], told)
    rows = rows_of(open_questions([str(path) for path in (*train, *val)]))
    assert [row["answers"] for row in rows] == [said(number) for number in [*range(4), *range(8)]]
    assert "val2014/COCO_val2014" in rows[4]["image"]


def test_questions_of_a_test_have_no_answers(tmp_path):
    questions, _ = write_vqa(tmp_path)
    (tmp_path / "train2014").rename(tmp_path / "test2015")
    for picture in (tmp_path / "test2015").iterdir():  # without a folder of the split
        picture.rename(tmp_path / picture.name.replace("train2014", "test2015"))
    content = json.loads(questions.read_text()) | {"data_subtype": "test-dev2015"}
    dump(questions, content)
    rows = rows_of(open_questions([str(questions)], answered=False))
    assert all(row["answers"] == [] and row["image"].endswith(".jpg") for row in rows)
    with pytest.raises(PairDataError, match=r"16 of 16 rows cannot be used.*row 0: there is no answer"):
        raise_flat(lambda: open_questions([str(questions)]))


def raise_flat(call):
    """A message of several lines in one."""
    try:
        call()
    except PairDataError as error:
        raise PairDataError(str(error).replace("\n", " ")) from None


def test_merged_files_of_albef(tmp_path):
    rows = rows_of(open_questions([str(write_merged_vqa(tmp_path))]))
    assert [row["id"] for row in rows] == list(range(16))
    for number, row in enumerate(rows):
        genome = number % 4 == 3
        assert row["weight"] == (0.5 if genome else 1.0)
        assert row["answers"] == (said(number)[:1] if genome else said(number))
    elsewhere = tmp_path / "genome"
    (elsewhere / "train2014").mkdir(parents=True)
    with pytest.raises(PairDataError, match="row 3: no picture file .*genome/train2014"):
        raise_flat(lambda: open_questions([str(tmp_path / "vqa_train.json")], genome_folder=str(elsewhere)))


def test_visual_genome_alone_and_beside_vqa(tmp_path):
    genome, vqa = write_genome(tmp_path / "vg"), write_vqa(tmp_path)
    rows = rows_of(open_questions([str(genome)]))
    assert [row["id"] for row in rows] == [0, 1, 10, 11] and {row["weight"] for row in rows} == {0.5}
    assert [row["answers"] for row in rows] == [["red."], ["red."], ["green."], ["green."]]
    assert Path(rows[0]["image"]).parent.name == "VG_100K_2" and Path(rows[2]["image"]).parent.name == "VG_100K"
    every = [str(path) for path in (genome, *vqa)]
    both = open_questions(every, str(tmp_path), genome_folder=str(tmp_path / "vg"))
    assert len(both) == 20 and both.name.endswith("question_answers.json (+2)")
    assert both[4]["answers"] == said(0)


def test_what_is_wrong_with_a_question_is_said(tmp_path):
    questions, annotations = write_vqa(tmp_path)
    content = json.loads(questions.read_text())
    broken = content["questions"]
    broken[1]["question_id"] = "seven"
    del broken[2]["image_id"]
    broken[3]["question_id"] = 5
    broken[4]["question"] = "  "
    broken[5]["image_id"] = 99
    broken[6] = "text"
    told = json.loads(annotations.read_text())
    told["annotations"][7]["answers"] = [{"answer": 3}]
    told["annotations"][8]["answers"] = [{"answer": " "}]
    dump(questions, content), dump(annotations, told)
    sources = [str(questions), str(annotations)]
    with pytest.raises(PairDataError) as caught:
        open_questions(sources)
    expected = [
        "8 of 16 rows cannot be used",
        "row 1: 'question_id' must be int, got str 'seven'",
        "row 2: there is no 'image_id' among the fields image_id, question, question_id",
        "row 3: question 5 has no annotation",
        "row 4: the text is empty",
        f"row 5: no picture file {tmp_path}/train2014/COCO_train2014_000000000099.jpg",
        "row 6: a row must be an object, got str 'text'",
        "row 7: an answer must be a string, got int 3",
        "row 8: there is no answer",
    ]
    expected[2] = "row 2: there is no 'image_id' among the fields question, question_id"
    for line in expected:
        assert line in str(caught.value)
    kept = open_questions(sources, bad_rows="skip")
    assert sorted(kept.bad) == list(range(1, 9)) and len(kept) == 16 and kept[9]["answers"] == said(9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"info": {}}, "expected VQA v2's questions or annotations, .*got dict with \\['info'\\]"),
        (None, "got NoneType with nothing"),
        ([], "no rows"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    with pytest.raises(PairDataError, match=message):
        open_questions([str(dump(tmp_path / "other.json", content))])


def test_files_that_cannot_be_read(tmp_path):
    _, annotations = write_vqa(tmp_path)
    with pytest.raises(PairDataError, match="annotations without the questions"):
        open_questions([str(annotations)])
    with pytest.raises(PairDataError, match="missing.json: cannot be read: No such file"):
        open_questions([str(tmp_path / "missing.json")])
    (tmp_path / "cut.json").write_text('{"questions": [')
    with pytest.raises(PairDataError, match="cut.json: cannot be read as JSON: it is not JSON .Expecting value"):
        open_questions([str(tmp_path / "cut.json")])
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(PairDataError, match="latin.json: cannot be read as JSON: it is not UTF-8"):
        open_questions([str(tmp_path / "latin.json")])


def test_questions_are_cleaned_as_asked(tmp_path):
    sources = [str(path) for path in write_vqa(tmp_path)]
    assert open_questions(sources, clean=pre_question)[3]["text"] == "what colour is picture 3"
    short = open_questions(sources, clean=partial(pre_question, max_words=2))
    assert {row["text"] for row in rows_of(short)} == {"what colour"}
    content = json.loads(Path(sources[0]).read_text())
    content["questions"][2]["question"] = "?!"
    dump(Path(sources[0]), content)
    with pytest.raises(PairDataError, match=r"row 2: no word is left of the text '\?!'"):
        raise_flat(lambda: open_questions(sources, clean=pre_question))


def test_candidates(tmp_path):
    assert read_answer_list(str(write_answer_list(tmp_path))) == [*COLOURS, "a car"]
    for content in ({}, [], ["red", 3], ["red", ""]):
        with pytest.raises(PairDataError, match="expected a list of answers"):
            read_answer_list(str(dump(tmp_path / "list.json", content)))
    with pytest.raises(PairDataError, match="'red' stands there twice"):
        read_answer_list(str(dump(tmp_path / "list.json", ["red", "blue", "red"])))


def test_entailment_in_both_formats(tmp_path):
    official, merged = write_entailment(tmp_path)
    assert modeling_simla_tasks.ENTAILMENT_LABELS == ENTAILMENT_LABELS == LABELS
    for source in (official, merged):
        rows = rows_of(open_entailment([str(source)]))
        for number, row in enumerate(rows):
            sentence, label = hypothesis(number)
            assert (row["text"], ENTAILMENT_LABELS[row["label"]]) == (sentence, label)
            assert row["image"] == str(tmp_path / f"flickr30k-images/{1000 + number % 4}.jpg")
    assert rows_of(open_entailment([str(official)]))[1]["id"] == "1001.jpg#0r1"
    cleaned = open_entailment([str(official)], str(tmp_path / "flickr30k-images"), clean=pre_caption)
    assert cleaned[0]["text"] == pre_caption(hypothesis(0)[0]) and Path(cleaned[0]["image"]).is_file()


def test_reasoning_in_both_formats(tmp_path):
    official, merged = write_reasoning(tmp_path)
    assert modeling_simla_tasks.REASONING_LABELS == REASONING_LABELS
    one, other = (rows_of(open_reasoning([str(source)])) for source in (official, merged))
    for number, (row, same) in enumerate(zip(one, other, strict=True)):
        assert {name: row[name] for name in row if name != "id"} == {name: same[name] for name in same if name != "id"}
        assert row["label"] == number % 2  # "True" is 1
        assert row["image"].endswith(f"train-{number // 2}-0-img0.png") and Path(row["image"]).is_file()
        assert row["second_image"].endswith(f"train-{number // 2}-0-img1.png") and Path(row["second_image"]).is_file()
    (tmp_path / "train.json").write_text(official.read_text())  # as NLVR2 calls its lines
    assert rows_of(open_reasoning([str(tmp_path / "train.json")])) == one
    assert one[3]["id"] == "train-1-0-1" and other[3]["id"] == "row 3"
    assert Path(one[0]["image"]).parent.name == "0" and Path(one[15]["image"]).parent.name == "train"


def test_what_is_wrong_with_a_sentence_is_said(tmp_path):
    official, merged = write_reasoning(tmp_path)
    lines = official.read_text().splitlines()
    lines[1] = lines[1][:-9]
    lines[2] = lines[2].replace("train-1-0-0", "nothing")
    lines[3] = lines[3].replace('"True"', '"Maybe"')
    lines[4] = lines[4].replace("train-2-0-0", "train-77-0-0")
    official.write_text("\n".join(lines))
    with pytest.raises(PairDataError) as caught:
        open_reasoning([str(official)])
    for line in (
        "4 of 16 rows cannot be used",
        "row 1: is not JSON (",
        "row 2: 'identifier' must read like 'train-10171-0-0', got 'nothing'",
        "row 3: the label must be one of False, True, got 'Maybe'",
        f"row 4: no picture file {tmp_path}/train-77-0-img0.png; no picture file {tmp_path}/train-77-0-img1.png",
    ):
        assert line in str(caught.value)
    content = json.loads(merged.read_text())
    content[0]["images"] = content[0]["images"][:1]
    with pytest.raises(PairDataError, match="'images' must be two paths"):
        open_reasoning([str(dump(merged, content))])
    dump_lines(tmp_path / "ve.jsonl", [{"sentence2": "red", "gold_label": "-", "Flickr30K_ID": "7"}])
    with pytest.raises(PairDataError, match="the label must be one of contradiction, neutral, entailment, got '-'"):
        open_entailment([str(tmp_path / "ve.jsonl")])
    with pytest.raises(PairDataError, match="expected a list of sentences, got dict"):
        open_entailment([str(dump(tmp_path / "ve.json", {}))])

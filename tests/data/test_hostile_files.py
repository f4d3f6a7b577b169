"""Files of every reader that are no files, or are nested so deep that a reader would give up: each is named."""

import json
import os
from functools import partial

import datasets
import pytest
from PIL import Image

from oner.processing.data.grounding_files import open_grounding, read_boxes
from oner.processing.data.karpathy import open_karpathy
from oner.processing.data.sources import PairDataError, open_rows
from oner.processing.data.task_rows import open_entailment, open_questions, open_reasoning, read_answer_list
from oner.training.run.parsing import read_config

READERS = {
    "questions": lambda path: open_questions([path]),
    "entailment": lambda path: open_entailment([path]),
    "reasoning": lambda path: open_reasoning([path]),
    "answers": read_answer_list,
    "karpathy": open_karpathy,
    "grounding": open_grounding,
    "boxes": lambda path: read_boxes(path, path, path),
    "configuration": read_config,
    "texts": partial(open_rows, kind="texts"),
    "pairs": open_rows,
}
DEPTHS = (300, 5_000, 200_000)


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_not_waited_for(tmp_path, reader):
    for name in ("p.json", "p.jsonl"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}: is a pipe; expected a file"):
            READERS[reader](str(tmp_path / name))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("reader", READERS)
def test_a_deep_document_is_refused_in_words(tmp_path, reader, depth):
    (tmp_path / "deep.json").write_text("[" * depth + "]" * depth)
    with pytest.raises(ValueError, match=rf"deep\.json: .*({depth} deep|nested too deep|expected a mapping)"):
        READERS[reader](str(tmp_path / "deep.json"))


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_deep_line_of_a_task_is_one_bad_row(tmp_path, depth):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg")
    good = json.dumps({"Flickr30K_ID": "1", "sentence2": "a cat", "gold_label": "neutral", "pairID": "a"})
    bad = good[:-1] + ', "z": ' + "[" * depth + "]" * depth + "}"
    (tmp_path / "s.jsonl").write_text("\n".join([good, bad, good]))
    rows = open_entailment([str(tmp_path / "s.jsonl")], bad_rows="skip")
    assert len(rows) == 3 and list(rows.bad) == [1] and f"{depth + 1} deep" in rows.bad[1]


@pytest.mark.parametrize("depth", DEPTHS[:2])
def test_the_head_of_a_readme_that_is_nested_too_deep(tmp_path, depth, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    for head in ("configs: " + "[" * depth + "]" * depth, "configs: [", "a: &a [*a]\nconfigs: 3"):
        (folder / "README.md").write_text(f"---\n{head}\n---\n")
        with pytest.raises(PairDataError, match="data: not a file, not a folder with metadata"):
            open_rows(folder)


def test_configurations_that_cannot_be_read(tmp_path):
    for name, content, words in (
        ("cut.yaml", "a: [", "cut.yaml: cannot be read as YAML"),
        ("latin.yaml", b"a: caf\xe9", "latin.yaml: cannot be read as YAML"),
        ("circle.yaml", "base: circle.yaml", "circle.yaml: is its own base"),
        ("list.yaml", "base: [a]", "expected another file's path"),
    ):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=words):
            read_config(tmp_path / name)
    with pytest.raises(ValueError, match="none.yaml: cannot be read: No such file"):
        read_config(tmp_path / "none.yaml")

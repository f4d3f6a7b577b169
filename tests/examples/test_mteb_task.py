"""examples/mteb_task.py: mteb's R@k of an export, by sentence-transformers, are those of our own evaluation."""

import pytest
from families import FAMILIES
from tiny_pretraining import load_example
from tiny_repository import emoji_rows, model_of, processor_of

from oner.training.publishing.hub import export_model

pytest.importorskip("mteb")
pytest.importorskip("sentence_transformers")


def test_both_ways_give_the_same_recall(emoji_folder, tmp_path):
    rows = emoji_rows(emoji_folder)
    processor = processor_of(FAMILIES["oner"], rows)
    model = export_model(model_of(FAMILIES["oner"], processor), processor, tmp_path / "model")
    # an id of two rows: a query with two right answers
    some = [{**row, "id": number // 2} for number, row in enumerate(rows[:24])]
    numbers = list(load_example("mteb_task").compare(model, some, "emoji"))
    assert len(numbers) == 6
    for name, ours, theirs in numbers:
        assert theirs == pytest.approx(ours, abs=1e-5), name

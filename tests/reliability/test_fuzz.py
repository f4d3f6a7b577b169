"""A few mutants of each kind that is quickly read; `make fuzz` has thousands, in processes that may die."""

import random

import datasets
import pytest
from fuzz_files import TASKS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "count"), [("nesting", 20), ("task_files", 400), ("archives", 150)])
def test_mutants_are_read_or_refused_in_words(kind, count, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = TASKS[kind](tmp_path)
    outcomes = set()
    for number in range(count):
        rng = random.Random(f"0 {kind} {number}")
        outcomes.add(task.read(task.make(rng), rng))
    assert {"read", "read in part", "refused"} <= outcomes or kind == "nesting"

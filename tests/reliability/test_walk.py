"""The count of files from disk to loss only goes down, and `make walk` counts what it says."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import walk
from families import PRETRAINING

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
# family -> files today; lower a number when the walk has become shorter
TODAY = {"oner": 27, "simla": 30, "codis": 29, "momo": 30}


@pytest.fixture(scope="module")
def walked() -> dict[str, walk.Walk]:
    return walk.main([])


def test_the_walk_does_not_become_longer(family, walked):
    files = walked[family.name].files
    assert len(files) <= TODAY[family.name], files


def test_the_walk_leads_from_the_rows_to_the_losses(family, walked):
    files = walked[family.name].files
    road = (
        "training/commands/train.py",
        "processing/data/rows.py",
        "processing/data/collation.py",
        f"modeling/{family.classes[PRETRAINING].__module__.rpartition('.')[2]}.py",
        "training/objectives/losses.py",
    )
    places = [files.index(name) for name in road]
    assert places == sorted(places) and places[0] == 0
    assert len(files) == len(set(files)) and not [name for name in files if not (walk.ROOT / name).is_file()]


def test_what_is_left_out_was_there(walked):
    """A function or a file that has been renamed must not count by its new name."""
    for name, one in walked.items():
        assert one.left_out - walk.ASIDE_FILES == walk.ASIDE, name
    assert set().union(*(one.left_out for one in walked.values())) >= walk.ASIDE_FILES


def test_only_calls_of_this_project_count():
    seen = walk.Walk()
    sys.setprofile(seen)
    try:
        Path("x").is_absolute()
        walk.function_of(sys._getframe())
    finally:
        sys.setprofile(None)
    assert seen.files == []

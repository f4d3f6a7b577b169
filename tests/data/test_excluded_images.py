"""Images of evaluation sets are kept out of training by the hashes of their files."""

import subprocess
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_pretraining import tiny_arguments, write_pairs

from oner.processing.data.collation import Collator, Reader
from oner.processing.data.excluded_images import image_hash, read_hashes
from oner.processing.data.layouts import ImageLayout
from oner.processing.data.places import PairDataError
from oner.processing.data.quarantine import BadRow, Quarantine, Watch, line_of, read_quarantine
from oner.processing.data.sampling import RowKey
from oner.training.run.parsing import parse_arguments


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three pictures of the embedded pairs."""
    cells = pq.read_table(write_pairs(tmp_path / "pairs.parquet"))["image"].to_pylist()[:3]
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, cell in zip(paths, cells, strict=True):
        path.write_bytes(cell["bytes"])
    return paths


def test_a_list_is_what_sha256sum_writes(files: list[Path], tmp_path: Path) -> None:
    told = subprocess.run(["sha256sum", *files[:2]], capture_output=True, text=True, check=True).stdout
    (tmp_path / "list.sha256").write_text(f"\n{told.upper()}\n", encoding="utf-8")
    hashes = read_hashes([str(tmp_path / "list.sha256")])
    assert hashes == {sha256(path.read_bytes()).hexdigest() for path in files[:2]} and not read_hashes([])
    (tmp_path / "wrong.txt").write_text(f"{told}images/0001.jpg\n", encoding="utf-8")
    with pytest.raises(
        PairDataError, match="wrong.txt, line 3: expected a SHA-256 of 64 digits, got 'images/0001.jpg'"
    ):
        read_hashes([str(tmp_path / "wrong.txt")])
    with pytest.raises(PairDataError, match="nowhere: cannot be read as a list of hashes"):
        read_hashes([str(tmp_path / "nowhere")])


def test_an_image_is_known_however_a_row_holds_it(files: list[Path]) -> None:
    content, path = files[0].read_bytes(), str(files[0])
    held = [content, path, {"bytes": content, "path": "elsewhere.png"}, {"bytes": None, "path": path}]
    assert {image_hash(image) for image in held} == {sha256(content).hexdigest()}
    assert image_hash({"bytes": None, "path": None}) is None


def test_a_reader_takes_no_excluded_image_for_a_row(files: list[Path]) -> None:
    excluded = frozenset([sha256(files[1].read_bytes()).hexdigest()])
    reader = Reader(image_transform=lambda image, rng: np.zeros(1), excluded=excluded)
    read = [
        reader.read(RowKey(0, 0, 0.0), {"image": str(path), "captions": []}, np.random.default_rng(0))
        for path in files
    ]
    assert [isinstance(one, BadRow) for one in read] == [False, True, False]
    assert read[1].reason == f"the picture {str(files[1])!r} is excluded" and read[1].excluded


def test_excluded_rows_are_replaced_and_listed_but_are_no_bad_ones(files: list[Path], tmp_path: Path) -> None:
    """Of a set half of which is somebody's test set a run reads the other half, whatever `max_bad_rows` says."""
    excluded = frozenset([sha256(files[1].read_bytes()).hexdigest()])
    reader = Reader(image_transform=lambda image, rng: torch.zeros(3, 8, 8), excluded=excluded)
    own, other = ((RowKey(number, number, 0.0), {"image": str(files[number])}) for number in (1, 2))
    batch = Collator(reader, ImageLayout(8))([(*own, iter([other]))])
    assert batch["rows"].tolist() == [2] and batch["quarantine"][0]["excluded"] is True

    quarantine = Quarantine(tmp_path, {"pairs": (watch := Watch(max_bad_rows=0.0))})
    quarantine.add("pairs", 1, [line_of("files", **line) for line in batch["quarantine"]])
    assert watch.new == (0, 0) and [line["row"] for line in read_quarantine(quarantine.path)] == [1]
    quarantine.begin(2)
    assert watch.before == (0, 0) and len(read_quarantine(quarantine.path)) == 1
    # and one that is truly bad counts as ever
    quarantine.add("pairs", 2, [line_of("files", 0, "cannot be read", attempt=0)])
    assert watch.new == (1, 0)


@pytest.mark.parametrize("kind", ["pairs", "images"])
def test_a_run_takes_the_list_for_every_kind_of_rows_with_images(kind: str, files: list[Path], tmp_path: Path) -> None:
    from oner.training.run.building import build_processor_and_config
    from oner.training.run.collators import build_collators
    from oner.training.run.loading import open_portions

    digest = sha256(files[2].read_bytes()).hexdigest()
    (tmp_path / "list.sha256").write_text(f"{digest}  coco/2.png\n", encoding="utf-8")
    told = {"excluded_images": [tmp_path / "list.sha256"], "kind": kind}
    told |= (
        {} if kind == "pairs" else {"losses": ["mim"], "text_column": None, "model_config": {"decoders": ["image"]}}
    )
    family = "oner" if kind == "pairs" else "momo"
    if kind == "images":
        told["tokenizer"] = Path(__file__).parents[2] / "examples" / "checkpoints" / "oner-emoji"
    arguments = parse_arguments(tiny_arguments(tmp_path / "pairs.parquet", tmp_path / "run", family, **told))
    rows = open_portions(arguments)
    (collator,) = build_collators(arguments, *build_processor_and_config(arguments, rows)).values()
    assert collator.reader.excluded == {digest}

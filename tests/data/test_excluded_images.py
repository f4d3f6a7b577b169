"""Images of evaluation sets are kept out of training by the hashes of their files."""

import subprocess
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_pretraining import tiny_arguments, write_pairs

from oner.processing.data.collation import Reader
from oner.processing.data.excluded_images import image_hash, read_hashes
from oner.processing.data.places import PairDataError
from oner.processing.data.quarantine import BadRow
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
    assert read[1].reason == f"the picture {str(files[1])!r} is excluded"


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

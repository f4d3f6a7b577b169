"""examples/search.py: run as a reader would run it, and its contact sheet."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

import oner  # noqa: F401  registers the classes and the task
from oner.modeling.configuration_oner import OneRConfig
from oner.modeling.modeling_oner import OneRForImageTextRetrieval
from oner.processing.data.sources import open_rows
from oner.processing.image_processing_vl import VisionLanguageImageProcessor, open_image
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.processing.vl_tokenizer import train_tokenizer
from oner.training.evaluation import contact_sheet
from oner.training.run import shipped
from oner_command_line import main as command_line

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "search.py"
EMOJI = ROOT / "examples" / "data" / "emoji" / "test_concept.parquet"


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [open_image(pair["image"]) for pair in open_rows(str(EMOJI)).take(range(6))]


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory, pictures: list[Image.Image]) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(open_rows(str(EMOJI)).captions(), vocab_size=400)
    processor = VisionLanguageProcessor(
        VisionLanguageImageProcessor(size={"height": 32, "width": 32}, patch_size=16), tokenizer
    )
    torch.manual_seed(0)
    config = OneRConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
        patch_size=16, projection_hidden_size=32, projection_dim=16, pad_token_id=tokenizer.pad_token_id,
        image_token_id=processor.image_token_id, cls_token_id=tokenizer.cls_token_id,
        mask_token_id=tokenizer.mask_token_id, pooling="mean",
    )  # fmt: skip
    model = OneRForImageTextRetrieval(config)
    for module in model.modules():  # statistics of real pictures: random weights alone send all the same way
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.momentum = 1.0
    with torch.no_grad():
        model.train().get_image_features(processor(images=pictures)["pixel_values"])
    model.eval().save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture
def photos(pictures: list[Image.Image], tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(folder / f"picture-{number}.png")
    return folder


def run_here(*arguments: Any) -> int:
    return command_line(["search", *map(str, arguments)])


def test_words_and_picture_in_a_process_of_its_own(model_directory: Path, photos: Path, tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "sheet.png"
    command = [SCRIPT, "red fruit", "--image", photos / "picture-2.png", "--index", EMOJI, "--model", model_directory,
               "--top-k", 5, "--out", out, "--index-cache", cache]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=tmp_path, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
    scores = [float(row[1]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert f"of {len(open_rows(str(EMOJI)))} in test_concept.parquet" in done.stdout
    assert f"contact sheet: {out}" in done.stdout and (cache / "retrieval_index.json").is_file()
    with Image.open(out) as sheet:
        assert sheet.format == "PNG" and sheet.width > 900 and sheet.height > 700


def test_folder_is_indexed_once_and_again_when_a_file_changes(
    model_directory: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    options = ("--model", model_directory, "--out", tmp_path / "out.png", "--top-k", 3)
    asked = ("--image", photos / "picture-4.png", "--index", photos, *options)
    run_here(*asked)
    first = capsys.readouterr()
    assert "indexing" in first.err and "   1  +1.000  picture-4" in first.out
    cache = tmp_path / ".photos.oner-index"
    run_here(*asked)
    second = capsys.readouterr()
    assert f"using the index kept in {cache}" in second.out and "indexing" not in second.err
    assert second.out.split("rank")[1] == first.out.split("rank")[1]

    (photos / "picture-4.png").rename(photos / "renamed.png")
    run_here("--image", photos / "renamed.png", *asked[2:])
    third = capsys.readouterr()
    assert "indexing" in third.err and "   1  +1.000  renamed" in third.out

    (embeddings,) = cache.glob("*.safetensors")
    for damaged in (embeddings, cache / "retrieval_index.json"):
        damaged.write_bytes(b"broken")
        run_here("sun", *asked[2:])
        assert f"indexing again: {damaged}" in capsys.readouterr().out
    assert len([file for file in cache.iterdir() if not file.name.startswith(".")]) == 3
    run_here("sun", "--index", cache, *options)  # a saved index as it is
    assert "of 6 in .photos.oner-index" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected a run, a folder of pictures"),
        (["--index", "."], "give words, --image, or both"),
        (["sun", "--index", "nowhere"], "--index nowhere: no such folder or file"),
        (["sun", "--index", ".", "--image", "no.png"], "--image no.png: no such file"),
    ],
)
def test_wrong_arguments(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_here(*arguments) == 2
    assert words in capsys.readouterr().err


def test_a_missing_shipped_model_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shipped, "FOLDERS", (tmp_path,))
    with pytest.raises(FileNotFoundError, match="make demo"):
        shipped.shipped_checkpoint()


def test_sheet_shows_query_and_answers_in_an_even_grid(photos: Path, pictures: list[Image.Image]) -> None:
    answers = [{"score": 0.5, "item": str(photos / f"picture-{i}.png"), "index": i} for i in range(6)]
    answers.append({"score": 0.1, "item": str(photos / "gone.png"), "index": 6})
    sheet = contact_sheet.draw_sheet({"text": "sun", "image": str(photos / "picture-0.png")}, answers, 7)
    side, gap, cell = contact_sheet.PICTURE, contact_sheet.GAP, contact_sheet.CELL
    assert sheet.width == gap + 4 * (cell + gap)
    for place in range(6):
        picture = pictures[place].resize((side, side), Image.Resampling.LANCZOS)
        left = gap + place % 4 * (cell + gap) + (cell - side) // 2
        top = cell + 2 * gap + place // 4 * (side + 92 + gap) + 12
        shown = sheet.crop((left, top, left + side, top + side))
        assert ImageChops.difference(shown, picture).getbbox() is None
    assert contact_sheet.picture_of(str(photos / "gone.png")) is None


@pytest.mark.parametrize("text", ["sun", "a caption that is longer than two lines of a card, by far", "x" * 99])
def test_captions_fit_their_card(text: str) -> None:
    face = contact_sheet.font(16)
    lines = contact_sheet.wrap(text, face, 200, 2)
    assert 1 <= len(lines) <= 2 and all(face.getlength(line) <= 200 for line in lines)
    assert " ".join(lines) == text or lines[-1].endswith("…")


def test_a_runs_sheet_shows_pictures_as_a_table_holds_them() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "#ff0000").save(stream, "PNG")
    sheet = contact_sheet.retrieval_sheet([("red", [({"bytes": stream.getvalue(), "path": None}, True)])], "title")
    middle = 2 * contact_sheet.CELL + contact_sheet.PICTURE // 2, 48 + contact_sheet.PICTURE // 2
    assert sheet.getpixel(middle) == (255, 0, 0)
    with pytest.raises(ValueError, match="not a picture"):
        contact_sheet.retrieval_sheet([("red", [({"bytes": b"no picture"}, True)])], "title")

"""examples/search.py: run as a reader would run it, and its contact sheet."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
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
from oner.training.commands.index import passed_over
from oner.training.commands.table_items import TableItems, columns_of_table, spelled
from oner.training.evaluation import contact_sheet
from oner.training.evaluation.results import results_directory
from oner.training.publishing import shipped
from oner.training.run.parsing import parse_arguments
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


def index_here(*arguments: Any) -> int:
    return command_line(["index", *map(str, arguments)])


def answers_of(capsys: pytest.CaptureFixture, *arguments: Any) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert run_here(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_an_index_counts_what_it_passed_over_and_is_asked_in_every_way(
    model_directory: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table with columns, a broken picture and a row without one; then the same again."""
    monkeypatch.chdir(tmp_path)
    (photos / "broken.png").write_bytes(b"broken")
    lines = [f"picture-{number}.png,thing {number},{('MIT', 'BSD')[number % 2]},20{number}0" for number in range(6)]
    table = photos / "metadata.csv"
    table.write_text("\n".join(["file_name,text,licence,year", *lines, "broken.png,a,MIT,1", "gone.png,,MIT,1"]))
    model = ("--model", model_directory)
    with pytest.warns(UserWarning, match="1 of 7 entries"):
        assert index_here(table, tmp_path / "index", *model) == 0
    said = capsys.readouterr().out
    assert f"6 items in {tmp_path / 'index'}: 6 embedded, 0 as they were" in said
    assert "passed over: 2 that were listed" in said and "     1  not a picture in a known format\n" in said
    with pytest.warns(UserWarning, match="1 of 7 entries"):
        index_here(table, tmp_path / "index", *model)
    assert "0 embedded, 6 as they were" in capsys.readouterr().out

    # JSON alone on stdout, no sheet, paths; numbers of a csv are numbers
    place = (tmp_path / "index", *model)
    asked = ("--image", photos / "picture-4.png")
    found = answers_of(capsys, *place, *asked, "--where", "licence=MIT", "--where", "year>=2020")
    assert [one["path"] for one in found][0] == str(photos / "picture-4.png") and found[0]["rank"] == 1
    assert {one["item"]["row"] for one in found} == {2, 4} and found[0]["item"]["year"] == 2040
    assert not (tmp_path / "results.png").exists()

    # sums, neighbours and re-ranking
    assert answers_of(capsys, *place, "--minus-image", photos / "picture-4.png")[-1]["index"] == 4
    both = answers_of(
        capsys, place[0], "thing", *model, "--plus-image", f"5:{photos / 'picture-1.png'}", "--minus", "0.1:two"
    )
    assert both[0]["index"] == 1
    near = answers_of(capsys, *place, "--like", "3", "--top-k", "2", "--out", tmp_path / "near.png")
    assert len(near) == 2 and 3 not in {one["index"] for one in near} and (tmp_path / "near.png").is_file()
    assert {one["index"] for one in answers_of(capsys, place[0], "thing", *model, "--rerank", "3")} == set(range(6))


def test_an_item_is_named_through_a_link(
    model_directory: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder and a table behind a link, asked for by the link, by the place itself, and from within it."""
    (photos / "0-link.png").symlink_to(photos / "picture-3.png")
    (tmp_path / "link").symlink_to(photos)
    (tmp_path / "tables").mkdir()
    names = ["0-link.png", *(f"picture-{number}.png" for number in range(6))]
    rows = [f"{photos / name},{name}" for name in names]
    (tmp_path / "tables" / "rows.csv").write_text("\n".join(["file_name,text", *rows]))
    monkeypatch.chdir(tmp_path / "link")
    for place in (tmp_path / "link", tmp_path / "tables" / "rows.csv"):
        link = tmp_path / "link"
        for said in (link / "picture-3.png", photos / "picture-3.png", "picture-3.png", "../photos/0-link.png"):
            found = answers_of(
                capsys, place, "--like", said, "--model", model_directory, "--index-cache", tmp_path / "cache"
            )
            assert len(found) == 6 and {one["index"] for one in found} == {*range(7)} - {names.index(Path(said).name)}


def test_other_backends_are_built_when_they_are_asked_for(
    model_directory: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("faiss")
    model = ("--model", model_directory)
    asked = ("--image", photos / "picture-4.png", *model)
    wanted = answers_of(capsys, photos, *asked, "--index-cache", tmp_path / "cache")
    for _ in range(2):
        assert answers_of(capsys, photos, *asked, "--index-cache", tmp_path / "cache", "--backend", "faiss") == wanted
    assert index_here(photos, tmp_path / "index", *model, "--backend", "faiss", "--kind", "hnsw") == 0
    assert "built faiss over 6 items" in capsys.readouterr().out
    (photos / "picture-0.png").unlink()
    index_here(photos, tmp_path / "index", *model)
    said = capsys.readouterr().out
    assert "built again: faiss" in said and "1 of the index before are gone or have changed" in said
    assert len(answers_of(capsys, tmp_path / "index", *asked, "--backend", "faiss")) == 5


def test_what_is_passed_over_is_summed_up_by_reason(tmp_path: Path) -> None:
    for name in ("a.png", "b.txt", "c.txt", "d", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    reasons = [
        "cannot read '/a/b.png': image file is truncated (12 bytes not processed)",
        "cannot read '/c.png': image file is truncated (7 bytes not processed)",
        "cannot read 60 bytes starting with b'\\x89PNG': image file is truncated (7 bytes not processed)",
        "cannot read '/d.png': not a picture in a known format, starts with b'x'",
    ]
    assert passed_over(reasons, tmp_path)[1:] == [
        "       3  image file is truncated (N bytes not processed)",
        "       1  not a picture in a known format",
        "       3  files that are no pictures (2 .txt, 1 without a suffix)",
    ]
    assert passed_over([], tmp_path / "a.png") == []


@pytest.mark.parametrize(
    ("cell", "value"),
    [("2020", 2020), ("1.5", 1.5), ("007", "007"), ("1e3", "1e3"), ("", None), ("nan", "nan"), ("MIT", "MIT")],
)
def test_cells_of_a_csv_are_numbers_where_they_spell_one(cell: str, value: Any) -> None:
    assert spelled(cell) == value and type(spelled(cell)) is type(value)


def test_columns_stand_beside_their_rows_and_prices_are_numbers(tmp_path: Path) -> None:
    """A file without further columns keeps its rows apart from those of the next; 3.50 is a number as 3.75 is."""
    header = "file_name,text,price,release"
    (tmp_path / "a.csv").write_text(f"{header}\n0.png,a,3.50,1.9\n1.png,b,12.75,1.10\n2.png,c,7,1.2")
    assert columns_of_table(str(tmp_path / "a.csv")) == {"price": [3.5, 12.75, 7], "release": [1.9, "1.10", 1.2]}

    pairs = {"image": [b"a", b"b"], "text": ["a", "b"]}
    pq.write_table(pa.table(pairs), tmp_path / "0.parquet")
    prices = pa.array([Decimal("3.50"), None], pa.decimal128(9, 2))
    pq.write_table(pa.table({**pairs, "year": [2000, 2001], "price": prices}), tmp_path / "1.parquet")
    found = {"year": [None, None, 2000, 2001], "price": [None, None, 3.5, None]}
    assert columns_of_table(str(tmp_path / "[01].parquet")) == found


def test_pictures_that_a_table_names_belong_to_it(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    rows = [
        {"image": {"bytes": None, "path": "a.png"}, "text": "a"},
        {"image": {"bytes": b"b", "path": None}, "text": "b"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "both.parquet")
    (tmp_path / "named.jsonl").write_text("\n".join(json.dumps({"image": f"{one}.png", "text": one}) for one in "abc"))
    assert TableItems(str(tmp_path / "both.parquet")).files() == [str(tmp_path / "a.png")]
    assert TableItems(str(tmp_path / "named.jsonl")).files() == [str(tmp_path / f"{one}.png") for one in "abc"]


@pytest.fixture
def make_run(model_directory: Path, tmp_path: Path) -> Callable[..., Path]:
    """A run that has ended, on the data of its arguments."""

    def make(**told: str) -> Path:
        line = ["--family", "oner", *(word for name, value in told.items() for word in (f"--{name}", value))]
        run = tmp_path / "run"
        shutil.copytree(model_directory, run / "model", dirs_exist_ok=True)
        (run / "model" / "results").mkdir(exist_ok=True)
        (run / "model" / "results" / "training_config.json").write_text(json.dumps(parse_arguments(line).to_dict()))
        (run / "log.jsonl").write_text("")
        return run

    return make


def test_a_run_is_searched_in_the_rows_and_columns_that_it_learned_from(
    make_run: Callable[..., Path], pictures: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Columns of other names than the usual, beside usual ones that hold something else; of two splits, one."""
    rows = {"photo": pictures, "image": ["gone.png"] * 6, "title": [f"title {number}" for number in range(6)],
            "text": ["a text"] * 6, "kind": list("abcdef")}  # fmt: skip
    parts = {"all": slice(None), "few": slice(3, 5)}
    splits = {name: datasets.Dataset.from_dict({key: one[part] for key, one in rows.items()})
              for name, part in parts.items()}  # fmt: skip
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    splits["few"].to_parquet(tmp_path / "few.parquet")
    columns = {"image_column": "photo", "text_column": "title", "id_column": "kind"}
    pictures[4].save(tmp_path / "asked.png")
    asked = ("--image", tmp_path / "asked.png")

    for told in ({"train_data": "saved", "split": "few"}, {"train_data": "few.parquet"}):
        source = str(tmp_path / told.pop("train_data"))
        run = make_run(train_data=source, **told, **columns)
        found = answers_of(capsys, run, *asked)
        assert [one["item"]["text"] for one in found] == ["title 4", "title 3"]
        assert found[0]["item"].get("kind") == ("e" if "parquet" in source else None)
        shown = contact_sheet.picture_of(found[0]["item"])
        assert ImageChops.difference(shown, pictures[4].convert(shown.mode)).getbbox() is None

    # another split of the same source is no index to use again
    for split, count in (("few", 2), ("all", 6), ("all", 6)):
        run = make_run(train_data=str(tmp_path / "saved"), split=split, **columns)
        assert len(answers_of(capsys, run, *asked)) == count


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([".", "sun", "--like", "3"], "--like is a question of its own"),
        ([".", "--plus", "sun", "--rerank", "3"], "--rerank compares one query"),
        ([], "expected a run, a folder of pictures"),
        (["--index", "."], "give words, --image, or both"),
        (["sun", "--index", "nowhere"], "--index nowhere: no such folder or file"),
        (["sun", "--index", ".", "--image", "no.png"], "--image no.png: no such file"),
        ([".", "sun", "--out", "sheets"], "--out is 'sheets'; expected the name of a picture, such as answers.png"),
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
    assert shipped.find_model("oner-emoji") == "oner-emoji"  # the Hub may know it


def test_a_model_is_named_by_its_directory_its_run_or_as_one_that_ships(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    ships = shipped.shipped_checkpoint()
    assert shipped.find_model("oner-emoji") == str(ships) and (ships / "model.safetensors").is_file()
    assert shipped.find_model("owner/oner-emoji") == "owner/oner-emoji"
    with pytest.raises(FileNotFoundError, match="available: .*oner-emoji"):
        shipped.shipped_checkpoint("oner-emoij")
    assert parse_arguments(["--initial_model", "oner-emoji", "--train_data", "pairs"]).model.initial_model == str(
        ships
    )

    # what lies here comes first
    (tmp_path / "runs/mine/model").mkdir(parents=True)
    (tmp_path / "runs/mine/model/config.json").write_text("{}")
    (tmp_path / "oner-emoji").mkdir()
    assert shipped.find_model("runs/mine") == "runs/mine/model"
    assert shipped.find_model("runs/mine/model") == "runs/mine/model"
    assert shipped.find_model("oner-emoji") == "oner-emoji"


def test_results_go_where_they_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert results_directory("mine", "mine/model") == Path("mine/model")
    assert results_directory("oner-emoji", "/somewhere/oner-emoji") == Path("runs/oner-emoji")
    assert results_directory("owner/name", "owner/name") == Path("runs/owner/name")


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


def test_rows_of_one_picture_are_shown_without_a_warning(tmp_path: Path, pictures: list[Image.Image], recwarn) -> None:
    pictures[0].save(tmp_path / "one.png")
    table = tmp_path / "pairs.csv"
    table.write_text("image,text\none.png,red\none.png,blue\n", encoding="utf-8")
    shown = contact_sheet.picture_of({"table": str(table), "row": 1})
    assert shown.size == pictures[0].size
    assert not [str(one.message) for one in recwarn if "different pictures" in str(one.message)]


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

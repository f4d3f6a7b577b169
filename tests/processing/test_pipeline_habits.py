"""How people are used to ask transformers' pipelines, tried on the shipped checkpoints of both families."""

import base64
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, Pipeline, pipeline
from transformers.pipelines import check_task
from transformers.pipelines.pt_utils import KeyDataset

import oner
from oner.processing.retrieval_sources import list_pictures

ROOT = Path(__file__).parents[2]
STYLE = ROOT / "examples/data/emoji/test_style.parquet"
COUNT = 6
LABELS = ["red apple", "green tree", "moon"]


@pytest.fixture(scope="module", params=["oner-emoji", "simla-emoji"])
def checkpoint(request) -> str:
    return str(ROOT / "examples/checkpoints" / request.param)


@pytest.fixture(scope="module")
def search(checkpoint) -> Pipeline:
    return pipeline("image-text-retrieval", model=checkpoint)


@pytest.fixture(scope="module")
def zero_shot(search) -> Pipeline:
    parts = {"tokenizer": search.processor.tokenizer, "image_processor": search.processor.image_processor}
    return pipeline("zero-shot-image-classification", model=search.model, **parts)


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    """Encoded pictures of the unseen style, and their first captions."""
    rows = pq.read_table(STYLE).slice(0, COUNT).to_pylist()
    return [{"image": row["image"]["bytes"], "text": row["captions"][0]} for row in rows]


@pytest.fixture(scope="module")
def data(cells) -> datasets.Dataset:
    columns = {"image": [cell["image"] for cell in cells], "text": [cell["text"] for cell in cells]}
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("int64")}
    columns = {**columns, "label": list(range(COUNT))}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_columns_data_sets_and_workers(search, data, cells):
    """All ways to name the same pictures give the same index and the same answers."""
    pictures = [cell["image"] for cell in cells]
    expected = search.index(pictures, show_progress=False).embeddings
    captions = [cell["text"] for cell in cells]
    answers = search(captions, top_k=3)
    stream = data.select_columns(["image", "label"]).to_iterable_dataset()
    for source in (data["image"], KeyDataset(data, "image"), data.select_columns(["image", "label"]), stream):
        assert torch.equal(search.index(source, show_progress=False, num_workers=1).embeddings, expected)
    assert search(data["text"], top_k=3) == search(KeyDataset(data, "text"), top_k=3) == answers
    assert search(captions, top_k=3, num_workers=2) == answers
    by_picture = search([{"image": picture} for picture in pictures])
    assert search(image=data["image"]) == search(data["image"], num_workers=2) == by_picture
    assert search.index_texts(data["text"], show_progress=False).items == captions

    # with its further columns; a column that rows do not have is no reason to guess
    joint = search.index(data, show_progress=False)
    assert [item["text"] for item in joint.items] == captions
    with pytest.raises(ValueError, match=r'needs a column "image" or "text", got \[\'label\'\]'):
        search.index(data.select_columns(["label"]))


def test_a_damaged_picture_in_a_data_set_is_one_rows_matter(search, data, cells):
    broken = data.to_pandas().to_dict("list")
    broken["image"][2] = {"bytes": cells[2]["image"][:60], "path": "two.png"}
    damaged = datasets.Dataset.from_dict(broken, features=data.features)
    for source in (damaged, damaged["image"]):
        with pytest.warns(UserWarning, match="1 of 6 entries"):
            index = search.index(source, show_progress=False)
        assert len(index) == COUNT - 1 and len(index.skipped) == 1


def test_generators_are_answered_while_they_run(search, cells):
    search.index_texts(LABELS, show_progress=False)
    asked = []

    def queries() -> Iterator[str]:
        for cell in cells:
            asked.append(cell["text"])
            yield cell["text"]

    answers = search(queries(), batch_size=2)
    assert asked == []
    first = next(answers)
    assert len(asked) == 2 and [one["item"] for one in first] == [one["item"] for one in search(cells[0]["text"])]
    assert len(list(answers)) == COUNT - 1 and len(asked) == COUNT


@pytest.mark.parametrize("task", ["image-text-matching", "visual-grounding"])
def test_pairs_are_asked_likewise(task, cells, data):
    pipe = pipeline(task, model=str(ROOT / "examples/checkpoints/simla-emoji"))
    pairs = [{"image": cell["image"], "text": cell["text"]} for cell in cells]
    expected = said(pipe(pairs))
    lazy = pipe(iter(pairs), batch_size=2)
    assert isinstance(lazy, Iterator) and said(lazy) == expected
    assert said(pipe(data["image"], text=data["text"], num_workers=2)) == expected
    text = base64.b64encode(cells[0]["image"]).decode()
    assert said([pipe(text, text=cells[0]["text"])]) == expected[:1]
    with pytest.warns(UserWarning, match=r"1 of 1 texts hold words .* '青蛙' \(2 of 2 tokens\)"):
        pipe(cells[0]["image"], text="青蛙")


def said(answers: Any) -> list[Any]:
    """What does not hang on a batch: boxes, or scores that are probabilities."""
    return [answer.get("box") or round(answer["score"], 3) for answer in answers]


def test_a_picture_and_its_labels_in_one_call(search, cells):
    """CLIP's snippet."""
    model, processor, picture = search.model, search.processor, Image.open(io.BytesIO(cells[0]["image"]))
    inputs = processor(text=LABELS, images=picture, return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = model(**inputs)
    assert outputs.logits_per_image.shape == (1, 3)
    cosines = search.embed([picture]) @ search.embed(LABELS).T
    torch.testing.assert_close(outputs.image_embeds @ outputs.text_embeds.T, cosines, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="3 texts and 1 pictures"):  # for a tower these are no pairs
        getattr(model, model.base_model_prefix)(**inputs)


def odd_pictures() -> dict[str, Image.Image]:
    """Pictures that converters see in different ways."""
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(clear).ellipse((16, 16, 48, 48), fill=(20, 20, 60, 255))
    palette = clear.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    deep = Image.new("I;16", (64, 64), 40_000)
    deep.paste(9_000, (10, 10, 50, 50))
    turned = Image.new("RGB", (64, 32), "red")
    turned.paste("blue", (0, 0, 32, 32))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    return {
        "RGBA": clear,
        "LA": clear.convert("LA"),
        "palette": palette,
        "16 bits": deep,
        "32 bits": deep.convert("I"),
        "CMYK": Image.new("CMYK", (64, 64), (0, 90, 200, 10)),
        "turned": turned,
    }


@pytest.mark.parametrize("kind", odd_pictures())
def test_every_pipeline_sees_what_the_processor_sees(kind, search, zero_shot, checkpoint, tmp_path):
    picture = odd_pictures()[kind]
    path = tmp_path / ("picture.tif" if kind in ("CMYK", "16 bits", "32 bits") else "picture.png")
    picture.save(path, **({"exif": picture.info["exif"]} if kind == "turned" else {}))
    features = pipeline(
        "image-feature-extraction", model=search.model, image_processor=search.processor.image_processor
    )
    for source in (picture, str(path), path, path.read_bytes(), base64.b64encode(path.read_bytes()).decode()):
        own = search.processor(images=source)["pixel_values"]
        assert torch.equal(zero_shot.preprocess(source, candidate_labels=["a"])["pixel_values"], own)
        assert torch.equal(features.preprocess(source)["pixel_values"], own)
        query = {"image": source}
        assert torch.equal(search.preprocess([query])["pixel_values"], own)


def test_built_in_pipelines_of_other_models_are_their_own():
    for task, cls in oner.registration.BUILT_IN.items():
        entry = check_task(task)[1]
        assert entry["impl"] is cls and issubclass(cls, Pipeline)

    class Plain:
        def preprocess(self, image: Any) -> Any:
            return image

    class Foreign(oner.registration.BUILT_IN["image-classification"].__bases__[0], Plain):
        image_processor = None

    assert Foreign().preprocess("as it is") == "as it is"


def test_a_long_label_is_cut_and_not_refused(zero_shot, cells):
    picture = Image.open(io.BytesIO(cells[0]["image"]))
    long = "red " * 200
    scores = {answer["label"]: answer["score"] for answer in zero_shot(picture, candidate_labels=[long, "moon"])}
    whole = f"This is a photo of {long}".split()[: zero_shot.model.config.max_text_length]
    cut = " ".join(whole).removeprefix("This is a photo of ")
    expected = zero_shot(picture, candidate_labels=[cut, "moon"], hypothesis_template="This is a photo of {}")
    assert set(scores) == {long, "moon"} and len(expected) == 2
    # several pictures at once, from a column
    several = zero_shot([picture, picture], candidate_labels=LABELS, batch_size=2)
    assert [one["label"] for one in several[0]] == [one["label"] for one in several[1]]


def test_unknown_words_are_said(search, cells):
    search.index([cell["image"] for cell in cells], show_progress=False)
    nothing = r"'青蛙' \(2 of 2 tokens\); of 1 it reads nothing else"
    for text, words in (("青蛙", nothing), ("red Größe", r"'red Größe' \(1 of 2")):
        with pytest.warns(UserWarning, match=words) as caught:
            search(text)
        assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="2 of 3 texts hold words"):
        search.index_texts(["red apple", "青蛙", "\x07"], show_progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(["red apple", "the quick brown fox, 1-2-3!"])


def test_no_picture_of_a_folder_is_passed_over(search, cells, tmp_path, monkeypatch):
    """By suffix, by how a file begins, and by name where it cannot be read."""
    picture = Image.open(io.BytesIO(cells[0]["image"])).convert("RGB")
    readable = ["a.png", "b.jp2", "c.tga", "d.ico", "e.AVIF", "f.tiff", "g.JPE", "h.webp", "no-suffix", "i.png.bak"]
    formats = {"no-suffix": "JPEG", "i.png.bak": "PNG", "g.JPE": "JPEG"}
    for name in readable:
        picture.save(tmp_path / name, formats.get(name))
    heic = b"\0\0\0\x18ftypheic" + b"\0" * 64
    for name in ("IMG_1.HEIC", "IMG_2", "IMG_3.heif", "IMG_4.jxl"):
        (tmp_path / name).write_bytes(heic)
    for name in ("notes.txt", "captions.json", "page"):
        (tmp_path / name).write_text("no picture")
    with pytest.warns(UserWarning, match="4 of 14 entries"):
        index = search.index(tmp_path, show_progress=False)
    assert {Path(item).name for item in index.items} == set(readable)
    assert {Path(entry["item"]).name for entry in index.skipped} == {"IMG_1.HEIC", "IMG_2", "IMG_3.heif", "IMG_4.jxl"}

    # a folder that cannot be looked into
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", scandir)
    assert str(tmp_path / "closed") in list_pictures(tmp_path)


def test_quantised_models_answer(checkpoint, search, cells):
    """torch's dynamic int8, whose weights are no tensors; torchao's tensors, where it is installed."""
    pictures = [cell["image"] for cell in cells]
    whole = search.embed(pictures)
    for make in (dynamic_int8, torchao_int8):
        model = make(AutoModelForZeroShotImageClassification.from_pretrained(checkpoint).eval())
        if model is None:
            continue
        pipe = pipeline("image-text-retrieval", model=model, processor=AutoProcessor.from_pretrained(checkpoint))
        pipe.index(pictures, show_progress=False)
        assert pipe(image=pictures[3], top_k=1)[0]["index"] == 3
        assert (pipe.embed(pictures) * whole).sum(1).min() > 0.99
        assert pipe.fingerprint != search.fingerprint


def dynamic_int8(model: torch.nn.Module) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.10 announces torchao in its place
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def torchao_int8(model: torch.nn.Module) -> torch.nn.Module | None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        return None
    quantize_(model, Int8WeightOnlyConfig())
    return model

"""The retrieval pipeline with a random-weight model, a trained tokenizer and real pictures."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs.pictures import READ, REFUSED
from torch.nn.functional import normalize
from transformers import pipeline

import oner  # noqa: F401  registers the classes and the task
from oner.modeling.configuration_oner import OneRConfig
from oner.modeling.modeling_oner import OneRForImageTextRetrieval
from oner.processing.data.sources import open_rows
from oner.processing.image_processing_vl import ImageDecodeError, VisionLanguageImageProcessor, open_image
from oner.processing.pipeline_image_text_retrieval import ImageTextRetrievalPipeline, list_pictures
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.processing.retrieval_index import IndexMismatchError, RetrievalIndex
from oner.processing.vl_tokenizer import train_tokenizer

EMOJI = Path(__file__).parents[2] / "examples" / "data" / "emoji" / "test_style.parquet"
COUNT = 24


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    return open_rows(str(EMOJI)).take(range(COUNT))


@pytest.fixture(scope="module")
def processor() -> VisionLanguageProcessor:
    tokenizer = train_tokenizer(open_rows(str(EMOJI)).captions(), vocab_size=600)
    return VisionLanguageProcessor(
        VisionLanguageImageProcessor(size={"height": 32, "width": 32}, patch_size=16), tokenizer
    )


def make_model(processor: VisionLanguageProcessor, seed: int = 0, **overrides: Any) -> OneRForImageTextRetrieval:
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    small = dict(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=16, projection_hidden_size=64, projection_dim=24, pad_token_id=tokenizer.pad_token_id,
        image_token_id=processor.image_token_id, cls_token_id=tokenizer.cls_token_id,
        mask_token_id=tokenizer.mask_token_id, pooling="mean",
    )  # fmt: skip
    model = OneRForImageTextRetrieval(OneRConfig(**{**small, **overrides}))
    spread_embeddings(model, processor)
    return model.eval()


def spread_embeddings(model: OneRForImageTextRetrieval, processor: VisionLanguageProcessor) -> None:
    """Sets the running statistics in a pass of each kind: random weights alone send all pictures the same way."""
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.momentum = None  # the mean of all passes
    rows = open_rows(str(EMOJI)).take(range(COUNT))
    with torch.no_grad():
        model.train().get_image_features(processor(images=[row["image"] for row in rows])["pixel_values"])
        model.get_text_features(**processor(text=[row["captions"][0] for row in rows]))


@pytest.fixture(scope="module")
def model(processor: VisionLanguageProcessor) -> OneRForImageTextRetrieval:
    return make_model(processor)


@pytest.fixture
def pipe(model: OneRForImageTextRetrieval, processor: VisionLanguageProcessor) -> ImageTextRetrievalPipeline:
    return ImageTextRetrievalPipeline(model=model, processor=processor, device="cpu")


@pytest.fixture
def photos(pairs: list[dict], tmp_path: Path) -> Path:
    """A folder with pictures at two depths, a broken one, and files that are no pictures."""
    folder = tmp_path / "photos"
    (folder / "sub" / "deeper").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    places = ["b.png", "a.PNG", "sub/c.png", "sub/deeper/d.jpg", ".hidden/e.png"]
    for place, pair in zip(places, pairs, strict=False):
        open_image(pair["image"]).save(folder / place)
    (folder / "sub" / "broken.png").write_bytes(pairs[7]["image"]["bytes"][:60])
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_folder_is_indexed_recursively_and_broken_pictures_are_listed(
    pipe: ImageTextRetrievalPipeline, photos: Path
) -> None:
    with pytest.warns(UserWarning, match=r"1 of 5 entries .*broken\.png") as caught:
        index = pipe.index(str(photos), show_progress=False)
    assert len(caught) == 1
    names = ["a.PNG", "b.png", "sub/c.png", "sub/deeper/d.jpg"]
    assert index.items == [str(photos / name) for name in names] and index is pipe.retrieval_index
    (skipped,) = index.skipped
    assert skipped["item"] == str(photos / "sub" / "broken.png") and "cannot read" in skipped["reason"]
    best = pipe(image=photos / "sub" / "c.png", top_k=1)[0]
    assert best["item"].endswith("c.png") and best["index"] == 2 and best["score"] == pytest.approx(1, abs=2e-3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Image was not the expected size")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_folder_of_every_bad_kind_is_indexed_without_it(
    pipe: ImageTextRetrievalPipeline, pairs: list[dict], tmp_path: Path
) -> None:
    """What a picture can be on the web and on a disk: refused kinds are listed with their reasons, others found."""
    picture = open_image(pairs[3]["image"])
    refused = [tmp_path / f"bad-{number:02}.jpg" for number in range(len(REFUSED))]
    for path, (make, _) in zip(refused, REFUSED.values(), strict=True):
        path.write_bytes(make(picture))
    read = [tmp_path / f"good-{number:02}.jpg" for number in range(len(READ))]
    for path, make in zip(read, READ.values(), strict=True):
        path.write_bytes(make(picture))
    os.mkfifo(tmp_path / "pipe.png")  # whoever opened it would wait for ever
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.warns(UserWarning, match=f"{len(refused) + 2} of {len(refused) + len(read) + 2} entries"):
        index = pipe.index(tmp_path, show_progress=False)
    assert sorted(index.items) == sorted(map(str, read))
    reasons = {Path(entry["item"]).name: entry["reason"] for entry in index.skipped}
    assert set(reasons) == {path.name for path in refused} | {"pipe.png", "link.png"}
    assert "pipe, socket or device, not a file" in reasons["pipe.png"] and "No such file" in reasons["link.png"]
    for path, (_, words) in zip(refused, REFUSED.values(), strict=True):
        assert re.search(words, reasons[path.name])


def test_a_text_that_is_no_text_is_named(pipe: ImageTextRetrievalPipeline) -> None:
    pipe.index_texts(["red fruit", "green tree"], show_progress=False)
    for text, words in (("caf\ud800", "lone surrogate"), ("a\0b", "NUL"), ("a" * 70_000, "70000 characters")):
        with pytest.raises(ValueError, match=f"the text of a query cannot be read: .*{words}"):
            pipe(text)
        with pytest.warns(UserWarning, match="1 of 2 entries"):
            index = pipe.index_texts(["apple", text], show_progress=False)
        assert index.items == ["apple"] and words in index.skipped[0]["reason"]


def test_answers_are_the_exact_cosines_of_the_models_own_features(
    pipe: ImageTextRetrievalPipeline, pairs: list[dict], model: Any, processor: VisionLanguageProcessor
) -> None:
    pipe.index([pair["image"] for pair in pairs], dtype="float32", batch_size=7, show_progress=False)
    with torch.no_grad():
        pictures = model.get_image_features(processor(images=[pair["image"] for pair in pairs])["pixel_values"])
        batch = processor(text="red fruit")
        words = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    cosines = (normalize(words.pooler_output) @ normalize(pictures.pooler_output).T)[0]
    answers = pipe("red fruit", top_k=COUNT + 50)
    assert [answer["index"] for answer in answers] == cosines.argsort(descending=True, stable=True).tolist()
    assert [answer["score"] for answer in answers] == pytest.approx(sorted(cosines.tolist(), reverse=True), abs=1e-5)
    assert [answer["item"] for answer in answers] == [f"{pairs[a['index']]['image']['path']}" for a in answers]
    assert len(pipe("red fruit")) == 5


def test_words_with_a_picture_are_one_joint_sequence(
    pipe: ImageTextRetrievalPipeline, pairs: list[dict], model: Any, processor: VisionLanguageProcessor
) -> None:
    picture = open_image(pairs[3]["image"])
    batch = processor(images=[picture], text=["made of glass"])
    with torch.no_grad():
        joint = normalize(model.get_multimodal_features(**batch).pooler_output)
    assert torch.allclose(pipe.embed([{"text": "made of glass", "image": picture}]), joint, atol=1e-6)
    assert not torch.allclose(pipe.embed([picture]), joint, atol=1e-3)
    assert not torch.allclose(pipe.embed(["made of glass"]), joint, atol=1e-3)
    pipe.index([pair["image"] for pair in pairs], dtype="float32", show_progress=False)
    expected = pipe({"text": "made of glass", "image": picture})
    scores = (joint.double() @ pipe.retrieval_index.embeddings.double().T).topk(5)
    assert [answer["index"] for answer in expected] == scores.indices[0].tolist()
    assert pipe("made of glass", image=picture) == expected
    assert pipe(text="made of glass", image=picture) == expected


def test_every_form_of_a_picture_gives_the_same_answer(
    pipe: ImageTextRetrievalPipeline, pairs: list[dict], tmp_path: Path
) -> None:
    pipe.index([pair["image"] for pair in pairs], show_progress=False)
    stored = pairs[5]["image"]
    path = tmp_path / "five.png"
    path.write_bytes(stored["bytes"])
    expected = pipe(open_image(stored))
    for picture in (stored["bytes"], path, {"image": stored}, {"image": str(path)}):
        assert pipe(picture) == expected
    assert pipe(image=str(path)) == expected and pipe(image=[str(path)]) == [expected]
    with pytest.warns(UserWarning, match="words that the vocabulary lacks"):  # a plain str is text
        assert pipe(str(path)) == pipe(text=str(path)) != expected


def test_a_list_of_mixed_queries_gives_a_list_of_answers_in_order(
    pipe: ImageTextRetrievalPipeline, pairs: list[dict]
) -> None:
    pipe.index([pair["image"] for pair in pairs], dtype="float32", show_progress=False)
    picture = pairs[2]["image"]["bytes"]
    queries = ["sun", picture, {"text": "moon", "image": picture}, "a longer text about stars", {"image": picture}]
    answers = pipe(queries, top_k=3, batch_size=2)
    for query, answer in zip(queries, answers, strict=True):
        single = pipe(query, top_k=3)
        assert [one["index"] for one in answer] == [one["index"] for one in single]
        assert [one["score"] for one in answer] == pytest.approx([one["score"] for one in single], abs=1e-5)
    assert list(pipe(query for query in queries[:1])) == [pipe("sun")]
    assert pipe([]) == []
    by_name = pipe(text=["sun", "moon"], image=[picture, picture], top_k=3)
    assert [one["index"] for one in by_name[1]] == [one["index"] for one in answers[2]]


def test_texts_rows_and_appending(pipe: ImageTextRetrievalPipeline, pairs: list[dict]) -> None:
    captions = [pair["captions"][0] for pair in pairs]
    assert pipe.index_texts(captions, show_progress=False).items == captions
    found = pipe(captions[4], top_k=1)[0]
    assert found["item"] == captions[4] and found["score"] == pytest.approx(1, abs=2e-3)

    picture = pairs[0]["image"]
    rows = [
        {"image": picture, "text": "sun"},
        {"text": "moon"},
        {"image": picture, "item": {"id": 7}},
        {"image": picture["bytes"]},
        picture["bytes"],
        open_image(picture),
    ]
    index = pipe.index(rows, append=True, show_progress=False)
    added = index.items[COUNT:]
    assert added[:3] == [{"image": picture["path"], "text": "sun"}, "moon", {"id": 7}]
    assert added[3:] == ["picture 3", "picture 4", "picture 5"] and len(index) == COUNT + 6
    joint = pipe.embed([{"image": picture, "text": "sun"}])
    assert torch.allclose(index.embeddings[COUNT].float(), joint[0], atol=1e-3)
    assert torch.equal(index.embeddings[COUNT + 3], index.embeddings[COUNT + 5])
    assert len(pipe.index_texts(["one"], show_progress=False)) == 1


def test_index_round_trip_and_other_models_are_refused(
    pipe: ImageTextRetrievalPipeline, processor: VisionLanguageProcessor, pairs: list[dict], tmp_path: Path
) -> None:
    pipe.index([pair["image"] for pair in pairs], show_progress=False)
    expected = pipe(["sun", "moon"])
    pipe.save_index(tmp_path / "index")

    same = ImageTextRetrievalPipeline(model=make_model(processor), processor=processor, device="cpu")
    assert isinstance(same.load_index(tmp_path / "index"), RetrievalIndex)
    assert same(["sun", "moon"]) == expected

    retrained = ImageTextRetrievalPipeline(model=make_model(processor, seed=1), processor=processor, device="cpu")
    with pytest.raises(IndexMismatchError, match="fingerprint"):
        retrained.load_index(tmp_path / "index")
    narrow = make_model(processor, projection_dim=16)
    with pytest.raises(IndexMismatchError, match="width 24 .*got width 16"):
        ImageTextRetrievalPipeline(model=narrow, processor=processor, device="cpu").load_index(tmp_path / "index")
    assert retrained.retrieval_index is None


def test_wrong_questions_are_refused(pipe: ImageTextRetrievalPipeline, pairs: list[dict], tmp_path: Path) -> None:
    for early in (lambda: pipe("sun"), lambda: pipe.save_index(tmp_path)):
        with pytest.raises(ValueError, match=r"call index\(folder\)"):
            early()
    pipe.index_texts(["sun", "moon"], show_progress=False)
    picture = pairs[0]["image"]["bytes"]
    cases: list[tuple[dict, type, str]] = [
        ({}, ValueError, "nothing was asked"),
        ({"inputs": {}}, ValueError, '"text", "image" or both, got \\[\\]'),
        ({"inputs": {"txt": "sun"}}, ValueError, r"got \['txt'\]"),
        ({"inputs": {"text": 3}}, TypeError, "must be a str, got int"),
        ({"inputs": "  "}, ValueError, "the text of a query cannot be read: the text is empty"),
        ({"inputs": 3}, ImageDecodeError, "from int"),
        ({"inputs": ["sun"], "image": picture}, ValueError, r"give text=\[\.\.\], image=\[\.\.\]"),
        ({"inputs": "sun", "text": "moon"}, ValueError, "go with each other"),
        ({"text": ["a", "b"], "image": [picture]}, ValueError, "same length"),
        ({"text": ["a", "b"], "image": picture}, ValueError, "same length"),
        ({"image": "https://example.org/a.png"}, ImageDecodeError, "allow_urls=True"),
        ({"inputs": "sun", "top_k": 0}, ValueError, "top_k must be a positive integer, got 0"),
        ({"inputs": "sun", "batch_size": 0}, ValueError, "batch_size must be a positive integer, got 0"),
    ]
    for arguments, kind, words in cases:
        with pytest.raises(kind, match=words):
            pipe(**arguments)


def test_wrong_sources_are_refused_and_leave_the_old_index(
    pipe: ImageTextRetrievalPipeline, pairs: list[dict], tmp_path: Path
) -> None:
    old = pipe.index_texts(["sun"], show_progress=False)
    cases: list[tuple[Any, type, str]] = [
        (str(tmp_path / "missing"), ValueError, "is not a folder"),
        (tmp_path, ValueError, "no picture under"),
        ([], ValueError, "the list is empty"),
        (b"bytes", TypeError, "folder or a list of pictures or rows, got bytes"),
        (open_image(pairs[0]["image"]), TypeError, "got Image"),
        ([b"no picture", tmp_path / "no.png"], ValueError, "not one of 2 entries could be read.*picture 0"),
        ([{"image": pairs[0]["image"], "caption": "sun"}], ValueError, "row 0: expected the keys text, image, item"),
        ([{"text": " "}, {"text": ""}, 3], ValueError, "not one of 3 entries.*row 0: the text of a query cannot be"),
        (["one.png", {"image": "two.png", "item": {1}}], ValueError, "not one of 2 entries.*No such file"),
    ]
    for source, kind, words in cases:
        with pytest.raises(kind, match=words):
            pipe.index(source, show_progress=False)
    assert pipe.retrieval_index is old


def test_rows_that_cannot_be_read_are_each_named_and_cost_no_other(
    pipe: ImageTextRetrievalPipeline, pairs: list[dict], tmp_path: Path
) -> None:
    picture = pairs[0]["image"]["bytes"]
    bad: dict[str, Any] = {
        "No such file": tmp_path / "gone.png",
        "pipe, socket or device|Input/output error": "/proc/self/mem",
        "the text is empty": {"image": picture, "text": " "},
        "NUL": {"text": "a\0b"},
        "must be a str, got int": {"text": 3},
        "from list": {"image": [picture]},
        "meta": torch.zeros(3, 9, 9, device="meta"),
        "from int": 3,
        "from NoneType": None,
        "expected the keys": {"picture": picture},
        "not JSON serializable": {"image": picture, "item": {1}},
        "fetching URLs is off": "https://example.org/a.png",
    }
    with pytest.warns(UserWarning, match=f"{len(bad)} of {len(bad) + 2} entries"):
        index = pipe.index([picture, *bad.values(), {"text": "moon"}], show_progress=False)
    assert index.items == ["picture 0", "moon"]
    for skipped, words in zip(index.skipped, bad, strict=True):
        assert re.search(words, skipped["reason"]), (words, skipped)
    assert index.skipped[2]["item"] == "picture 3" and index.skipped[0]["item"].endswith("gone.png")

    # appended, all or nothing is seen
    with pytest.raises(ZeroDivisionError):
        pipe.index((1 / (30 - number) and picture for number in range(60)), append=True, batch_size=8)
    assert pipe.retrieval_index is index and len(index) == 2


def test_construction_is_checked(model: Any, processor: VisionLanguageProcessor) -> None:
    with pytest.raises(TypeError, match="get_text_features, got Linear"):
        linear = torch.nn.Linear(2, 2)
        linear.device, linear.config = torch.device("cpu"), model.config
        ImageTextRetrievalPipeline(model=linear, processor=processor, device="cpu")
    with pytest.raises(ValueError, match="needs a processor"):
        ImageTextRetrievalPipeline(model=model, device="cpu")
    with pytest.raises(TypeError, match=r"got \['topk'\]"):
        ImageTextRetrievalPipeline(model=model, processor=processor, device="cpu", topk=3)


def test_pictures_are_listed_sorted_without_hidden_ones(photos: Path) -> None:
    names = [str(Path(name).relative_to(photos)) for name in list_pictures(photos)]
    assert names == ["a.PNG", "b.png", "sub/broken.png", "sub/c.png", "sub/deeper/d.jpg"]


def test_from_a_model_directory_also_in_half_precision(
    model: Any, processor: VisionLanguageProcessor, pairs: list[dict], tmp_path: Path
) -> None:
    processor.save_pretrained(tmp_path)
    make_model(processor).half().save_pretrained(tmp_path)
    pipe = pipeline("image-text-retrieval", model=str(tmp_path), device="cpu", top_k=2)
    assert isinstance(pipe, ImageTextRetrievalPipeline) and pipe.model_name == str(tmp_path)
    assert pipe.model.dtype == torch.float32  # the CPU computes in full precision whatever was stored
    pipe.index([pair["image"] for pair in pairs], show_progress=False)
    full = ImageTextRetrievalPipeline(model=model, processor=processor, device="cpu")
    assert pipe.fingerprint == full.fingerprint
    assert torch.allclose(pipe.embed(["sun"]), full.embed(["sun"]), atol=5e-3)
    assert len(pipe("sun")) == 2 and len(pipe("sun", top_k=3)) == 3

"""`visual-grounding` by the cosines of one tower: the maps of the evaluation, as boxes; a scene's apple is found."""

import warnings
from pathlib import Path

import pytest
import torch
from families import FAMILIES, RETRIEVAL
from tiny_repository import emoji_rows, model_of, processor_of
from transformers import pipeline

from oner.processing.data.sources import open_rows
from oner.processing.image_processing_vl import open_image
from oner.training.evaluation.localization import pointing, similarity_maps
from oner.training.evaluation.sheets import draw_scenes
from oner.training.publishing.hub import export_model


@pytest.fixture(scope="module")
def rows(emoji_folder) -> list[dict]:
    return emoji_rows(emoji_folder)


@pytest.fixture(scope="module")
def exported(rows, tmp_path_factory) -> Path:
    processor = processor_of(FAMILIES["oner"], rows)
    model = model_of(FAMILIES["oner"], processor)
    return export_model(model, processor, tmp_path_factory.mktemp("hub") / "oner")


@pytest.fixture(scope="module")
def where(exported):
    return pipeline("visual-grounding", model=str(exported))


def test_maps_are_what_stands_out_of_the_cosines(where, rows):
    pictures, texts = [open_image(row["image"]) for row in rows[:3]], ["a red apple", "tree", "green tree and more"]
    cosines = similarity_maps(where.model, where.processor, pictures, texts)  # (3, 4, 4)
    expected = (cosines - cosines.mean((1, 2), keepdim=True)).clamp_min(0)
    answers = where(pictures, text=texts)
    for answer, cells, picture in zip(answers, expected, pictures, strict=True):
        torch.testing.assert_close(answer["map"], cells, rtol=0, atol=1e-6)
        assert answer["score"] > 0 and answer["box"]["xmax"] <= picture.width
        assert answer["box"]["xmin"] < answer["box"]["xmax"]


def test_what_it_cannot_be_asked_is_said(where, rows):
    picture = open_image(rows[0]["image"])
    with pytest.raises(ValueError, match=r"expected mode of \('cosine',\), got 'itc'"):
        where(picture, text="a red apple", mode="itc")
    model = model_of(FAMILIES["oner"], where.processor, RETRIEVAL)
    with pytest.raises(ValueError, match="expects pixel_values, got None"):
        model.ground(torch.ones(1, 2, dtype=torch.long))


def test_the_shipped_checkpoint_points_at_what_is_named(root, emoji_folder):
    """Four emoji as one picture: a name's map peaks in its quarter in half of them; by chance in a quarter."""
    rows = open_rows(emoji_folder / "train.parquet", text_column="captions", id_column="hexcode")
    scenes = draw_scenes(rows, 60, seed=0)
    where = pipeline("visual-grounding", model=str(root / "examples/checkpoints/oner-scenes"))
    texts = [scene.words[scene.asked] for scene in scenes]
    with warnings.catch_warnings():
        # of a word that the vocabulary of scenes lacks
        warnings.simplefilter("ignore", UserWarning)
        answers = where([scene.image for scene in scenes], text=texts)
    share, lift = pointing(torch.stack([answer["map"] for answer in answers]), [scene.asked for scene in scenes])
    assert share >= 0.45 and lift > 0

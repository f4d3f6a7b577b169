"""An export is a SentenceTransformer: its vectors are ours, with `oner` or with the code beside the weights alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from families import MASKED_LM
from PIL import Image
from tiny_repository import emoji_rows, model_of, processor_of
from torch import nn
from transformers import AutoModel, PreTrainedModel

from oner.processing.image_processing_vl import open_image
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.training.publishing.hub import export_model
from oner.training.publishing.sentence_files import FILES

sentence_transformers = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
pytestmark = pytest.mark.usefixtures("fresh_accelerator")
TEXTS = ["a red fruit", "a green tree with several words more", "x"]
# in an interpreter where oner does not exist: python -c REMOTE tests/ OUT PICTURE MODEL
REMOTE = """
import sys
sys.path.insert(0, sys.argv[1])
from hub_probe import NoOner
sys.meta_path.insert(0, NoOner())
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[4], trust_remote_code=True, device="cpu")
picture = Image.open(sys.argv[3])
kinds = ("a red fruit", picture, {"text": "a red fruit", "image": picture})
np.save(sys.argv[2], np.stack([model.encode(one) for one in kinds]))
"""


@pytest.fixture(scope="module")
def rows(emoji_folder) -> list[dict]:
    return emoji_rows(emoji_folder)


@pytest.fixture(scope="module")
def pictures(rows) -> list[Image.Image]:
    return [open_image(row["image"]) for row in rows[: len(TEXTS)]]


@pytest.fixture(scope="module")
def processor(family, rows) -> VisionLanguageProcessor:
    return processor_of(family, rows)


@pytest.fixture(scope="module")
def exported(family, processor, tmp_path_factory) -> Path:
    return export_model(model_of(family, processor), processor, tmp_path_factory.mktemp("hub") / family.name)


@pytest.fixture
def encoder(exported):
    return sentence_transformers.SentenceTransformer(str(exported), device="cpu")


@torch.no_grad()
def unit(features) -> np.ndarray:
    return nn.functional.normalize(features.pooler_output, dim=-1).numpy()


def expected_of(model: PreTrainedModel, processor: VisionLanguageProcessor, pictures: list) -> dict[str, np.ndarray]:
    """Kind -> unit vectors (rows, P) of our own methods."""
    with torch.no_grad():
        return {
            "text": unit(model.get_text_features(**processor(text=TEXTS))),
            "image": unit(model.get_image_features(**processor(images=pictures))),
            "both": unit(model.get_multimodal_features(**processor(text=TEXTS, images=pictures))),
        }


def test_texts_pictures_and_both_have_our_vectors(exported, encoder, processor, pictures):
    expected = expected_of(AutoModel.from_pretrained(exported).eval(), processor, pictures)
    both = [{"text": text, "image": picture} for text, picture in zip(TEXTS, pictures, strict=True)]
    for kind, given in (("text", TEXTS), ("image", pictures), ("both", both)):
        found = encoder.encode(given)
        np.testing.assert_allclose(found, expected[kind], rtol=0, atol=1e-6, err_msg=kind)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=0, atol=1e-6)
    # similarity is cosine, and a picture's is not a text's by accident
    similarity = encoder.similarity(expected["image"], expected["text"]).numpy()
    np.testing.assert_allclose(similarity, expected["image"] @ expected["text"].T, rtol=0, atol=1e-6)
    assert np.abs(expected["image"] - expected["text"]).max() > 1e-2


@pytest.mark.slow
def test_without_oner_its_code_gives_the_same(family, exported, processor, pictures, tmp_path):
    if family.name != "oner":
        pytest.skip("one family is enough for the files: test_hub_portable.py has the code of each")
    pictures[0].save(tmp_path / "photo.png")
    out = tmp_path / "vectors.npy"
    tests = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-c", REMOTE, tests, str(out), str(tmp_path / "photo.png"), str(exported)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    ours = expected_of(AutoModel.from_pretrained(exported).eval(), processor, pictures)
    expected = np.stack([ours[kind][0] for kind in ("text", "image", "both")])
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=1e-6)


def test_vectors_are_cut_and_quantised_by_its_own_functions(exported, encoder, pictures):
    whole = encoder.encode(pictures)  # (3, 8)
    short = encoder.encode(pictures, truncate_dim=4, normalize_embeddings=True)  # (3, 4)
    cut = whole[:, :4] / np.linalg.norm(whole[:, :4], axis=1, keepdims=True)
    np.testing.assert_allclose(short, cut, rtol=0, atol=1e-6)
    bits = sentence_transformers.quantize_embeddings(whole, "ubinary")  # (3, 1)
    np.testing.assert_array_equal(bits, np.packbits(whole > 0, axis=1))
    steps = sentence_transformers.quantize_embeddings(whole, "int8", calibration_embeddings=whole)
    assert steps.dtype == np.int8 and steps.shape == whole.shape
    again = sentence_transformers.SentenceTransformer(str(exported), device="cpu", truncate_dim=4)
    np.testing.assert_allclose(again.encode(pictures), whole[:, :4], rtol=0, atol=1e-6)


def test_its_trainer_takes_a_step_and_saves_what_was_learned(encoder, pictures, tmp_path):
    pairs = datasets.Dataset.from_dict({"anchor": TEXTS, "positive": pictures})
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"),
        per_device_train_batch_size=len(TEXTS),
        max_steps=1,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    before = encoder.encode(TEXTS)
    loss = losses.MultipleNegativesRankingLoss(encoder)
    sentence_transformers.SentenceTransformerTrainer(encoder, arguments, pairs, loss=loss).train()
    learned = encoder.eval().encode(TEXTS)
    assert np.abs(learned - before).max() > 1e-3
    encoder.save_pretrained(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), learned, rtol=0, atol=1e-6)


def test_a_model_without_embeddings_does_not_claim_to_have_any(family, processor, tmp_path):
    model = model_of(family, processor, MASKED_LM)
    directory = export_model(model, processor, tmp_path / "model")
    retrieves = "image-text-retrieval" in json.loads((directory / "config.json").read_text())["custom_pipelines"]
    assert {(directory / name).is_file() for name in FILES} == {retrieves}

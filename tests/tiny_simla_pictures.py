"""A SIMLA of some thousand weights with a trained tokenizer and real pictures, for pipelines and evaluators."""

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageStat
from tiny_oner import randomised

import oner
from oner.processing.data.sources import open_rows
from oner.processing.image_processing_vl import VisionLanguageImageProcessor
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.processing.vl_tokenizer import train_tokenizer

EMOJI = Path(__file__).parent.parent / "examples" / "data" / "emoji" / "test_style.parquet"


def real_rows(count: int) -> list[dict[str, Any]]:
    """Emoji with their captions, each of a concept of its own."""
    return open_rows(str(EMOJI), id_column="hexcode").take(range(count))


def make_processor() -> VisionLanguageProcessor:
    tokenizer = train_tokenizer(open_rows(str(EMOJI)).captions(), vocab_size=400)
    image_processor = VisionLanguageImageProcessor(size={"height": 32, "width": 32}, patch_size=8)
    return VisionLanguageProcessor(image_processor, tokenizer, joint_layout=False)


def make_simla(cls: type, processor: VisionLanguageProcessor, seed: int = 0, **overrides: Any) -> Any:
    """One of SIMLA's classes with random weights, in eval mode: pictures of 32 pixels, 4 x 4 patches, four heads."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_text_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 16,
        "num_visual_codes": 8,
        "max_text_length": 64,
        "max_position_embeddings": 80,
        "grounding_layer": 1,
        "answer_decoder_layers": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "image_token_id": processor.image_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": None,
        "mask_token_id": tokenizer.mask_token_id,
    }
    model = randomised(cls(oner.SimlaConfig(**{**fields, **overrides})), seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "head" not in name:
            parameter.data.mul_(4)  # N(0, .02) makes all pictures alike
    return model.eval()


def drawn(figure: Any) -> Image.Image:
    """The figure as the caller would save it."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    return Image.open(file).convert("RGB")


def assert_not_blank(figure: Any) -> None:
    picture = drawn(figure)
    assert min(picture.size) > 300
    assert max(ImageStat.Stat(picture).stddev) > 10

"""What tests of publishing publish: a tiny model of a family, and a processor whose vocabulary it has."""

from pathlib import Path

import hub_probe
import torch
from families import PRETRAINING, Family
from transformers import PreTrainedModel

from oner.processing.data.sources import open_rows
from oner.processing.image_processing_vl import VisionLanguageImageProcessor
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.processing.vl_tokenizer import train_tokenizer


def emoji_rows(folder: Path) -> list[dict]:
    """Every third of the pairs of unseen concepts."""
    rows = open_rows(
        str(folder / "test_concept.parquet"), image_column="image", text_column="captions", id_column="hexcode"
    )
    return [rows[number] for number in range(0, 660, 3)]


def processor_of(family: Family, rows: list[dict]) -> VisionLanguageProcessor:
    captions = [caption for row in rows for caption in row["captions"]] + hub_probe.TEXTS * 2
    tokenizer = train_tokenizer(captions, vocab_size=600, min_frequency=1)
    image_processor = VisionLanguageImageProcessor(size={"height": 32, "width": 32}, patch_size=8)
    joint = family.tiny.tiny_config().pair_layout == "joint"
    return VisionLanguageProcessor(image_processor, tokenizer, max_text_length=12, joint_layout=joint)


def model_of(family: Family, processor: VisionLanguageProcessor, auto: str = PRETRAINING) -> PreTrainedModel:
    """Sixteen patches, the processor's words, and statistics, biases and norms that are not 0 and 1."""
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    return family.build(
        auto,
        vocab_size=len(tokenizer),
        image_size=32,
        patch_size=8,
        max_text_length=24,
        pad_token_id=tokenizer.pad_token_id,
        image_token_id=processor.image_token_id,
        cls_token_id=tokenizer.cls_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )

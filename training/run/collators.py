"""From arguments to what makes batches of rows."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from oner.processing.data.augmentation import TrainingImageTransform
from oner.processing.data.collation import PairCollator
from oner.processing.processing_vl import OneRProcessor
from oner.processing.vl_captions import pre_caption

from .arguments import Arguments

# (RowKey, row, stand-ins) of each place -> batch
Collator = Callable[[list[tuple]], dict[str, Any]]
CAPTION_RULES = {"albef": pre_caption}
CODE_STRIDE = 8  # pixels a side that one visual code stands for in every tokenizer of DALL-E's layout


def build_collators(arguments: Arguments, processor: OneRProcessor, config: PreTrainedConfig) -> dict[str, Collator]:
    """The collator of each portion of a run."""
    return {name: pair_collator(told, processor, config) for name, told in arguments.portions().items()}


def pair_collator(
    arguments: Arguments,
    processor: OneRProcessor,
    config: PreTrainedConfig,
    kind: type[PairCollator] = PairCollator,
    **others: Any,
) -> PairCollator:
    """The collator of a run's pairs, or a `kind` of it for a task; `others` are further arguments of that."""
    data, run = arguments.data, arguments.run
    second_view = {}
    if data.code_crop is not None:
        side = config.image_size // config.patch_size * CODE_STRIDE
        second_view = {"code_size": side, "code_crop": data.code_crop}
    return kind(
        processor.tokenizer,
        TrainingImageTransform(
            config.image_size,
            scale=tuple(data.crop_scale),
            margin=data.crop_margin,
            hflip=data.horizontal_flip,
            color_jitter=data.color_jitter,
            grayscale=data.grayscale,
            rand_augment=data.rand_augment,
            mean=processor.image_processor.image_mean,
            std=processor.image_processor.image_std,
            **second_view,
        ),
        image_token_id=config.image_token_id,
        cls_token_id=config.cls_token_id,
        mask_token_id=config.mask_token_id,
        pad_token_id=config.pad_token_id,
        vocab_size=config.vocab_size,
        patch_size=config.patch_size,
        max_text_length=config.max_text_length,
        seed=run.seed,
        mlm_probability=data.mlm_probability,
        mim_ratio=tuple(data.mim_ratio),
        mim_masking=data.mim_masking,
        mim_min_block=data.mim_min_block,
        random_specials=data.random_specials,
        clean_caption=CAPTION_RULES.get(data.caption_rules),
        max_pixels=data.max_pixels,
        source=", ".join(data.train_data),
        **others,
    )

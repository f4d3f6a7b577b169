"""Builds the processor, the configuration and the student of a run from its arguments."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForPreTraining, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from oner.processing.data.augmentation import NORMALIZATIONS, names_a_side
from oner.processing.data.rows import PairRows, PairStream
from oner.processing.image_processing_vl import VisionLanguageImageProcessor
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.processing.vl_tokenizer import tokenizer_from_vocab, train_tokenizer, unknown_words
from oner.training.conversion.towers import initialise, tower_fields
from oner.training.parallel.distributed import rank
from oner.training.publishing.model_loading import check_place, load_model

from .adapters import add_lora
from .arguments import Arguments, ModelArguments
from .inputs import digest_of_tokenizer, kept_tokenizer
from .optimization import checkpoint_activations

SAMPLED_TEXTS = 20_000  # rows whose texts are checked against a vocabulary that was not trained on them

logger = logging.get_logger(__name__)


def build_processor_and_config(
    arguments: Arguments, rows: Mapping[str, PairRows | PairStream]
) -> tuple[VisionLanguageProcessor, PreTrainedConfig]:
    """
    Builds the processor and the matching configuration. The tokenizer is given, trained on the captions (the same on
    every process), or that of the resumed run.

    Raises:
        ValueError: the family or size does not exist; streamed data without a tokenizer; `initial_vision` and
            `initial_text` contradict each other or `model_config`.
    """
    model = arguments.model
    overrides = dict(model.model_config or {})
    data = arguments.data
    colours = NORMALIZATIONS[data.image_normalization or "imagenet"]  # mean and standard deviation, (3,) each
    crop = 1.0 if data.eval_crop is None else data.eval_crop

    # a resumed run keeps its tokenizer, even if the captions have changed
    length = overrides.get("max_text_length", 64)
    kept = kept_tokenizer(arguments.run, length)

    # tokenizer and configuration: those of a trained model, or new ones
    if model.initial_model is not None:
        check_place(model.initial_model)
        processor = AutoProcessor.from_pretrained(model.initial_model)
        tokenizer = processor.tokenizer
        if kept is not None and digest_of_tokenizer(kept) != digest_of_tokenizer(tokenizer):
            tokenizer = kept
        images = processor.image_processor
        if data.image_normalization is None:
            colours = images.image_mean, images.image_std
        if data.eval_crop is None and images.do_center_crop:
            crop = images.crop_size["height"] / images.size["height"]
        config = AutoConfig.from_pretrained(model.initial_model, **overrides)
    else:
        tokenizer = kept or _tokenizer(arguments, rows, length)
        ids = {
            "pad_token_id": tokenizer.pad_token_id,
            "cls_token_id": tokenizer.cls_token_id,
            "mask_token_id": tokenizer.mask_token_id,
            "image_token_id": tokenizer.image_token_id,
        }
        config_class = CONFIG_MAPPING[model.family]
        given = {"vocab_size": len(tokenizer), **ids, **overrides}
        config = config_class.from_size(model.size, **given, **_told_by_towers(model, config_class, given))

    # warn if a vocabulary of other texts does not cover these
    if (source := model.initial_model or model.tokenizer) is not None:
        _warn_of_unknown_words(tokenizer, rows, source)
    _warn_of_sides(arguments, rows)

    # the processor, with the image size of the configuration
    image_processor = _image_processor(config.image_size, config.patch_size, crop, *colours)
    joint = config.pair_layout == "joint"
    options = {"max_text_length": config.max_text_length, "joint_layout": joint}
    return VisionLanguageProcessor(image_processor, tokenizer, **options), config


def _told_by_towers(
    model: ModelArguments, config_class: type[PreTrainedConfig], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Width, depth and other fields of the published towers that the model starts from; empty without towers."""
    if model.initial_vision is None and model.initial_text is None:
        return {}
    told = tower_fields(config_class, model.size, given, model.initial_vision, model.initial_text)
    if rank() == 0:
        logger.warning("configuration fields from initial_vision and initial_text: %s", told)
    return told


def _image_processor(
    image_size: int, patch_size: int, eval_crop: float, mean: Sequence[float], std: Sequence[float]
) -> VisionLanguageImageProcessor:
    # images are resized to `side`, then cropped at the centre
    side = round(image_size / eval_crop)
    options = {"size": {"height": side, "width": side}, "patch_size": patch_size}
    options |= {"image_mean": list(mean), "image_std": list(std)}
    if eval_crop < 1:
        options |= {"do_center_crop": True, "crop_size": {"height": image_size, "width": image_size}}
    return VisionLanguageImageProcessor(**options)


def _tokenizer(arguments: Arguments, rows: Mapping[str, PairRows | PairStream], max_text_length: int):
    model = arguments.model
    if model.tokenizer is not None:
        return tokenizer_from_vocab(
            model.tokenizer,
            lower_case=model.lower_case,
            strip_accents=model.strip_accents,
            max_text_length=max_text_length,
        )

    # training a vocabulary needs an extra pass over the captions
    if any(isinstance(portion, PairStream) for portion in rows.values()):
        raise ValueError(
            "streamed data are read once, so no vocabulary can be trained on them first; expected `tokenizer`"
        )
    captions = chain.from_iterable(portion.captions() for portion in rows.values())
    return train_tokenizer(
        captions,
        vocab_size=model.vocab_size,
        limit_alphabet=model.limit_alphabet,
        lower_case=model.lower_case is not False,
        strip_accents=model.strip_accents,
        max_text_length=max_text_length,
    )


def _warn_of_sides(arguments: Arguments, rows: Mapping[str, PairRows | PairStream]) -> None:
    """Says before the first step how many captions are wrong of the images that are mirrored under them."""
    for name, portion in rows.items():
        flip = arguments.portions()[name].data.crop.horizontal_flip
        if rank() != 0 or not flip or portion.kind != "pairs" or isinstance(portion, PairStream):
            continue
        texts = list(_sampled(portion))
        if told := [text for text in texts if names_a_side(text)]:
            logger.warning(
                f"{len(told)} of {len(texts)} captions of {name} name a side ({told[0]!r:.60}), and horizontal_flip "
                f"{flip:g} mirrors that share of their pictures under them; 0 mirrors none"
            )


def _sampled(portion: PairRows) -> Iterator[str]:
    """Texts from all over the rows: sources may be sorted."""
    return islice(portion.captions(), 0, None, max(1, len(portion) // SAMPLED_TEXTS))


def _warn_of_unknown_words(tokenizer, rows: Mapping[str, PairRows | PairStream], source: str) -> None:
    """Warns before the first step if a vocabulary from elsewhere does not cover the texts."""
    if rank() != 0:
        return
    for name, portion in rows.items():
        if isinstance(portion, PairStream):
            continue  # read once, by the run
        unknown, total, words = unknown_words(tokenizer, _sampled(portion))
        if unknown:
            shown = ", ".join(repr(word) for word, _ in words.most_common(5))
            warnings.warn(
                f"the tokenizer of {source} does not know {unknown} of {total} tokens ({unknown / total:.1%}) of the "
                f"texts of {name}: they are read as [UNK] ({shown}); without initial_model and tokenizer a vocabulary "
                f"is trained on the texts",
                stacklevel=2,
            )


def build_model(arguments: Arguments, config: PreTrainedConfig) -> PreTrainedModel:
    """
    Builds the student in fp32: from `initial_model`, or from scratch. Heads that `initial_model` lacks are initialised
    at random with `seed`, and listed in a warning.

    Raises:
        ModelDirectoryError: `initial_model` is damaged, or lacks weights of its tower or a part of a head.
        ValueError: `initial_vision` or `initial_text` cannot be read or does not fit; names the keys.
    """
    # the seed determines random weights: all of them from scratch, otherwise only those of missing heads
    torch.manual_seed(arguments.run.seed)
    options = {}
    if arguments.model.attn_implementation is not None:
        options["attn_implementation"] = arguments.model.attn_implementation
    if arguments.model.initial_model is not None:
        model = load_model(
            AutoModelForPreTraining,
            arguments.model.initial_model,
            draws_heads=True,
            config=config,
            dtype=torch.float32,
            **options,
        )
    else:
        model = AutoModelForPreTraining.from_config(config, dtype=torch.float32, **options)

    # published towers replace the random ones
    if arguments.model.initial_vision is not None or arguments.model.initial_text is not None:
        towers = arguments.model.initial_vision, arguments.model.initial_text
        report = initialise(model, *towers, arguments.model.fold_token_types)
        if rank() == 0:
            logger.warning(report.describe())
    if arguments.model.lora is not None:
        add_lora(model, arguments.model.lora)
    if arguments.model.gradient_checkpointing:
        checkpoint_activations(model)
    return model

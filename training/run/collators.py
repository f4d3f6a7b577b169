"""Builds collators from arguments: for pairs, images, texts, and the rows of a task."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedConfig

from oner.processing.data.augmentation import CodeView, TrainingImageTransform
from oner.processing.data.collation import Collator, Corruption, Reader, Targets
from oner.processing.data.excluded_images import read_hashes
from oner.processing.data.layouts import ImageLayout, JointLayout, Layout, SeparateLayout, SpecialTokens
from oner.processing.data.masking import ALL_PATCHES, Dropping, Keeping, Masking, Replacement
from oner.processing.data.task_collation import Labels
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.processing.vl_captions import pre_caption

from .arguments import Arguments, DataArguments

# `pair_layout` of a family's configuration -> layout
LAYOUTS = {"joint": JointLayout, "separate": SeparateLayout}
CAPTION_RULES = {"albef": pre_caption}
CODE_STRIDE = 8  # side in pixels of the region of one visual code, in tokenizers of DALL-E's layout


def build_collators(
    arguments: Arguments, processor: VisionLanguageProcessor, config: PreTrainedConfig
) -> dict[str, Collator]:
    """The collator of each portion of a run, according to the kind of its rows."""
    return {
        name: COLLATORS[portion.data.kind](portion, processor, config)
        for name, portion in arguments.portions().items()
    }


def pair_collator(
    arguments: Arguments, processor: VisionLanguageProcessor, config: PreTrainedConfig, masking: Masking | None = None
) -> Collator:
    """Collator of pairs; `masking` replaces that of the arguments, for tasks without masking."""
    data = arguments.data
    special = SpecialTokens.of(config, processor.tokenizer)
    reader = Reader(
        processor.tokenizer,
        _transform(data, processor, config),
        max_text_length=data.max_text_length or config.max_text_length,
        clean_caption=CAPTION_RULES.get(data.caption_rules),
        max_pixels=data.max_pixels,
        excluded=read_hashes(data.excluded_images),
    )

    # masking, the layout of a pair, and the patches to keep if the objective drops some
    corruption = _corruption(data.masking if masking is None else masking, special)
    keeping = getattr(arguments.objective, "keeping", ALL_PATCHES)
    return _collator(arguments, reader, _pair_layout(config, special), corruption, keeping=keeping)


def text_collator(
    arguments: Arguments,
    processor: VisionLanguageProcessor,
    config: PreTrainedConfig,
    masking: Masking | None = None,
) -> Collator:
    """
    Collator of texts without images. Texts longer than `max_text_length` tokens (by default the configuration's) are
    read in windows of that length. The rules for captions do not apply.
    """
    # with windows for long texts, and without an image transform
    data = arguments.data
    special = SpecialTokens.of(config, processor.tokenizer)
    reader = Reader(
        processor.tokenizer,
        max_text_length=data.max_text_length or config.max_text_length,
        windows=True,
    )
    corruption = _corruption(data.masking if masking is None else masking, special)
    return _collator(arguments, reader, SeparateLayout(special), corruption)


def image_collator(
    arguments: Arguments, processor: VisionLanguageProcessor, config: PreTrainedConfig, masking: Masking | None = None
) -> Collator:
    """Collator of images without texts."""
    data = arguments.data
    special = SpecialTokens.of(config, processor.tokenizer)
    reader = Reader(
        image_transform=_transform(data, processor, config),
        max_pixels=data.max_pixels,
        excluded=read_hashes(data.excluded_images),
    )
    corruption = _corruption(data.masking if masking is None else masking, special)
    return _collator(arguments, reader, ImageLayout(config.patch_size), corruption)


def tokenizer_collator(arguments: Arguments, image_size: int) -> Collator:
    """Collator for training an image tokenizer: images with side `image_size`, in [0, 1], without masking."""
    data = arguments.data
    transform = TrainingImageTransform(image_size, data.crop, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return _collator(arguments, Reader(image_transform=transform, max_pixels=data.max_pixels), ImageLayout())


def labels(processor: VisionLanguageProcessor, config: PreTrainedConfig) -> Targets:
    """Targets of rows with a "label"."""
    return Labels()


def task_collator(
    arguments: Arguments,
    processor: VisionLanguageProcessor,
    config: PreTrainedConfig,
    images: Sequence[str] = ("image",),
    targets: Callable[[VisionLanguageProcessor, PreTrainedConfig], Targets] | None = labels,
) -> Collator:
    """Collator of a task's rows: a text already cleaned by its source, one or several images, and optional targets."""
    data = arguments.data

    # without caption rules, since texts are already cleaned, and without masking
    special = SpecialTokens.of(config, processor.tokenizer)
    reader = Reader(
        processor.tokenizer,
        _transform(data, processor, config),
        images=images,
        text="text",
        max_text_length=data.max_text_length or config.max_text_length,
        max_pixels=data.max_pixels,
        excluded=read_hashes(data.excluded_images),
    )
    answers = None if targets is None else targets(processor, config)
    return _collator(arguments, reader, _pair_layout(config, special), targets=answers)


def text_task_collator(arguments: Arguments, processor: VisionLanguageProcessor, config: PreTrainedConfig) -> Collator:
    """Collator of a task on texts: one text, or two concatenated, and labels; long texts are truncated."""
    special = SpecialTokens.of(config, processor.tokenizer)
    length = arguments.data.max_text_length or config.max_text_length
    reader = Reader(processor.tokenizer, text="text", max_text_length=length)
    return _collator(arguments, reader, SeparateLayout(special), targets=Labels())


# kind of rows -> its collator
COLLATORS = {"pairs": pair_collator, "images": image_collator, "texts": text_collator}


def _collator(
    arguments: Arguments,
    reader: Reader,
    layout: Layout,
    corruption: Corruption | None = None,
    targets: Targets | None = None,
    keeping: Keeping = ALL_PATCHES,
) -> Collator:
    source = ", ".join(arguments.data.train_data)
    return Collator(reader, layout, corruption, targets, arguments.run.seed, source, keeping)


def _pair_layout(config: PreTrainedConfig, special: SpecialTokens) -> Layout:
    # families with separate sequences for image and text say so in their configuration class
    return LAYOUTS[getattr(type(config), "pair_layout", "joint")](special, config.patch_size)


def _corruption(masking: Masking, special: SpecialTokens) -> Corruption:
    return Dropping(masking) if masking.corruption == "drop" else Replacement(masking, special)


def _transform(
    data: DataArguments, processor: VisionLanguageProcessor, config: PreTrainedConfig
) -> TrainingImageTransform:
    """A random crop followed by the processor's image transform, with a second view for visual codes if requested."""
    # one code per patch, so the side of the second view is that many strides
    second_view = None
    if data.code_crop is not None:
        second_view = CodeView(config.image_size // config.patch_size * CODE_STRIDE, data.code_crop)
    colours = processor.image_processor
    return TrainingImageTransform(config.image_size, data.crop, colours.image_mean, colours.image_std, second_view)

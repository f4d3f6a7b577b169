"""From arguments to what makes batches of rows: pairs, images, texts, and the rows of a task."""

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

# what a family may call its layout of a pair -> that layout
LAYOUTS = {"joint": JointLayout, "separate": SeparateLayout}
CAPTION_RULES = {"albef": pre_caption}
CODE_STRIDE = 8  # pixels a side that one visual code stands for in every tokenizer of DALL-E's layout


def build_collators(
    arguments: Arguments, processor: VisionLanguageProcessor, config: PreTrainedConfig
) -> dict[str, Collator]:
    """The collator of each portion of a run, by the kind of its rows."""
    return {
        name: COLLATORS[portion.data.kind](portion, processor, config)
        for name, portion in arguments.portions().items()
    }


def pair_collator(
    arguments: Arguments, processor: VisionLanguageProcessor, config: PreTrainedConfig, masking: Masking | None = None
) -> Collator:
    """Of pairs; `masking` instead of the arguments' own, as a task has that hides nothing."""
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

    # what is hidden, how the two lie in a batch, and what is read of images, where an objective has a say in that
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
    Of texts without images. One of more than `max_text_length` tokens is read in windows of so many; the
    configuration's number if none is given. Rules for captions do not hold for them.
    """
    # long texts become windows; no image transform, for there is no image
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
    """Of images without texts."""
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
    """Of an image tokenizer: images of so many pixels a side, in [0, 1], and nothing hidden."""
    data = arguments.data
    transform = TrainingImageTransform(image_size, data.crop, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return _collator(arguments, Reader(image_transform=transform, max_pixels=data.max_pixels), ImageLayout())


def labels(processor: VisionLanguageProcessor, config: PreTrainedConfig) -> Targets:
    """Of rows with a "label"."""
    return Labels()


def task_collator(
    arguments: Arguments,
    processor: VisionLanguageProcessor,
    config: PreTrainedConfig,
    images: Sequence[str] = ("image",),
    targets: Callable[[VisionLanguageProcessor, PreTrainedConfig], Targets] | None = labels,
) -> Collator:
    """Of a task's rows: a text that their source has cleaned, one image or several, and what is right, if told."""
    data = arguments.data

    # texts come cleaned, so no caption rules; nothing is hidden
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
    """Of a task's texts alone, or two of them behind each other, and what is right; no window is drawn."""
    special = SpecialTokens.of(config, processor.tokenizer)
    length = arguments.data.max_text_length or config.max_text_length
    reader = Reader(processor.tokenizer, text="text", max_text_length=length)
    return _collator(arguments, reader, SeparateLayout(special), targets=Labels())


# kind of rows -> what makes batches of them
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
    # a family that cuts images and texts apart says so in its configuration class
    return LAYOUTS[getattr(type(config), "pair_layout", "joint")](special, config.patch_size)


def _corruption(masking: Masking, special: SpecialTokens) -> Corruption:
    return Dropping(masking) if masking.corruption == "drop" else Replacement(masking, special)


def _transform(
    data: DataArguments, processor: VisionLanguageProcessor, config: PreTrainedConfig
) -> TrainingImageTransform:
    """What the processor does to an image, behind a random crop; and a second view if one is asked for."""
    # one code for each patch, so the second view is as many strides a side as there are patches
    second_view = None
    if data.code_crop is not None:
        second_view = CodeView(config.image_size // config.patch_size * CODE_STRIDE, data.code_crop)
    colours = processor.image_processor
    return TrainingImageTransform(config.image_size, data.crop, colours.image_mean, colours.image_std, second_view)

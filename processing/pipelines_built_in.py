"""transformers' own image pipelines, changed so that our models get the same pixels as from our processor.

transformers' pipelines decode images themselves: they put transparency on black and clip 16 bits at 255. Here
`open_image` decodes first, so they have nothing left to convert. With any other model, each pipeline behaves like its
base class.
"""

from typing import Any

from transformers import (
    BatchEncoding,
    ImageClassificationPipeline,
    ImageFeatureExtractionPipeline,
    ZeroShotImageClassificationPipeline,
)

from .image_processing_vl import open_image
from .vl_sources import is_many, iterate, undecoded


class ReadsPictures:
    """Mixin for a pipeline whose inputs are images, including URLs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # users expect a dataset column to work like a list
        if args and self.is_ours and is_many(args[0]) and hasattr(args[0], "column_name"):
            args = (list(iterate(undecoded(args[0]))), *args[1:])
        return super().__call__(*args, **kwargs)

    def preprocess(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """The base pipeline's, for any image that `open_image` reads."""
        if self.is_ours:
            image = open_image(image, self.image_processor.max_pixels, allow_urls=True)
        return super().preprocess(image, *args, **kwargs)

    @property
    def is_ours(self) -> bool:
        # checks the method, not the class: code loaded from the Hub has a class of its own
        return hasattr(self.image_processor, "shrink")


class ZeroShotPipeline(ReadsPictures, ZeroShotImageClassificationPipeline):
    """Also truncates labels to the model's maximum text length, as the processor does."""

    def preprocess(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """pixel_values (1, 3, H, W), and the ids and mask of the labels (labels, L)."""
        inputs = super().preprocess(image, *args, **kwargs)
        longest = getattr(self.model.config, "max_text_length", None)
        if self.is_ours and longest is not None:
            texts = inputs["text_inputs"][0]
            inputs["text_inputs"] = [BatchEncoding({name: rows[:, : 1 + longest] for name, rows in texts.items()})]
        return inputs


class ImageFeaturesPipeline(ReadsPictures, ImageFeatureExtractionPipeline):
    """Takes images only."""


class PictureClassificationPipeline(ReadsPictures, ImageClassificationPipeline):
    """Takes images only."""


# task -> the class that replaces transformers'
BUILT_IN = {
    "zero-shot-image-classification": ZeroShotPipeline,
    "image-feature-extraction": ImageFeaturesPipeline,
    "image-classification": PictureClassificationPipeline,
}

__all__ = ["BUILT_IN", "ImageFeaturesPipeline", "PictureClassificationPipeline", "ZeroShotPipeline"]

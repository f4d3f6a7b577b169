"""transformers' own pipelines on pictures, which see with a model of this package what its processor sees.

They open a picture themselves: transparency on black, 16 bits cut at 255. Here `open_image` reads it before, and they
find nothing left to convert. With any other model each is the class that it extends.
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
    """Beside a pipeline whose inputs are pictures, addresses among them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # a data set's column is a list to its users
        if args and self.is_ours and is_many(args[0]) and hasattr(args[0], "column_name"):
            args = (list(iterate(undecoded(args[0]))), *args[1:])
        return super().__call__(*args, **kwargs)

    def preprocess(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline's own, of anything that `open_image` reads."""
        if self.is_ours:
            image = open_image(image, self.image_processor.max_pixels, allow_urls=True)
        return super().preprocess(image, *args, **kwargs)

    @property
    def is_ours(self) -> bool:
        # by what it can do: code from the Hub may have the class twice
        return hasattr(self.image_processor, "shrink")


class ZeroShotPipeline(ReadsPictures, ZeroShotImageClassificationPipeline):
    """Also cuts labels that are longer than the model's texts, as the processor does."""

    def preprocess(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """Pixels (1, 3, H, W), and the labels' ids and mask (labels, L)."""
        inputs = super().preprocess(image, *args, **kwargs)
        longest = getattr(self.model.config, "max_text_length", None)
        if self.is_ours and longest is not None:
            texts = inputs["text_inputs"][0]
            inputs["text_inputs"] = [BatchEncoding({name: rows[:, : 1 + longest] for name, rows in texts.items()})]
        return inputs


class ImageFeaturesPipeline(ReadsPictures, ImageFeatureExtractionPipeline):
    """Of pictures alone."""


class PictureClassificationPipeline(ReadsPictures, ImageClassificationPipeline):
    """Of pictures alone."""


# task -> the class in place of transformers'
BUILT_IN = {
    "zero-shot-image-classification": ZeroShotPipeline,
    "image-feature-extraction": ImageFeaturesPipeline,
    "image-classification": PictureClassificationPipeline,
}

__all__ = ["BUILT_IN", "ImageFeaturesPipeline", "PictureClassificationPipeline", "ZeroShotPipeline"]

"""The training picture: a random crop, resized and normalised; nothing stronger (paper, appendix E).

Shapes: 3 channels, H = W = image_size.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation


class TrainingImageTransform:
    """timm's bicubic `RandomResizedCropAndInterpolation`, an optional flip, normalisation.

    timm draws from python's global `random`; here that state is set from the generator of the call and put back
    afterwards, so that a picture depends on its own generator alone and nothing outside is disturbed.

    Args:
        image_size: side H = W of the result.
        scale: share of the picture's area that a crop covers.
        ratio: aspect ratios of a crop.
        hflip: probability of a horizontal flip (off: captions speak of left and right).
        mean, std: per channel, of values in [0, 1].
    """

    def __init__(
        self,
        image_size: int,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.0,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be positive, got {image_size}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be a rising pair in (0, 1], got {tuple(scale)}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be a rising pair of positive numbers, got {tuple(ratio)}")
        if not 0.0 <= hflip <= 1.0:
            raise ValueError(f"hflip must be in [0, 1], got {hflip}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std need three values, std positive; got {tuple(mean)} and {tuple(std)}")
        self.image_size, self.hflip = image_size, hflip
        self.crop = RandomResizedCropAndInterpolation(image_size, tuple(scale), tuple(ratio), "bicubic")
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.factor = (1.0 / (255.0 * torch.tensor(std))).view(3, 1, 1)
        self.offset = (-torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """One picture (PIL, RGB) to (3, H, W) float32; takes two draws from `rng`."""
        if image.mode != "RGB":
            raise ValueError(f"the picture must be RGB, got mode {image.mode}")
        seed, flip = int(rng.integers(1 << 62)), float(rng.random()) < self.hflip
        state = random.getstate()
        try:
            random.seed(seed)
            image = self.crop(image)
        finally:
            random.setstate(state)
        if flip:
            image = ImageOps.mirror(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.float().mul_(self.factor).add_(self.offset).contiguous()

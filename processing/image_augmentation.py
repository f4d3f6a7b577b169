"""The training picture: a random crop, resized and normalised; nothing stronger by default (paper, appendix E).

Shapes: 3 channels, H = W = image_size.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.v2 import functional as tvf


class TrainingImageTransform:
    """timm's bicubic `RandomResizedCropAndInterpolation`, an optional flip, normalisation.

    timm draws from python's global `random`; here that state is set from the generator of the call and put back
    afterwards, so that a picture depends on its own generator alone and nothing outside is disturbed.

    Args:
        image_size: side H = W of the result.
        scale: share of the picture's area that a crop covers.
        ratio: aspect ratios of a crop.
        hflip: probability of a horizontal flip (off: captions speak of left and right).
        color_jitter: brightness, contrast and saturation are each scaled by a factor in 1 ± this (off).
        grayscale: probability of losing the colour (off).
        mean, std: per channel, of values in [0, 1].
    """

    def __init__(
        self,
        image_size: int,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.0,
        color_jitter: float = 0.0,
        grayscale: float = 0.0,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be positive, got {image_size}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be a rising pair in (0, 1], got {tuple(scale)}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be a rising pair of positive numbers, got {tuple(ratio)}")
        for name, share in (("hflip", hflip), ("color_jitter", color_jitter), ("grayscale", grayscale)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std need three values, std positive; got {tuple(mean)} and {tuple(std)}")
        self.image_size, self.hflip, self.color_jitter, self.grayscale = image_size, hflip, color_jitter, grayscale
        self.crop = RandomResizedCropAndInterpolation(image_size, tuple(scale), tuple(ratio), "bicubic")
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.factor = (1.0 / (255.0 * torch.tensor(std))).view(3, 1, 1)
        self.offset = (-torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """One picture (PIL, RGB) to (3, H, W) float32; two draws from `rng`, and some for colours if they change."""
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
        image = self._recolour(image, rng)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.float().mul_(self.factor).add_(self.offset).contiguous()

    def _recolour(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        # torchvision's own ColorJitter draws from torch's global generator, so only its functions are used
        if self.color_jitter:
            for adjust in (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation):
                image = adjust(image, float(rng.uniform(1 - self.color_jitter, 1 + self.color_jitter)))
        if self.grayscale and rng.random() < self.grayscale:
            image = tvf.rgb_to_grayscale(image, num_output_channels=3)
        return image

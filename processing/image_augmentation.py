"""The training picture: a random crop, resized and normalised; nothing stronger by default (paper, appendix E).

Shapes: 3 channels, H = W = image_size.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.v2 import functional as tvf

WHITE = (255, 255, 255)  # the ground on which the processor lays transparent pictures too


class TrainingImageTransform:
    """timm's bicubic `RandomResizedCropAndInterpolation`, optional distortions, normalisation.

    timm draws from the global generators of python and numpy; here their states are set from the generator of the call
    and put back afterwards, so that a picture depends on its own generator alone and nothing outside is disturbed.

    Args:
        image_size: side H = W of the result.
        scale: share of the picture's area that a crop covers.
        ratio: aspect ratios of a crop.
        margin: before the crop, white ground is laid round the picture, at each side up to this share of that side
            (drawn uniformly), so that crops also show things smaller than the picture does (off).
        hflip: probability of a horizontal flip (off: captions speak of left and right).
        color_jitter: brightness, contrast and saturation are each scaled by a factor in 1 ± this (off).
        grayscale: probability of losing the colour (off).
        rand_augment: timm's RandAugment by its configuration string, "rand-m7-n2-mstd0.5" (off); ground that a
            shift or a turn uncovers is white.
        mean, std: per channel, of values in [0, 1].
    """

    def __init__(
        self,
        image_size: int,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        margin: float = 0.0,
        hflip: float = 0.0,
        color_jitter: float = 0.0,
        grayscale: float = 0.0,
        rand_augment: str | None = None,
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
        if margin < 0:
            raise ValueError(f"margin must not be negative, got {margin}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std need three values, std positive; got {tuple(mean)} and {tuple(std)}")
        self.image_size, self.margin, self.hflip = image_size, margin, hflip
        self.color_jitter, self.grayscale = color_jitter, grayscale
        self.rand_augment = _rand_augment(rand_augment, image_size) if rand_augment else None
        self.crop = RandomResizedCropAndInterpolation(image_size, tuple(scale), tuple(ratio), "bicubic")
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.factor = (1.0 / (255.0 * torch.tensor(std))).view(3, 1, 1)
        self.offset = (-torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """One picture (PIL, RGB) to (3, H, W) float32; two draws from `rng`, and more for what is switched on."""
        if image.mode != "RGB":
            raise ValueError(f"the picture must be RGB, got mode {image.mode}")
        seed, flip = int(rng.integers(1 << 62)), float(rng.random()) < self.hflip
        if self.margin:
            image = self._with_margin(image, float(rng.uniform(0, self.margin)))
        with _global_draws_from(seed):
            image = self.crop(image)
            if self.rand_augment is not None:
                image = self.rand_augment(image)
        if flip:
            image = ImageOps.mirror(image)
        image = self._recolour(image, rng)
        # PIL parts the channels four times as fast as a transposed copy of floats does
        pixels = torch.from_numpy(np.stack([np.asarray(channel) for channel in image.split()]))
        return pixels.float().mul_(self.factor).add_(self.offset)

    def _with_margin(self, image: Image.Image, share: float) -> Image.Image:
        width, height = round(share * image.width), round(share * image.height)
        return ImageOps.expand(image, (width, height, width, height), fill=WHITE)

    def _recolour(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        # torchvision's own ColorJitter draws from torch's global generator, so only its functions are used
        if self.color_jitter:
            for adjust in (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation):
                image = adjust(image, float(rng.uniform(1 - self.color_jitter, 1 + self.color_jitter)))
        if self.grayscale and rng.random() < self.grayscale:
            image = tvf.rgb_to_grayscale(image, num_output_channels=3)
        return image


def _rand_augment(config: str, image_size: int):
    # timm's own reference values: shifts of up to 45 % of the side, and the ground that the distortion uncovers
    try:
        return rand_augment_transform(config, {"translate_const": int(0.45 * image_size), "img_mean": WHITE})
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f'rand_augment must be a string of timm such as "rand-m7-n2", got {config!r}') from error


@contextmanager
def _global_draws_from(seed: int) -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])

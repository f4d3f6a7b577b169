"""The training picture: a random crop, resized and normalised; nothing stronger by default (paper, appendix E).

Shapes: 3 channels, H = W = image_size, S = code_size.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import RandAugment, rand_augment_ops, rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.v2 import functional as tvf

# a crop of the whole area can only have the picture's own ratio: timm then takes all of it if that is within
ANY_RATIO = (1e-6, 1e6)
WHITE = (255, 255, 255)  # the ground on which the processor lays transparent pictures too
GREY = (128, 128, 128)
# mean and deviation of each channel, by the name of their origin
NORMALIZATIONS = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}
CODE_CROPS = ("common", "independent")
# RandAugment as ALBEF, TCL and SIMLA run it: two of these and of doing nothing, each done half of the time
ALBEF = "albef-n2-m7"
ALBEF_OPS = (
    "AutoContrast",
    "Equalize",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
)


class TrainingImageTransform:
    """timm's bicubic `RandomResizedCropAndInterpolation`, optional distortions, normalisation.

    timm draws from the global generators of python and numpy; here their states are set from the generator of the call
    and put back afterwards, so that a picture depends on its own generator alone and nothing outside is disturbed.

    Args:
        image_size: side H = W of the result.
        scale: share of the picture's area that a crop covers; (1, 1) squeezes the whole picture, whatever its shape.
        ratio: aspect ratios of a crop.
        margin: before the crop, white ground is laid round the picture, at each side up to this share of that side
            (drawn uniformly), so that crops also show things smaller than the picture does (off).
        hflip: probability of a horizontal flip (off: captions speak of left and right).
        color_jitter: brightness, contrast and saturation are each scaled by a factor in 1 ± this (off).
        grayscale: probability of losing the colour (off).
        rand_augment: timm's RandAugment by its configuration string, "rand-m7-n2-mstd0.5" (off); ground that a
            shift or a turn uncovers is white. Or "albef-n2-m7": ALBEF's, after the flip, on grey ground.
        mean, std: per channel, of values in [0, 1].
        code_size: side S of a second view for a tokenizer of pictures, its values in [0, 1] (off).
        code_crop: "common": the second view shows what the first does, by the same draws, and is resized from the same
            crop by Lanczos (BEiT). "independent": it is drawn anew and resized by bicubic (SIMLA's code).
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
        code_size: int | None = None,
        code_crop: str = "common",
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
        if code_size is not None and code_size < 1:
            raise ValueError(f"code_size must be positive, got {code_size}")
        if code_crop not in CODE_CROPS:
            raise ValueError(f"code_crop must be one of {CODE_CROPS}, got {code_crop!r}")
        self.image_size, self.margin, self.hflip = image_size, margin, hflip
        self.color_jitter, self.grayscale = color_jitter, grayscale
        self.flip_first = rand_augment == ALBEF  # where ALBEF flips; timm's distortions keep the order they had here
        self.rand_augment = _rand_augment(rand_augment, image_size) if rand_augment else None
        ratio = ANY_RATIO if min(scale) == 1 else tuple(ratio)
        self.crop = RandomResizedCropAndInterpolation(image_size, tuple(scale), ratio, "bicubic")
        self._normalize(mean, std)
        self.replays, self.code_view = code_crop == "common", None
        if code_size is not None:
            self.code_view = self._view_for_codes(code_size, rand_augment)

    def _normalize(self, mean: Sequence[float], std: Sequence[float]) -> None:
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.factor = (1.0 / (255.0 * torch.tensor(std))).view(3, 1, 1)
        self.offset = (-torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1)

    def _view_for_codes(self, size: int, rand_augment: str | None) -> "TrainingImageTransform":
        """This transform at another size, without normalisation."""
        view = copy.copy(self)
        view.image_size = size
        filtering = "lanczos" if self.replays else "bicubic"
        view.crop = RandomResizedCropAndInterpolation(size, self.crop.scale, self.crop.ratio, filtering)
        if rand_augment:
            view.rand_augment = _rand_augment(rand_augment, size, size / self.image_size if self.replays else 1.0)
        view._normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return view

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor | dict[str, torch.Tensor]:
        """One picture (PIL, RGB) to (3, H, W) float32; two draws from `rng`, and more for what is switched on.

        With a second view: `pixel_values` (3, H, W) and `code_pixel_values` (3, S, S). A common one draws no more.
        """
        if image.mode != "RGB":
            raise ValueError(f"the picture must be RGB, got mode {image.mode}")
        if self.code_view is None:
            return self._view(image, rng)
        rng_of_codes = copy.deepcopy(rng) if self.replays else rng
        views = {"pixel_values": self._view(image, rng)}
        return {**views, "code_pixel_values": self.code_view._view(image, rng_of_codes)}

    def _view(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        seed, flip = int(rng.integers(1 << 62)), float(rng.random()) < self.hflip
        if self.margin:
            image = self._with_margin(image, float(rng.uniform(0, self.margin)))
        with _global_draws_from(seed):
            image = self.crop(image)
            if flip and self.flip_first:
                image = ImageOps.mirror(image)
            if self.rand_augment is not None:
                image = self.rand_augment(image)
        if flip and not self.flip_first:
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


def _rand_augment(config: str, image_size: int, shift: float = 1.0) -> RandAugment:
    """`shift` scales ALBEF's shifts, which are so many pixels whatever the size; timm's are shares of the side."""
    if config == ALBEF:
        hparams = {"translate_const": 10 * shift, "img_mean": GREY, "interpolation": Image.Resampling.BILINEAR}
        ops = rand_augment_ops(magnitude=7, prob=0.5, hparams=hparams, transforms=list(ALBEF_OPS))
        return RandAugment([_unchanged, *ops], num_layers=2)
    # timm's own reference values: shifts of up to 45 % of the side, and the ground that the distortion uncovers
    try:
        return rand_augment_transform(config, {"translate_const": int(0.45 * image_size), "img_mean": WHITE})
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f'rand_augment must be a string of timm such as "rand-m7-n2", or "{ALBEF}"; got {config!r}'
        ) from error


def _unchanged(image: Image.Image) -> Image.Image:
    return image


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

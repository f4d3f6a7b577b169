"""Augmentation of training images: a random resized crop, normalised; by default nothing else (OneR, appendix E).

Shapes: 3 channels, H = W = image_size, S side of the second view.
"""

import copy
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import RandAugment, rand_augment_ops, rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.v2 import functional as tvf

from .bounds import check_bounds

CROP_RATIO = (3 / 4, 4 / 3)  # aspect ratios of a crop
# a crop of the whole area must have the image's own ratio; timm takes the whole image if that ratio is in range
ANY_RATIO = (1e-6, 1e6)
WHITE = (255, 255, 255)  # background colour, on which the processor also composites transparent images
GREY = (128, 128, 128)
# mean and deviation of each channel, by source
NORMALIZATIONS = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}
CodeCrop = Literal["common", "independent"]
SIDE = re.compile(r"\b(?:left|right)(?:most|wards?|[- ]?hand(?:ed)?)?\b", re.IGNORECASE)
# RandAugment of ALBEF, TCL and SIMLA: two of these or the identity, each applied with probability 1/2
ALBEF = "albef-n2-m7"
MOST_OPERATIONS = 100  # maximum number of RandAugment operations per image; timm's configurations have 2 or 3
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


def names_a_side(text: str) -> bool:
    """Whether an English text says left or right, and so is wrong of the mirrored image."""
    return SIDE.search(text) is not None


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class Crop:
    """Augmentation options, applied before normalisation, by their flat names in a configuration.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    BOUNDS: ClassVar[dict[str, str]] = {
        "crop_scale": "(0, 1]",
        "crop_margin": "[0, 1]",
        "horizontal_flip": "[0, 1]",
        "color_jitter": "[0, 1]",
        "grayscale": "[0, 1]",
    }

    crop_scale: list[float] = field(
        default_factory=lambda: [0.5, 1.0],
        metadata=_help("Share of the image's area that a random crop covers, from, to; 1 1 squeezes all of it."),
    )
    crop_margin: float = field(
        default=0.0,
        metadata=_help("White ground laid round an image before the crop, at each side up to this share of it."),
    )

    # operations on the crop, all off by default
    horizontal_flip: float = field(
        default=0.0, metadata=_help("Probability of a flip; captions speak of left and right.")
    )
    color_jitter: float = field(
        default=0.0, metadata=_help("Brightness, contrast and saturation are scaled by factors in 1 plus or minus it.")
    )
    grayscale: float = field(default=0.0, metadata=_help("Probability of losing the colour."))
    rand_augment: str | None = field(
        default=None, metadata=_help('timm\'s RandAugment by its string, "rand-m7-n2-mstd0.5", or "albef-n2-m7".')
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if len(self.crop_scale) != 2 or self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale is {self.crop_scale}; expected two rising numbers in (0, 1]")
        counts = re.findall(r"-n(\d+)", self.rand_augment or "")
        if any(int(count) > MOST_OPERATIONS for count in counts):
            raise ValueError(f"rand_augment is {self.rand_augment!r}; expected at most {MOST_OPERATIONS} operations")


@dataclass(frozen=True)
class CodeView:
    """A second view of an image for an image tokenizer, with values in [0, 1].

    Args:
        size: its side S.
        crop: "common" uses the crop and random draws of the first view, resized with Lanczos (BEiT). "independent" is
            drawn separately and resized with bicubic interpolation (SIMLA's code).

    Raises:
        ValueError: the size is not positive, or the crop is unknown.
    """

    size: int
    crop: CodeCrop = "common"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"the size of a second view is {self.size}; expected at least 1")
        if self.crop not in get_args(CodeCrop):
            raise ValueError(f"code_crop is {self.crop!r}; expected one of {get_args(CodeCrop)}")


class TrainingImageTransform:
    """timm's bicubic `RandomResizedCropAndInterpolation`, optional distortions, normalisation.

    timm draws from the global generators of python and numpy; their states are seeded from the generator of the call
    and restored afterwards, so an image depends on its own generator only and global states are unchanged.

    Args:
        image_size: side H = W of the result.
        crop: augmentation options. timm's RandAugment fills with white; ALBEF's is applied after the flip and fills
            with grey.
        mean, std: per channel, for values in [0, 1].
        code_view: a second view, (3, S, S).

    Raises:
        ValueError: sizes or statistics are invalid, or timm does not know the RandAugment string.
    """

    def __init__(
        self,
        image_size: int,
        crop: Crop | None = None,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        code_view: CodeView | None = None,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be positive, got {image_size}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std need three values, std positive; got {tuple(mean)} and {tuple(std)}")

        # the first view
        self.image_size = image_size
        self.options = Crop() if crop is None else crop
        self._draw_by(image_size, "bicubic")
        self._normalize(mean, std)

        # and the second, at its own size
        self.code_view = None
        if code_view is not None:
            self.replays = code_view.crop == "common"
            self.code_view = self._view_for_codes(code_view.size)

    def _draw_by(self, image_size: int, filtering: str, shift: float = 1.0) -> None:
        """Sets up the operations of a view; `shift` scales ALBEF's translations."""
        scale = self.options.crop_scale
        config = self.options.rand_augment
        ratio = ANY_RATIO if min(scale) == 1 else CROP_RATIO
        self.random_crop = RandomResizedCropAndInterpolation(image_size, tuple(scale), ratio, filtering)
        self.rand_augment = _rand_augment(config, image_size, shift) if config else None
        self.flip_first = config == ALBEF  # ALBEF flips before RandAugment, timm after it

    def _normalize(self, mean: Sequence[float], std: Sequence[float]) -> None:
        # (x / 255 - mean) / std as one multiplication and one addition
        self.factor = (1.0 / (255.0 * torch.tensor(std))).view(3, 1, 1)
        self.offset = (-torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1)

    def _view_for_codes(self, size: int) -> "TrainingImageTransform":
        """This transform at another size, without normalisation."""
        view = copy.copy(self)
        if self.replays:
            # the content of the first view at another resolution
            view._draw_by(size, "lanczos", shift=size / self.image_size)
        else:
            view._draw_by(size, "bicubic")
        view._normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return view

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor | dict[str, torch.Tensor]:
        """One image (PIL, RGB) to (3, H, W) float32; makes two draws from `rng`, and more for optional operations.

        With a second view: `pixel_values` (3, H, W) and `code_pixel_values` (3, S, S). A common one needs no draws.
        """
        if image.mode != "RGB":
            raise ValueError(f"the picture must be RGB, got mode {image.mode}")
        if self.code_view is None:
            return self._view(image, rng)
        rng_of_codes = copy.deepcopy(rng) if self.replays else rng
        views = {"pixel_values": self._view(image, rng)}  # (3, H, W)
        return {**views, "code_pixel_values": self.code_view._view(image, rng_of_codes)}  # (3, S, S)

    def _view(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        # all draws of this view except those of colour
        seed = int(rng.integers(1 << 62))
        flip = float(rng.random()) < self.options.horizontal_flip
        if self.options.crop_margin:
            image = self._with_margin(image, float(rng.uniform(0, self.options.crop_margin)))

        # crop and distort, by timm
        with _global_draws_from(seed):
            image = self.random_crop(image)
            if flip and self.flip_first:
                image = ImageOps.mirror(image)
            if self.rand_augment is not None:
                image = self.rand_augment(image)
        if flip and not self.flip_first:
            image = ImageOps.mirror(image)
        image = self._recolour(image, rng)

        # splitting channels in PIL is four times as fast as transposing floats
        pixels = torch.from_numpy(np.stack([np.asarray(channel) for channel in image.split()]))  # (3, H, W) uint8
        return pixels.float().mul_(self.factor).add_(self.offset)  # (3, H, W) float32

    def _with_margin(self, image: Image.Image, share: float) -> Image.Image:
        width = round(share * image.width)
        height = round(share * image.height)
        return ImageOps.expand(image, (width, height, width, height), fill=WHITE)

    def _recolour(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        # torchvision's ColorJitter draws from torch's global generator, so its functional form is used
        jitter = self.options.color_jitter
        grayscale = self.options.grayscale
        if jitter:
            for adjust in (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation):
                image = adjust(image, float(rng.uniform(1 - jitter, 1 + jitter)))
        if grayscale and rng.random() < grayscale:
            image = tvf.rgb_to_grayscale(image, num_output_channels=3)
        return image


def _rand_augment(config: str, image_size: int, shift: float = 1.0) -> RandAugment:
    """Builds RandAugment; `shift` scales ALBEF's translations, fixed in pixels; timm's are shares of the side."""
    if config == ALBEF:
        hparams = {"translate_const": 10 * shift, "img_mean": GREY, "interpolation": Image.Resampling.BILINEAR}
        ops = rand_augment_ops(magnitude=7, prob=0.5, hparams=hparams, transforms=list(ALBEF_OPS))
        return RandAugment([_unchanged, *ops], num_layers=2)
    # timm's reference value for translations, up to 45 % of the side, and the fill colour
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

"""The training picture: crops, distortions, and draws from the generator of the call alone."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from oner.processing.data.augmentation import CodeView, Crop, TrainingImageTransform

SIZE = 32
WHOLE = [1.0, 1.0]
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def picture(size=(40, 30), mode="RGB", seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.mark.parametrize(
    "options", [{}, {"crop_margin": 0.3, "color_jitter": 0.4, "rand_augment": "rand-m9-n3-p1-mstd0.5"}]
)
def test_augmentation_is_a_function_of_its_generator(options):
    transform, image = TrainingImageTransform(SIZE, Crop(**options)), picture((60, 50))
    state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    one, two = (transform(image, np.random.default_rng(4)) for _ in range(2))
    random.seed(1)
    np.random.seed(1)
    three = transform(image, np.random.default_rng(4))
    random.setstate(state)
    np.random.set_state(numpy_state)
    assert torch.equal(one, two) and torch.equal(one, three) and one.is_contiguous()
    assert not torch.equal(one, transform(image, np.random.default_rng(5)))
    transform(image, np.random.default_rng(6))
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1]) and np.random.get_state()[2:] == numpy_state[2:]


def test_augmentation_restores_the_state_after_an_error(monkeypatch):
    transform = TrainingImageTransform(SIZE)

    def fail(image):
        random.random()
        raise RuntimeError("inside timm")

    monkeypatch.setattr(transform, "random_crop", fail)
    state = random.getstate()
    with pytest.raises(RuntimeError, match="inside timm"):
        transform(picture(), np.random.default_rng(0))
    assert random.getstate() == state


def test_augmentation_normalises_and_flips():
    grey = Image.new("RGB", (50, 50), (128, 0, 255))
    pixels = TrainingImageTransform(16)(grey, np.random.default_rng(0))
    expected = (torch.tensor([128, 0, 255]) / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    assert torch.allclose(pixels, expected.view(3, 1, 1).expand(3, 16, 16), atol=1e-5)
    plain, mirrored = (
        TrainingImageTransform(16, Crop(horizontal_flip=p))(picture(), np.random.default_rng(0)) for p in (0.0, 1.0)
    )
    assert torch.equal(plain.flip(-1), mirrored)


def test_augmentation_covers_at_least_half_of_the_picture():
    image = picture((64, 64))
    transform, areas = TrainingImageTransform(16), []
    crop = transform.random_crop

    def spy(img):
        areas.append(np.prod(crop.get_params(img, crop.scale, crop.ratio)[2:]) / 64**2)
        return crop(img)

    transform.random_crop = spy
    for seed in range(200):
        transform(image, np.random.default_rng(seed))
    assert 0.48 < min(areas) < 0.56 and 0.9 < max(areas) <= 1.0


def test_a_margin_shows_the_picture_smaller_on_white():
    black = Image.new("RGB", (64, 64))
    shares = []
    for seed in range(100):
        pixels = TrainingImageTransform(64, Crop(WHOLE, crop_margin=0.5), **PLAIN)(black, np.random.default_rng(seed))
        assert pixels[:, 32, 32].max() < 0.05
        shares.append((pixels < 0.5).float().mean().item())
    # a margin of m leaves 1 / (1 + 2m) of each side
    assert 0.25 <= min(shares) < 0.3 and 0.9 < max(shares) <= 1.0
    assert (TrainingImageTransform(64, Crop(WHOLE), **PLAIN)(black, np.random.default_rng(0)) < 0.05).all()


def test_rand_augment_distorts_on_white_ground():
    turned = TrainingImageTransform(64, Crop(WHOLE, rand_augment="rand-m10-n4-p1"), **PLAIN)
    plain = TrainingImageTransform(64, Crop(WHOLE), **PLAIN)
    image = Image.new("RGB", (64, 64), (200, 60, 30))
    ways = [turned(image, np.random.default_rng(seed)) for seed in range(60)]
    same = sum(torch.equal(way, plain(image, np.random.default_rng(seed))) for seed, way in enumerate(ways))
    # what a shift, shear or turn uncovers in a one-coloured picture can only be the ground
    white = sum(bool((way > 0.99).all(0).any()) for way in ways)
    assert same < 20 and white > 10


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TrainingImageTransform(0), "image_size must be positive"),
        (lambda: Crop([0.8, 0.5]), r"crop_scale is \[0.8, 0.5\]; expected two rising numbers in \(0, 1\]"),
        (lambda: Crop([0.8]), r"crop_scale is \[0.8\]; expected two rising"),
        (lambda: Crop(crop_margin=-0.1), r"crop_margin is -0.1; expected a number in \[0, 1\]"),
        (lambda: Crop(horizontal_flip=2), r"horizontal_flip is 2; expected a number in \[0, 1\]"),
        (lambda: Crop(color_jitter=-1), "color_jitter is -1; expected"),
        (
            lambda: TrainingImageTransform(16, Crop(rand_augment="auto-m7")),
            'such as "rand-m7-n2", or "albef-n2-m7"; got .auto-m7.',
        ),
        (lambda: TrainingImageTransform(16, Crop(rand_augment="rand-q7")), "rand_augment must be a string of timm"),
        (lambda: TrainingImageTransform(16, std=(1, 0, 1)), "mean and std need three values"),
        (lambda: CodeView(0), "the size of a second view is 0; expected at least 1"),
        (lambda: CodeView(8, "same"), r"code_crop is 'same'; expected one of \('common', 'independent'\)"),
    ],
)
def test_augmentation_refuses_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_augmentation_takes_rgb_only():
    with pytest.raises(ValueError, match="must be RGB, got mode L"):
        TrainingImageTransform(16)(picture(mode="L"), np.random.default_rng(0))


def test_a_crop_of_all_is_the_whole_picture_whatever_its_shape():
    image = picture((130, 40))
    transform = TrainingImageTransform(SIZE, Crop(WHOLE))
    squeezed = torch.from_numpy(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).copy())
    expected = squeezed.permute(2, 0, 1) * transform.factor + transform.offset
    for seed in range(5):
        assert torch.equal(transform(image, np.random.default_rng(seed)), expected)

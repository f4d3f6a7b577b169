"""The second view, for a tokenizer of pictures, and ALBEF's distortions, each against its closed form."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.transforms import RandomResizedCropAndInterpolation

from oner.processing.data.augmentation import NORMALIZATIONS, CodeView, Crop, TrainingImageTransform

SIZE, CODES = 64, 32
WHOLE = [1.0, 1.0]
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def picture(size=(150, 110), seed=0):
    """Smooth, of many colours: 8 x 8 random patches drawn large."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def tensor_of(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


def test_a_common_view_is_the_same_crop_resized_by_lanczos():
    image, flips = picture(), 0
    transform = TrainingImageTransform(SIZE, Crop([0.2, 1.0], horizontal_flip=0.5), code_view=CodeView(CODES), **PLAIN)
    for number in range(20):
        views = transform(image, np.random.default_rng(number))
        rng = np.random.default_rng(number)
        random.seed(int(rng.integers(1 << 62)))
        flip = rng.random() < 0.5
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3))
        crop = image.crop((left, top, left + width, top + height))
        filters = {"pixel_values": (SIZE, Image.Resampling.BICUBIC), "code_pixel_values": (CODES, Image.LANCZOS)}
        for name, (side, resampling) in filters.items():
            expected = crop.resize((side, side), resampling)
            expected = tensor_of(ImageOps.mirror(expected) if flip else expected)
            torch.testing.assert_close(views[name], expected, rtol=0, atol=1e-6)
        flips += flip
    assert set(views) == set(filters) and 4 < flips < 16


DISTORTED = Crop([0.2, 1.0], crop_margin=0.3, horizontal_flip=0.5, color_jitter=0.4, grayscale=0.2)


@pytest.mark.parametrize("rand_augment", [None, "rand-m9-n3-p1-mstd0.5", "albef-n2-m7"])
def test_a_common_view_costs_no_draw_and_shows_what_the_first_does(rand_augment):
    image, crop = picture(), replace(DISTORTED, rand_augment=rand_augment)
    ways = (None, CodeView(CODES), CodeView(CODES, "independent"))
    alone, both, apart = (TrainingImageTransform(SIZE, crop, code_view=way, **PLAIN) for way in ways)
    common, independent = [], []
    for number in range(40):
        rng, other, third = (np.random.default_rng(number) for _ in range(3))
        expected, views, strangers = alone(image, rng), both(image, other), apart(image, third)
        assert torch.equal(views["pixel_values"], expected) and torch.equal(strangers["pixel_values"], expected)
        assert rng.bit_generator.state == other.bit_generator.state != third.bit_generator.state
        small = torch.nn.functional.avg_pool2d(expected, 2)
        for made, shown in ((common, views), (independent, strangers)):
            codes = shown["code_pixel_values"]
            assert codes.shape == (3, CODES, CODES) and 0 <= codes.min() and codes.max() <= 1
            made.append((codes - small).abs().mean().item())
    # solarising and equalising take small differences of the two sizes apart, so that the middle is compared
    assert np.median(common) < 0.02 and np.median(independent) > 0.1
    assert sum(distance > 0.1 for distance in common) <= 4


def test_albefs_shifts_follow_the_size_of_a_common_view():
    """Seven pixels of a picture are three and a half of one half its size; SIMLA's code shifts that by seven."""
    shifts = {}
    for crop in ("common", "independent"):
        transform = TrainingImageTransform(SIZE, Crop(rand_augment="albef-n2-m7"), code_view=CodeView(CODES, crop))
        ops = {op.name: op for op in transform.code_view.rand_augment.ops[1:]}
        shifts[crop] = {abs(ops["TranslateX"].level_fn(7, ops["TranslateX"].hparams)[0]) for _ in range(9)}
    assert shifts == {"common": {3.5}, "independent": {7.0}}


def test_an_independent_view_is_a_whole_draw_of_its_own():
    image, crop = picture(), replace(DISTORTED, rand_augment="albef-n2-m7")
    transform = TrainingImageTransform(SIZE, crop, code_view=CodeView(CODES, "independent"))
    rng = np.random.default_rng(3)
    first = TrainingImageTransform(SIZE, crop)(image, rng)
    second = TrainingImageTransform(CODES, crop, **PLAIN)(image, rng)
    views = transform(image, np.random.default_rng(3))
    assert torch.equal(views["pixel_values"], first) and torch.equal(views["code_pixel_values"], second)


def albef_ops():
    transform = TrainingImageTransform(SIZE, Crop(WHOLE, rand_augment="albef-n2-m7"))
    return transform.rand_augment.ops


def test_albefs_list_has_ten_entries_drawn_twice_and_done_half_of_the_time():
    transform = TrainingImageTransform(SIZE, Crop(rand_augment="albef-n2-m7"))
    augment, done, twice = transform.rand_augment, Counter(), 0
    assert len(augment.ops) == 10 and augment.num_layers == 2
    for op in augment.ops[1:]:
        op.aug_fn = lambda image, *_, name=op.name, **__: done.update([name]) or image
    image = picture()
    for number in range(4000):
        before = done.copy()
        np.random.seed(number), random.seed(number)
        augment(image)
        twice += max((done - before).values(), default=0) == 2
    error = 5 * np.sqrt(4000 * 0.1 * 0.9)
    expected = "AutoContrast Equalize Brightness Sharpness ShearX ShearY TranslateX TranslateY Rotate".split()
    assert set(done) == set(expected) and all(abs(count - 400) < error for count in done.values())
    # with replacement: one of nine, twice, both done: 9 / 100 / 4 of all
    assert abs(twice - 90) < 5 * np.sqrt(90)
    assert augment.ops[0](image) is image


def bilinear(array, x, y):
    """Values of (H, W) at real places, centres of pixels at whole numbers; NaN outside of the picture."""
    height, width = array.shape
    inside = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
    x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
    left, top = np.minimum(x.astype(int), width - 2), np.minimum(y.astype(int), height - 2)
    right, below = x - left, y - top
    mixed = (array[top, left] * (1 - right) + array[top, left + 1] * right) * (1 - below)
    mixed += (array[top + 1, left] * (1 - right) + array[top + 1, left + 1] * right) * below
    return np.where(inside, mixed, np.nan)


def source_places(name, sign, side):
    """Where each pixel of a warped picture comes from: shears of .21 from the corner, 7 pixels, 21 degrees."""
    y, x = (axis.astype(float) for axis in np.mgrid[:side, :side])
    if name == "ShearX":
        return x + sign * 0.21 * (y + 0.5), y
    if name == "ShearY":
        return x, y + sign * 0.21 * (x + 0.5)
    if name == "TranslateX":
        return x + sign * 7, y
    if name == "TranslateY":
        return x, y + sign * 7
    angle, middle = sign * np.deg2rad(21), (side - 1) / 2
    across, down = x - middle, y - middle
    return middle + np.cos(angle) * across - np.sin(angle) * down, middle + np.sin(angle) * across + np.cos(
        angle
    ) * down


@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_albefs_warps_are_bilinear_on_grey_by_their_magnitudes(name):
    (op,) = [op for op in albef_ops()[1:] if op.name == name]
    op.prob, image, signs = 1.0, picture((SIZE, SIZE)), set()
    array = np.asarray(image).astype(float)
    for number in range(12):
        random.seed(number)
        warped = np.asarray(op(image)).astype(float)
        errors = {}
        for sign in (-1, 1):
            places = source_places(name, sign, SIZE)
            expected = np.stack([bilinear(array[..., channel], *places) for channel in range(3)], -1)
            grey = np.isnan(expected)
            assert 0.08 < grey.mean() < 0.3
            wrong = np.abs(np.where(grey, 128, expected) - warped) > 1.01
            errors[sign] = wrong.mean()  # rounding moves a place at the edge in or out
        sign = min(errors, key=errors.get)
        assert errors[sign] < 0.01 < 0.1 < errors[-sign]
        signs.add(sign)
    assert signs == {-1, 1}


def test_albefs_colours_by_their_magnitudes():
    ops, image = {op.name: op for op in albef_ops()[1:]}, picture((SIZE, SIZE)).point(lambda value: 40 + value // 2)
    array, done = np.asarray(image).astype(float), {}
    for name in ("Brightness", "Sharpness", "AutoContrast", "Equalize"):
        ops[name].prob = 1.0
        done[name] = np.asarray(ops[name](image)).astype(float)
    assert np.abs(done["Brightness"] - np.clip(1.36 * array, 0, 255)).max() <= 1
    # away from a blur whose middle counts five times; the border has none
    padded = np.pad(array, ((1, 1), (1, 1), (0, 0)))
    shifted = [padded[i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3)]
    blurred = np.round((sum(shifted) + 4 * array) / 13)
    sharp = np.clip(blurred + 1.36 * (array - blurred), 0, 255)
    assert np.abs(done["Sharpness"] - sharp)[1:-1, 1:-1].max() <= 1
    assert np.array_equal(done["Sharpness"][0], array[0]) and (done["Sharpness"] != array).mean() > 0.05
    low, high = array.min((0, 1)), array.max((0, 1))
    assert np.abs(done["AutoContrast"] - (array - low) * 255 / (high - low)).max() <= 1
    for channel in range(
        3
    ):  # a value becomes the number of pixels below it, in steps of which 255 make all but the last
        counts = np.bincount(array[..., channel].astype(int).ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        table = np.minimum((step // 2 + np.cumsum(counts) - counts) // step, 255)
        assert np.array_equal(done["Equalize"][..., channel], table[array[..., channel].astype(int)])


def test_albef_flips_before_it_distorts_and_timms_string_after():
    for config, flipped in (("albef-n2-m7", True), ("rand-m7-n2", False)):
        seen, image = [], picture((SIZE, SIZE))
        transform = TrainingImageTransform(SIZE, Crop(WHOLE, horizontal_flip=1.0, rand_augment=config), **PLAIN)
        transform.rand_augment = lambda given, seen=seen: seen.append(given) or given
        result = transform(image, np.random.default_rng(0))
        mirrored = ImageOps.mirror(image)
        assert np.array_equal(np.asarray(seen[0]), np.asarray(mirrored if flipped else image))
        torch.testing.assert_close(result, tensor_of(mirrored), rtol=0, atol=1e-6)


def test_clips_colours():
    mean, std = NORMALIZATIONS["clip"]
    assert mean == (0.48145466, 0.4578275, 0.40821073) and std == (0.26862954, 0.26130258, 0.27577711)
    pixels = TrainingImageTransform(8, mean=mean, std=std)(
        Image.new("RGB", (9, 9), (255, 0, 51)), np.random.default_rng(0)
    )
    expected = [(1 - mean[0]) / std[0], -mean[1] / std[1], (0.2 - mean[2]) / std[2]]
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor(expected), rtol=0, atol=1e-5)

"""The guarded decoder and the image processor, on emoji pictures and on files made to be odd."""

import base64
import io
import pickle
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from transformers import AutoImageProcessor, PreTrainedConfig

from oner.processing import image_processing_vl
from oner.processing.image_fetching import BYTES_PER_PIXEL, ByteBudget
from oner.processing.image_processing_vl import (
    ImageDecodeError,
    VisionLanguageImageProcessor,
    flatten_images,
    open_image,
)

EMOJI = Path(__file__).parents[2] / "examples" / "data" / "emoji" / "test_concept.parquet"
RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.fixture(scope="module")
def emoji() -> list[bytes]:
    """Encoded pictures of the embedded data, one in forty."""
    return [cell["bytes"] for cell in pq.read_table(EMOJI, columns=["image"])["image"].to_pylist()[::40]]


def encode(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels_of(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def test_every_kind_of_source_gives_the_same_picture(emoji, tmp_path):
    data = encode(open_image(emoji[0]), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    array = np.asarray(picture)
    tensor = torch.tensor(array)
    sources = [data, bytearray(data), memoryview(data), path, str(path), picture, Image.open(path), array]
    sources += [{"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, {"bytes": data, "path": "nowhere"}]
    sources += [array.transpose(2, 0, 1), tensor, tensor.permute(2, 0, 1), array / 255.0, tensor.float() / 255]
    sources += [array.astype(np.uint16) * 257, array.astype(np.int64)]
    for source in sources:
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), array), type(source)
    assert open_image(picture) is not picture


def test_real_pictures_with_alpha_lie_on_white(emoji):
    for data in emoji:
        picture = open_image(data)
        picture.putalpha(picture.convert("L"))  # every degree of transparency
        rgba = np.asarray(picture).astype(float)
        alpha = rgba[..., 3:] / 255
        assert alpha.min() < 0.9
        expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
        for source in (encode(picture, "PNG"), encode(picture, "WEBP", lossless=True, exact=True), picture):
            assert np.abs(np.asarray(open_image(source)) - expected).max() <= 1.0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"])
def test_every_mode_becomes_rgb(mode):
    source = Image.new("L", (5, 4), 255)
    image = Image.fromarray(np.full((4, 5), 65535, np.uint16)) if mode == "I;16" else source.convert(mode)
    assert image.mode == mode
    opened = open_image(image)
    assert opened.mode == "RGB" and opened.size == (5, 4)
    assert np.asarray(opened).min() >= 254


def test_transparency_is_laid_on_white():
    la = Image.new("LA", (2, 1), (0, 0))
    la.putpixel((1, 0), (100, 255))
    assert pixels_of(open_image(encode(la, "PNG"))) == [WHITE, (100, 100, 100)]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    assert pixels_of(open_image(encode(palette, "PNG", transparency=0))) == [WHITE, RED]
    keyed = Image.new("RGB", (2, 1), RED)
    keyed.putpixel((0, 0), (1, 2, 3))
    assert pixels_of(open_image(encode(keyed, "PNG", transparency=(1, 2, 3)))) == [WHITE, RED]
    half = np.array([[[255, 0, 0, 0], [255, 0, 0, 255]]], np.uint8)
    assert pixels_of(open_image(half)) == [WHITE, RED]


def test_cmyk_jpeg():
    data = encode(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(np.asarray(open_image(data)).astype(int) - RED).max() < 12


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    stream = encode(Image.fromarray(ramp), "PNG")
    big_endian = Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes())
    for source in (stream, ramp, Image.fromarray(ramp), Image.fromarray(ramp.astype(np.int32)), big_endian):
        assert np.array_equal(np.asarray(open_image(source))[..., 0], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_matches_pillow(orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(expected))
    assert open_image(data).size == ((6, 4) if orientation < 5 else (4, 6))


def test_what_is_upright_stays_upright_when_it_is_opened_again():
    """By ourselves, and by Pillow: the tag that says how to turn it does not travel with the picture."""
    turned = Image.new("RGB", (4, 2), RED)
    exif = turned.getexif()
    exif[0x0112] = 6
    upright = open_image(encode(turned, "JPEG", exif=exif.tobytes()))
    assert upright.size == (2, 4) == open_image(upright).size == ImageOps.exif_transpose(upright).size


def test_unreadable_exif_is_ignored():
    data = encode(Image.new("RGB", (4, 4), RED), "JPEG", exif=b"Exif\0\0garbage")
    assert open_image(data).size == (4, 4)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert open_image(data).getpixel((3, 3)) == RED


def test_broken_files_name_source_and_reason(emoji, tmp_path):
    whole = encode(open_image(emoji[0]), "PNG")
    html = tmp_path / "page.jpg"
    html.write_text("<!DOCTYPE html><html>404</html>")
    empty = tmp_path / "empty.png"
    empty.touch()
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole[: len(whole) // 2])
    cases = [
        (whole[: len(whole) // 2], r"\d+ bytes starting with b'\\x89PNG.*truncated"),
        (str(html), r"page\.jpg'.*not a picture in a known format.*<!DOCTYPE"),
        (html, r"page\.jpg"),
        (b"", "0 bytes: empty"),
        (empty, r"empty\.png': empty"),
        (tmp_path / "missing.png", r"missing\.png': No such file"),
        (tmp_path, "directory"),
        ("a\0b", "null byte"),
        ({"bytes": None, "path": None}, "'bytes' and 'path' are unset"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (None, "NoneType"),
        (7, "int"),
    ]
    for source, message in cases:
        with pytest.raises(ImageDecodeError, match=message):
            open_image(source)
    message = r"PngImageFile of mode .* from '.*cut\.png': .*truncated"
    with Image.open(cut) as image, pytest.raises(ImageDecodeError, match=message):
        open_image(image)
    assert issubclass(ImageDecodeError, ValueError)
    assert str(pickle.loads(pickle.dumps(ImageDecodeError("x")))) == "x"


def test_pixel_cap_is_read_from_the_header(monkeypatch):
    def decode(*_):
        raise AssertionError("decoded before the cap was checked")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with pytest.raises(ImageDecodeError, match="pixels"):
        open_image(png_header(100_000, 100_000))
    with pytest.raises(ImageDecodeError, match=r"200x100 = 20000 pixels, more than max_pixels=19999"):
        open_image(png_header(200, 100), max_pixels=19_999)
    with pytest.raises(AssertionError, match="decoded"):  # within the cap the decoder is reached
        try:
            open_image(png_header(200, 100), max_pixels=20_000)
        except ImageDecodeError as error:
            raise error.__cause__ from None


def test_pixel_cap_holds_for_arrays_and_images():
    for source in (np.zeros((4, 5, 3), np.uint8), Image.new("RGB", (5, 4))):
        assert open_image(source, max_pixels=20).size == (5, 4)
        with pytest.raises(ImageDecodeError, match="max_pixels=19"):
            open_image(source, max_pixels=19)


def test_pillow_globals_stay():
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    open_image(Image.new("RGB", (2, 2)), max_pixels=None)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4, 3), 1.5), r"values in 1\.5\.\.1\.5, expected 0\.\.1"),
        (np.full((4, 4, 3), np.nan), "nan"),
        (np.full((4, 4, 3), -1), "expected 0..255"),
        (np.zeros((5, 6, 7)), r"shape \(5, 6, 7\)"),
        (np.zeros((2, 4, 4, 3)), "expected"),
        (np.zeros((0, 4, 3)), "4x0 pixels"),
        (np.zeros((4, 4), complex), "complex"),
    ],
)
def test_arrays_out_of_range(array, message):
    with pytest.raises(ImageDecodeError, match=message):
        open_image(array)


def test_urls_only_when_allowed(monkeypatch):
    data = encode(Image.new("RGB", (3, 2), RED), "PNG")
    asked = []

    def fetch(url):
        asked.append(url)
        return data

    monkeypatch.setattr("oner.processing.image_processing_vl.fetch_bytes", fetch)
    url = "https://example.org/a.png"
    with pytest.raises(ImageDecodeError, match="allow_urls=True"):
        open_image(url)
    assert asked == []
    assert open_image(url, allow_urls=True).size == (3, 2)
    processor = VisionLanguageImageProcessor(size=32, allow_urls=True)  # a configuration must not switch it on
    with pytest.raises(ImageDecodeError, match="allow_urls=True"):
        processor(url)
    assert processor(url, allow_urls=True, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
    assert "allow_urls" not in processor.to_dict()


def test_base64_text_and_data_addresses_are_pictures(emoji, tmp_path, monkeypatch):
    text = base64.b64encode(emoji[0]).decode()
    wrapped = "\n".join(text[start : start + 76] for start in range(0, len(text), 76)) + "\n"
    for source in (text, wrapped, f"data:image/png;base64,{text}", {"path": text}):
        assert open_image(source).tobytes() == open_image(emoji[0]).tobytes()

    # a file of such a name is a file, and no message holds a payload
    monkeypatch.chdir(tmp_path)
    short = base64.b64encode(encode(Image.new("RGB", (1, 1)), "GIF")).decode().replace("/", "+")
    Path(short[:200]).write_bytes(emoji[1])
    assert open_image(short[:200]).tobytes() == open_image(emoji[1]).tobytes()
    for broken in (
        text[:-4] + "!!!!",
        f"data:image/png;base64,{text[:-1000]}",
        base64.b64encode(bytes(9000)).decode(),
    ):
        with pytest.raises(ImageDecodeError) as caught:
            open_image(broken)
        assert len(str(caught.value)) < 400 and text[:100] not in str(caught.value)


UNITS = {
    "tensor": lambda array: torch.from_numpy(array).permute(2, 0, 1),
    "half a tensor": lambda array: torch.from_numpy(array).permute(2, 0, 1).bfloat16(),
    "array": lambda array: array,
    "double array": lambda array: array.astype(np.float64),
    "batch": lambda array: torch.from_numpy(array).permute(2, 0, 1)[None],
    "list": lambda array: [array, torch.from_numpy(array).permute(2, 0, 1)],
}


@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.parametrize("options", [{}, {"do_center_crop": True}, {"do_normalize": False}], ids=str)
def test_floats_have_the_pixels_of_their_file_rescaled_or_not(emoji, kind, options):
    """transformers' rule: who gives 0..1 says do_rescale=False."""
    processor = VisionLanguageImageProcessor(size=32)
    picture = open_image(emoji[0]).resize((45, 40))
    unit = np.asarray(picture).astype(np.float32) / 255
    wanted = processor(picture, **options, return_tensors="pt")["pixel_values"]
    tolerance = 0.02 if kind == "half a tensor" else 1e-5
    for do_rescale in (True, False):
        got = processor(UNITS[kind](unit), do_rescale=do_rescale, **options, return_tensors="pt")["pixel_values"]
        assert (got - wanted).abs().max() < tolerance


def test_bytes_are_not_normalised_as_if_they_were_floats(emoji):
    processor = VisionLanguageImageProcessor(size=32)
    unit = torch.rand(3, 32, 32)
    for source in (emoji[0], open_image(emoji[0]), np.zeros((32, 32, 3), np.uint8), [unit, emoji[0]]):
        with pytest.raises(ValueError, match="do_rescale=False is for pictures that are floats in 0..1, got"):
            processor(source, do_rescale=False)
    # raw pixels, and a mean that speaks of them, mean what they say
    raw = processor(emoji[0], do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert raw.dtype == torch.uint8 and raw.max() > 1
    caffe = processor(emoji[0], do_rescale=False, image_mean=[124.0, 116.0, 104.0], image_std=[1.0, 1.0, 1.0])
    assert min(map(torch.min, caffe["pixel_values"])) >= -124


def test_a_shrunk_picture_is_the_picture_to_the_processor(emoji):
    processor = VisionLanguageImageProcessor(size=32)
    sources = [open_image(emoji[0]).resize(size) for size in ((100, 41), (41, 100), (32, 32), (7, 300))]
    for options in ({}, {"do_center_crop": True}, {"size": {"height": 16, "width": 48}}, {"do_resize": False}):
        chosen = sources[2:3] if "do_resize" in options else sources
        whole = processor(chosen, **options, return_tensors="pt")["pixel_values"]
        small = [processor.shrink(source, **options) for source in chosen]
        assert all(pixels.dtype == torch.uint8 for pixels in small)
        assert torch.equal(processor(small, **options, return_tensors="pt")["pixel_values"], whole)


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch):
    """By all threads together, within the budget; small ones beside each other."""
    processor = VisionLanguageImageProcessor(size=32)
    data, small = encode(Image.new("RGB", (400, 300)), "PNG"), encode(Image.new("RGB", (4, 3)), "PNG")
    held, most = [], []
    decode = image_processing_vl._decode
    budget = ByteBudget(400 * 300 * BYTES_PER_PIXEL + 1000)

    def slowly(image):
        held.append(image.size)
        time.sleep(0.02)
        most.append(list(held))
        held.remove(image.size)
        return decode(image)

    monkeypatch.setattr(image_processing_vl, "decoding", budget)
    monkeypatch.setattr(image_processing_vl, "_decode", slowly)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(processor.shrink, [data, small] * 8))) == 16
    assert max(sizes.count((400, 300)) for sizes in most) == 1
    with ThreadPoolExecutor(1) as pool:
        with budget.hold(10**12):  # more than there is: all of it
            waiting = pool.submit(processor.shrink, small)
            time.sleep(0.05)
            assert not waiting.done()
        assert waiting.result().shape == (3, 32, 32)


def test_pixels_match_a_plain_computation(emoji):
    processor = VisionLanguageImageProcessor(size={"height": 48, "width": 48}, patch_size=16)
    pixels = processor(emoji, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (len(emoji), 3, 48, 48) and pixels.dtype == torch.float32
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for data, got in zip(emoji, pixels, strict=True):
        small = np.asarray(open_image(data).resize((48, 48), Image.Resampling.BICUBIC)) / 255
        expected = torch.tensor((small - mean) / std).permute(2, 0, 1)
        assert (got - expected).abs().max() < 2.1 / 255 / 0.224  # torchvision and Pillow round differently


def test_center_crop_mode_is_resize_then_crop():
    wide = Image.new("RGB", (96, 32), RED)
    wide.paste((0, 255, 0), (32, 0, 64, 32))
    processor = VisionLanguageImageProcessor(size=32, do_normalize=False)
    crop = processor(wide, do_center_crop=True, return_tensors="pt")["pixel_values"]
    assert torch.equal(crop, torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    squeezed = processor(wide, return_tensors="pt")["pixel_values"]
    assert squeezed.shape == crop.shape and squeezed[0, 0].mean() > 0.5
    saved = VisionLanguageImageProcessor(size=32, do_center_crop=True, do_normalize=False)
    assert torch.equal(saved(wide, return_tensors="pt")["pixel_values"], crop)


def test_batches_of_any_nesting(emoji):
    processor = VisionLanguageImageProcessor(size=32)
    one = processor(emoji[0], return_tensors="pt")["pixel_values"]
    assert one.shape == (1, 3, 32, 32)
    assert torch.equal(
        processor([[emoji[0]], [emoji[0]]], return_tensors="pt")["pixel_values"], one.repeat(2, 1, 1, 1)
    )
    batch = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert len(flatten_images(batch)) == 3
    pixels = processor(batch, return_tensors="pt")["pixel_values"]
    expected = (batch - torch.tensor(processor.image_mean).view(3, 1, 1)) / torch.tensor(processor.image_std).view(
        3, 1, 1
    )
    assert (pixels - expected).abs().max() < 0.51 / 255 / 0.224
    assert isinstance(processor([emoji[0]], return_tensors="np")["pixel_values"], np.ndarray)


def test_processor_errors(emoji):
    processor = VisionLanguageImageProcessor(size=32, patch_size=16)
    with pytest.raises(ImageDecodeError, match=r"image 1 of 2: cannot read 0 bytes"):
        processor([emoji[0], b""])
    with pytest.raises(ValueError, match=r"30x32 is not a multiple of patch_size=16"):
        processor(emoji[0], size={"height": 30, "width": 32})
    with pytest.raises(ValueError, match="must end in one size"):
        processor([Image.new("RGB", (64, 32)), Image.new("RGB", (32, 32))], do_resize=False)
    with pytest.raises(ValueError, match="empty list"):
        processor([])
    with pytest.raises(ImageDecodeError, match="max_pixels=10"):
        processor(emoji[0], max_pixels=10)


def test_save_and_load(emoji, tmp_path):
    class Config(PreTrainedConfig):
        model_type = "oner-image-processor-test"

    AutoImageProcessor.register(
        Config, image_processor_classes={"torchvision": VisionLanguageImageProcessor}, exist_ok=True
    )
    processor = VisionLanguageImageProcessor(size=32, patch_size=8, max_pixels=10**6, do_center_crop=True)
    processor.save_pretrained(tmp_path)
    for loaded in (
        VisionLanguageImageProcessor.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path),
    ):
        assert type(loaded) is VisionLanguageImageProcessor
        assert loaded.to_dict() == processor.to_dict()
        assert (loaded.patch_size, loaded.max_pixels, dict(loaded.size)) == (8, 10**6, {"height": 32, "width": 32})
        assert torch.equal(
            loaded(emoji, return_tensors="pt")["pixel_values"], processor(emoji, return_tensors="pt")["pixel_values"]
        )


def test_of_a_picture_long_beyond_measure_the_middle_alone_is_resized():
    """Its shorter side as wide as the window, a line of 20,000 pixels would take a hundred million."""
    processor = VisionLanguageImageProcessor(size=32, patch_size=8, do_center_crop=True)
    for width, height in ((1, 20_000), (20_000, 1)):
        line = Image.linear_gradient("L").resize((width, height)).convert("RGB")
        assert max(processor.shrink(line).shape) == 32 * image_processing_vl.LONGEST
        assert processor(line, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)

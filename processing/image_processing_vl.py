"""Decodes images from any source and turns them into normalised pixels.

Shapes: B images, H height, W width in pixels, P patch size; N = (H / P) * (W / P) patches, row-major.
All decoding is in ``open_image``; ``VisionLanguageImageProcessor`` accepts every source that it accepts.
"""

import errno
import io
import json
import os
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from .image_fetching import BYTES_PER_PIXEL, decoding, fetch_bytes, from_base64, named
from .vl_sources import is_many

MAX_PIXELS = 89_478_485  # PIL's own warning threshold: a quarter of a GiB at 3 bytes a pixel
LONGEST = 100  # aspect ratio to which a longer image is cropped before the resize, if a centre crop follows
_HEIC = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1")
_FLOATS = (np.float16, np.float32, np.float64)

# Raster formats decoded by Pillow itself. Excluded on purpose: EPS (runs Ghostscript), WMF, and scientific containers,
# whose pixel ranges have no standard meaning.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000", "TGA", "PCX", "ICNS")

_ORIENTATION_TAG = 0x0112  # EXIF 2.32, table 4
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageDecodeError(ValueError):
    """An image could not be read. The message names the source and the reason.

    The constructor takes only a message, so that a data-loading worker can re-raise the error.
    """


def open_image(
    source: Any,
    max_pixels: int | None = MAX_PIXELS,
    allow_urls: bool = False,
    finish: Callable[[Image.Image], Any] | None = None,
) -> Any:
    """Reads one image from ``source`` into memory as upright 8-bit RGB.

    Args:
        source: a PIL image; a numpy array or torch tensor, (H, W), (H, W, C) or (C, H, W) with C in 1..4, of
            booleans, 8-bit or 16-bit integers, or floats in 0..1; a path; encoded bytes, also as base64 text or a
            ``data:`` URL; ``{"bytes": ..., "path": ...}``; an http(s) URL if ``allow_urls``.
        max_pixels: images with more pixels are rejected from the header, before decoding; ``None`` disables the
            limit.
        allow_urls: whether URLs may be fetched.
        finish: applied to the image, for example to shrink it; its result is returned instead. All threads share one
            memory budget for decoding and ``finish``, so many large images at once wait for each other.

    Greyscale and palette images are expanded to RGB, transparency is composited on white, CMYK is converted, 16 bits
    are scaled to 8, EXIF rotation is applied, and an animation gives its first frame.

    Raises:
        ImageDecodeError: for any reason: a missing or empty file, not an image, truncated, too large, an array with
            a wrong range or shape, an unsupported type.
    """
    # every kind of source ends in `_decode` or `_narrow_to_rgb`
    finish = finish or (lambda image: image)
    if isinstance(source, dict):
        source = _from_mapping(source)
    if isinstance(source, Image.Image):
        name = f"{type(source).__name__} of mode {source.mode}"
        name += f" from {source.filename!r}" if getattr(source, "filename", None) else ""
        _check_pixels(source.size, max_pixels, name)
        with decoding.hold(source.size[0] * source.size[1] * BYTES_PER_PIXEL):
            return finish(_guarded(_decode, source, name))
    if isinstance(source, torch.Tensor | np.ndarray | np.generic):
        return finish(_from_array(source, max_pixels))
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        if not allow_urls:
            raise ImageDecodeError(
                f"cannot read {named(source)}: fetching URLs is off; pass allow_urls=True to allow it"
            )
        return _from_stream(io.BytesIO(_fetch(source)), named(source), max_pixels, finish)

    # base64 text, a path, or encoded bytes
    if isinstance(source, str) and (data := from_base64(source, _is_picture)) is not None:
        return _from_stream(io.BytesIO(data), named(source), max_pixels, finish)
    if isinstance(source, str | os.PathLike):
        return _from_path(os.fspath(source), max_pixels, finish)
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        name = f"{len(data)} bytes starting with {data[:16]!r}" if data else "0 bytes"
        return _from_stream(io.BytesIO(data), name, max_pixels, finish)
    raise ImageDecodeError(
        f"cannot read a picture from {type(source).__name__}: expected a PIL image, an array or tensor, a path, "
        "bytes or {'bytes', 'path'}"
    )


def flatten_images(images: Any) -> list[Any]:
    """Flattens one source, a batch (B, ...) or a nested list of sources to a list of sources, without decoding."""
    if isinstance(images, torch.Tensor | np.ndarray) and images.ndim == 4:
        return list(images)
    if is_many(images):
        return [source for item in images for source in flatten_images(item)]
    return [images]


def _is_float(source: Any) -> bool:
    """Whether an image is given as floats, and so in 0..1, as from torchvision's ``ToTensor``."""
    if isinstance(source, Image.Image):
        return source.mode == "F"
    return torch.is_floating_point(source) if torch.is_tensor(source) else getattr(source, "dtype", None) in _FLOATS


def _from_mapping(source: dict) -> Any:
    """An undecoded image of the datasets library: its bytes if embedded, else its path."""
    if source.get("bytes") is not None:
        return source["bytes"]
    if source.get("path") is not None:
        return source["path"]
    raise ImageDecodeError(
        f"cannot read a picture from a dict with keys {sorted(source)}: 'bytes' and 'path' are unset"
    )


def _is_picture(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=_formats()):
            return True
    except Exception:  # Pillow's parsers raise many types
        return False


def _from_path(path: str, max_pixels: int | None, finish: Callable[[Image.Image], Any]) -> Any:
    try:
        # checked before opening: a pipe without a writer would block forever
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind):
            what = "directory" if stat.S_ISDIR(kind) else "pipe, socket or device"
            raise ImageDecodeError(f"cannot read {named(path)}: a {what}, not a file")
        stream = open(path, "rb")
    except ImageDecodeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            reason = f"{reason}, and it is no picture in base64"
        raise ImageDecodeError(f"cannot read {named(path)}: {reason}") from error
    with stream:
        return _from_stream(stream, named(path), max_pixels, finish)


def _fetch(url: str) -> bytes:
    try:
        return fetch_bytes(url)
    except OSError as error:
        raise ImageDecodeError(f"cannot fetch {named(url)}: {error}") from error


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """The accepted formats that this Pillow supports (AVIF, WEBP and JPEG2000 are optional)."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _from_stream(stream: Any, name: str, max_pixels: int | None, finish: Callable[[Image.Image], Any]) -> Any:
    # Pillow would report an empty file as an unknown format
    try:
        head = stream.read(16)
        stream.seek(0)
    except OSError as error:  # disk error
        raise ImageDecodeError(f"cannot read {name}: {error.strerror or error}") from error
    if not head:
        raise ImageDecodeError(f"cannot read {name}: empty")

    # read the header in an allowed format, and check the size before decoding
    try:
        image = Image.open(stream, formats=_formats())
    except UnidentifiedImageError as error:
        what = (
            "HEIC, which is not read here; save it as JPEG or PNG" if head[4:12] in _HEIC else f"starts with {head!r}"
        )
        raise ImageDecodeError(f"cannot read {name}: not a picture in a known format, {what}") from error
    except Exception as error:  # Pillow's parsers raise many types on hostile headers; all mean the same here
        raise ImageDecodeError(f"cannot read {name}: {_reason(error)}") from error
    _check_pixels(image.size, max_pixels, name)
    with decoding.hold(image.size[0] * image.size[1] * BYTES_PER_PIXEL):
        with image:
            decoded = _guarded(_decode, image, name)
        del image  # frees the decoder's buffers before `finish`
        _check_pixels(decoded.size, max_pixels, name)  # the header of a container may understate the size
        result = finish(decoded)
        del decoded
    return result


def _check_pixels(size: tuple[int, int], max_pixels: int | None, name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageDecodeError(f"cannot read {name}: {width}x{height} pixels, nothing to see")
    if max_pixels is not None and width * height > max_pixels:
        raise ImageDecodeError(
            f"cannot read {name}: {width}x{height} = {width * height} pixels, more than max_pixels={max_pixels}"
        )


def _guarded(function: Any, image: Any, name: str) -> Image.Image:
    try:
        return function(image)
    except Exception as error:  # as above: truncated and hostile data raise many types
        raise ImageDecodeError(f"cannot read {name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _decode(image: Image.Image) -> Image.Image:
    """Converts a PIL image of any mode, possibly not yet loaded, to a new upright 8-bit RGB image."""
    image.load()
    turn = _ORIENTATIONS.get(_orientation(image))
    if image.mode == "F" or image.mode.startswith("I"):
        flat = _wide_to_rgb(np.asarray(image), image.mode)
    else:
        flat = _narrow_to_rgb(image)
    if turn is not None:
        flat = flat.transpose(turn)
    flat.info = {}  # otherwise the EXIF rotation would be applied again
    return flat


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # unreadable metadata does not make the image unreadable
        return 1


def _narrow_to_rgb(image: Image.Image) -> Image.Image:
    """Converts 8-bit modes. Transparency is an alpha channel (RGBA, LA, PA) or an entry in ``info`` (P, L, RGB)."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    # copy RGB: never return the caller's image, or one whose file is about to close
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _wide_to_rgb(values: np.ndarray, mode: str) -> Image.Image:
    """Converts 16-bit and float greyscale. PIL's own conversion clips at 255; this scales the range."""
    low, high = values.min(), values.max()

    # floats in 0..1 or 0..255
    if mode == "F":
        if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 255:
            raise ValueError(f"float pixels in {low}..{high}, expected 0..1 or 0..255")
        grey = values * 255.0 if high <= 1 else values
    else:
        if low < 0 or high > 65535:
            raise ValueError(f"integer pixels in {low}..{high}, expected 0..65535")
        # mode "I" holds 32 bits and is taken as 8-bit if the values fit; the "I;16" modes are 16-bit
        grey = values if mode == "I" and high <= 255 else values / 257.0
    return Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")


def _from_array(source: Any, max_pixels: int | None) -> Image.Image:
    name = f"{type(source).__name__} of shape {tuple(source.shape)} and type {source.dtype}"
    is_tensor = isinstance(source, torch.Tensor)

    # as an array, (H, W), (H, W, C) or (C, H, W)
    if is_tensor:
        source = source.detach().cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    pixels = _channels_last(source, prefer_first=is_tensor, name=name)  # (H, W, C)
    _check_pixels((pixels.shape[1], pixels.shape[0]), max_pixels, name)
    pixels = _to_uint8(pixels, name)

    # PIL expects greyscale without a channel axis
    if pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return _guarded(lambda array: _narrow_to_rgb(Image.fromarray(np.ascontiguousarray(array))), pixels, name)


def _channels_last(array: np.ndarray, prefer_first: bool, name: str) -> np.ndarray:
    """Any layout to (H, W, C). If ambiguous, tensors are taken as (C, H, W) and arrays as (H, W, C)."""
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim == 3:
        last = array.shape[2] in (1, 2, 3, 4)
        first = array.shape[0] in (1, 2, 3, 4)
        if first and (prefer_first or not last):
            return array.transpose(1, 2, 0)  # (H, W, C)
        if last:
            return array
    raise ImageDecodeError(f"cannot read {name}: expected (H, W), (H, W, C) or (C, H, W) with C in 1..4")


def _to_uint8(pixels: np.ndarray, name: str) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype == np.uint16:
        return np.round(pixels / 257.0).astype(np.uint8)

    # other types need a known range: floats in 0..1, integers in 0..255
    if pixels.dtype.kind not in "iuf":
        raise ImageDecodeError(f"cannot read {name}: expected booleans, integers or floats")
    low, high = pixels.min(), pixels.max()
    top = 1 if pixels.dtype.kind == "f" else 255
    if not (low >= 0 and high <= top):  # also true for NaN
        raise ImageDecodeError(f"cannot read {name}: values in {low}..{high}, expected 0..{top}")
    return np.round(pixels.astype(np.float32) * (255.0 / top)).astype(np.uint8)


class OneRImageKwargs(ImagesKwargs, total=False):
    """Options in addition to those of transformers.

    patch_size: side P of a patch in pixels; H and W must be multiples of it.
    max_pixels: largest image to decode, in pixels.
    allow_urls: whether URLs may be fetched; set by the caller only, never read from or written to a file.
    """

    patch_size: int | None
    max_pixels: int | None
    allow_urls: bool | None


class VisionLanguageImageProcessor(TorchvisionBackend):
    """Images to ``pixel_values`` (B, 3, H, W): square bicubic resize with antialiasing, ImageNet mean and deviation.

    ``do_center_crop=True`` keeps the aspect ratio instead: the shorter side is resized to S, then the central S x S
    square is cropped (SLIP's zero-shot evaluation; pass ``resample`` for the paper's bilinear filter).

    Images given as floats in 0..1 yield the same pixels with ``do_rescale=False``, as in transformers, and without
    it. Images are decoded and resized one at a time, so a batch of large images needs the memory of one.

    Raises:
        ImageDecodeError: an image could not be read; the message gives its index in the batch.
        ValueError: H or W is not a multiple of ``patch_size``, images of one batch differ in size, or 8-bit images
            would be normalised without rescaling to 0..1, the range of mean and deviation.
    """

    valid_kwargs = OneRImageKwargs
    model_input_names = ["pixel_values"]
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}
    default_to_square = True
    crop_size = None
    do_resize = True
    do_center_crop = False
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    patch_size = 16
    max_pixels = MAX_PIXELS
    allow_urls = False

    def __init__(self, **kwargs: Any) -> None:
        kwargs.pop("allow_urls", None)  # a downloaded configuration must not switch the network on
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The saved configuration: everything but ``allow_urls``."""
        return {key: value for key, value in super().to_dict().items() if key != "allow_urls"}

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> list[str]:
        """Saves as transformers does; if a processor was saved there, into its file, which serves both."""
        written = super().save_pretrained(save_directory, *args, **kwargs)
        own, shared = (Path(save_directory) / name for name in ("preprocessor_config.json", "processor_config.json"))
        if not shared.is_file():
            return written
        values = json.loads(shared.read_text(encoding="utf-8"))
        values["image_processor"] = json.loads(own.read_text(encoding="utf-8"))
        shared.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        own.unlink()
        return [str(shared)]

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Returns the sources unchanged: ``open_image`` reads them, with its checks."""
        return image_url_or_urls

    def _prepare_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        sources = flatten_images(images)
        if not sources:
            raise ValueError("images is an empty list; pass at least one picture")
        tensors = []
        for index, source in enumerate(sources):
            try:
                tensors.append(self._scaled(self.shrink(source, **kwargs), source, **kwargs))  # (3, h, w)
            except ImageDecodeError as error:
                if len(sources) == 1:
                    raise
                raise ImageDecodeError(f"image {index} of {len(sources)}: {error}") from error
        return tensors

    def shrink(self, source: Any, **kwargs: Any) -> torch.Tensor:
        """Decodes and resizes one image: uint8 (3, h, w), for which the processor gives the same pixels as ``source``.

        Args:
            source: anything that ``open_image`` reads.
            kwargs: options of this call; they default to the processor's.

        Raises:
            ImageDecodeError: the image could not be read.
        """
        names = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "max_pixels")
        options = {**{name: getattr(self, name) for name in names}, **kwargs}
        size = _resized(options)

        def finish(image: Image.Image) -> torch.Tensor:
            most = LONGEST * min(image.size)
            if options["do_center_crop"] and max(image.size) > most:
                image = tvF.center_crop(image, [min(side, most) for side in reversed(image.size)])
            pixels = tvF.pil_to_tensor(image).to(options.get("device") or "cpu")  # (3, h, w) uint8
            return self.resize(pixels, size, options["resample"]) if options["do_resize"] else pixels

        return open_image(source, options["max_pixels"], bool(options.get("allow_urls")), finish)

    def _scaled(self, pixels: torch.Tensor, source: Any, **kwargs: Any) -> torch.Tensor:
        """With ``do_rescale=False``, restores floats in 0..1 for float sources; rejects normalised 8-bit ones."""
        if kwargs["do_rescale"]:
            return pixels
        if _is_float(source):
            return pixels.float() / 255
        if kwargs["do_normalize"] and max(kwargs["image_mean"]) <= 1:
            raise ValueError(
                f"do_rescale=False is for pictures that are floats in 0..1, got {type(source).__name__} with pixels "
                "in 0..255: normalised, they would reach far out of any model's range; leave do_rescale as it is"
            )
        return pixels

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        if kwargs.get("do_center_crop") and kwargs.get("crop_size") is None:
            kwargs["crop_size"] = kwargs.get("size")
        super()._validate_preprocess_kwargs(**kwargs)

    def resize(self, image: torch.Tensor, size: SizeDict, resample: Any = None, **kwargs: Any) -> torch.Tensor:
        """Resizes (B, 3, h, w), uint8, with antialiasing."""
        return super().resize(image, size, resample=resample, antialias=True)

    def center_crop(self, image: torch.Tensor, size: SizeDict, **kwargs: Any) -> torch.Tensor:
        """torchvision's crop, so that the window is that of the published evaluations (ties round to even)."""
        return tvF.center_crop(image, [size.height, size.width])

    def _preprocess(self, images: list[torch.Tensor], *args: Any, **kwargs: Any) -> BatchFeature:
        return_tensors = kwargs.pop("return_tensors", None)
        patch_size = kwargs.pop("patch_size")

        # resize the shorter side to the crop's, then crop the centre
        if kwargs.get("do_center_crop"):
            kwargs["crop_size"] = kwargs.get("crop_size") or kwargs["size"]
        kwargs["size"] = _resized(kwargs)
        batch = super()._preprocess(images, *args, return_tensors=None, **kwargs)
        _check_grid(batch["pixel_values"], patch_size)
        return BatchFeature({"pixel_values": batch["pixel_values"]}, tensor_type=return_tensors)


def _resized(options: dict[str, Any]) -> SizeDict:
    """Target size of the resize; with a centre crop, that of the shorter side alone."""
    size = options["size"]
    if not isinstance(size, SizeDict):
        size = SizeDict(**get_size_dict(size))
    if options.get("do_center_crop") and size.height and size.width:
        return SizeDict(shortest_edge=max(size.height, size.width))
    return size


def _check_grid(pixel_values: list[torch.Tensor], patch_size: int) -> None:
    """Raises ValueError unless all images of the batch have one size, a multiple of the patch size."""
    sizes = sorted({tuple(image.shape[-2:]) for image in pixel_values})
    if len(sizes) > 1:
        raise ValueError(f"pictures of one batch must end in one size, got {sizes}; pass size= with height and width")
    height, width = sizes[0]
    if height % patch_size or width % patch_size:
        raise ValueError(f"picture size {height}x{width} is not a multiple of patch_size={patch_size}")


__all__ = ["MAX_PIXELS", "ImageDecodeError", "VisionLanguageImageProcessor", "flatten_images", "open_image"]

"""Encoded pictures of the kinds that the web holds, made from a real one: those to refuse and those to read.

`REFUSED` and `READ` map the name of a kind to a function of the real picture (PIL, RGB) that gives encoded bytes. A
refused kind comes with the words that its reason must hold.
"""

import base64
import gzip
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, PngImagePlugin

Make = Callable[[Image.Image], bytes]
REFUSED: dict[str, tuple[Make, str]] = {}
READ: dict[str, Make] = {}


def refused(name: str, words: str) -> Callable[[Make], Make]:
    """Enters a function into `REFUSED`."""

    def enter(make: Make) -> Make:
        REFUSED[name] = make, words
        return make

    return enter


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG by hand: its header, then `chunks` as they are."""
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)) + chunks
    )


def chunk(name: bytes, content: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(name + content) if crc is None else crc
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


END = chunk(b"IEND", b"")
UNKNOWN = "not a picture in a known format"

# Answers of a server, and files of other kinds
NO_PICTURES = {
    "HTML named .jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "HTML in UTF-16": "<!DOCTYPE html><html></html>".encode("utf-16"),
    "JSON of an API": json.dumps({"error": "rate limit"}).encode(),
    "XML of a bucket": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>',
    "PDF": b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n",
    "EPS, which would run a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(36),
    "PSD": b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(12),
    "MP4": b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41" + bytes(64),
    "pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "AppleDouble beside a picture": b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(60),
    "pickled array": pickle.dumps(np.zeros((4, 4, 3), np.uint8).tolist()),
    "a kilobyte of zeros": bytes(1024),
    "one byte": b"\xff",
    "noise": np.random.default_rng(0).integers(0, 256, 2048, dtype=np.uint8).tobytes(),
}
for _name, _content in NO_PICTURES.items():
    REFUSED[_name] = (lambda image, content=_content: content), UNKNOWN


@refused("HEIC of a phone", "not a picture in a known format, HEIC, which is not read here; save it as JPEG")
def _(image: Image.Image) -> bytes:
    return b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(64)


@refused("0 bytes", "0 bytes|empty")
def _(image: Image.Image) -> bytes:
    return b""


@refused("NumPy file", UNKNOWN)
def _(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(image))
    return buffer.getvalue()


@refused("picture in a zip", UNKNOWN)
def _(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", encoded(image))
    return buffer.getvalue()


@refused("picture in gzip", UNKNOWN)
def _(image: Image.Image) -> bytes:
    return gzip.compress(encoded(image), mtime=0)


@refused("picture in base64", UNKNOWN)
def _(image: Image.Image) -> bytes:
    return base64.b64encode(encoded(image))


@refused("picture read as text and written again", UNKNOWN)
def _(image: Image.Image) -> bytes:
    return encoded(image).decode("utf-8", "replace").encode("utf-8")


def cut(kind: str, share: float = 0.5, **options: object) -> Make:
    def make(image: Image.Image) -> bytes:
        content = encoded(image, kind, **options)
        return content[: int(len(content) * share)]

    return make


CUT = "truncated|cut|cannot|could not|not enough|broken|decoder|Premature|failed"
REFUSED |= {
    "JPEG cut in the middle": (cut("JPEG", quality=95), CUT),
    "JPEG cut before its last bytes": (cut("JPEG", 0.97, quality=95), CUT),
    "progressive JPEG cut": (cut("JPEG", progressive=True), CUT),
    "JPEG cut in its header": (cut("JPEG", 0.05), ""),
    "PNG cut": (cut("PNG"), CUT),
    "PNG cut in its header": (lambda image: encoded(image)[:20], ""),
    "interlaced palette PNG cut": (lambda image: encoded(image.quantize(16))[:300], CUT),
    "WebP cut": (cut("WEBP", lossless=True), CUT),
    "lossy WebP cut": (cut("WEBP"), CUT),
    "GIF cut": (lambda image: cut("GIF")(image.quantize(64)), CUT),
    "BMP cut": (cut("BMP"), CUT),
    "TIFF cut": (cut("TIFF"), ""),
    "LZW TIFF cut": (cut("TIFF", compression="tiff_lzw"), ""),
    "JPEG 2000 cut": (cut("JPEG2000"), CUT),
    "AVIF cut": (cut("AVIF"), ""),
    "PPM cut": (cut("PPM"), CUT),
    "ICO cut": (cut("ICO"), ""),
}


@refused("PNG header of 100,000 x 100,000", "pixels")
def _(image: Image.Image) -> bytes:
    return png(100_000, 100_000, chunk(b"IDAT", zlib.compress(bytes(1000))) + END)


@refused("JPEG header of 65,535 x 65,535", "pixels")
def _(image: Image.Image) -> bytes:
    content = bytearray(encoded(image, "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    return bytes(content)


@refused("GIF of 65,535 x 65,535 in 40 bytes", "pixels")
def _(image: Image.Image) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b",\x00\x00\x00\x00" + bytes(20)


@refused("BMP header of two milliards of pixels", "pixels")
def _(image: Image.Image) -> bytes:
    content = bytearray(encoded(image, "BMP"))
    struct.pack_into("<ii", content, 18, 2**20, 2000)
    return bytes(content)


@refused("ICO whose entry says 16 x 16 and holds 9,600 x 9,600", "pixels")
def _(image: Image.Image) -> bytes:
    inner = png(9_600, 9_600, chunk(b"IDAT", zlib.compress(bytes(9_600 * 1201), 9)) + END, depth=1, colour=0)
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 1, len(inner), 22) + inner


@refused("PNG with a text of 8 MB, deflated", "text|memory|large|Decompressed")
def _(image: Image.Image) -> bytes:
    squeezed = zlib.compressobj(9)
    bomb = b"".join(squeezed.compress(bytes(2**20)) for _ in range(8)) + squeezed.flush()
    content = encoded(image)
    return content[:33] + chunk(b"zTXt", b"Comment\x00\x00" + bomb) + content[33:]


@refused("PNG of width 0", "0x9|Truncated|invalid|cannot")
def _(image: Image.Image) -> bytes:
    return png(0, 9, chunk(b"IDAT", zlib.compress(b"")) + END)


@refused("JPEG of height 0", "pixels|cannot|broken|size")
def _(image: Image.Image) -> bytes:
    content = bytearray(encoded(image, "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 7] = b"\x00\x00"
    return bytes(content)


@refused("PNG without pixels", "")
def _(image: Image.Image) -> bytes:
    return png(image.width, image.height, END)


@refused("PNG whose header has a wrong checksum", "broken PNG|bad header checksum|not a picture")
def _(image: Image.Image) -> bytes:
    content = bytearray(encoded(image))
    content[29] ^= 1
    return bytes(content)


@refused("PNG with a bit of its pixels flipped", CUT)
def _(image: Image.Image) -> bytes:
    content = bytearray(encoded(image))
    content[len(content) // 2] ^= 1
    return bytes(content)


@refused("PNG with fewer rows than it says", CUT)
def _(image: Image.Image) -> bytes:
    return png(64, 64, chunk(b"IDAT", zlib.compress(bytes(64 * 100))) + END)


@refused("JPEG whose middle is zeros up to the end", "")
def _(image: Image.Image) -> bytes:
    content = encoded(image, "JPEG", quality=95)
    return content[:400] + bytes(200)


@refused("JPEG header before noise", "")
def _(image: Image.Image) -> bytes:
    return b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01" + NO_PICTURES["noise"]


@refused("TIFF of floats with NaN", "float pixels|NaN|nan")
def _(image: Image.Image) -> bytes:
    return encoded(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF")


@refused("TIFF of floats beyond 255", "float pixels")
def _(image: Image.Image) -> bytes:
    return encoded(Image.fromarray(np.full((8, 8), 1e6, np.float32)), "TIFF")


@refused("TIFF that points at itself", "")
def _(image: Image.Image) -> bytes:
    return b"II*\x00\x08\x00\x00\x00" + struct.pack("<HI", 0, 8) + bytes(32)


def exif(turn: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = turn
    return tags


def wide(image: Image.Image) -> Image.Image:
    """16 bits of grey."""
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def see_through(image: Image.Image, mode: str = "RGBA") -> Image.Image:
    image = image.convert(mode)
    image.putalpha(128)
    return image


def frames(image: Image.Image) -> dict[str, object]:
    return {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}


def with_text(image: Image.Image) -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("Comment", "\u00e9\u4e2d" * 1000, zip=True)
    return encoded(image, pnginfo=notes)


READ |= {
    "plain PNG": encoded,
    "plain JPEG": lambda image: encoded(image, "JPEG"),
    "grey JPEG": lambda image: encoded(image.convert("L"), "JPEG"),
    "CMYK JPEG": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "progressive JPEG": lambda image: encoded(image, "JPEG", progressive=True),
    "JPEG with trailing bytes": lambda image: encoded(image, "JPEG") + b"<!-- served by -->" * 9,
    "JPEG with half an EXIF": lambda image: encoded(image, "JPEG", exif=exif(6).tobytes()[:18]),
    "JPEG with a colour profile that is noise": lambda image: encoded(image, "JPEG", icc_profile=b"\x00" * 200),
    "grey PNG of 16 bits": lambda image: encoded(wide(image)),
    "TIFF of 16 bits": lambda image: encoded(wide(image), "TIFF"),
    "TIFF of floats in 0..1": lambda image: encoded(Image.fromarray(np.eye(9, dtype=np.float32)), "TIFF"),
    "TIFF of CMYK": lambda image: encoded(image.convert("CMYK"), "TIFF"),
    "TIFF of two pages": lambda image: encoded(image, "TIFF", **frames(image)),
    "palette": lambda image: encoded(image.quantize(7)),
    "palette with alpha": lambda image: encoded(see_through(image).quantize(16)),
    "palette with a transparent index": lambda image: encoded(image.quantize(9), transparency=0),
    "RGBA": lambda image: encoded(see_through(image)),
    "grey with alpha": lambda image: encoded(see_through(image, "LA")),
    "one bit": lambda image: encoded(image.convert("1")),
    "animated GIF": lambda image: encoded(image.quantize(32), "GIF", **frames(image.quantize(32))),
    "animated WebP": lambda image: encoded(image, "WEBP", **frames(image)),
    "animated PNG": lambda image: encoded(image, **frames(image)),
    "BMP": lambda image: encoded(image, "BMP"),
    "ICO": lambda image: encoded(image.resize((32, 32)), "ICO"),
    "PPM": lambda image: encoded(image, "PPM"),
    "JPEG 2000": lambda image: encoded(image, "JPEG2000"),
    "AVIF": lambda image: encoded(image, "AVIF"),
    "WebP with alpha": lambda image: encoded(see_through(image), "WEBP"),
    "PNG with a long text": with_text,
    "PNG without its last chunk": lambda image: encoded(image)[: -len(END)],
    "1 x 1": lambda image: encoded(image.resize((1, 1))),
    "1 x 20,000": lambda image: encoded(image.resize((1, 20_000))),
    "20,000 x 1": lambda image: encoded(image.resize((20_000, 1))),
    "EXIF upside down": lambda image: encoded(image, "JPEG", exif=exif(3)),
    "EXIF on its side": lambda image: encoded(image, "JPEG", exif=exif(6)),
    "EXIF of a turn that there is not": lambda image: encoded(image, "JPEG", exif=exif(99)),
}

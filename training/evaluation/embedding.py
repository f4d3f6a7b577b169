"""Computes embeddings of images, texts and pairs in batches, for all evaluators.

Shapes: n items, P width of the projection. Embeddings are L2-normalised, float32, on the model's device.
A row is {"image": PIL | bytes | path | {"bytes", "path"}, "captions": list[str], "id": concept id}.
"""

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from oner.processing.data.row_checks import SHOWN, PairDataError, report
from oner.processing.image_processing_vl import ImageDecodeError, open_image

from .sheets import evaluating, on_device

Row = Mapping[str, Any]


def batches(count: int, batch_size: int, description: str, progress: bool) -> Iterator[slice]:
    """Slices of `batch_size` over `count` items, with a progress bar that counts items."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    with tqdm(total=count, desc=description, unit="item", disable=not progress, leave=False) as bar:
        for start in range(0, count, batch_size):
            stop = min(start + batch_size, count)
            yield slice(start, stop)
            bar.update(stop - start)


def _embed(
    model: Any, count: int, encode: Callable[[slice], Any], batch_size: int, description: str, progress: bool
) -> Tensor:
    """(n, P): the normalised pooler_output of `encode` for every slice."""
    if count == 0:
        raise ValueError(f"nothing to embed: no {description}")
    with evaluating(model):
        chunks = [
            F.normalize(encode(rows).pooler_output.float(), dim=-1)
            for rows in batches(count, batch_size, description, progress)
        ]
    embeddings = torch.cat(chunks)  # (n, P)

    # one NaN would make all scores against it NaN
    if not torch.isfinite(embeddings).all():
        bad = (~torch.isfinite(embeddings)).any(1)
        raise ValueError(f"{int(bad.sum())} of {count} embeddings of {description} are not finite")
    return embeddings


def picture_fault(image: Any) -> str | None:
    """Why an image cannot be decoded; None if it can."""
    try:
        open_image(image, finish=lambda picture: None)
    except ImageDecodeError as error:
        return str(error)
    return None


def check_pictures(
    rows: Sequence[Row],
    name: str,
    keys: Sequence[str] = ("image",),
    numbers: Sequence[int] | None = None,
    threads: int = 4,
) -> None:
    """
    Decodes every picture once. An evaluation never skips bad rows, since a score over fewer rows is another score;
    this
    reports them before a run starts, not at its first evaluation.

    Args:
        keys: Keys of a row's pictures.
        numbers: Numbers of the rows to check; all if None.

    Raises:
        PairDataError: pictures cannot be read; names the first ten by number, and how many there are.
    """
    # rows may share a file, which is then checked once
    known: dict[str, str | None] = {}

    def wrong(image: Any) -> str | None:
        path = image if isinstance(image, str) else ""
        if path in known:
            return known[path]
        reason = picture_fault(image)
        if path:
            known[path] = reason
        return reason

    def reason_of(number: int) -> str | None:
        row = rows[number]
        return "; ".join(filter(None, (wrong(row[key]) for key in keys))) or None

    # Pillow releases the GIL while it decodes, so threads are enough
    looked_at = range(len(rows)) if numbers is None else numbers
    with ThreadPoolExecutor(threads) as pool:
        reasons = zip(looked_at, pool.map(reason_of, looked_at), strict=True)
        bad = [(number, text) for number, text in reasons if text is not None]
    if bad:
        raise PairDataError(report(name, bad[:SHOWN], len(bad), len(looked_at)))


def opened(images: Iterable[Any], first: int) -> list[Any]:
    """Decodes images. Raises `ImageDecodeError` with the number, counted from `first`, of an unreadable one."""
    decoded = []
    for number, image in enumerate(images, first):
        try:
            decoded.append(open_image(image))
        except ImageDecodeError as error:
            raise ImageDecodeError(f"picture {number}: {error}") from error
    return decoded


def middle_square(model: Any) -> dict[str, Any]:
    """Processor options that keep the aspect ratio: the shorter side is resized to the model's image size, and the
    centre is cropped (SLIP's ImageNet protocol; the filter stays the processor's)."""
    square = {"height": model.config.image_size, "width": model.config.image_size}
    return {"size": square, "crop_size": square, "do_center_crop": True}


def embed_images(
    model: Any, processor: Any, images: Sequence[Any], batch_size: int = 64, progress: bool = False, **options: Any
) -> Tensor:
    """f(I), (n, P). `images` are anything that `open_image` opens, or rows' "image"; decoded one batch at a time.

    `options` are the processor's.
    """

    def encode(rows: slice) -> Any:
        batch = processor(images=opened(images[rows], rows.start), return_tensors="pt", **options)  # (b, 3, H, W)
        return model.get_image_features(pixel_values=on_device(batch, model)["pixel_values"])

    return _embed(model, len(images), encode, batch_size, "pictures", progress)


def embed_texts(
    model: Any, processor: Any, texts: Sequence[str], batch_size: int = 256, progress: bool = False
) -> Tensor:
    """f(T), (n, P). Equal texts are embedded once, so that they tie exactly; batches contain texts of similar length.

    If the tokenizer gives no mask (SigLIP's), the model also reads padding, so all texts are padded to the full
    length.
    """

    # sorted by length, to avoid padding
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    place = {text: row for row, text in enumerate(unique)}
    tokenizer = getattr(processor, "tokenizer", None)
    masked = tokenizer is None or "attention_mask" in tokenizer.model_input_names
    padding = {"padding": True if masked else "max_length", "truncation": True}

    def encode(rows: slice) -> Any:
        batch = on_device(processor(text=unique[rows], return_tensors="pt", **padding), model)
        read = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        return model.get_text_features(**read)

    embeddings = _embed(model, len(unique), encode, batch_size, "texts", progress)

    # (u, P) -> (n, P)
    return embeddings[torch.tensor([place[text] for text in texts], device=embeddings.device)]


def embed_pairs(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    texts: Sequence[str],
    batch_size: int = 64,
    progress: bool = False,
    times: int = 1,
    **options: Any,
) -> Tensor:
    """f(I, T), (n, P): picture and text as one sequence.

    With `times` above 1 each picture has that many consecutive texts, n = times * pictures; a batch decodes it once.
    `options` are the processor's.
    """
    if len(images) * times != len(texts):
        raise ValueError(f"{times} text(s) a picture: got {len(images)} pictures and {len(texts)} texts")

    def encode(rows: slice) -> Any:
        # the pictures of this batch; the first and last may have only some of their texts in it
        first = rows.start // times
        last = (rows.stop - 1) // times + 1
        pictures = opened(images[first:last], first)

        # one sequence per row: [CLS], patches, tokens
        batch = processor(
            images=[pictures[row // times - first] for row in range(rows.start, rows.stop)],
            text=list(texts[rows]),
            padding=True,
            truncation=True,
            return_tensors="pt",
            **options,
        )
        batch = on_device(batch, model)
        return model.get_multimodal_features(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=batch["pixel_values"]
        )

    return _embed(model, len(texts), encode, batch_size, "pairs", progress)


class Column(Sequence):
    """One column of map-style rows as a lazy sequence, so that pictures stay on disk."""

    def __init__(self, rows: Sequence[Row], name: str, indices: Sequence[int] | None = None):
        self.rows = rows
        self.name = name
        self.indices = range(len(rows)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self.rows[row][self.name] for row in self.indices[index]]
        return self.rows[self.indices[index]][self.name]


class PictureRows(Sequence):
    """
    Merges rows with the same picture and concept into one with all their captions, since tables often have one row per
    caption. Pictures are read lazily.

    Attributes:
        captions, ids: Of each merged row.
    """

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows
        self.captions: list[list[str]] = []
        self.ids: list[Hashable] = []
        self._first: list[int] = []
        places: dict[tuple[str, Hashable], int] = {}
        for number, row in enumerate(rows):
            concept = ("row", number) if row.get("id") is None else row["id"]
            place = places.setdefault((picture_key(row["image"]), concept), len(places))
            if place == len(self.ids):
                self._first.append(number)
                self.ids.append(concept)
                self.captions.append([])
            self.captions[place] += row["captions"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        return {**self.rows[self._first[index]], "captions": self.captions[index], "id": self.ids[index]}


class Gallery(Sequence):
    """Rows whose pictures are embedded only once, for several evaluators that search them.

    Only for a single model with fixed weights.
    """

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows
        self._vectors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> Any:
        return self.rows[index]

    def vectors(self, model: Any, processor: Any, batch_size: int = 64, progress: bool = False) -> Tensor:
        """f(I) of every row, (n, P)."""
        if self._vectors is None:
            self._vectors = embed_images(model, processor, Column(self.rows, "image"), batch_size, progress)
        return self._vectors


def gallery_vectors(
    model: Any, processor: Any, rows: Sequence[Row], batch_size: int = 64, progress: bool = False
) -> Tensor:
    """f(I) of the pictures of `rows`, (n, P); a `Gallery` caches them."""
    rows = rows if isinstance(rows, Gallery) else Gallery(rows)
    return rows.vectors(model, processor, batch_size, progress)


def spaced(rows: Sequence[Any], limit: int | None = None) -> list[Any]:
    """All of `rows` in order; with a `limit` at most that many, evenly spaced from the first.

    Raises:
        ValueError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"a limit must be at least 1, got {limit}")

    count = len(rows) if limit is None else min(limit, len(rows))
    places = [number * len(rows) // count for number in range(count)]

    # `PairRows.take` reads all of them at once
    take = getattr(rows, "take", None)
    return [rows[place] for place in places] if take is None else take(places)


def row_ids(rows: Iterable[Row], owner: str = "row") -> list[Hashable]:
    """
    The concept id of every row. A row without an id is its own concept; `owner` distinguishes those of two lists.
    """
    ids = (row.get("id") for row in rows)
    return [(owner, number) if concept is None else concept for number, concept in enumerate(ids)]


def numbered(*columns: Sequence[Hashable]) -> tuple[Tensor, ...]:
    """Columns of hashable values as int64 tensors; equal values, also across columns, get equal numbers."""

    # numbered in order of appearance
    numbers: dict[Hashable, int] = {}
    return tuple(torch.tensor([numbers.setdefault(value, len(numbers)) for value in column]) for column in columns)


def picture_key(image: Any) -> str:
    """What makes two picture sources the same picture: the bytes of the file, the path, or the pixels."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str | PathLike):
        return f"path {os.path.normpath(image)}"

    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()

    # pixels of what is in memory, since no file says who it is
    picture = open_image(image)
    return f"pixels {picture.size} {hashlib.sha256(picture.tobytes()).hexdigest()}"

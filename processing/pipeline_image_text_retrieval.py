"""Pipeline "image-text-retrieval": index pictures, texts or both, then ask by text, by picture, or by both at once.

    pipe = pipeline("image-text-retrieval", model="org/oner-base")
    pipe.index("photos/")
    pipe("red fruit", top_k=5)                                     # [{"score": 0.61, "item": ..., "index": 17}, ...]
    pipe("made of glass", image="photos/apple.jpg")                # one query of both: one joint sequence

Strings never have two meanings: in a query a plain str is text; in `index` it is a picture's path (or a folder), in
`index_texts` a caption. Pictures in a query come as PIL, bytes, pathlib.Path, `image=...` or {"image": ...}.

Shapes: B queries of one kind, L positions, P projection_dim, n indexed items, k answers per query.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers.modeling_outputs import ModelOutput

from .image_processing_vl import ImageDecodeError
from .pipeline_pairs import VisionLanguagePipeline
from .retrieval_index import RetrievalIndex, space_fingerprint
from .vl_captions import caption_reason

PICTURE_SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
QUERY_KEYS = ("text", "image")
ROW_KEYS = ("text", "image", "item")

Query = dict[str, Any]  # "text", "image" or both; "item" in a row to be indexed


def list_pictures(folder: str | os.PathLike) -> list[str]:
    """Every picture file under `folder`, by suffix, sorted; hidden files and folders are left out."""
    pictures = []
    # in place, which keeps os.walk out of hidden folders
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in files if not name.startswith("."))
        pictures += [os.path.join(parent, name) for name in names if Path(name).suffix.lower() in PICTURE_SUFFIXES]
    return pictures


def read_query(query: Any) -> Query:
    """One query of any accepted form → {"text": str} and/or {"image": picture}."""
    # a str is a text, anything else that is no mapping a picture
    if isinstance(query, str):
        query = {"text": query}
    if not isinstance(query, Mapping):
        return {"image": query}

    # keys that are known, with values that can be read
    values = {key: query[key] for key in QUERY_KEYS if query.get(key) is not None}
    if not values or set(query) - set(QUERY_KEYS):
        raise ValueError(f'a query has the keys "text", "image" or both, got {sorted(map(str, query))}')
    if not isinstance(values.get("text", ""), str):
        raise TypeError(f'"text" of a query must be a str, got {type(values["text"]).__name__}')
    if "text" in values and not values["text"].strip():
        raise ValueError("the text of a query is empty")
    if "text" in values and (reason := caption_reason(values["text"])) is not None:
        raise ValueError(f"the text of a query cannot be read: {reason}")
    return values


def gather_queries(inputs: Any, text: Any, image: Any) -> tuple[list[Query], bool]:
    """The three ways to ask → list of queries, and whether it was a single one."""
    # a positional query: one of any form, or a list of such
    if isinstance(inputs, str) and text is None:
        text = inputs
        inputs = None
    if inputs is not None:
        if text is not None or image is not None:
            raise ValueError("text= and image= go with each other or one str; for several give text=[..], image=[..]")
        many = isinstance(inputs, (list, tuple, Iterator))
        return [read_query(query) for query in (inputs if many else [inputs])], not many

    # by name: each of text= and image= one, or lists of one length
    named = {key: value for key, value in (("text", text), ("image", image)) if value is not None}
    if not named:
        raise ValueError('nothing was asked: give a str, a picture, {"text": ..., "image": ...} or a list of them')
    lengths = {len(value) if isinstance(value, (list, tuple)) else None for value in named.values()}
    if len(lengths) > 1:
        raise ValueError("text= and image= must both be single, or lists of the same length")
    if lengths == {None}:
        return [read_query(named)], True
    return [read_query(dict(zip(named, pair, strict=True))) for pair in zip(*named.values(), strict=True)], False


def read_row(row: Any, position: int) -> Query:
    """One entry of an index source → its query plus "item", what the answers will show for it."""
    # a picture by itself
    stored_picture = isinstance(row, Mapping) and "bytes" in row and not set(row) - {"bytes", "path"}
    if not isinstance(row, Mapping) or stored_picture:  # {"bytes", "path"}: a picture as `datasets` stores it
        return {"image": row, "item": name_of(row, position)}

    # a mapping: its query, and what answers show for it
    if set(row) - set(ROW_KEYS):
        raise ValueError(f"row {position}: expected the keys {', '.join(ROW_KEYS)}, got {sorted(map(str, row))}")
    try:
        query = read_query({key: row.get(key) for key in QUERY_KEYS})
    except (TypeError, ValueError) as error:
        raise type(error)(f"row {position}: {error}") from None

    # given, or made of what it holds
    if "item" in row:
        item = row["item"]
    elif "image" in query and "text" in query:
        item = {"image": name_of(query["image"], position), "text": query["text"]}
    else:
        item = query["text"] if "text" in query else name_of(query["image"], position)
    return {**query, "item": item}


def name_of(picture: Any, position: int) -> str:
    """A path's own name, a PIL picture's file, else "picture <position>"."""
    if isinstance(picture, (str, os.PathLike)):
        return os.fspath(picture)
    path = picture.get("path") if isinstance(picture, Mapping) else getattr(picture, "filename", None)
    return str(path) if path else f"picture {position}"


def report_skipped(index: RetrievalIndex, skipped: list[dict[str, str]], seen: int) -> None:
    """Lists the entries that could not be read in `index.skipped` and warns once; raises if there is no other."""
    # nothing that could be searched
    if seen == 0:
        raise ValueError("nothing to index: the list is empty")
    first = f"{skipped[0]['item']}: {skipped[0]['reason']}" if skipped else ""
    if len(skipped) == seen:
        raise ValueError(f"not one of {seen} entries could be read; the first: {first}")

    # some were left out: once in a warning, all of them in the list
    if skipped:
        index.skipped = index.skipped + skipped
        warnings.warn(
            f"{len(skipped)} of {seen} entries could not be read and are left out (index.skipped lists them); "
            f"the first: {first}",
            stacklevel=3,
        )


class ImageTextRetrievalPipeline(VisionLanguagePipeline):
    """Index, then ask. Any model with `get_text_features`, `get_image_features` and `get_multimodal_features`.

    Args (besides `VisionLanguagePipeline`'s):
        top_k: answers per query when a call does not say (5).

    Attributes:
        retrieval_index: the index that answers, or None.
    """

    task_name = "image-text-retrieval"
    model_methods = ("get_text_features", "get_image_features", "get_multimodal_features")
    reads_heads = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.retrieval_index: RetrievalIndex | None = None
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Identifies the model's embedding space; computed once."""
        if self._fingerprint is None:
            self._fingerprint = space_fingerprint(self.model)
        return self._fingerprint

    @property
    def model_name(self) -> str:
        return getattr(self.model, "name_or_path", "") or type(self.model).__name__

    # The stages of transformers.Pipeline, for a batch of queries of one kind

    def _sanitize_parameters(
        self, top_k: int | None = None, allow_urls: bool | None = None, **unknown: Any
    ) -> tuple[dict, dict, dict]:
        if unknown:
            raise TypeError(f"image-text-retrieval takes top_k, batch_size and allow_urls, got {sorted(unknown)}")
        return {} if allow_urls is None else {"allow_urls": allow_urls}, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, queries: list[Query], allow_urls: bool = False) -> dict[str, Any]:
        """B queries, all of the same kind → the processor's batch."""
        # a query of both is one joint sequence
        inputs: dict[str, list] = {}
        if "image" in queries[0]:
            inputs["images"] = [self._open(query["image"], allow_urls) for query in queries]
        if "text" in queries[0]:
            inputs["text"] = [query["text"] for query in queries]
        return {"kind": tuple(inputs), **self.processor(**inputs, return_tensors="pt", padding=True).to(self.dtype)}

    def _forward(self, model_inputs: dict[str, Any]) -> ModelOutput:
        kind = model_inputs.pop("kind")
        if kind == ("images",):
            output = self.model.get_image_features(pixel_values=model_inputs["pixel_values"])
        else:
            names = ("input_ids", "attention_mask") + (("pixel_values",) if "images" in kind else ())
            encode = self.model.get_multimodal_features if "images" in kind else self.model.get_text_features
            output = encode(**{name: model_inputs[name] for name in names})
        return ModelOutput(embeddings=output.pooler_output)  # (B, P)

    def postprocess(self, model_outputs: Mapping[str, torch.Tensor], top_k: int = 5) -> list[list[dict[str, Any]]]:
        """Embeddings (B, P) → for each query its k answers, best first."""
        index = self._ready_index()
        scores, indices = index.search(model_outputs["embeddings"], top_k=top_k)  # (B, k) each
        return [
            [{"score": score, "item": index.items[i], "index": i} for score, i in zip(*pair, strict=True)]
            for pair in zip(scores.tolist(), indices.tolist(), strict=True)
        ]

    def __call__(
        self,
        inputs: Any = None,
        *,
        text: str | list[str] | None = None,
        image: Any = None,
        top_k: int | None = None,
        batch_size: int | None = None,
        allow_urls: bool | None = None,
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """Answers one query with a list of {"score", "item", "index"}, a list of queries with a list of such lists.

        Args:
            inputs: a str (text), a picture, {"text": ..., "image": ...}, or a list of these.
            text, image: the same by name; both together, or `image` beside a str, are one joint query.

        Raises:
            ValueError: nothing was indexed, nothing was asked, or a list and a single picture are mixed.
        """
        # refused before anything is embedded
        self._ready_index()

        # embedded and searched
        queries, single = gather_queries(inputs, text, image)
        embeddings = self.embed(queries, batch_size=batch_size, allow_urls=allow_urls)
        post = {**self._postprocess_params, **({} if top_k is None else {"top_k": top_k})}
        answers = self.postprocess({"embeddings": embeddings}, **post)
        return answers[0] if single else answers

    def embed(
        self, queries: Iterable[Any], batch_size: int | None = None, allow_urls: bool | None = None
    ) -> torch.Tensor:
        """Any queries, kinds mixed → retrieval embeddings (number of queries, P), fp32, unit rows, on the CPU."""
        queries = [read_query(query) for query in queries]
        size = self._read_batch_size(batch_size)
        before = {**self._preprocess_params, **({} if allow_urls is None else {"allow_urls": allow_urls})}

        # each kind in batches of its own, since a batch has one layout
        rows: dict[int, torch.Tensor] = {}
        for kind in (("text",), ("image",), ("text", "image")):
            places = [i for i, query in enumerate(queries) if tuple(key for key in QUERY_KEYS if key in query) == kind]
            for start in range(0, len(places), size):
                batch = places[start : start + size]
                output = self.forward(self.preprocess([queries[i] for i in batch], **before), **self._forward_params)
                rows.update(zip(batch, output["embeddings"].float(), strict=True))  # (P,) each
        if not rows:
            return torch.empty(0, self.model.config.projection_dim)
        embeddings = torch.stack([rows[i] for i in range(len(queries))])  # (queries, P), as they were asked
        return torch.nn.functional.normalize(embeddings, dim=-1)

    # The index

    def index(
        self,
        source: Any,
        *,
        append: bool = False,
        batch_size: int | None = None,
        num_workers: int = 2,
        allow_urls: bool | None = None,
        dtype: str = "float16",
        show_progress: bool = True,
    ) -> RetrievalIndex:
        """Embeds pictures (or pictures with texts) and keeps them as the index that answers.

        What cannot be read is left out, warned about once, and listed with its reason in `index.skipped`.

        Args:
            source: a folder (searched recursively); or an iterable of paths, PIL pictures, bytes, addresses (with
                allow_urls) or rows {"image", "text", "item"}: a row with both is one joint embedding, and "item", if
                given, is the JSON value that answers show.
            append: add to the present index instead of replacing it.
            num_workers: threads that decode pictures.
            dtype: how embeddings are kept, "float16" or "float32".

        Raises:
            ValueError: no picture under the folder, an empty source, or not one readable entry.
        """
        # what is embedded, and the index that it goes into
        rows, total = self._rows_of(source)
        index = self.retrieval_index if append and self.retrieval_index is not None else self._new_index(dtype)
        size = self._read_batch_size(batch_size)
        allowed = self._preprocess_params.get("allow_urls", False) if allow_urls is None else allow_urls
        seen = 0
        skipped: list[dict[str, str]] = []

        # a batch at a time: decoded by threads, then embedded
        with (
            ThreadPoolExecutor(max(1, num_workers)) as pool,
            tqdm(total=total, desc="indexing", unit="item", disable=not show_progress) as bar,
        ):
            while batch := list(islice(rows, size)):
                opened = list(pool.map(lambda row: self._open_row(row, allowed), batch))

                # what cannot be read is noted, the rest embedded
                skipped += [{"item": str(row["item"]), "reason": reason} for row, reason in opened if reason]
                good = [row for row, reason in opened if not reason]
                if good:
                    embeddings = self.embed([{key: row.get(key) for key in QUERY_KEYS} for row in good], size)
                    index.add(embeddings, [row["item"] for row in good], self.fingerprint, self.model_name)
                seen += len(batch)
                bar.update(len(batch))

        # a new index answers only once it is whole
        report_skipped(index, skipped, seen)
        self.retrieval_index = index
        return index

    def index_texts(self, texts: Iterable[str], **options: Any) -> RetrievalIndex:
        """As `index`, for captions: the items are the texts themselves."""
        rows = [texts] if isinstance(texts, str) else list(texts)
        for position, text in enumerate(rows):
            if not isinstance(text, str):
                raise TypeError(f"index_texts takes str, got {type(text).__name__} at position {position}")
        return self.index([{"text": text} for text in rows], **options)

    def save_index(self, directory: str | os.PathLike) -> Path:
        """Saves the present index into `directory`; see `RetrievalIndex.save`."""
        return self._ready_index().save(directory)

    def load_index(self, directory: str | os.PathLike) -> RetrievalIndex:
        """Loads a saved index and answers from it. Raises IndexMismatchError if another model made it."""
        index = RetrievalIndex.load(directory)
        index.check_space(self.model.config.projection_dim, self.fingerprint, self.model_name)
        self.retrieval_index = index
        return index

    def _new_index(self, dtype: str) -> RetrievalIndex:
        return RetrievalIndex(self.model.config.projection_dim, self.model_name, self.fingerprint, dtype)

    def _ready_index(self) -> RetrievalIndex:
        if self.retrieval_index is None:
            raise ValueError("there is no index to search: call index(folder), index_texts(...) or load_index(...)")
        return self.retrieval_index

    def _rows_of(self, source: Any) -> tuple[Iterator[Query], int | None]:
        """A folder or an iterable → rows with an "item" each, read as they are needed, and how many if known."""
        # the pictures of a folder
        if isinstance(source, (str, os.PathLike)):
            if not os.path.isdir(source):
                raise ValueError(f"{os.fspath(source)!r} is not a folder; give a folder or a list of pictures")
            folder, source = source, list_pictures(source)
            if not source:
                raise ValueError(f"no picture under {os.fspath(folder)!r} ({', '.join(sorted(PICTURE_SUFFIXES))})")

        # or any iterable but what is one picture or row itself
        single = isinstance(source, (bytes, bytearray, Mapping, Image.Image, np.ndarray, torch.Tensor))
        if single or not isinstance(source, Iterable):
            raise TypeError(f"index takes a folder or a list of pictures or rows, got {type(source).__name__}")
        total = len(source) if isinstance(source, Sized) else None
        return (read_row(row, position) for position, row in enumerate(source)), total

    def _open_row(self, row: Query, allow_urls: bool) -> tuple[Query, str | None]:
        """The row with its picture decoded, and None; or the row and why its picture cannot be read."""
        if "image" not in row:
            return row, None
        try:
            return {**row, "image": self._open(row["image"], allow_urls)}, None
        except ImageDecodeError as error:
            return row, str(error)

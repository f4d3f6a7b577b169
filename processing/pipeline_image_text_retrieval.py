"""Pipeline "image-text-retrieval": index images, texts or both, then query by text, by image, or by both at once.

    pipe = pipeline("image-text-retrieval", model="org/oner-base")
    pipe.index("photos/")
    pipe("red fruit", top_k=5)                                     # [{"score": 0.61, "item": ..., "index": 17}, ...]
    pipe("made of glass", image="photos/apple.jpg")                # one query with both: one joint sequence
    pipe.combine([("a horse", 1.0), ("stripes", 0.7), ("a rider", -0.5)])     # a weighted sum of queries
    pipe.neighbours("photos/apple.jpg")                            # nearest neighbours of an indexed item
    pipe("red fruit", where=["licence=MIT", "year>=2020"], rerank_k=50)

The meaning of a string is never ambiguous: in a query a plain str is text; in `index` it is an image path (or a
folder), in `index_texts` a caption. Images in a query are PIL images, bytes, pathlib.Path, `image=...` or {"image":
...}.

Shapes: B queries of one kind, L positions, D width of states, P projection_dim, n indexed items, k answers per query.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.modeling_outputs import ModelOutput

from .pipeline_pairs import Unknown, VisionLanguagePipeline, checked_top_k, known_options
from .retrieval_backend import Answer, SearchBackend, open_backend
from .retrieval_filter import Where, read_where
from .retrieval_index import RetrievalIndex, space_fingerprint
from .retrieval_index_files import DTYPES
from .retrieval_late_interaction import RERANK_WEIGHT, OpenItem, check_reranking, late_interaction, query_of_item
from .retrieval_nearest import unit_rows
from .retrieval_sources import (
    QUERY_KEYS,
    SHEET_REASON,
    Query,
    gather_queries,
    is_sheet,
    list_pictures,
    name_of_row,
    read_query,
    read_row,
    rows_of,
    told_of,
)
from .retrieval_unfinished import UnfinishedIndex, unfinished_index
from .vl_sources import iterate, warn_caller

TOP_K = 5


@dataclass
class Row:
    """
    One entry of an index that is being built.

    Attributes:
        item: What answers contain.
        query: {"text", "image"}, with the image decoded.
        reason: Why it cannot be read; None if it can.
        key: Its key in `UnfinishedIndex`, if it has one.
        embedding: A unit row (P,) in the index's dtype, once it is known.
    """

    item: Any
    query: Query | None = None
    reason: str | None = None
    key: str | None = None
    embedding: torch.Tensor | None = None


def report_skipped(index: RetrievalIndex, seen: int) -> None:
    """Warns once about entries that could not be read; raises if there are no others."""
    if seen == 0:
        raise ValueError("nothing to index: the list is empty")
    skipped = index.skipped
    first = told_of(skipped[0]["item"], skipped[0]["reason"]) if skipped else ""
    if len(skipped) == seen:
        raise ValueError(f"not one of {seen} entries could be read; the first: {first}")
    if skipped:
        said = f"{len(skipped)} of {seen} entries could not be read and are left out (index.skipped lists them)"
        warn_caller(f"{said}; the first: {first}")


class ImageTextRetrievalPipeline(VisionLanguagePipeline):
    """Retrieval pipeline for any model with `get_text_features`, `get_image_features` and `get_multimodal_features`.

    Args (besides `VisionLanguagePipeline`'s):
        top_k: default number of answers per query (5).

    Attributes:
        retrieval_index: the index or other backend that answers, or None.
    """

    task_name = "image-text-retrieval"
    model_methods = ("get_text_features", "get_image_features", "get_multimodal_features")
    reads_heads = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.retrieval_index: SearchBackend | None = None
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

    # The stages of transformers.Pipeline, each for a batch of queries of one kind

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        where: Where = None,
        allow_urls: bool | None = None,
        num_workers: int | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        before = known_options(
            f"{self.task_name} (with top_k=, where=)", {"allow_urls": allow_urls, "num_workers": num_workers}, unknown
        )
        after = {"top_k": top_k, "where": where}
        return before, {}, {name: value for name, value in after.items() if value is not None}

    def preprocess(self, queries: list[Query], allow_urls: bool = False, num_workers: int = 0) -> dict[str, Any]:
        """B queries, all of the same kind → the processor's batch."""
        # a query with both is one joint sequence
        inputs: dict[str, list] = {}
        if "image" in queries[0]:
            inputs["images"] = self.read_all([query["image"] for query in queries], allow_urls, num_workers)
        if "text" in queries[0]:
            inputs["text"] = [query["text"] for query in queries]
        return {"kind": tuple(inputs), **self.processor(**inputs, return_tensors="pt", padding=True).to(self.dtype)}

    def _forward(self, model_inputs: dict[str, Any], states: bool = False) -> ModelOutput:
        kind = model_inputs.pop("kind")
        if kind == ("images",):
            output = self.model.get_image_features(pixel_values=model_inputs["pixel_values"])
        else:
            names = ("input_ids", "attention_mask") + (("pixel_values",) if "images" in kind else ())
            encode = self.model.get_multimodal_features if "images" in kind else self.model.get_text_features
            output = encode(**{name: model_inputs[name] for name in names})
        if not states:
            return ModelOutput(embeddings=output.pooler_output)  # (B, P)
        mask = model_inputs.get("attention_mask")  # (B, L)
        mask = torch.ones(output.last_hidden_state.shape[:2]) if mask is None else mask
        return ModelOutput(embeddings=output.pooler_output, states=output.last_hidden_state, mask=mask)

    def postprocess(
        self, model_outputs: Mapping[str, torch.Tensor], top_k: int = TOP_K, where: Where = None
    ) -> list[list[Answer]]:
        """Embeddings (B, P) → for each query its k answers, best first."""
        return self._ready_index().answers(model_outputs["embeddings"], top_k, where)

    def __call__(
        self,
        inputs: Any = None,
        *,
        text: str | list[str] | None = None,
        image: Any = None,
        top_k: int | None = None,
        where: Where = None,
        rerank_k: int | None = None,
        rerank_weight: float = RERANK_WEIGHT,
        open_item: OpenItem = query_of_item,
        batch_size: int | None = None,
        allow_urls: bool | None = None,
        num_workers: int | None = None,
    ) -> list[Answer] | list[list[Answer]] | Iterator[list[Answer]]:
        """Answers one query with a list of {"score", "item", "index"}, several queries with a list of such lists.

        Args:
            inputs: a str (text), an image, {"text": ..., "image": ...}; a list or a dataset column of these; or an
                iterator of these, for which an iterator is returned that reads one batch ahead.
            text, image: the same by name; both together, or `image` with a str, form one joint query.
            where: conditions on the columns of items, such as "licence=MIT"; see `retrieval_filter.py`.
            rerank_k: number of best answers by cosine to re-rank by comparing tokens with patches; None disables
                re-ranking. For single-tower models; see `retrieval_late_interaction.py`.
            rerank_weight: weight of late interaction in the re-ranking score, from 0 to 1.
            open_item: maps an item to a query with its image or text, for re-ranking.
            num_workers: threads that decode images (0: no extra threads).

        Raises:
            ValueError: nothing is indexed, no query is given, or a list and a single image are mixed; a condition
                is invalid; re-ranking with a two-tower model, or of items that cannot be opened.
        """
        # check before anything is embedded
        self._ready_index()
        read_where(where)
        if rerank_k is not None:
            check_reranking(self.model.config, checked_top_k(rerank_k), rerank_weight)

        # embed and search, batch by batch
        queries, single = gather_queries(inputs, text, image)
        options = {"batch_size": batch_size, "allow_urls": allow_urls, "num_workers": num_workers}
        by_call = {"top_k": top_k, "where": where}
        post = {**self._postprocess_params, **{name: value for name, value in by_call.items() if value is not None}}
        again = None if rerank_k is None else partial(self._rerank, rerank_k, rerank_weight, open_item, options)
        answers = self._answers(queries, options, post, rerank_k or 0, again)
        if isinstance(inputs, Iterator):
            return answers
        found = list(answers)
        return found[0] if single else found

    def _answers(
        self,
        queries: Iterator[Query],
        options: dict[str, Any],
        post: dict[str, Any],
        depth: int,
        again: Callable[[Query, list[Answer]], list[Answer]] | None,
    ) -> Iterator[list[Answer]]:
        top_k = checked_top_k(post.get("top_k", TOP_K))
        while batch := list(islice(queries, self._read_batch_size(options["batch_size"]))):
            outputs = {"embeddings": self.embed(batch, **options)}
            if again is None:
                yield from self.postprocess(outputs, **post)
                continue
            found = self.postprocess(outputs, **{**post, "top_k": max(top_k, depth)})
            yield from (again(query, answers)[:top_k] for query, answers in zip(batch, found, strict=True))

    def _rerank(
        self,
        rerank_k: int,
        weight: float,
        open_item: OpenItem,
        options: dict[str, Any],
        query: Query,
        answers: list[Answer],
    ) -> list[Answer]:
        """Re-ranks the first `rerank_k` answers, with combined scores; the others follow in their old order."""
        first = answers[:rerank_k]
        (asked,) = self.states([query], **options)  # (S, D)
        shown = self.states([open_item(answer["item"]) for answer in first], **options)  # (S', D) each
        late = late_interaction(asked, shown).tolist()  # (rerank_k,)
        mixed = [
            {**answer, "score": (1 - weight) * answer["score"] + weight * one, "cosine": answer["score"]}
            for answer, one in zip(first, late, strict=True)
        ]
        return sorted(mixed, key=lambda answer: (-answer["score"], answer["index"])) + answers[rerank_k:]

    def combine(
        self,
        queries: Iterable[tuple[Any, float]],
        *,
        top_k: int | None = None,
        where: Where = None,
        **options: Any,
    ) -> list[Answer]:
        """Searches by a weighted sum of the unit embeddings of several queries; a negative weight subtracts.

        Args:
            queries: (query, weight) pairs; a query in any form: text, image or both.

        Raises:
            ValueError: there is no query, a weight is not finite, or the sum is zero.
        """
        queries = list(queries)
        if not queries:
            raise ValueError("nothing was asked: expected pairs of a query and its weight")
        weights = torch.tensor([float(weight) for _, weight in queries], dtype=torch.float64)  # (q,)
        if not torch.isfinite(weights).all():
            raise ValueError(f"weights must be finite numbers, got {weights.tolist()}")
        rows = self.embed([query for query, _ in queries], **options).to(torch.float64)  # (q, P)
        together = (weights[:, None] * rows).sum(0, keepdim=True)  # (1, P)
        if together.norm() < 1e-6:
            raise ValueError("the weighted queries cancel each other: there is no direction left to search in")
        return self._ready_index().answers(together, *self._wanted(top_k, where))[0]

    def neighbours(self, item: Any, *, top_k: int | None = None, where: Where = None) -> list[Answer]:
        """Nearest neighbours of an indexed item, without itself; `item` may be its index, if no item equals that int.

        Raises:
            ValueError: there is no such item.
        """
        return self._ready_index().neighbours(item, *self._wanted(top_k, where))

    def _wanted(self, top_k: int | None, where: Where) -> tuple[int, Where]:
        own = {"top_k": TOP_K, "where": None, **self._postprocess_params}
        return checked_top_k(own["top_k"] if top_k is None else top_k), own["where"] if where is None else where

    def embed(
        self,
        queries: Iterable[Any],
        batch_size: int | None = None,
        allow_urls: bool | None = None,
        num_workers: int | None = None,
    ) -> torch.Tensor:
        """Queries of any kinds → retrieval embeddings (number of queries, P), fp32, unit rows, on the CPU.

        Warns about texts with words that the vocabulary lacks.
        """
        queries = [read_query(query) for query in iterate(queries)]
        by_call = {"allow_urls": allow_urls, "num_workers": num_workers}
        embeddings, unknown = self._embed(queries, self._read_batch_size(batch_size), by_call)
        self.tell_unknown(unknown, len(queries))
        return embeddings

    def states(
        self,
        queries: Iterable[Any],
        batch_size: int | None = None,
        allow_urls: bool | None = None,
        num_workers: int | None = None,
    ) -> list[torch.Tensor]:
        """Any queries → for each, the states (S, D) of its tokens and patches after the last layer, without [CLS]."""
        queries = [read_query(query) for query in iterate(queries)]
        by_call = {"allow_urls": allow_urls, "num_workers": num_workers}
        outputs, _ = self._run(queries, self._read_batch_size(batch_size), by_call, states=True)
        return [states[mask.bool()][1:].float() for states, mask in outputs]

    def _embed(self, queries: list[Query], size: int, by_call: dict[str, Any]) -> tuple[torch.Tensor, list[Unknown]]:
        """As `embed`, for parsed queries; also returns the texts with unknown words."""
        outputs, unknown = self._run(queries, size, by_call)
        if not outputs:
            return torch.empty(0, self.model.config.projection_dim), unknown
        embeddings = torch.stack(outputs)  # (queries, P), in the order of the queries
        return torch.nn.functional.normalize(embeddings, dim=-1), unknown

    def _run(
        self, queries: list[Query], size: int, by_call: dict[str, Any], states: bool = False
    ) -> tuple[list[Any], list[Unknown]]:
        """The embedding (P,) of each query, or its states (L, D) and mask (L,); also the texts with unknown words."""
        before = self._preprocess_params | {name: value for name, value in by_call.items() if value is not None}

        # a batch holds queries of one kind
        rows: dict[int, Any] = {}
        unknown: list[Unknown] = []
        for kind in (("text",), ("image",), ("text", "image")):
            places = [i for i, query in enumerate(queries) if tuple(key for key in QUERY_KEYS if key in query) == kind]
            for start in range(0, len(places), size):
                batch = places[start : start + size]
                inputs = self.preprocess([queries[i] for i in batch], **before)
                unknown += self.unknown_words([queries[i].get("text") for i in batch], inputs)
                during = {**self._forward_params, **({"states": True} if states else {})}
                output = self.forward(inputs, **during)
                parts = zip(output["states"], output["mask"], strict=True) if states else output["embeddings"].float()
                rows.update(zip(batch, parts, strict=True))
        return [rows[i] for i in range(len(queries))], unknown

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
        directory: str | os.PathLike | None = None,
        share: tuple[int, int] | None = None,
    ) -> RetrievalIndex:
        """Embeds images (or images with texts) and makes them the index that answers queries.

        Unreadable entries are skipped with one warning, and listed with the reason in `index.skipped`. Images are
        decoded to the model's size one by one, so that a batch of large images needs little memory.

        Args:
            source: a folder (searched recursively); or an iterable of paths, PIL images, bytes, URLs (with
                allow_urls) or rows {"image", "text", "item"}: a row with image and text gets one joint embedding, and
                "item", if given, is the JSON value that answers show; or a `datasets` dataset with such columns.
            append: add to the current index instead of replacing it, once everything is embedded.
            num_workers: threads that decode images.
            dtype: how a new index stores embeddings, "float16" or "float32".
            directory: where to save the index, as `save_index` does, and finished parts before it is complete: if a
                call is killed, the same call resumes from them. If the directory already holds an index made by this
                model, its unchanged entries are not embedded again, and those gone from the source are dropped.
            share: (r, n): embed only every n-th row from r on; a call without it merges them once all are done.

        Raises:
            ValueError: there is no image in the folder, the source is empty, or no entry is readable.
            IndexFileError: `directory` holds something else, or another process is indexing into it.
        """
        entries, total = rows_of(source)
        if share is not None:
            entries = islice(entries, share[0], None, share[1])
            total = total and len(range(share[0], total, share[1]))
        old = self._own_index() if append and self.retrieval_index is not None else None
        new = self._new_index(dtype if old is None else old.dtype)
        allowed = self._preprocess_params.get("allow_urls", False) if allow_urls is None else allow_urls
        size = self._read_batch_size(batch_size)
        seen = 0
        unknown: list[Unknown] = []

        # one batch at a time: decoded by threads, then embedded unless an earlier, interrupted call did so
        with (
            unfinished_index(directory, self._space, new.dtype, 0 if share is None else share[0]) as known,
            ThreadPoolExecutor(max(1, num_workers)) as pool,
            tqdm(total=total, desc="indexing", unit="item", disable=not show_progress) as bar,
        ):
            while batch := list(islice(entries, size)):
                rows = list(pool.map(partial(self._open_row, known, allowed), batch, range(seen, seen + len(batch))))
                new.note_skipped({"item": str(row.item), "reason": row.reason} for row in rows if row.reason)
                unknown += self._add_rows(new, [row for row in rows if not row.reason], known, size)
                seen += len(batch)
                bar.update(len(batch))

            # the index answers queries only once it is complete
            new.counts = known.counts(new.keys)
            if share is not None:
                return new
            report_skipped(new, seen)
            self.tell_unknown(unknown, seen)
            index = new if old is None else old.extend(new)
            if directory is not None:
                index.save(directory)
                known.finish()
        self.retrieval_index = index
        return index

    def index_texts(self, texts: Iterable[str], **options: Any) -> RetrievalIndex:
        """`index` for captions: the items are the texts themselves."""
        rows = ({"text": text} for text in iterate([texts] if isinstance(texts, str) else texts))
        return self.index(list(rows) if isinstance(texts, Sized) else rows, **options)

    def save_index(self, directory: str | os.PathLike) -> Path:
        """Saves the current index into `directory`; see `RetrievalIndex.save`."""
        return self._own_index().save(directory)

    def load_index(self, directory: str | os.PathLike, backend: str = "exact") -> SearchBackend:
        """Loads a saved index to answer from, or opens another backend that was built in its directory.

        Raises IndexMismatchError if another model made it, and the errors of `open_backend`.
        """
        index = RetrievalIndex.load(directory) if backend == "exact" else open_backend(backend, directory)
        index.check_space(self.model.config.projection_dim, self.fingerprint, self.model_name)
        self.retrieval_index = index
        return index

    def _new_index(self, dtype: str) -> RetrievalIndex:
        return RetrievalIndex(self.model.config.projection_dim, self.model_name, self.fingerprint, dtype)

    def _own_index(self) -> RetrievalIndex:
        """The index in memory, which can grow and be saved. Raises ValueError if another backend is in use."""
        index = self._ready_index()
        if not isinstance(index, RetrievalIndex):
            raise ValueError(f"{type(index).__module__} only answers; load the index itself: load_index(directory)")
        return index

    def _ready_index(self) -> SearchBackend:
        if self.retrieval_index is None:
            raise ValueError("there is no index to search: call index(folder), index_texts(...) or load_index(...)")
        return self.retrieval_index

    @property
    def _space(self) -> str:
        """Identifies what determines the embedding of a row: model, image processor, maximum text length."""
        return f"{self.fingerprint} {self.processor.image_processor.to_json_string()} {self.processor.max_text_length}"

    def _open_row(self, known: UnfinishedIndex, allow_urls: bool, entry: Any, position: int) -> Row:
        """One entry of a source, its image decoded at the model's size, or the reason why it cannot be read."""
        try:
            query = read_row(entry, position)
        except (TypeError, ValueError) as error:
            return Row(name_of_row(entry, position), reason=str(error))
        item = query.pop("item")

        # embedded by an earlier call
        key = known.key(query)
        if (embedding := known.find(key)) is not None:
            return Row(item, key=key, embedding=embedding)
        if is_sheet(query.get("image")):
            return Row(item, reason=SHEET_REASON)
        try:
            if "image" in query:
                query["image"] = self.read(query["image"], allow_urls)
        except Exception as error:  # whatever is wrong with an image concerns its row only
            return Row(item, reason=str(error) or type(error).__name__)
        return Row(item, query, key=key)

    def _add_rows(self, index: RetrievalIndex, rows: list[Row], known: UnfinishedIndex, size: int) -> list[Unknown]:
        """Embeds the rows without an embedding, and adds all to `index`; returns the texts with unknown words."""
        missing = [row for row in rows if row.embedding is None]
        embeddings, unknown = self._embed([row.query for row in missing], size, {})
        known.add(zip([row.key for row in missing], embeddings, strict=True))

        # as unit rows, like the known ones
        for row, unit in zip(missing, unit_rows(embeddings).to(DTYPES[index.dtype]), strict=True):
            row.embedding = unit  # (P,)
        if rows:
            together = torch.stack([row.embedding for row in rows])  # (rows, P)
            index.add_unit_rows(together, [row.item for row in rows], [row.key for row in rows])
        return unknown


__all__ = ["ImageTextRetrievalPipeline", "list_pictures"]

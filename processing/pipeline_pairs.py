"""The common base of the pipelines on images and texts: checks of the model, decoding, and pairs in any form.

    pipe("photo.png", text="a red apple")              # one answer
    pipe("photo.png", text=["a red apple", "a tree"])  # a list of answers: one image with each text
    pipe([picture, picture], text=["an apple", "a tree"])  # a list of answers: pairs
    pipe({"image": "photo.png", "text": "a red apple"})    # or a list of such dicts

An image is anything that `open_image` reads. The tasks are in the other `pipeline_*.py`.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice, repeat
from typing import Any, NamedTuple

import torch
from transformers import Pipeline

from .vl_captions import caption_reason
from .vl_sources import is_many, iterate, undecoded, warn_caller

BATCH_SIZE = 32

Pair = dict[str, Any]


class Unknown(NamedTuple):
    """A text of `total` tokens, `lost` of which are [UNK]: words that the vocabulary lacks."""

    text: str
    lost: int
    total: int


class VisionLanguagePipeline(Pipeline):
    """A pipeline with a processor, for models that have the methods of its task.

    Args (besides `transformers.Pipeline`'s):
        batch_size: rows per forward pass (32).
        allow_urls: whether an image may be an http(s) URL (False).

    Attributes:
        task_name: the task, for messages.
        model_methods: methods that the model must have.
        reads_heads: whether it needs weights other than the tower's.

    Raises:
        TypeError: the model lacks one of these methods.
        ValueError: a model object is given without a processor.
    """

    task_name: str
    model_methods: tuple[str, ...]
    reads_heads = True

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

        # the model must have the methods, and come with a processor
        if (method := self.lacks(self.model)) is not None:
            raise TypeError(f"{self.task_name} needs a model with {method}, got {type(self.model).__name__}")
        if self.processor is None:
            raise ValueError(f"{self.task_name} needs a processor; pass processor= with a model object")
        if self.device.type == "cpu" and kwargs.get("dtype", "auto") == "auto" and self.model.dtype == torch.float16:
            self.model.float()  # fp16 saves disk space; on a CPU, computing in it gains nothing and costs accuracy
        self.model.eval()

    @classmethod
    def lacks(cls, model: Any) -> str | None:
        """The first required method that a model, or a model class, lacks; None if it has all of them."""
        return next((method for method in cls.model_methods if not hasattr(model, method)), None)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves as transformers does, and also the processor, which transformers leaves out."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _read_batch_size(self, batch_size: int | None) -> int:
        # given in the call, else to the pipeline, else the default
        size = next((size for size in (batch_size, self._batch_size) if size is not None), BATCH_SIZE)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {size!r}")
        return size

    def read(self, picture: Any, allow_urls: bool = False, **options: Any) -> torch.Tensor:
        """Decodes an image and resizes it to its final size, for the processor: uint8 (3, h, w)."""
        return self.processor.image_processor.shrink(picture, allow_urls=allow_urls, **options)

    def read_all(self, pictures: list[Any], allow_urls: bool, num_workers: int, **options: Any) -> list[torch.Tensor]:
        """`read` for several images, in `num_workers` threads."""
        read = partial(self.read, allow_urls=allow_urls, **options)
        if num_workers < 1 or len(pictures) < 2:
            return [read(picture) for picture in pictures]
        with ThreadPoolExecutor(num_workers) as pool:
            return list(pool.map(read, pictures))

    def unknown_words(self, texts: list[str | None], inputs: Mapping[str, Any]) -> list[Unknown]:
        """The texts of a batch, given with its ids and mask (B, L), that have [UNK] tokens, or no tokens at all."""
        if "input_ids" not in inputs:
            return []
        ids, real = inputs["input_ids"], inputs["attention_mask"]
        real = real * (ids != self.processor.image_token_id)
        unknown = ((ids == self.processor.tokenizer.unk_token_id) & (real == 1)).sum(1).tolist()  # (B,)
        tokens = (real.sum(1) - 1).tolist()  # (B,), [CLS] not counted
        counts = zip(texts, unknown, tokens, strict=True)
        return [Unknown(text, lost, total) for text, lost, total in counts if text is not None and (lost or not total)]

    def tell_unknown(self, unknown: list[Unknown], asked: int) -> None:
        """Warns once about texts that the model cannot read, or only in part."""
        if not unknown:
            return
        blind = [one for one in unknown if one.lost == one.total]
        shown = (blind or unknown)[0]
        nothing = f"; of {len(blind)} it reads nothing else, and answers to these mean nothing" if blind else ""
        warn_caller(
            f"{len(unknown)} of {asked} texts hold words that the vocabulary lacks, which the model reads as "
            f"{self.processor.tokenizer.unk_token}, such as {shown.text!r:.80} ({shown.lost} of {shown.total} tokens)"
            f"{nothing}"
        )


class PairPipeline(VisionLanguagePipeline):
    """
    Answers pairs of an image and a text, batch by batch. A subclass implements `_forward` and `postprocess`, and
    declares its options in `_sanitize_parameters`.

    Attributes:
        text_name: key and argument name of the text.
    """

    text_name = "text"

    def preprocess(self, pairs: list[Pair], allow_urls: bool = False, num_workers: int = 0) -> dict[str, Any]:
        """n pairs → the processor's batch: ids (n, L) and pixel_values (n, 3, H, W)."""
        pictures = self.read_all([pair["image"] for pair in pairs], allow_urls, num_workers)
        texts = [pair[self.text_name] for pair in pairs]
        return dict(self.processor(images=pictures, text=texts, return_tensors="pt", padding=True).to(self.dtype))

    @abstractmethod
    def postprocess(self, model_outputs: Any, **options: Any) -> list[Any]:
        """The model's outputs for a batch → one answer per pair."""

    def answer(self, pairs: Iterable[Pair], batch_size: int | None, **options: Any) -> Iterator[Any]:
        """One answer per pair, in order, computed batch by batch."""
        size = self._read_batch_size(batch_size)
        by_call = self._sanitize_parameters(**options)

        # options of each stage: the pipeline's, overridden by this call's
        stages = (self._preprocess_params, self._forward_params, self._postprocess_params)
        before, during, after = ({**own, **new} for own, new in zip(stages, by_call, strict=True))

        # a pair is read only when its batch is
        pairs = iter(pairs)
        while some := list(islice(pairs, size)):
            batch = self.preprocess(some, **before)
            self.tell_unknown(self.unknown_words([pair[self.text_name] for pair in some], batch), len(some))
            yield from self.postprocess(self.forward(batch, **during), **after)

    def __call__(self, inputs: Any = None, *, image: Any = None, batch_size: int | None = None, **options: Any) -> Any:
        """One answer for a single pair, a list for several; the module docstring shows the forms of pairs.

        For an iterator of images or pairs, returns an iterator that reads one batch ahead.

        Raises:
            ValueError: no pair is given, a text is invalid, or the lists differ in length.
            ImageDecodeError: an image cannot be read.
        """
        pairs, single = gather_pairs(inputs, image, options.pop(self.text_name, None), self.text_name)
        answers = self.answer(pairs, batch_size, **options)
        if isinstance(inputs, Iterator):
            return answers
        found = list(answers)
        return found[0] if single else found


def gather_pairs(inputs: Any, image: Any, text: Any, text_name: str = "text") -> tuple[Iterable[Pair], bool]:
    """All call forms → {"image": image, text_name: str} for each pair, and whether there was a single one."""
    if inputs is not None and image is not None:
        raise ValueError("the picture was given twice; give it first or as image=, not both")
    source = inputs if image is None else image
    if source is None:
        keys = f'{{"image": ..., "{text_name}": ...}}'
        raise ValueError(f"nothing was asked: give a picture and {text_name}=, or {keys}")

    # one pair or several
    many, many_texts = is_many(source), is_many(text)
    if text is None:
        pairs = iterate(undecoded(source)) if many else [source]
        return (_read_pair(pair, text_name, place) for place, pair in enumerate(pairs)), not many

    # images and texts: equally many, or a single one for all of the others
    lengths = [len(value) for value in (source, text) if is_many(value) and isinstance(value, Sized)]
    if many and many_texts and len(set(lengths)) > 1:
        raise ValueError(f"got {lengths[0]} pictures and {lengths[1]} texts; expected as many, or one of either")
    sources = iterate(undecoded(source)) if many else repeat(source) if many_texts else [source]
    texts = iterate(text) if many_texts else repeat(text)
    rows = ({"image": one, text_name: words} for one, words in zip(sources, texts, strict=many and many_texts))
    return (_read_pair(row, text_name, place) for place, row in enumerate(rows)), not many and not many_texts


def _read_pair(pair: Any, text_name: str, place: int) -> Pair:
    """Checks the keys and the text of one pair. Raises `ValueError`."""
    # checked exactly: a misspelt key would look like a missing text
    if not isinstance(pair, Mapping) or set(pair) != {"image", text_name}:
        got = sorted(map(str, pair)) if isinstance(pair, Mapping) else type(pair).__name__
        raise ValueError(f'pair {place}: expected {text_name}= too, or the keys "image" and "{text_name}", got {got}')
    if (reason := caption_reason(pair[text_name])) is not None:
        raise ValueError(f"pair {place}: the {text_name} cannot be read: {reason}")
    return dict(pair)


def known_options(task: str, known: Mapping[str, Any], unknown: Mapping[str, Any]) -> dict[str, Any]:
    """The known options that are not None. Raises `TypeError` for unknown options."""
    if unknown:
        raise TypeError(f"{task} takes {', '.join((*known, 'batch_size'))}, got {sorted(unknown)}")
    return {name: value for name, value in known.items() if value is not None}


def checked_top_k(top_k: int | None) -> int | None:
    """Returns `top_k`. Raises `ValueError` unless it is a positive integer or None."""
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
        raise ValueError(f"top_k must be a positive integer, got {top_k!r}")
    return top_k


__all__ = ["PairPipeline", "VisionLanguagePipeline", "gather_pairs"]

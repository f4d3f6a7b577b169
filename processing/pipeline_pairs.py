"""What the pipelines on pictures and texts have in common: checks of the model, decoding, and pairs in any form.

    pipe("photo.png", text="a red apple")              # one answer
    pipe("photo.png", text=["a red apple", "a tree"])  # a list: one picture with each text
    pipe([picture, picture], text=["an apple", "a tree"])  # a list: pairs
    pipe({"image": "photo.png", "text": "a red apple"})    # or a list of such

A picture is anything `open_image` reads. This module defines no task; see its neighbours `pipeline_*.py`.
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
    """A text of `total` tokens of which `lost` stand for words that the vocabulary lacks."""

    text: str
    lost: int
    total: int


class VisionLanguagePipeline(Pipeline):
    """A pipeline that has the model's processor and methods.

    Args (besides `transformers.Pipeline`'s):
        batch_size: rows per forward pass (32).
        allow_urls: whether a picture may be an http(s) address (False).

    Attributes:
        task_name: the task, for messages.
        model_methods: what a model must have to serve it.
        reads_heads: whether it needs weights beside the tower's.

    Raises:
        TypeError: a model that lacks one of these methods.
        ValueError: a model object without a processor.
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

        # a model that serves the task, with its processor
        if (method := self.lacks(self.model)) is not None:
            raise TypeError(f"{self.task_name} needs a model with {method}, got {type(self.model).__name__}")
        if self.processor is None:
            raise ValueError(f"{self.task_name} needs a processor; pass processor= with a model object")
        if self.device.type == "cpu" and kwargs.get("dtype", "auto") == "auto" and self.model.dtype == torch.float16:
            self.model.float()  # half precision saves disk; computing in it gains nothing on a CPU and costs accuracy
        self.model.eval()

    @classmethod
    def lacks(cls, model: Any) -> str | None:
        """The first method that a model, or a class of models, would need beside its own; None where it serves."""
        return next((method for method in cls.model_methods if not hasattr(model, method)), None)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As transformers', and the processor, which it leaves out."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _read_batch_size(self, batch_size: int | None) -> int:
        # the call's, else the pipeline's, else ours
        size = next((size for size in (batch_size, self._batch_size) if size is not None), BATCH_SIZE)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {size!r}")
        return size

    def read(self, picture: Any, allow_urls: bool = False, **options: Any) -> torch.Tensor:
        """A picture as it goes into the processor, already of the size it will have: uint8 (3, h, w)."""
        return self.processor.image_processor.shrink(picture, allow_urls=allow_urls, **options)

    def read_all(self, pictures: list[Any], allow_urls: bool, num_workers: int, **options: Any) -> list[torch.Tensor]:
        """Likewise of several, by so many threads."""
        read = partial(self.read, allow_urls=allow_urls, **options)
        if num_workers < 1 or len(pictures) < 2:
            return [read(picture) for picture in pictures]
        with ThreadPoolExecutor(num_workers) as pool:
            return list(pool.map(read, pictures))

    def unknown_words(self, texts: list[str | None], inputs: Mapping[str, Any]) -> list[Unknown]:
        """Of a batch's texts, with their ids and mask (B, L): those that the vocabulary does not hold all of."""
        if "input_ids" not in inputs:
            return []
        ids, real = inputs["input_ids"], inputs["attention_mask"]
        real = real * (ids != self.processor.image_token_id)
        unknown = ((ids == self.processor.tokenizer.unk_token_id) & (real == 1)).sum(1).tolist()  # (B,)
        tokens = (real.sum(1) - 1).tolist()  # (B,), [CLS] not counted
        counts = zip(texts, unknown, tokens, strict=True)
        return [Unknown(text, lost, total) for text, lost, total in counts if text is not None and (lost or not total)]

    def tell_unknown(self, unknown: list[Unknown], asked: int) -> None:
        """Warns once of texts that the model cannot read, or not whole."""
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
    Answers pairs of a picture and a text, batch by batch. A subclass writes `_forward` and `postprocess`, and names
    its options in `_sanitize_parameters`.

    Attributes:
        text_name: what the text of a pair is called.
    """

    text_name = "text"

    def preprocess(self, pairs: list[Pair], allow_urls: bool = False, num_workers: int = 0) -> dict[str, Any]:
        """n pairs → the processor's batch, ids (n, L) and pixels (n, 3, H, W)."""
        pictures = self.read_all([pair["image"] for pair in pairs], allow_urls, num_workers)
        texts = [pair[self.text_name] for pair in pairs]
        return dict(self.processor(images=pictures, text=texts, return_tensors="pt", padding=True).to(self.dtype))

    @abstractmethod
    def postprocess(self, model_outputs: Any, **options: Any) -> list[Any]:
        """The model's outputs of a batch → one answer for each of its pairs."""

    def answer(self, pairs: Iterable[Pair], batch_size: int | None, **options: Any) -> Iterator[Any]:
        """One answer for each pair, in order, batch by batch."""
        size = self._read_batch_size(batch_size)
        by_call = self._sanitize_parameters(**options)

        # the options of each stage: those of the pipeline, and those of this call over them
        stages = (self._preprocess_params, self._forward_params, self._postprocess_params)
        before, during, after = ({**own, **new} for own, new in zip(stages, by_call, strict=True))

        # each is read when its batch is
        pairs = iter(pairs)
        while some := list(islice(pairs, size)):
            batch = self.preprocess(some, **before)
            self.tell_unknown(self.unknown_words([pair[self.text_name] for pair in some], batch), len(some))
            yield from self.postprocess(self.forward(batch, **during), **after)

    def __call__(self, inputs: Any = None, *, image: Any = None, batch_size: int | None = None, **options: Any) -> Any:
        """One answer for one pair, else a list of them; see the head of the module for what a pair can be.

        An iterator of pictures or pairs is answered by an iterator, a batch ahead of what was asked for.

        Raises:
            ValueError: nothing was asked, a text that is none, or lists that do not go together.
            ImageDecodeError: a picture cannot be read.
        """
        pairs, single = gather_pairs(inputs, image, options.pop(self.text_name, None), self.text_name)
        answers = self.answer(pairs, batch_size, **options)
        if isinstance(inputs, Iterator):
            return answers
        found = list(answers)
        return found[0] if single else found


def gather_pairs(inputs: Any, image: Any, text: Any, text_name: str = "text") -> tuple[Iterable[Pair], bool]:
    """All ways to ask → {"image": picture, text_name: str} for each pair, and whether it was a single one."""
    if inputs is not None and image is not None:
        raise ValueError("the picture was given twice; give it first or as image=, not both")
    source = inputs if image is None else image
    if source is None:
        keys = f'{{"image": ..., "{text_name}": ...}}'
        raise ValueError(f"nothing was asked: give a picture and {text_name}=, or {keys}")

    # pairs, one or several
    many, many_texts = is_many(source), is_many(text)
    if text is None:
        pairs = iterate(undecoded(source)) if many else [source]
        return (_read_pair(pair, text_name, place) for place, pair in enumerate(pairs)), not many

    # pictures with texts: as many of both, or one of either for all
    lengths = [len(value) for value in (source, text) if is_many(value) and isinstance(value, Sized)]
    if many and many_texts and len(set(lengths)) > 1:
        raise ValueError(f"got {lengths[0]} pictures and {lengths[1]} texts; expected as many, or one of either")
    sources = iterate(undecoded(source)) if many else repeat(source) if many_texts else [source]
    texts = iterate(text) if many_texts else repeat(text)
    rows = ({"image": one, text_name: words} for one, words in zip(sources, texts, strict=many and many_texts))
    return (_read_pair(row, text_name, place) for place, row in enumerate(rows)), not many and not many_texts


def _read_pair(pair: Any, text_name: str, place: int) -> Pair:
    """One pair, its text checked. Raises `ValueError`."""
    # a misspelt key would else be a text that is missing
    if not isinstance(pair, Mapping) or set(pair) != {"image", text_name}:
        got = sorted(map(str, pair)) if isinstance(pair, Mapping) else type(pair).__name__
        raise ValueError(f'pair {place}: expected {text_name}= too, or the keys "image" and "{text_name}", got {got}')
    if (reason := caption_reason(pair[text_name])) is not None:
        raise ValueError(f"pair {place}: the {text_name} cannot be read: {reason}")
    return dict(pair)


def known_options(task: str, known: Mapping[str, Any], unknown: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, those that are None left out. Raises `TypeError` for one that is unknown."""
    if unknown:
        raise TypeError(f"{task} takes {', '.join((*known, 'batch_size'))}, got {sorted(unknown)}")
    return {name: value for name, value in known.items() if value is not None}


def checked_top_k(top_k: int | None) -> int | None:
    """Raises `ValueError` for what is no number of answers."""
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
        raise ValueError(f"top_k must be a positive integer, got {top_k!r}")
    return top_k


__all__ = ["PairPipeline", "VisionLanguagePipeline", "gather_pairs"]

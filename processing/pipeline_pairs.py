"""What the pipelines on pictures and texts have in common: checks of the model, decoding, and pairs in any form.

    pipe("photo.png", text="a red apple")              # one answer
    pipe("photo.png", text=["a red apple", "a tree"])  # a list: one picture with each text
    pipe([picture, picture], text=["an apple", "a tree"])  # a list: pairs
    pipe({"image": "photo.png", "text": "a red apple"})    # or a list of such

A picture is anything `open_image` reads. This module defines no task; see its neighbours `pipeline_*.py`.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from transformers import Pipeline

from .image_processing_vl import MAX_PIXELS, open_image
from .vl_captions import caption_reason

BATCH_SIZE = 32

Pair = dict[str, Any]


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
        for method in self.model_methods:
            if not hasattr(self.model, method):
                raise TypeError(f"{self.task_name} needs a model with {method}, got {type(self.model).__name__}")
        if self.processor is None:
            raise ValueError(f"{self.task_name} needs a processor; pass processor= with a model object")
        if self.device.type == "cpu" and kwargs.get("dtype", "auto") == "auto" and self.model.dtype == torch.float16:
            self.model.float()  # half precision saves disk; computing in it gains nothing on a CPU and costs accuracy
        self.model.eval()

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

    def _open(self, picture: Any, allow_urls: bool) -> Image.Image:
        max_pixels = getattr(self.processor.image_processor, "max_pixels", MAX_PIXELS)
        return open_image(picture, max_pixels=max_pixels, allow_urls=allow_urls)


class PairPipeline(VisionLanguagePipeline):
    """
    Answers pairs of a picture and a text, batch by batch. A subclass writes `_forward` and `postprocess`, and names
    its options in `_sanitize_parameters`.

    Attributes:
        text_name: what the text of a pair is called.
    """

    text_name = "text"

    def preprocess(self, pairs: list[Pair], allow_urls: bool = False) -> dict[str, Any]:
        """n pairs → the processor's batch, ids (n, L) and pixels (n, 3, H, W)."""
        pictures = [self._open(pair["image"], allow_urls) for pair in pairs]
        texts = [pair[self.text_name] for pair in pairs]
        return dict(self.processor(images=pictures, text=texts, return_tensors="pt", padding=True).to(self.dtype))

    @abstractmethod
    def postprocess(self, model_outputs: Any, **options: Any) -> list[Any]:
        """The model's outputs of a batch → one answer for each of its pairs."""

    def answer(self, pairs: list[Pair], batch_size: int | None, **options: Any) -> list[Any]:
        """One answer for each pair, in order."""
        size = self._read_batch_size(batch_size)
        by_call = self._sanitize_parameters(**options)

        # the options of each stage: those of the pipeline, and those of this call over them
        stages = (self._preprocess_params, self._forward_params, self._postprocess_params)
        before, during, after = ({**own, **new} for own, new in zip(stages, by_call, strict=True))

        # batch by batch
        answers = []
        for start in range(0, len(pairs), size):
            batch = self.preprocess(pairs[start : start + size], **before)
            answers += self.postprocess(self.forward(batch, **during), **after)
        return answers

    def __call__(self, inputs: Any = None, *, image: Any = None, batch_size: int | None = None, **options: Any) -> Any:
        """One answer for one pair, else a list of them; see the head of the module for what a pair can be.

        Raises:
            ValueError: nothing was asked, a text that is none, or lists that do not go together.
            ImageDecodeError: a picture cannot be read.
        """
        pairs, single = gather_pairs(inputs, image, options.pop(self.text_name, None), self.text_name)
        answers = self.answer(pairs, batch_size, **options)
        return answers[0] if single else answers


def gather_pairs(inputs: Any, image: Any, text: Any, text_name: str = "text") -> tuple[list[Pair], bool]:
    """All ways to ask → [{"image": picture, text_name: str}], and whether it was a single pair."""
    if inputs is not None and image is not None:
        raise ValueError("the picture was given twice; give it first or as image=, not both")
    source = inputs if image is None else image
    if source is None:
        keys = f'{{"image": ..., "{text_name}": ...}}'
        raise ValueError(f"nothing was asked: give a picture and {text_name}=, or {keys}")

    # one picture or several
    many = isinstance(source, (list, tuple, Iterator))
    sources = list(source) if many else [source]
    if text is None:
        return [_read_pair(pair, text_name, place) for place, pair in enumerate(sources)], not many

    # with one text or several: lists of one length, or one of either for all
    texts = list(text) if isinstance(text, (list, tuple)) else [text]
    single = not many and not isinstance(text, (list, tuple))
    if many and isinstance(text, (list, tuple)) and len(sources) != len(texts):
        raise ValueError(f"got {len(sources)} pictures and {len(texts)} texts; expected as many, or one of either")
    count = max(len(sources), len(texts)) if sources and texts else 0
    sources = sources if many else sources * count
    texts = texts if isinstance(text, (list, tuple)) else texts * count
    rows = [{"image": one, text_name: words} for one, words in zip(sources, texts, strict=True)]
    return [_read_pair(row, text_name, place) for place, row in enumerate(rows)], single


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

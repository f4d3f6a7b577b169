"""Turns texts, images or both into a batch: as one sequence ``[CLS] [IMG]*N w1 ... wT [PAD]*``, or separately.

Shapes: B examples, H x W pixels, P patch size, N = (H / P) * (W / P) patches row-major, T tokens of a text,
L = 1 + N + T positions in the joint layout, else L = 1 + T. In the joint layout ``input_ids``, ``attention_mask`` and
the model's ``last_hidden_state`` have the same L positions; the model replaces the placeholders by patch embeddings.
Source: OneR, section "One Representation": text and patches "into one sequence", one [CLS], no separator.
"""

from pathlib import Path
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack

from .vl_sources import is_many, iterate

_IMAGE_TOKENS = ("[IMG]", "[unused0]")  # of our own vocabularies; of bert-base-uncased's
_TEXT_OPTIONS = frozenset(
    ("padding", "truncation", "max_length", "return_tensors", "is_split_into_words", "pad_to_multiple_of")
    + ("split_special_tokens", "return_attention_mask", "return_token_type_ids", "add_special_tokens", "verbose")
)
# option groups that only transformers reads, or that are ignored: generic callers pass all groups to every model
_OTHER_GROUPS = frozenset(("common_kwargs", "audio_kwargs", "videos_kwargs"))


class OneRTextKwargs(TextKwargs, total=False):
    """
    split_special_tokens: whether to read special tokens spelled out in a text as plain characters (default True).
    """

    split_special_tokens: bool | None


class VisionLanguageProcessorKwargs(ProcessingKwargs, total=False):
    """The options of ``VisionLanguageProcessor.__call__``."""

    text_kwargs: OneRTextKwargs
    _defaults = {}  # required by transformers 5.20, the newest for Python 3.10


class VisionLanguageProcessor(ProcessorMixin):
    """Combines ``VisionLanguageImageProcessor`` and a WordPiece tokenizer.

    Args:
        image_processor: computes ``pixel_values``; has a ``patch_size``.
        tokenizer: has [PAD], [CLS], [UNK] and the image token.
        image_token: the placeholder; by default the tokenizer's own ``image_token``, else ``[IMG]`` or ``[unused0]``.
        max_text_length: maximum number of tokens of a text, without [CLS].
        joint_layout: whether the ids contain a placeholder for each patch of an image, as models with one
            tower read pairs. False: ids are of the text only, as models with two towers read them. The
            configuration's ``pair_layout`` determines it.

    Raises:
        ValueError: the tokenizer lacks a needed token, or ``max_text_length`` is not positive.
    """

    valid_processor_kwargs = VisionLanguageProcessorKwargs
    text_kwargs = {"padding": True, "truncation": True, "return_tensors": "pt"}

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_token: str | None = None,
        max_text_length: int = 64,
        joint_layout: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

        # what determines the length and content of a sequence
        if getattr(image_processor, "patch_size", None) is None:
            raise ValueError(f"{type(image_processor).__name__} has no patch_size: cannot count placeholders")
        if not isinstance(max_text_length, int) or max_text_length < 1:
            raise ValueError(f"max_text_length must be a positive int, got {max_text_length!r}")
        self.max_text_length, self.joint_layout = max_text_length, joint_layout
        self.image_token = image_token or _find_image_token(tokenizer)
        self.image_token_id = _token_id(tokenizer, self.image_token, "image_token")
        for name in ("pad_token", "cls_token", "unk_token"):
            _token_id(tokenizer, getattr(tokenizer, name, None), name)

    def __call__(
        self, images: Any = None, text: Any = None, **kwargs: Unpack[VisionLanguageProcessorKwargs]
    ) -> BatchFeature:
        """Makes a batch of texts, of images, or of pairs.

        Args:
            images: one source or a list of them, anything ``open_image`` reads; or a batch (B, C, H, W).
            text: a str or a list of str, or a dataset column of them; with ``is_split_into_words=True`` a list of
                words or a list of such lists.
            return_tensors: "pt" (default), "np", or None for lists.
            padding: True or "longest" (default), "max_length" (texts to max_length), or False.
            truncation: whether to truncate texts to ``max_length`` (default True); placeholders are never cut.
            max_length: maximum number of tokens, without [CLS] and placeholders; default ``max_text_length``.
            pad_to_multiple_of: rounds L up.
            split_special_tokens: if True (default), "[IMG]" or "[MASK]" in a text are plain characters.
                If False, a text may contain [MASK]; the image token, [CLS] and [PAD] remain plain characters.
            size, do_center_crop, resample, device, ...: options of the image processor.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, L) int64, and with images ``pixel_values`` (B, 3, H, W) float.
            Without ``joint_layout``, images alone have no ids. If the numbers of texts and images differ, a retrieval
            model scores all against all; the ids are then of the texts only, in either layout.

        Raises:
            ValueError: neither is given, a text is not a str, or a list is empty.
            TypeError: an unknown option.
            ImageDecodeError: see ``open_image``.
        """
        # check the inputs and the options
        if images is None and text is None:
            raise ValueError(f"{type(self).__name__} got neither images nor text: pass at least one of them")
        self._check_options(kwargs)

        # texts as token ids, without padding
        merged = self._merge_kwargs(VisionLanguageProcessorKwargs, **kwargs)
        options = {**self.text_kwargs, **merged["text_kwargs"]}
        image_options = merged["images_kwargs"]
        tokens = None if text is None else self._tokenize(text, options)
        data: dict[str, Any] = {}
        n_patches = 0

        # images as pixels, and in the joint layout one placeholder per patch
        if images is not None:
            pixel_values = self.image_processor(images, **{**image_options, "return_tensors": "pt"})["pixel_values"]
            data["pixel_values"] = pixel_values  # (B, 3, H, W)
        if images is not None and self.joint_layout:
            # equal numbers are pairs; otherwise all texts are scored with all images, as in CLIP, in separate inputs
            pairs = tokens is None or len(tokens) == len(pixel_values)
            tokens = [[] for _ in pixel_values] if tokens is None else tokens
            n_patches = self.num_image_tokens(*pixel_values.shape[-2:]) if pairs else 0

        # texts, or both in one sequence
        sequences = {} if tokens is None else self._lay_out(tokens, n_patches, options)  # (B, L) each
        return BatchFeature({**sequences, **data}, tensor_type=options.get("return_tensors"))

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> list[str]:
        """Saves as transformers does, but without padding and truncation settings left in the tokenizer by calls."""
        # the digests of a published directory would not match the new files
        (Path(save_directory) / "digests.json").unlink(missing_ok=True)
        # settings of an earlier call would stay in tokenizer.json, and other programs would apply them
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        return super().save_pretrained(save_directory, *args, **kwargs)

    def num_image_tokens(self, height: int, width: int) -> int:
        """N, the number of placeholders for an image of ``height`` x ``width`` pixels."""
        patch_size = self.image_processor.patch_size
        return (height // patch_size) * (width // patch_size)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def _check_options(self, kwargs: dict[str, Any]) -> None:
        """Raises for unknown options: transformers would warn once and use the defaults."""
        # options of the text or the image, passed flat or in their group
        image_options = set(self.image_processor.valid_kwargs.__annotations__)
        groups = {"text_kwargs": _TEXT_OPTIONS, "images_kwargs": image_options}
        flat = set(kwargs) - set(groups) - _OTHER_GROUPS
        unknown = flat - _TEXT_OPTIONS - image_options
        for group, known in groups.items():
            unknown |= set(kwargs.get(group) or {}) - known
        if unknown:
            raise TypeError(
                f"{type(self).__name__} does not know {sorted(unknown)}; text options: {sorted(_TEXT_OPTIONS)}, "
                f"image options: {sorted(image_options)}"
            )

        # fixed options may be passed, but not changed
        for name, fixed in (
            ("return_token_type_ids", False),
            ("add_special_tokens", True),
            ("return_attention_mask", True),
        ):
            value = kwargs.get(name, (kwargs.get("text_kwargs") or {}).get(name))
            if value is not None and value != fixed:
                raise ValueError(f"{name}={value} is not possible: a sequence is always [CLS], placeholders, words")

    def _tokenize(self, text: Any, options: dict[str, Any]) -> list[list[int]]:
        """Texts to token ids, truncated, without [CLS]."""
        split = bool(options.get("is_split_into_words"))

        # a batch of texts, or of lists of words
        texts = _as_texts(text, split)
        strict = options.get("split_special_tokens")
        strict = True if strict is None else bool(strict)
        # truncated here and not in the tokenizer, which would keep the setting and save it
        rows = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=strict,
            is_split_into_words=split,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        if options.get("truncation") not in (None, False, "do_not_truncate"):
            limit = self._limit(options)
            rows = [row[:limit] for row in rows]
        # second safeguard: another tokenizer may have a special token as an ordinary entry of its vocabulary
        tokenizer = self.tokenizer
        closed = {self.image_token_id, tokenizer.pad_token_id, tokenizer.cls_token_id}
        closed |= {tokenizer.mask_token_id} if strict else set()
        unknown = tokenizer.unk_token_id
        return [row if closed.isdisjoint(row) else [unknown if i in closed else i for i in row] for row in rows]

    def _limit(self, options: dict[str, Any]) -> int:
        limit = options.get("max_length")
        limit = self.max_text_length if limit is None else limit
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f"max_length must be a positive number of words, got {limit!r}")
        return limit

    def _lay_out(self, tokens: list[list[int]], n_patches: int, options: dict[str, Any]) -> dict[str, Any]:
        """Token ids to ``[CLS] [IMG]*N w1 ... wT [PAD]*`` and its mask, (B, L); lists if not padded."""
        prefix = [self.tokenizer.cls_token_id] + [self.image_token_id] * n_patches
        padding = options.get("padding")

        # without padding: lists, which form a tensor only if all rows have one length
        if padding in (None, False, "do_not_pad"):
            ids = [prefix + row for row in tokens]
            lengths = sorted({len(row) for row in ids})
            if options.get("return_tensors") is not None and len(lengths) > 1:
                raise ValueError(
                    f"padding=False, but the sequences differ in length {lengths}: no tensor can hold them"
                )
            return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}

        # the length of the longest row, or the requested one, rounded up
        length = len(prefix) + max(map(len, tokens))
        if padding == "max_length":
            length = max(length, len(prefix) + self._limit(options))
        elif padding not in (True, "longest"):
            raise ValueError(f"padding must be True, 'longest', 'max_length' or False, got {padding!r}")
        multiple = options.get("pad_to_multiple_of") or 1
        length = -(-length // multiple) * multiple

        # fill with padding, then write the prefix, then each row's tokens
        input_ids = torch.full((len(tokens), length), self.tokenizer.pad_token_id, dtype=torch.long)  # (B, L)
        attention_mask = torch.zeros_like(input_ids)  # (B, L)
        input_ids[:, : len(prefix)] = torch.tensor(prefix)
        for index, row in enumerate(tokens):
            end = len(prefix) + len(row)
            input_ids[index, len(prefix) : end] = torch.tensor(row, dtype=torch.long)
            attention_mask[index, :end] = 1
        if options.get("return_tensors") is None:
            return {"input_ids": input_ids.tolist(), "attention_mask": attention_mask.tolist()}
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def _find_image_token(tokenizer: Any) -> str:
    own = getattr(tokenizer, "image_token", None)
    if own is not None:
        return own
    vocab = tokenizer.get_vocab()
    for token in _IMAGE_TOKENS:
        if token in vocab:
            return token
    raise ValueError(f"the tokenizer has no image token: its vocabulary lacks {' and '.join(_IMAGE_TOKENS)}")


def _token_id(tokenizer: Any, token: str | None, name: str) -> int:
    vocab = tokenizer.get_vocab()
    if token is None or token not in vocab:
        raise ValueError(f"the tokenizer's vocabulary of {len(vocab)} lacks {name}={token!r}")
    return vocab[token]


def _as_texts(text: Any, split: bool) -> list[Any]:
    """Checks the nesting and returns a batch: a list of str, or of lists of str if ``split``."""
    if is_many(text):  # also a dataset column
        text = list(iterate(text))
    # one text becomes a batch of one
    if split and isinstance(text, list | tuple) and text and all(isinstance(word, str) for word in text):
        text = [text]
    elif not split and isinstance(text, str):
        text = [text]
    if not isinstance(text, list | tuple) or not text:
        got = "an empty list" if isinstance(text, list | tuple) else type(text).__name__
        raise ValueError(f"text must be a str or a list of str (of words if is_split_into_words), got {got}")
    for index, item in enumerate(text):
        if split:
            good = isinstance(item, list | tuple) and all(isinstance(word, str) for word in item)
        else:
            good = isinstance(item, str)
        if not good:
            hint = "a list of words" if split else "a str (lists of words need is_split_into_words=True)"
            raise ValueError(f"text {index} is {item!r:.60} of type {type(item).__name__}, expected {hint}")
        try:
            "".join(item).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"text {index} is {item!r:.60}, which holds a lone surrogate; expected Unicode") from None
    return [list(item) if split else item for item in text]


__all__ = ["VisionLanguageProcessor"]

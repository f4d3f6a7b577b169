"""WordPiece tokenizers for one-sequence models: trained from captions, or made from any BERT vocabulary.

Both end the same way: ``[CLS] $A`` without [SEP] (one tower reads one sequence, nothing needs separating), no
``token_type_ids``, and an image token, the placeholder that the processor repeats once per patch.

Called directly, the tokenizer reads "[MASK]" or "[IMG]" spelled out in a text as the special token (fill-mask needs
it); with ``split_special_tokens=True``, as ``VisionLanguageProcessor`` calls it, they are letters and brackets.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, IMAGE, UNK, CLS, MASK = "[PAD]", "[IMG]", "[UNK]", "[CLS]", "[MASK]"
SPECIAL_TOKENS = (PAD, IMAGE, UNK, CLS, MASK)  # ids 0..4 of a trained vocabulary
BERT_IMAGE_TOKEN = "[unused0]"  # id 1 of bert-base-uncased: a row of the embedding table that no text ever uses


def train_tokenizer(
    captions: Iterable[str],
    vocab_size: int = 8192,
    min_frequency: int = 2,
    limit_alphabet: int = 1000,
    lower_case: bool = True,
    max_text_length: int = 64,
    strip_accents: bool | None = None,
) -> PreTrainedTokenizerFast:
    """Trains WordPiece on ``captions``. The same captions, in any order, give the same vocabulary.

    Args:
        captions: read once.
        vocab_size: upper bound on the number of tokens, specials included.
        min_frequency: a merge must occur this often.
        limit_alphabet: keep only so many of the commonest characters; words with others become [UNK].
        lower_case: fold case and strip accents, as in bert-base-uncased.
        max_text_length: tokens a text may have, without [CLS].
        strip_accents: whether to, if not as `lower_case` says. Vowels of Hindi and Thai, the voicing of Japanese and
            German umlauts are accents to it.

    Raises:
        ValueError: no words in ``captions``, an entry is not a str, or ``vocab_size`` leaves no room.
    """
    # words and how often each occurs; the order of the captions is gone
    room = vocab_size - len(SPECIAL_TOKENS)
    if room < 2:
        raise ValueError(f"vocab_size must be at least {len(SPECIAL_TOKENS) + 2}, got {vocab_size}")
    words = _count_words(captions, _backend({UNK: 0}, lower_case, strip_accents))
    if not words:
        raise ValueError("captions hold no words: cannot train a tokenizer")

    # the alphabet: the commonest characters
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    # Every character may take two entries, alone and as a continuation; ties are broken by code point.
    ranked = sorted(characters, key=lambda character: (-characters[character], character))
    alphabet = sorted(ranked[: max(1, min(limit_alphabet, room // 2))])
    vocab = _train_vocab(words, alphabet, vocab_size, min_frequency)
    return _wrap(_backend(vocab, lower_case, strip_accents), IMAGE, max_text_length)


def tokenizer_from_vocab(
    source: str | os.PathLike,
    image_token: str | None = None,
    lower_case: bool | None = None,
    max_text_length: int = 64,
) -> PreTrainedTokenizerFast:
    """Makes the tokenizer from an existing BERT vocabulary: ids are kept, ``[CLS] $A`` replaces ``[CLS] $A [SEP]``.

    Args:
        source: a ``vocab.txt`` (one token a line), or the folder of a saved tokenizer (``tokenizer.json`` or
            ``vocab.txt``).
        image_token: the placeholder's token; by default ``[IMG]`` if the vocabulary has it, else ``[unused0]``.
        lower_case: for ``vocab.txt``; by default what ``tokenizer_config.json`` beside it says, else True.
            A ``tokenizer.json`` brings its own normaliser, which is kept.
        max_text_length: tokens a text may have, without [CLS].

    Raises:
        FileNotFoundError: no vocabulary at ``source``.
        ValueError: the vocabulary lacks a needed token, which is named, or holds one twice.
    """
    path = Path(source)

    # a file, or the folder of a saved tokenizer
    if path.is_dir():
        folder = path
        path = next((folder / name for name in ("tokenizer.json", "vocab.txt") if (folder / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no tokenizer.json or vocab.txt in {str(folder)!r}")
    elif not path.is_file():
        raise FileNotFoundError(f"no vocabulary at {str(path)!r}: expected a vocab.txt or a saved tokenizer's folder")

    # a saved tokenizer as it is, but for lengths, which are the processor's business
    if path.suffix == ".json":
        backend = Tokenizer.from_file(str(path))
        backend.no_padding()
        backend.no_truncation()
    else:
        vocab = _read_vocab(path)
        if UNK not in vocab:
            raise ValueError(f"vocabulary {str(path)!r} lacks {UNK!r}")
        backend = _backend(vocab, _lower_case_beside(path) if lower_case is None else lower_case)

    # the placeholder, and every other token that is needed
    if image_token is None:
        image_token = IMAGE if backend.token_to_id(IMAGE) is not None else BERT_IMAGE_TOKEN
    missing = [token for token in (PAD, UNK, CLS, MASK, image_token) if backend.token_to_id(token) is None]
    if missing:
        raise ValueError(f"vocabulary {str(path)!r} lacks {', '.join(map(repr, missing))}")
    return _wrap(backend, image_token, max_text_length)


def _read_vocab(path: Path) -> dict[str, int]:
    vocab: dict[str, int] = {}
    # Only "\n" ends a token: BERT vocabularies hold characters that str.splitlines would also break at.
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for index, line in enumerate(lines):
        token = line.rstrip("\r")
        if token in vocab:
            raise ValueError(
                f"vocabulary {str(path)!r} holds {token!r} twice, in lines {vocab[token] + 1}, {index + 1}"
            )
        vocab[token] = index
    return vocab


def _lower_case_beside(path: Path) -> bool:
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return True
    return bool(json.loads(config.read_text(encoding="utf-8")).get("do_lower_case", True))


def _backend(vocab: dict[str, int], lower_case: bool, strip_accents: bool | None = None) -> Tokenizer:
    """BERT's normaliser, pre-tokenizer and model around ``vocab``."""
    backend = Tokenizer(models.WordPiece(vocab, unk_token=UNK, max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower_case, strip_accents=strip_accents)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _count_words(captions: Iterable[str], backend: Tokenizer) -> Counter[str]:
    words: Counter[str] = Counter()
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"caption {index} is a {type(caption).__name__}, expected str")
        normalised = backend.normalizer.normalize_str(caption)
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalised))
    return words


def _train_vocab(words: Counter[str], alphabet: list[str], vocab_size: int, min_frequency: int) -> dict[str, int]:
    """The vocabulary, token to id.

    tokenizers' trainer numbers continuation characters in the order of a hash map and breaks ties between merges by
    these numbers, so its vocabulary differs from run to run. Declaring every character beforehand fixes the numbers.
    """
    # a word with a character outside the alphabet becomes [UNK] as a whole
    known = set(alphabet)
    usable = sorted(word for word in words if known.issuperset(word))
    inside = {character for word in usable for character in word[1:]}
    starts = {word[0] for word in usable}
    declared = [*SPECIAL_TOKENS, *sorted(starts), *(f"##{character}" for character in sorted(inside))]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=declared,
        continuing_subword_prefix="##",
    )
    learner = Tokenizer(models.WordPiece(unk_token=UNK))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator((" ".join([word] * words[word]) for word in usable), trainer)
    return learner.get_vocab()


def _wrap(backend: Tokenizer, image_token: str, max_text_length: int) -> PreTrainedTokenizerFast:
    # declared to the backend, so that they are never cut
    specials = list(dict.fromkeys((PAD, image_token, UNK, CLS, MASK)))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A", pair=f"{CLS} $A $B", special_tokens=[(CLS, backend.token_to_id(CLS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNK,
        cls_token=CLS,
        mask_token=MASK,
        extra_special_tokens={"image_token": image_token},
        model_max_length=max_text_length + 1,  # and [CLS]
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


__all__ = ["BERT_IMAGE_TOKEN", "SPECIAL_TOKENS", "tokenizer_from_vocab", "train_tokenizer"]

"""WordPiece tokenizers for one-sequence models: trained on captions, or made from any BERT vocabulary.

Both use the template ``[CLS] $A`` without [SEP] (a tower reads one sequence, so nothing needs separating), no
``token_type_ids``, and an image token, the placeholder that the processor repeats once per patch.

Called directly, the tokenizer parses "[MASK]" or "[IMG]" in a text as the special token (fill-mask needs this); with
``split_special_tokens=True``, as ``VisionLanguageProcessor`` calls it, they are plain text.

Marks. bert-base-uncased drops every nonspacing mark: the voicing of kana (ガラス, glass, becomes カラス, crow), the
vowels of Indic scripts and the tones of Thai. A trained tokenizer drops only those of Latin, Greek and Cyrillic
letters (é = e, й = и), or none if captions are partly Vietnamese, whose tones are such marks. The choice is stored in
``tokenizer.json``.

Words. Scripts without spaces between words are split where the script changes, and before the vowels that Thai and
Lao write ahead of their syllable; Han is split into characters. A word of more than 100 letters is split into pieces
of 100 instead of becoming [UNK].
"""

import json
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

PAD, IMAGE, UNK, CLS, MASK = "[PAD]", "[IMG]", "[UNK]", "[CLS]", "[MASK]"
SPECIAL_TOKENS = (PAD, IMAGE, UNK, CLS, MASK)  # ids 0..4 of a trained vocabulary
BERT_IMAGE_TOKEN = "[unused0]"  # id 1 of bert-base-uncased: an embedding that no text ever uses
LONGEST_WORD = 100  # letters; WordPiece is quadratic in a word's length, and BERT maps longer words to [UNK]
ALPHABET = 1000  # default number of characters to keep
COVERAGE = 0.999  # share of the captions' characters to cover by keeping more, if the vocabulary has room

# combining marks of Latin, Greek and Cyrillic letters, of symbols, and variation selectors; not those of other scripts
_MARKS = (
    r"[\x{300}-\x{36f}\x{483}-\x{487}\x{1ab0}-\x{1aff}\x{1dc0}-\x{1dff}\x{20d0}-\x{20f0}\x{fe00}-\x{fe0f}"
    r"\x{fe20}-\x{fe2f}\x{e0100}-\x{e01ef}]"
)
# Thai and Lao write these vowels before the consonant that they follow in speech, so a syllable begins here
_AHEAD = r"\x{e40}-\x{e44}\x{ec0}-\x{ec4}"
_UNSPACED = (
    rf"[\p{{Katakana}}\x{{30fc}}]{{1,{LONGEST_WORD}}}|\p{{Hiragana}}{{1,{LONGEST_WORD}}}"
    rf"|[{_AHEAD}]?[\p{{Thai}}\p{{Lao}}&&[^{_AHEAD}]]{{1,{LONGEST_WORD - 1}}}"
    rf"|[\p{{Khmer}}\p{{Myanmar}}\p{{Javanese}}\p{{Balinese}}]{{1,{LONGEST_WORD}}}"
)
# letters with a horn, a hook above or a dot below, and d with a stroke: rare outside Vietnamese
_VIETNAMESE = re.compile("[\u0323\u0309\u031b\u0111\u0110]")
_VIETNAMESE_SHARE = 0.02  # share of words with such letters; about a half in Vietnamese


class _Reading(NamedTuple):
    """How a text is split into words: as BERT does for its vocabularies, else as the module docstring describes."""

    lower_case: bool = True
    strip_accents: bool = True
    split_han: bool = True
    of_bert: bool = False


def train_tokenizer(
    captions: Iterable[str],
    vocab_size: int = 8192,
    min_frequency: int = 2,
    limit_alphabet: int | None = None,
    lower_case: bool = True,
    max_text_length: int = 64,
    strip_accents: bool | None = None,
) -> PreTrainedTokenizerFast:
    """Trains WordPiece on ``captions``. The same captions, in any order, give the same vocabulary.

    Words of more than 100 letters (addresses, base64) are ignored in training. A warning gives the number of words of
    the captions that become [UNK].

    Args:
        captions: iterated once.
        vocab_size: maximum number of tokens, including special tokens.
        min_frequency: minimum frequency of a merge.
        limit_alphabet: number of most frequent characters to keep; words with others become [UNK]. By default 1,000,
            and as many more as are needed to cover 99.9 % of the text, if the vocabulary has room: Chinese needs
            3,000 and more.
        lower_case: whether to lower-case.
        max_text_length: maximum text length in tokens, without [CLS].
        strip_accents: whether to drop the marks of Latin, Greek and Cyrillic letters; other scripts keep theirs. None
            drops them if ``lower_case`` is true and the captions are not Vietnamese (fewer than 2 % of words have
            Vietnamese letters). Pass False if marks distinguish words (Yoruba, pinyin, año and ano).

    Raises:
        ValueError: ``captions`` have no words, an entry is not a str, or ``vocab_size`` is too small.
    """
    # word counts, which do not depend on the order of the captions
    room = vocab_size - len(SPECIAL_TOKENS)
    if room < 2:
        raise ValueError(f"vocab_size must be at least {len(SPECIAL_TOKENS) + 2}, got {vocab_size}")
    raw = _count_words(captions, _normalizer(_Reading(lower_case=False, strip_accents=False)))
    if strip_accents is None:
        strip_accents = lower_case and not _is_vietnamese(raw)
    reading = _Reading(lower_case, strip_accents)
    words = _folded(raw, _normalizer(reading))
    if not words:
        raise ValueError("captions hold no words of at most 100 letters: cannot train a tokenizer")

    # the alphabet, and the words that it can spell
    known = set(_alphabet(words, room, limit_alphabet))
    usable = {word: count for word, count in words.items() if known.issuperset(word)}
    if len(usable) < len(words):
        lost, of = sum(words.values()) - sum(usable.values()), sum(words.values())
        warnings.warn(
            f"{lost} of {of} words of the captions ({lost / of:.2%}) will be {UNK}: they have characters beyond the "
            f"commonest {len(known)}; vocab_size ({vocab_size}) or limit_alphabet ({limit_alphabet}) can be raised",
            stacklevel=2,
        )
    return _wrap(_backend(_train_vocab(usable, vocab_size, min_frequency), reading), IMAGE, max_text_length)


def tokenizer_from_vocab(
    source: str | os.PathLike,
    image_token: str | None = None,
    lower_case: bool | None = None,
    max_text_length: int = 64,
    strip_accents: bool | None = None,
) -> PreTrainedTokenizerFast:
    """Makes the tokenizer from an existing BERT vocabulary: ids are kept, ``[CLS] $A`` replaces ``[CLS] $A [SEP]``.

    Args:
        source: a ``vocab.txt`` (one token per line), or the folder of a saved tokenizer (``tokenizer.json`` or
            ``vocab.txt``).
        image_token: the placeholder token; by default ``[IMG]`` if the vocabulary has it, else ``[unused0]``.
        lower_case: for ``vocab.txt``; defaults to the value in ``tokenizer_config.json`` beside it, else True.
            The normaliser of a ``tokenizer.json`` is kept.
        max_text_length: maximum text length in tokens, without [CLS].
        strip_accents: for ``vocab.txt``, with the same default, else ``lower_case``; BERT's rule drops the marks of
            every script, as when the vocabulary was made.

    Raises:
        FileNotFoundError: there is no vocabulary at ``source``.
        ValueError: the vocabulary lacks a required token, which is named, or holds a token twice.
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

    # a saved tokenizer, without padding and truncation, which the processor controls
    if path.suffix == ".json":
        backend = Tokenizer.from_file(str(path))
        backend.no_padding()
        backend.no_truncation()
    else:
        vocab = _read_vocab(path)
        if UNK not in vocab:
            raise ValueError(f"vocabulary {str(path)!r} lacks {UNK!r}")
        backend = _backend(vocab, _reading_beside(path, lower_case, strip_accents))

    # the placeholder and the other required tokens
    if image_token is None:
        image_token = IMAGE if backend.token_to_id(IMAGE) is not None else BERT_IMAGE_TOKEN
    missing = [token for token in (PAD, UNK, CLS, MASK, image_token) if backend.token_to_id(token) is None]
    if missing:
        raise ValueError(f"vocabulary {str(path)!r} lacks {', '.join(map(repr, missing))}")
    return _wrap(backend, image_token, max_text_length)


def _read_vocab(path: Path) -> dict[str, int]:
    vocab: dict[str, int] = {}
    # split at "\n" only: BERT vocabularies hold characters that str.splitlines also splits at
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for index, line in enumerate(lines):
        token = line.rstrip("\r")
        if token in vocab:
            raise ValueError(
                f"vocabulary {str(path)!r} holds {token!r} twice, in lines {vocab[token] + 1}, {index + 1}"
            )
        vocab[token] = index
    return vocab


def _reading_beside(path: Path, lower_case: bool | None, strip_accents: bool | None) -> _Reading:
    """BERT's options: as given, else from ``tokenizer_config.json`` beside the vocabulary, else BERT's defaults."""
    file = path.with_name("tokenizer_config.json")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if lower_case is None:
        lower_case = bool(config.get("do_lower_case", True))
    if strip_accents is None:
        strip_accents = config.get("strip_accents")
    strip_accents = lower_case if strip_accents is None else bool(strip_accents)
    return _Reading(lower_case, strip_accents, bool(config.get("tokenize_chinese_chars", True)), of_bert=True)


def _backend(vocab: dict[str, int], reading: _Reading) -> Tokenizer:
    """WordPiece with ``vocab``, with its normaliser, pre-tokenizer and decoder."""
    backend = Tokenizer(models.WordPiece(vocab, unk_token=UNK, max_input_chars_per_word=LONGEST_WORD))
    backend.normalizer = _normalizer(reading)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer() if reading.of_bert else _words(f".{{{LONGEST_WORD}}}")
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _normalizer(reading: _Reading) -> normalizers.Normalizer:
    if reading.of_bert:
        options = {"strip_accents": reading.strip_accents, "handle_chinese_chars": reading.split_han}
        return normalizers.BertNormalizer(lowercase=reading.lower_case, **options)

    # marks are removed in decomposed form (NFD); the others are recomposed (NFC)
    steps = [normalizers.BertNormalizer(strip_accents=False, lowercase=False)]
    steps += [normalizers.NFD(), normalizers.Replace(Regex(_MARKS), "")] if reading.strip_accents else []
    steps += [normalizers.Lowercase()] if reading.lower_case else []
    return normalizers.Sequence([*steps, normalizers.NFC()])


def _words(*cuts: str) -> pre_tokenizers.PreTokenizer:
    """Splits at spaces and punctuation, then into runs of scripts without spaces, then by the patterns in ``cuts``."""
    pieces = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (_UNSPACED, *cuts)]
    return pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), *pieces])


def _count_words(captions: Iterable[str], normalizer: normalizers.Normalizer) -> Counter[str]:
    """Counts words, except those too long to be words of a language."""
    words: Counter[str] = Counter()
    divide = _words()
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"caption {index} is a {type(caption).__name__}, expected str")
        found = divide.pre_tokenize_str(normalizer.normalize_str(caption))
        words.update(word for word, _ in found if len(word) <= LONGEST_WORD)
    return words


def _folded(words: Counter[str], normalizer: normalizers.Normalizer) -> Counter[str]:
    """Counts of the normalised words."""
    folded: Counter[str] = Counter()
    for word, count in words.items():
        folded.update(dict.fromkeys(normalizer.normalize_str(word).split(), count))
    return folded


def _is_vietnamese(words: Counter[str]) -> bool:
    marked = sum(count for word, count in words.items() if _VIETNAMESE.search(unicodedata.normalize("NFD", word)))
    return marked >= _VIETNAMESE_SHARE * words.total()


def _alphabet(words: Counter[str], room: int, limit: int | None) -> Sequence[str]:
    """The most frequent characters, ties broken by code point."""
    characters: Counter[str] = Counter()
    entries: Counter[str] = Counter()  # a character takes up to two entries: word-initial and as a continuation
    for word, count in words.items():
        for character in word:
            characters[character] += count
    for places in ({word[0] for word in words}, {character for word in words for character in word[1:]}):
        entries.update(places)

    # the given number of characters
    ranked = sorted(characters, key=lambda character: (-characters[character], character))
    kept = max(1, min(ALPHABET if limit is None else limit, room // 2))
    if limit is not None:
        return ranked[:kept]

    # or as many as the coverage needs and the vocabulary has room for
    covered = sum(characters[character] for character in ranked[:kept])
    taken = sum(entries[character] for character in ranked[:kept])
    while kept < len(ranked) and covered < COVERAGE * characters.total() and taken + entries[ranked[kept]] <= room:
        covered += characters[ranked[kept]]
        taken += entries[ranked[kept]]
        kept += 1
    return ranked[:kept]


def _train_vocab(words: dict[str, int], vocab_size: int, min_frequency: int) -> dict[str, int]:
    """The vocabulary, token to id.

    tokenizers' trainer numbers continuation characters in hash-map order and breaks ties between merges by these
    numbers, so its vocabulary differs from run to run. Declaring all characters beforehand fixes the numbers.
    """
    usable = sorted(words)
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


def unknown_words(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> tuple[int, int, Counter[str]]:
    """Number of [UNK] tokens in the texts, number of all tokens, and counts of the words that became [UNK]."""
    unknown = total = 0
    words: Counter[str] = Counter()
    texts = list(texts)
    if not texts:
        return unknown, total, words  # rows of images have no texts
    # text that looks like a special token is plain text, as in the processor
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    for text, ids, places in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        lost = [
            text[start:end] for token, (start, end) in zip(ids, places, strict=True) if token == tokenizer.unk_token_id
        ]
        total += len(ids)
        unknown += len(lost)
        words.update(lost)
    return unknown, total, words


def _wrap(backend: Tokenizer, image_token: str, max_text_length: int) -> PreTrainedTokenizerFast:
    # added as special tokens, so that they are never split
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
        model_max_length=max_text_length + 1,  # plus [CLS]
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


__all__ = ["BERT_IMAGE_TOKEN", "SPECIAL_TOKENS", "tokenizer_from_vocab", "train_tokenizer", "unknown_words"]

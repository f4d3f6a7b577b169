"""Trained and borrowed WordPiece tokenizers."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, BertTokenizer

from oner.processing.vl_tokenizer import SPECIAL_TOKENS, tokenizer_from_vocab, train_tokenizer

EMOJI = Path(__file__).parents[2] / "examples" / "data" / "emoji" / "test_concept.parquet"


@pytest.fixture(scope="module")
def captions() -> list[str]:
    rows = pq.read_table(EMOJI, columns=["captions"])["captions"].to_pylist()
    return [caption for row in rows for caption in row]


@pytest.fixture(scope="module")
def tokenizer(captions):
    return train_tokenizer(captions, vocab_size=800)


@pytest.fixture(scope="module")
def bert_vocab(tmp_path_factory, tokenizer) -> Path:
    """A vocab.txt laid out as bert-base-uncased's, specials at their ids, with real words after them."""
    words = [word for word in tokenizer.get_vocab() if word not in SPECIAL_TOKENS]
    lines = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_layout_of_a_trained_vocabulary(tokenizer, captions):
    assert SPECIAL_TOKENS == ("[PAD]", "[IMG]", "[UNK]", "[CLS]", "[MASK]")
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(tokenizer) <= 800
    ids = (tokenizer.pad_token_id, tokenizer.image_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id)
    assert (*ids, tokenizer.mask_token_id) == (0, 1, 2, 3, 4)
    assert tokenizer.sep_token is None and tokenizer.model_max_length == 65
    unknown = sum(2 in tokenizer(caption)["input_ids"] for caption in captions)
    assert unknown == 0
    assert "umbrella" in tokenizer.get_vocab()


def test_the_call_of_the_built_in_pipelines(tokenizer):
    batch = tokenizer(["a photo", "a photo of a closed umbrella"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][:, 0].tolist() == [3, 3]
    short = batch["attention_mask"][0].sum()
    assert batch["input_ids"][0, short:].eq(0).all() and batch["input_ids"][0, :short].ne(0).all()
    assert tokenizer("Umbrella")["input_ids"] == tokenizer("umbrella")["input_ids"]
    assert len(tokenizer("word " * 500, truncation=True)["input_ids"]) == 65
    assert (
        tokenizer.decode(tokenizer("a closed umbrella")["input_ids"], skip_special_tokens=True) == "a closed umbrella"
    )


def test_mask_is_special_and_image_token_can_be_shut_out(tokenizer):
    assert 4 in tokenizer("a [MASK] umbrella")["input_ids"]
    ids = tokenizer("[IMG] [MASK] [CLS] [PAD] [img]", split_special_tokens=True)["input_ids"]
    assert not {0, 1, 3, 4} & set(ids[1:])


def test_same_captions_same_vocabulary_in_any_order_and_process(tokenizer, captions):
    again = train_tokenizer(iter(sorted(captions, reverse=True)), vocab_size=800)
    assert again.get_vocab() == tokenizer.get_vocab()
    code = (
        "import sys, json; from oner.processing.vl_tokenizer import train_tokenizer;"
        "print(json.dumps(train_tokenizer(json.load(sys.stdin), vocab_size=800).get_vocab(), sort_keys=True))"
    )
    run = [sys.executable, "-c", code]
    out = subprocess.run(
        run, input=json.dumps(captions), capture_output=True, text=True, check=True, cwd=EMOJI.parents[3]
    )
    assert json.loads(out.stdout.splitlines()[-1]) == tokenizer.get_vocab()


def test_limits_of_training(captions):
    tiny = train_tokenizer(captions, vocab_size=20)
    assert len(tiny) <= 20
    assert len(train_tokenizer(captions, vocab_size=100_000, min_frequency=10**9)) < 200  # characters alone
    few = train_tokenizer(["aaa bbb", "aaa ccc"], vocab_size=100, limit_alphabet=2)
    assert few.tokenize("aaa bbb ccc") == ["aaa", "b", "##b", "##b", "[UNK]"]
    cased = train_tokenizer(["Red red"] * 5, vocab_size=50, lower_case=False)
    assert {"Red", "red"} <= set(cased.get_vocab())
    with pytest.raises(ValueError, match="vocab_size must be at least 7, got 5"):
        train_tokenizer(captions, vocab_size=5)
    with pytest.raises(ValueError, match="no words"):
        train_tokenizer(["", " "])
    with pytest.raises(ValueError, match="caption 1 is a float"):
        train_tokenizer(["a", float("nan")])


def test_bert_vocabulary(bert_vocab):
    ours = tokenizer_from_vocab(bert_vocab)
    ids = (ours.pad_token_id, ours.image_token_id, ours.unk_token_id, ours.cls_token_id, ours.mask_token_id)
    assert ids == (0, 1, 100, 101, 103) and ours.image_token == "[unused0]"
    theirs = BertTokenizer(str(bert_vocab))
    for text in ("A closed umbrella, Ünïcode!", "an unheardofword 漢", "a [MASK]"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"][:-1]  # all but [SEP]
    assert 1 not in ours("[unused0] umbrella", split_special_tokens=True)["input_ids"]
    assert ours("a", "b")["input_ids"].count(101) == 1
    assert set(ours("a")) == {"input_ids", "attention_mask"}


def test_vocabulary_from_a_saved_folder(bert_vocab, tmp_path, tokenizer):
    reference = tokenizer_from_vocab(bert_vocab)
    BertTokenizer(str(bert_vocab)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "own")
    text = "A closed Umbrella"
    for folder in (tmp_path / "bert", bert_vocab.parent):
        loaded = tokenizer_from_vocab(folder)
        assert loaded(text)["input_ids"] == reference(text)["input_ids"]
        assert loaded.image_token == "[unused0]"
    own = tokenizer_from_vocab(tmp_path / "own")
    assert own(text)["input_ids"] == tokenizer(text)["input_ids"] and own.image_token == "[IMG]"


def test_casing_follows_the_configuration_beside(bert_vocab, tmp_path):
    (tmp_path / "vocab.txt").write_text(bert_vocab.read_text(encoding="utf-8") + "Umbrella\n", encoding="utf-8")
    assert tokenizer_from_vocab(tmp_path).tokenize("Umbrella") == ["umbrella"]
    assert tokenizer_from_vocab(tmp_path, lower_case=False).tokenize("Umbrella") == ["Umbrella"]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert tokenizer_from_vocab(tmp_path).tokenize("Umbrella") == ["Umbrella"]


def test_bad_vocabularies_are_named(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[unused0]\n[UNK]\n[CLS]\nword\n")
    with pytest.raises(ValueError, match=r"lacks '\[MASK\]'"):
        tokenizer_from_vocab(path)
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[MASK]\nword\n")
    with pytest.raises(ValueError, match=r"lacks '\[unused0\]'"):
        tokenizer_from_vocab(path)
    assert tokenizer_from_vocab(path, image_token="word").image_token_id == 4
    path.write_text("word\nother\nword\n")
    with pytest.raises(ValueError, match=r"'word' twice, in lines 1, 3"):
        tokenizer_from_vocab(path)
    path.write_text("word\n")
    with pytest.raises(ValueError, match=r"lacks '\[UNK\]'"):
        tokenizer_from_vocab(path)
    with pytest.raises(FileNotFoundError, match="no vocabulary at"):
        tokenizer_from_vocab(tmp_path / "nothing.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="no tokenizer.json or vocab.txt"):
        tokenizer_from_vocab(tmp_path / "folder")


def test_loads_without_oner_and_beside_an_unknown_model(tokenizer, bert_vocab, tmp_path):
    borrowed = tokenizer_from_vocab(bert_vocab)
    text = "A closed [IMG] Umbrella"
    tokenizer(text, truncation=True, max_length=4, padding="max_length")  # use must leave no trace in the files
    for name, original in (("own", tokenizer), ("bert", borrowed)):
        original.save_pretrained(tmp_path / name)
        (tmp_path / name / "config.json").write_text('{"model_type": "oner"}')
    code = (
        "import sys; sys.modules['oner'] = None\n"
        "from transformers import AutoTokenizer\n"
        f"for name in ('own', 'bert'): print(AutoTokenizer.from_pretrained({str(tmp_path)!r} + '/' + name)"
        f"({text!r})['input_ids'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert out.stdout.splitlines() == [str(tokenizer(text)["input_ids"]), str(borrowed(text)["input_ids"])]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert loaded.image_token_id == 1 and loaded.model_max_length == 65 and loaded.mask_token_id == 4
    assert loaded.model_input_names == ["input_ids", "attention_mask"]

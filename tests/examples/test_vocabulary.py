"""A vocabulary of all stages' texts before the first stage, which may read none."""

import importlib.util

from tiny_pretraining import ROOT
from toy_family.runs import write_sources

from oner import tokenizer_from_vocab


def test_it_knows_the_words_of_pairs_and_of_texts(tmp_path):
    sources = write_sources(tmp_path)
    (tmp_path / "more.txt").write_text("zebras gallop\nzebras gallop past\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("vocabulary", ROOT / "examples" / "data" / "vocabulary.py")
    vocabulary = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vocabulary)
    more = ["--pairs", sources["pairs"], "--texts", sources["texts"], str(tmp_path / "more.txt"), "--size", "400"]
    made = vocabulary.main([str(tmp_path / "vocabulary"), *more])
    tokenizer = tokenizer_from_vocab(made, max_text_length=16)
    ids = tokenizer("zebras and hearts", add_special_tokens=False)["input_ids"]
    assert ids and tokenizer.unk_token_id not in ids and len(tokenizer) <= 400

"""The gate of what is published: no absolute path, no credentials, and everything else as it was."""

import json
import time
from pathlib import Path

import pytest

from oner.training.publishing.public import LEFT_OUT, plain, public_text

# what is to be published -> what must be
PLACES = {
    "/home/alice/secret-project/run": "run",
    "/home/alice": "~",
    "/Users/alice/": "~",
    "/mnt/My Disk/pairs of ours.csv": "pairs of ours.csv",
    "/data/cc-{000..127}.tar": "cc-{000..127}.tar",
    "~/x/z.csv": "z.csv",
    "~bob/z.csv": "z.csv",
    "../../alice/z.csv": "z.csv",
    "C:\\Users\\alice\\x.csv": "x.csv",
    "C:/Users/alice/x.csv": "x.csv",
    "\\\\server\\share\\x.csv": "x.csv",
    "file:///home/alice/x.csv": "x.csv",
    "alice@box:/data/x.csv": "x.csv",
    "see /home/alice/a.csv, and (/srv/b/c.json); ok": "see a.csv, and (c.json); ok",
    '{"image_tokenizer": "/home/alice/x/codes"}': '{"image_tokenizer": "codes"}',
    "pairs:/srv/x/y.csv": "pairs:y.csv",
}
ADDRESSES = {
    "s3://user:SECRET@bucket/x": "s3://bucket/x",
    "s3://user:SEC/RET@bucket/x": "s3://bucket/x",
    "https://u:p@example.org/x?sig=abc#part": "https://example.org/x",
    "at https://example.org/x?token=abc now": "at https://example.org/x now",
    "http://nas/share/x.csv": "x.csv",
    "http://10.0.0.1:8000/x.csv": "x.csv",
    "https://files.corp.internal/x.csv": "x.csv",
    "hdfs://namenode:9000/user/alice/x.csv": "x.csv",
    "token hf_abcdefghijklmnopqrstu here": f"token {LEFT_OUT} here",
    "AKIAABCDEFGHIJKLMNOP": LEFT_OUT,
    "Bearer abcdefghijkl": LEFT_OUT,
}
UNTOUCHED = [
    "examples/data/emoji/train.parquet", "cc-{000..127}.tar", "runs/vqa/model", "org/name", "test_style/recall@10",
    "hf://datasets/org/name@main/a.parquet", "https://example.org:443/a/b", "a photo of a {}.", "{}/{} and/or 1/2",
    "/", "~5 words", "<!-- mark -->", "</details>", "the gap (centroids), L2", "[CLS] [IMG]*N", "青蛙 / frog", "",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), {**PLACES, **ADDRESSES}.items())
def test_places_and_secrets_are_left_out(text, expected):
    assert public_text(text) == expected
    assert public_text(expected) == expected, "the gate passes what it made"


@pytest.mark.parametrize("text", UNTOUCHED)
def test_all_else_is_as_it_was(text):
    assert public_text(text) == text


def test_what_lies_below_the_working_directory_is_named_from_there(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert public_text(str(tmp_path / "here" / "runs" / "x")) == "runs/x"
    assert public_text(str(tmp_path / "there" / "runs" / "x")) == "x"
    # a working directory above the home would show all of it
    monkeypatch.setenv("HOME", str(tmp_path / "here" / "alice"))
    assert public_text(str(tmp_path / "here" / "alice" / "thesis" / "x")) == "x"
    assert public_text(f"in {tmp_path}/here/alice/My Thesis/x.csv") == "in ~/My Thesis/x.csv"


@pytest.mark.parametrize(
    "piece", ["a", "a.", "/a", "../", "a@", "x@y.", "a:/", "\\\\", "http://", "eyJ", "sk-", "a b/"]
)
def test_a_long_text_costs_little(piece):
    """A caption may have 65,536 letters; a pattern that tries again at each of them takes minutes."""
    start = time.process_time()
    public_text(piece * (65_536 // len(piece)))
    assert time.process_time() - start < 2


def test_values_keep_their_types_and_secrets_are_known_by_their_keys():
    told = {
        "storage_options": {"key": "a", "secret": "b", "anon": False},
        "hf_token": "x", "api_key": "y", "password": "z", "AWS_SECRET_ACCESS_KEY": "w",
        "pad_token": "[PAD]", "mask_token_id": 3, "use_auth_token": True, "tokenizer": None, "id_column": "hexcode",
        "lists": [Path("/home/alice/a"), ("/srv/x/b", 1.5)], "/home/alice/set/recall": float("nan"),
    }  # fmt: skip
    assert plain(told) == {
        "storage_options": {"key": LEFT_OUT, "secret": LEFT_OUT, "anon": False},
        **dict.fromkeys(["hf_token", "api_key", "password", "AWS_SECRET_ACCESS_KEY"], LEFT_OUT),
        "pad_token": "[PAD]", "mask_token_id": 3, "use_auth_token": True, "tokenizer": None, "id_column": "hexcode",
        "lists": ["a", ["b", 1.5]], "recall": None,
    }  # fmt: skip
    json.dumps(plain(told), allow_nan=False)

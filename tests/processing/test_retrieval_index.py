"""The retrieval index: exact scores, stable order, and a directory that is read back whole or refused by name."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from oner.processing.retrieval_index import (
    IndexFileError,
    IndexMismatchError,
    RetrievalIndex,
    Snapshot,
    space_fingerprint,
)
from oner.processing.retrieval_index_files import LOCK_FILE
from oner.processing.retrieval_nearest import pack_keys, unpack_keys


def make_index(n: int = 500, width: int = 24, dtype: str = "float16", seed: int = 0) -> RetrievalIndex:
    generator = torch.Generator().manual_seed(seed)
    index = RetrievalIndex(width, model="org/toy", fingerprint="abc", dtype=dtype)
    index.add(torch.randn(n, width, generator=generator), [f"photos/{i}.png" for i in range(n)])
    return index


def queries_of(count: int, width: int = 24) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("chunk", [1, 37, 16384])
def test_search_equals_numpy_in_double_precision(dtype: str, chunk: int) -> None:
    index, queries = make_index(dtype=dtype), queries_of(9)
    scores, indices = index.search(queries, top_k=20, chunk=chunk)
    unit = queries.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    exact = unit @ index.embeddings.double().numpy().T
    order = np.argsort(-exact, axis=1, kind="stable")[:, :20]
    assert np.array_equal(indices.numpy(), order)
    assert np.array_equal(scores.numpy(), np.take_along_axis(exact, order, axis=1).astype(np.float32))


def test_embeddings_are_stored_as_unit_rows_in_the_dtype_asked_for() -> None:
    for dtype, tolerance in (("float16", 1e-3), ("float32", 1e-6)):
        index = make_index(dtype=dtype)
        assert str(index.embeddings.dtype) == f"torch.{dtype}"
        assert (index.embeddings.double().norm(dim=1) - 1).abs().max() < tolerance


@pytest.mark.parametrize("chunk", [1, 7, 64, 16384])
def test_equal_items_tie_and_come_in_the_order_they_were_added(chunk: int) -> None:
    rows = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).repeat(40, 1)
    index = RetrievalIndex(24)
    index.add(rows, list(range(200)))
    scores, indices = index.search(rows[:1], top_k=45, chunk=chunk)
    assert indices[0, :40].tolist() == list(range(0, 200, 5))
    assert len(set(scores[0, :40].tolist())) == 1
    assert scores[0, 40] < scores[0, 39]


def test_items_that_fp32_cannot_tell_apart_come_in_their_true_order() -> None:
    """Sixty rows whose cosines lie within a few units of fp32's last place, among a thousand others."""
    generator = torch.Generator().manual_seed(2)
    asked = torch.nn.functional.normalize(torch.randn(1, 256, generator=generator, dtype=torch.float64), dim=1)
    aside = torch.randn(60, 256, generator=generator, dtype=torch.float64)
    near = asked + 1e-4 * torch.nn.functional.normalize(aside, dim=1)
    rows = torch.cat([torch.randn(1000, 256, generator=generator), near.float()])[torch.randperm(1060)]
    index = RetrievalIndex(256, dtype="float32")
    index.add(rows, range(1060))
    exact = (index.embeddings.double() * asked).sum(1).to(torch.float32)
    order = torch.sort(exact, descending=True, stable=True)
    for k in (1, 5, 59):
        scores, indices = index.search(asked, top_k=k)
        assert torch.equal(indices[0], order.indices[:k]) and torch.equal(scores[0], order.values[:k])


@pytest.mark.parametrize("copies", [20, 3000])
def test_many_copies_are_told_from_what_is_better(copies: int) -> None:
    queries = queries_of(2)
    index = RetrievalIndex(24)
    index.add(torch.cat([queries[:1].repeat(copies, 1), queries[1:], queries[:1]]), range(copies + 2))
    scores, indices = index.search(queries, top_k=4)
    assert indices[0].tolist() == [0, 1, 2, 3] and indices[1, 0] == copies


def test_a_setting_that_rounds_products_changes_no_answer() -> None:
    index, queries = make_index(500), queries_of(9)
    scores, indices = index.search(queries)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = index.search(queries)
    assert torch.equal(rough[0], scores) and torch.equal(rough[1], indices)


def test_search_of_many_query_blocks_equals_one_by_one() -> None:
    index, queries = make_index(50), queries_of(1030)
    scores, indices = index.search(queries, top_k=3)
    for i in (0, 1023, 1024, 1029):
        one_scores, one_indices = index.search(queries[i : i + 1], top_k=3)
        assert torch.equal(one_indices[0], indices[i]) and torch.equal(one_scores[0], scores[i])


def test_keys_sort_as_scores_then_lower_index() -> None:
    scores = torch.tensor([[0.5, -0.25, 0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, -1e-30]])
    keys = pack_keys(scores, torch.arange(10, 19))
    back, indices = unpack_keys(keys)
    assert torch.equal(back, scores) and indices.tolist() == [list(range(10, 19))]
    assert unpack_keys(keys.sort(descending=True).values)[1].tolist() == [[14, 10, 16, 17, 12, 13, 18, 11, 15]]


def test_top_k_is_cut_to_the_number_of_items_and_an_empty_index_answers_nothing() -> None:
    scores, indices = make_index(4).search(queries_of(2), top_k=100)
    assert scores.shape == indices.shape == (2, 4)
    scores, indices = RetrievalIndex(24).search(queries_of(2), top_k=5)
    assert scores.shape == indices.shape == (2, 0)
    assert make_index(4).search(torch.empty(0, 24), top_k=3)[0].shape == (0, 3)


def test_save_and_load_give_the_same_index_and_answers(tmp_path: Path) -> None:
    index = make_index(60)
    index.add(queries_of(2), [{"text": "grüne Äpfel", "image": None}, Path("a/b.png")], fingerprint="abc")
    index.skipped = [{"item": "photos/broken.png", "reason": "not a picture"}]
    assert index.save(tmp_path / "saved") == tmp_path / "saved"
    loaded = RetrievalIndex.load(tmp_path / "saved")
    assert torch.equal(loaded.embeddings, index.embeddings) and loaded.embeddings.dtype == torch.float16
    assert loaded.items == index.items and loaded.items[-1] == str(Path("a/b.png"))
    names = ("projection_dim", "model", "fingerprint", "dtype", "skipped")
    assert all(getattr(loaded, name) == getattr(index, name) for name in names)
    assert torch.equal(loaded.search(queries_of(3))[1], index.search(queries_of(3))[1])


def test_saving_again_replaces_the_old_index_and_leaves_nothing_beside(tmp_path: Path) -> None:
    make_index(5).save(tmp_path)
    make_index(6, seed=3).save(tmp_path)
    assert len(RetrievalIndex.load(tmp_path)) == 6
    assert len([file for file in tmp_path.iterdir() if file.name != LOCK_FILE]) == 2


def test_what_a_killed_writer_left_goes_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    make_index(5).save(tmp_path)
    left = [
        "embeddings-0123456789abcdef.safetensors",
        ".embeddings-01.safetensors.7.tmp",
        ".retrieval_index.json.7.tmp",
    ]
    mine = ["embeddings-mine.safetensors", "notes.txt", ".env.tmp"]
    for name in left + mine:
        (tmp_path / name).write_text("x")
    make_index(6, seed=3).save(tmp_path)
    assert not {file.name for file in tmp_path.iterdir()} & set(left)
    assert {file.name for file in tmp_path.iterdir()} >= set(mine)


def test_an_index_that_grows_in_threads_names_what_it_finds(tmp_path: Path) -> None:
    """Four threads add, three search, one saves and loads: every answer is the item whose embedding was asked."""
    vectors = torch.nn.functional.normalize(torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    index = RetrievalIndex(16)
    index.add(vectors[:100], range(100))
    done = threading.Event()

    def add(part: int) -> None:
        for start in range(100 + part * 25, 4000, 100):
            index.add(vectors[start : start + 25], range(start, min(start + 25, 4000)))

    def search(asked: int) -> None:
        while not done.is_set():
            scores, indices = index.search(vectors[[asked, asked + 50]], top_k=3)
            assert [index.items[place] for place in indices[:, 0]] == [asked, asked + 50]
            assert scores[:, 0].min() > 0.999

    def keep() -> None:
        while not done.is_set():
            index.save(tmp_path)
            assert_whole(RetrievalIndex.load(tmp_path), vectors)

    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(search, asked) for asked in range(3)] + [pool.submit(keep)]
        adding = [pool.submit(add, part) for part in range(4)]
        for future in adding:
            future.result()
        done.set()
        for future in others:
            future.result()
    assert sorted(index.items) == list(range(4000))
    assert_whole(index, vectors)
    assert len(index._snapshot.blocks) == 1


def assert_whole(index: RetrievalIndex, vectors: torch.Tensor) -> None:
    """Each item stands beside its own embedding."""
    assert len(index.embeddings) == len(index.items) >= 100
    assert ((index.embeddings.float() * vectors[index.items]).sum(1) > 0.999).all()


def test_a_reader_beside_writers_sees_one_index_whole(tmp_path: Path) -> None:
    """Two writers replace each other's index; whoever reads meanwhile gets one of them, never an error."""
    indexes = [make_index(30, seed=seed) for seed in (1, 2)]
    indexes[0].save(tmp_path)
    done = threading.Event()

    def write(index: RetrievalIndex) -> None:
        for _ in range(40):
            index.save(tmp_path)

    def read() -> int:
        count = 0
        while not done.is_set() or not count:
            loaded = RetrievalIndex.load(tmp_path).embeddings
            count += any(torch.equal(loaded, index.embeddings) for index in indexes)
        return count

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for future in [pool.submit(write, index) for index in indexes]:
            future.result()
        done.set()
        assert all(future.result() > 0 for future in readers)


def test_a_crash_before_the_last_rename_leaves_the_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_index(5).save(tmp_path)
    import os

    real = os.replace

    def crash(source: str, target: str) -> None:
        if str(target).endswith("retrieval_index.json"):
            raise OSError("power cut")
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        make_index(6, seed=3).save(tmp_path)
    assert len(RetrievalIndex.load(tmp_path)) == 5


def edit_header(directory: Path, **changes: object) -> None:
    path = directory / "retrieval_index.json"
    header = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del header[key]
        else:
            header[key] = value
    path.write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"format": "faiss"}, "format", "not a retrieval index"),
        ({"version": 99}, "version", "reads version 1, got 99"),
        ({"items": ...}, "items", "missing"),
        ({"items": "a"}, "items", "expected list, got str"),
        ({"projection_dim": True}, "projection_dim", "expected int, got bool"),
        ({"projection_dim": 25}, "embeddings", r"expected \(8, 25\) float16, got \(8, 24\)"),
        ({"count": 7}, "count", "says 7, but there are 8"),
        ({"dtype": "float8"}, "dtype", "expected one of"),
        ({"embeddings_file": "../embeddings-x.safetensors"}, "embeddings_file", "beside it"),
        ({"embeddings_file": "embeddings-x.safetensors"}, "embeddings_file", "no such file"),
        ({"embeddings_file": "embeddings-\0.safetensors"}, "embeddings_file", "beside it"),
        ({"version": True}, "version", "got True"),
        ({"items": [f"other {i}" for i in range(8)]}, "header_sha256", "not what was saved"),
    ],
)
def test_a_wrong_header_is_refused_with_file_and_key(tmp_path: Path, changes: dict, key: str, words: str) -> None:
    make_index(8).save(tmp_path)
    edit_header(tmp_path, **changes)
    with pytest.raises(IndexFileError, match=words) as caught:
        RetrievalIndex.load(tmp_path)
    assert caught.value.key == key and str(tmp_path) in caught.value.file


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(IndexFileError, match="retrieval_index.json: no such file"):
        RetrievalIndex.load(tmp_path)
    directory = make_index(8).save(tmp_path / "index")
    tensors = next(directory.glob("*.safetensors"))
    payload = bytearray(tensors.read_bytes())
    payload[-1] ^= 1
    tensors.write_bytes(payload)
    with pytest.raises(IndexFileError, match="safetensors.*damaged"):
        RetrievalIndex.load(directory)
    tensors.write_bytes(payload[:100])
    with pytest.raises(IndexFileError, match="damaged"):
        RetrievalIndex.load(directory)
    import hashlib

    save_file({"other": torch.zeros(2)}, tensors)
    edit_header(directory, embeddings_sha256=hashlib.sha256(tensors.read_bytes()).hexdigest())
    with pytest.raises(IndexFileError, match=r"key 'embeddings': missing; the file holds \['other'\]"):
        RetrievalIndex.load(directory)
    (directory / "retrieval_index.json").write_text('{"format": "oner-retr')
    with pytest.raises(IndexFileError, match="not readable as JSON"):
        RetrievalIndex.load(directory)


def test_embeddings_that_are_no_unit_rows_are_refused(tmp_path: Path) -> None:
    """Their scores would be no cosines."""
    index = make_index(8)
    index._snapshot = Snapshot((index.embeddings * 3,), 8)
    with pytest.raises(IndexFileError, match="row .* is not of length one"):
        RetrievalIndex.load(index.save(tmp_path))


def test_a_number_of_thousands_of_digits_is_damage(tmp_path: Path) -> None:
    (tmp_path / "retrieval_index.json").write_text('{"version": 1' + "0" * 5000 + "}")
    with pytest.raises(IndexFileError, match="not readable as JSON"):
        RetrievalIndex.load(tmp_path)


def test_save_does_not_replace_a_foreign_file(tmp_path: Path) -> None:
    (tmp_path / "retrieval_index.json").write_text('{"mine": 1}')
    with pytest.raises(IndexFileError, match="not a retrieval index"):
        make_index(2).save(tmp_path)
    assert (tmp_path / "retrieval_index.json").read_text() == '{"mine": 1}'
    (tmp_path / "file").write_text("")
    with pytest.raises(IndexFileError, match="is a file"):
        make_index(2).save(tmp_path / "file")


def test_other_widths_and_models_are_not_mixed() -> None:
    index = make_index(4)
    with pytest.raises(IndexMismatchError, match="width 24 .*got width 8"):
        index.add(torch.ones(1, 8), ["a"])
    with pytest.raises(IndexMismatchError, match="width 24 .*got width 8"):
        index.search(torch.ones(1, 8))
    with pytest.raises(IndexMismatchError, match="made by 'org/toy'.*got embeddings of 'org/other'"):
        index.add(torch.ones(1, 24), ["a"], fingerprint="xyz", model="org/other")
    assert len(index) == 4


def test_bad_additions_and_questions_are_refused() -> None:
    index = make_index(4)
    with pytest.raises(ValueError, match="and 2 items"):
        index.add(torch.ones(1, 24), ["a", "b"])
    with pytest.raises(TypeError, match="path or a JSON value, got set"):
        index.add(torch.ones(1, 24), [{1, 2}])
    with pytest.raises(ValueError, match="embedding 1 has no direction: its length is nan"):
        index.add(torch.stack([torch.ones(24), torch.full((24,), float("nan"))]), ["a", "b"])
    with pytest.raises(ValueError, match="its length is 0.0"):
        index.search(torch.zeros(1, 24))
    for bad in ({"top_k": 0}, {"top_k": 2.0}, {"chunk": -1}):
        with pytest.raises(ValueError, match="must be a positive integer"):
            index.search(torch.ones(1, 24), **bad)
    with pytest.raises(ValueError, match=r"expected queries \(q, 24\), got \(24,\)"):
        index.search(torch.ones(24))
    with pytest.raises(ValueError, match="dtype must be one of"):
        RetrievalIndex(24, dtype="int8")
    assert len(index) == 4 and index.embeddings.shape == (4, 24)


def test_fingerprint_follows_the_weights_and_not_their_precision() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16))
    before = space_fingerprint(model)
    assert space_fingerprint(model.half()) == before
    model[1].running_mean += 1.0
    assert space_fingerprint(model) != before


def test_keys_are_saved_beside_their_rows(tmp_path: Path) -> None:
    index = RetrievalIndex(24)
    index.add(torch.ones(2, 24), ["a", "b"], keys=["0f" * 16, None])
    index.add(torch.ones(1, 24), ["c"])
    assert RetrievalIndex.load(index.save(tmp_path)).keys == ["0f" * 16, None, None] == index.keys
    with pytest.raises(ValueError, match="as many keys as items, got 1 and 2"):
        index.add(torch.ones(2, 24), ["a", "b"], keys=["0f" * 16])
    with pytest.raises(ValueError, match="32 hexadecimal digits, got 'x'"):
        index.add(torch.ones(1, 24), ["a"], keys=["x"])

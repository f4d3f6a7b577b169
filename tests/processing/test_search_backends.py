"""Every backend gives the answers of exact search: items, numbers, scores, with conditions and without."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import oner_search_options
from oner.processing import retrieval_backend
from oner.processing.retrieval_backend import (
    SearchBackend,
    build_backend,
    build_stale,
    built_backends,
    library,
    open_backend,
)
from oner.processing.retrieval_filter import Condition, read_where
from oner.processing.retrieval_index import IndexFileError, IndexMismatchError, RetrievalIndex

COUNT, WIDTH = 600, 24
# name of the backend, the library it needs, the options it is built with
BACKENDS = {
    "exact": ("torch", {}),
    "faiss-ivf": ("faiss", {"kind": "ivf", "recall": 1.0}),
    "faiss-hnsw": ("faiss", {"kind": "hnsw", "recall": 1.0}),
    "lancedb": ("lancedb", {}),
    "qdrant": ("qdrant_client", {"url": ":memory:"}),
}
each = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def item_of(number: int) -> dict[str, Any]:
    item: dict[str, Any] = {"path": f"photos/{number} it's.png", "year": 2000 + number % 20, "good": number % 3 == 0}
    item["share"] = number / COUNT
    item["key"] = (1 << 60) + number  # floats do not tell these apart
    if number % 4:
        item["licence"] = ("MIT", "BSD", "2020")[number % 3]
    return item


def make_index(seed: int = 0) -> RetrievalIndex:
    index = RetrievalIndex(WIDTH, model="org/toy", fingerprint="abc")
    rows = torch.randn(COUNT, WIDTH, generator=torch.Generator().manual_seed(seed))
    index.add(rows, [item_of(number) if number < COUNT - 1 else "a plain item" for number in range(COUNT)])
    return index


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_index().save(tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="module")
def exact(directory: Path) -> RetrievalIndex:
    return RetrievalIndex.load(directory)


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest, directory: Path) -> SearchBackend:
    needed, options = BACKENDS[request.param]
    pytest.importorskip(needed)
    if request.param == "exact":
        return RetrievalIndex.load(directory)
    name = request.param.split("-")[0]
    built = build_backend(name, directory, **options)
    return built if name == "qdrant" else open_backend(name, directory)


def queries() -> torch.Tensor:
    return 3 * torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(7))


WHERE = [
    None,
    "licence=MIT",
    ["licence=MIT|BSD", "year>=2010"],
    {"licence": ["MIT", "BSD"], "good": True},
    "licence!=MIT",
    "licence!=nothing",
    "licence=2020",
    "year=2005",
    "year!=2005",
    "year<2003",
    "share<=0.25",
    "share>0.9",
    "good=false",
    "good!=true",
    f"key={(1 << 60) + 7}|{(1 << 60) + 9}",
    {"key": (1 << 60) + 7},
    "licence=MIT | BSD",
    "path=photos/7 it's.png",
    "item=a plain item",
    "licence>3",
    "nothing=MIT",
]


@each
@pytest.mark.parametrize("where", WHERE, ids=str)
def test_answers_are_those_of_exact_search(backend: SearchBackend, exact: RetrievalIndex, where: Any) -> None:
    assert len(backend) == COUNT
    wanted = exact.answers(queries(), top_k=7, where=where)
    found = backend.answers(queries(), top_k=7, where=where)
    for one, other in zip(found, wanted, strict=True):
        assert [answer["index"] for answer in one] == [answer["index"] for answer in other]
        assert [answer["item"] for answer in one] == [answer["item"] for answer in other]
        assert [answer["score"] for answer in one] == pytest.approx([answer["score"] for answer in other], abs=1e-5)


def test_conditions_admit_what_they_say(exact: RetrievalIndex) -> None:
    """Against Python's own comparisons."""
    says = {
        "licence=MIT": lambda item: item.get("licence") == "MIT",
        "licence!=MIT": lambda item: item.get("licence") not in (None, "MIT"),
        "year>=2010": lambda item: item.get("year", 0) >= 2010,
        "year=2005|2006": lambda item: item.get("year") in (2005, 2006),
        "good=true": lambda item: item.get("good") is True,
        "share<0.5": lambda item: item.get("share", 1) < 0.5,
        "licence=MIT | BSD": lambda item: item.get("licence") in ("MIT", "BSD"),
        f"key={(1 << 60) + 7}": lambda item: item["key"] == (1 << 60) + 7,
        f"key<={(1 << 60) + 7}": lambda item: item["key"] <= (1 << 60) + 7,
    }
    for where, met in says.items():
        found = exact.answers(queries()[:1], top_k=COUNT, where=where)[0]
        admitted = {number for number, item in enumerate(exact.items) if isinstance(item, dict) and met(item)}
        assert {answer["index"] for answer in found} == admitted and admitted, where


@each
def test_neighbours_of_an_item(backend: SearchBackend, exact: RetrievalIndex) -> None:
    wanted = exact.search(exact.embeddings[11][None], top_k=5)[1][0].tolist()
    assert wanted[0] == 11
    for item in (11, item_of(11)):
        found = backend.neighbours(item, top_k=4)
        assert [answer["index"] for answer in found] == wanted[1:]
    assert all(one["item"]["good"] for one in backend.neighbours(11, top_k=4, where="good=true"))
    for unknown in ("no item", COUNT, -1, True):
        with pytest.raises(ValueError, match=f"not in the index of {COUNT} items"):
            backend.neighbours(unknown)


@pytest.mark.parametrize("name", ["exact", "lancedb", "qdrant"])
def test_of_equal_answers_the_first_are_given(tmp_path: Path, name: str) -> None:
    """Eleven copies of a picture in the midst of others; a database gives any of them."""
    needed, options = BACKENDS[name]
    pytest.importorskip(needed)
    index = RetrievalIndex(WIDTH, dtype="float32")
    rows = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1))
    rows[20:40:2] = rows[7]
    index.add(rows, list(range(40)))
    index.save(tmp_path)
    backend = index if name == "exact" else build_backend(name, tmp_path, **options)
    for top_k in (1, 3, 12):
        found = [answer["index"] for answer in backend.answers(rows[7:8], top_k)[0]]
        assert found[:11] == [7, *range(20, 40, 2)][:top_k] and len(found) == top_k


def test_an_item_that_is_a_number_is_no_place() -> None:
    """Products are often called by numbers; the place of another one in the index is not meant."""
    index = RetrievalIndex(2)
    index.add(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), [2, 1, 0])
    assert [answer["item"] for answer in index.neighbours(2, top_k=2)] == [0, 1]
    assert [answer["item"] for answer in index.neighbours(0, top_k=1)] == [1]


@each
def test_other_spaces_and_numbers_are_refused(backend: SearchBackend) -> None:
    with pytest.raises(IndexMismatchError, match="width 24"):
        backend.answers(torch.ones(1, 8))
    with pytest.raises(ValueError, match="top_k must be a positive integer"):
        backend.answers(queries(), top_k=0)
    with pytest.raises(IndexMismatchError, match="made by 'org/toy'"):
        backend.check_space(WIDTH, "another")


@pytest.mark.parametrize(
    ("where", "conditions"),
    [
        ("a=b", [Condition("a", "=", ("b",))]),
        (" a b >= 1.5 ", [Condition("a b", ">=", ("1.5",))]),
        ("url=http://x?a=b", [Condition("url", "=", ("http://x?a=b",))]),
        ({"a": 3, "b": [True, "x"]}, [Condition("a", "=", ("3",)), Condition("b", "=", ("true", "x"))]),
        ([], []),
    ],
)
def test_conditions_are_read(where: Any, conditions: list[Condition]) -> None:
    assert list(read_where(where)) == conditions


@pytest.mark.parametrize(
    "where",
    ["licence", "=MIT", "", "year>many", "year<nan", [3], "licence==MIT", "year=>3", {"a": None}, {"a": {">=": 3}}],
    ids=str,
)
def test_what_is_no_condition_is_refused(where: Any) -> None:
    with pytest.raises(ValueError, match="got"):
        read_where(where)


def test_faiss_is_tuned_saved_and_read_back(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    index = make_index()
    index.save(tmp_path)
    built = build_backend("faiss", tmp_path, recall=0.7)
    note = json.loads((tmp_path / "faiss.json").read_text())
    assert note["effort"] == built.effort < built._found.nlist and 0.7 <= note["reached"] < 1

    # of other questions it finds about as much, scored to the bit
    asked = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(9))
    scores, found = open_backend("faiss", tmp_path).search(asked)
    true_scores, truth = index.search(asked)
    share = (truth[:, :, None] == found[:, None, :]).any(-1).float().mean()
    assert 0.5 < share < 1
    known, got = scored(true_scores, truth), scored(scores, found)
    both = known.keys() & got.keys()
    assert both and all(known[pair] == got[pair] for pair in both)

    # a damaged file is refused, and so is one of embeddings that are gone, until it is built again
    file = next(tmp_path.glob("faiss-*.index"))
    payload = file.read_bytes()
    file.write_bytes(payload[:-1])
    with pytest.raises(IndexFileError, match="missing or damaged"):
        open_backend("faiss", tmp_path)
    file.write_bytes(payload)
    assert build_stale(tmp_path) == []
    make_index(seed=1).save(tmp_path)
    with pytest.raises(IndexFileError, match="have been replaced; build it again"):
        open_backend("faiss", tmp_path)
    assert build_stale(tmp_path) == ["faiss"] == built_backends(tmp_path)
    assert len(open_backend("faiss", tmp_path)) == COUNT and len(list(tmp_path.glob("faiss-*.index"))) == 1
    assert json.loads((tmp_path / "faiss.json").read_text())["options"] == {"kind": "ivf", "recall": 0.7}


def scored(scores: torch.Tensor, indices: torch.Tensor) -> dict[tuple[int, int], float]:
    """The score of each query with each item that it found."""
    places = [(query, index) for query, row in enumerate(indices.tolist()) for index in row]
    return dict(zip(places, scores.flatten().tolist(), strict=True))


def test_datasets_finds_the_same_by_its_own_faiss_index(exact: RetrievalIndex) -> None:
    """As docs/search.md has it."""
    pytest.importorskip("faiss")
    from datasets import Dataset

    table = Dataset.from_dict({"number": range(COUNT), "embedding": exact.embeddings.float().numpy()})
    table.add_faiss_index("embedding", metric_type=0)
    asked = torch.nn.functional.normalize(queries()[0], dim=0)
    scores, rows = table.get_nearest_examples("embedding", asked.numpy(), k=5)
    wanted, numbers = exact.search(asked[None], top_k=5)
    assert rows["number"] == numbers[0].tolist() and scores.tolist() == pytest.approx(wanted[0].tolist(), abs=1e-5)


def test_an_index_too_small_for_lists_is_searched_all_the_same(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    index = RetrievalIndex(WIDTH)
    index.add(torch.randn(3, WIDTH), ["a", "b", "c"])
    index.save(tmp_path)
    for kind in ("ivf", "hnsw"):
        answers = build_backend("faiss", tmp_path, kind=kind).answers(queries(), top_k=5)
        assert answers == index.answers(queries(), top_k=5)
    with pytest.raises(ValueError, match="kind must be one of ivf, hnsw"):
        build_backend("faiss", tmp_path, kind="pq")
    with pytest.raises(ValueError, match="recall must be a share"):
        build_backend("faiss", tmp_path, recall=98)


def test_backends_that_are_not_there_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_index().save(tmp_path)
    with pytest.raises(ValueError, match="a backend is one of faiss, lancedb, qdrant"):
        open_backend("milvus", tmp_path)
    with pytest.raises(ImportError, match=r"this backend needs nowhere_at_all: pip install 'oner\[search\]'"):
        library("nowhere_at_all", "search")
    monkeypatch.setattr(retrieval_backend, "__package__", "transformers_modules.org.model")
    with pytest.raises(ImportError, match="install oner"):
        open_backend("faiss", tmp_path)


def test_the_command_line_offers_all_of_them() -> None:
    assert oner_search_options.BACKENDS == retrieval_backend.BACKENDS


def test_a_backend_that_was_not_built_is_named(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    make_index().save(tmp_path)
    with pytest.raises(IndexFileError, match="no such file; build it: .*--backend faiss"):
        open_backend("faiss", tmp_path)
    (tmp_path / "faiss.json").write_text("{}")
    with pytest.raises(IndexFileError, match="not what oner-search-backend wrote"):
        open_backend("faiss", tmp_path)


@pytest.mark.parametrize("name", ["lancedb", "qdrant"])
def test_a_database_is_replaced_when_the_new_one_is_whole(tmp_path: Path, name: str) -> None:
    pytest.importorskip({"qdrant": "qdrant_client"}.get(name, name))
    make_index().save(tmp_path)
    options = {"url": ":memory:"} if name == "qdrant" else {}
    first = build_backend(name, tmp_path, **options)
    make_index(seed=1).save(tmp_path)
    second = build_backend(name, tmp_path, **options)
    wanted = make_index(seed=1).answers(queries(), top_k=3)
    assert [[one["index"] for one in found] for found in second.answers(queries(), top_k=3)] == [
        [one["index"] for one in found] for found in wanted
    ]
    if name == "lancedb":
        import lancedb

        assert len(lancedb.connect(str(tmp_path / "lancedb")).list_tables().tables) == 1
        assert first.table.name != second.table.name


def test_a_database_of_earlier_items_is_refused_until_it_is_built_again(tmp_path: Path) -> None:
    pytest.importorskip("lancedb")
    index = RetrievalIndex(WIDTH)
    index.add(torch.eye(2, WIDTH), [{"licence": "MIT"}, {"licence": "BSD"}])
    index.save(tmp_path)
    build_backend("lancedb", tmp_path)

    # the same embeddings, and so the same file of them, with other items
    index.items[1]["licence"] = "MIT"
    index.save(tmp_path)
    with pytest.raises(IndexFileError, match="embeddings or items that have been replaced"):
        open_backend("lancedb", tmp_path)
    assert build_stale(tmp_path) == ["lancedb"]
    assert len(open_backend("lancedb", tmp_path).answers(queries()[:1], where="licence=MIT")[0]) == 2


@pytest.mark.parametrize(
    ("items", "where", "right"),
    [
        ([{"a": 1}, {"a": "1"}], "a=1", 2),
        ([{"a": ["x"]}, {"a": ["y"]}], "a!=x", 2),
        ([{"a": 2**64 + 1}, {"a": 2**64}], f"a={2**64}", 1),
        ([{"a`b": 1}, {"a`b": 2}], "a`b=1", 1),
    ],
    ids=["mixed", "lists", "beyond 64 bits", "backtick"],
)
def test_a_column_that_only_exact_search_compares_is_refused_by_lancedb(
    tmp_path: Path, items: list, where: str, right: int
) -> None:
    pytest.importorskip("lancedb")
    index = RetrievalIndex(WIDTH)
    index.add(torch.randn(2, WIDTH), items)
    assert len(index.answers(queries()[:1], where=where)[0]) == right
    index.save(tmp_path)
    with pytest.raises(ValueError, match=r"lancedb cannot compare the column .* mixes numbers and texts"):
        build_backend("lancedb", tmp_path).answers(queries(), where=where)


def test_lancedb_keeps_the_names_of_its_own_columns(tmp_path: Path) -> None:
    pytest.importorskip("lancedb")
    index = RetrievalIndex(WIDTH)
    index.add(torch.randn(1, WIDTH), [{"oner_id": 7, "a": None}])
    index.save(tmp_path)
    with pytest.raises(ValueError, match="a column 'oner_id', a name that the table in lancedb needs"):
        build_backend("lancedb", tmp_path)

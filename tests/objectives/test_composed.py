"""Composed image retrieval: the loss by hand, a batch in pieces, and rows of every form it is published in."""

import copy
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from tiny_finetuning import emoji, write_momo
from tiny_oner import joint_batch, randomised, text_of, tiny_config

from oner import OneRModel
from oner.processing.data.collation import Example
from oner.processing.data.composed_rows import References, open_composed
from oner.processing.data.row_checks import PairDataError
from oner.training.objectives.composed import ComposedObjective, ComposedObjectiveArguments
from oner.training.run.gradient_cache import loss_and_gradients
from oner.training.tasks.composed import AutoModelForComposedRetrieval, ComposedArguments, evaluator


def student(**fields):
    torch.manual_seed(2)
    return randomised(OneRModel(tiny_config(**fields))).eval()  # statistics of a batch would differ with its pieces


def batch(ids=(4, 9, 4, 7)):
    made = joint_batch([3, 5, 2, 4])
    pictures = torch.stack([made["pixel_values"], made["pixel_values"].roll(1, 0) * 0.7], 1)  # (B, 2, C, H, W)
    text = {name: made[name] for name in ("input_ids", "attention_mask")}
    # the second row's reference is the target of the last, the third's of its own and the first
    references = torch.tensor([-1, ids[3], ids[0], -2])
    return {**text, "pixel_values": pictures, "ids": torch.tensor(ids), "reference_ids": references}


def unit(vectors):
    return torch.nn.functional.normalize(vectors.double(), dim=-1)


def by_hand(model, given, temperature, references, dim=None):
    """Softmax over targets and references, right where they share the id; and the other way; of `dim` coordinates."""
    reference, target = given["pixel_values"].unbind(1)
    text = {name: given[name] for name in ("input_ids", "attention_mask")}
    query = unit(model(**text, pixel_values=reference).pooler_output[:, :dim])
    answers = unit(model(pixel_values=target).pooler_output[:, :dim])
    same = given["ids"][:, None] == given["ids"][None]
    keys, right = answers, same
    if references:
        keys = torch.cat([answers, unit(model(pixel_values=reference).pooler_output[:, :dim])])
        right = torch.cat([same, given["ids"][:, None] == given["reference_ids"][None]], 1)

    def loss(asking, asked, right):
        chances = (asking @ asked.T / temperature).softmax(1).log()
        return -((chances * right).sum(1) / right.sum(1)).mean()

    return (loss(query, keys, right) + loss(answers, query, same)) / 2


@pytest.mark.parametrize("references", [True, False])
@pytest.mark.parametrize("temperature", [None, 0.3])
def test_the_loss_is_the_sum_by_hand(references, temperature):
    model, given = student(), batch()
    told = ComposedObjectiveArguments(query_temperature=temperature, reference_negatives=references)
    taken = ComposedObjective(model, told)(model, given, 0.5)
    expected = by_hand(model, given, temperature or model.config.temperature, references)
    assert float(taken.loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    assert taken.parts.keys() == {"composed"}


def test_narrower_vectors_have_the_same_loss_of_their_own():
    model, given = student(), batch()
    told = ComposedObjectiveArguments(query_temperature=0.005, matryoshka_dims=[3], matryoshka_weights=[0.5])
    taken = ComposedObjective(model, told)(model, given, 0.5)
    whole, narrow = (float(by_hand(model, given, 0.005, True, dim).detach()) for dim in (None, 3))
    assert float(taken.parts["composed@3"]) == pytest.approx(narrow, abs=1e-4) and abs(whole - narrow) > 1e-3
    assert float(taken.loss.detach()) == pytest.approx(whole + narrow / 2, abs=2e-4)


@pytest.mark.parametrize("keep_weight", [0.0, 1.0])
@pytest.mark.parametrize("two_heads", [False, True])
def test_a_batch_in_pieces_has_the_gradients_of_the_whole(two_heads, keep_weight):
    model, given = student(two_heads=two_heads), batch()
    objective = ComposedObjective(model, ComposedObjectiveArguments(keep_weight=keep_weight))
    for teacher in objective.teachers():
        teacher.model.eval()
    objective(model, given, 0.5).loss.backward()
    whole = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    loss_and_gradients(Accelerator(cpu=True), objective, model, {"pairs": given}, 0.5, {"pairs": 2})
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) is (name not in whole), name
        if name in whole:
            assert torch.allclose(parameter.grad, whole[name], atol=1e-6), name
    # what no loss reaches is frozen, for engines over processes
    assert {name for name, one in model.named_parameters() if one.requires_grad} == whole.keys()


@pytest.mark.parametrize("chunks", [1, 2])
def test_what_is_kept_costs_nothing_at_the_start_and_is_the_mean_by_hand_later(chunks):
    model, given = student(), batch()
    told = ComposedObjectiveArguments(keep_weight=2.0)
    objective = ComposedObjective(model, told)
    objective.teacher.model.eval()
    before = copy.deepcopy(model)
    assert float(objective(model, given, 0.5).parts["keep"]) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)

    def alone(tower):
        reference, target = given["pixel_values"].unbind(1)
        words = text_of(given)
        return [
            unit(tower(**one).pooler_output) for one in ({"pixel_values": target}, {"pixel_values": reference}, words)
        ]

    with torch.no_grad():
        moved = [1 - (one * other).sum(-1) for one, other in zip(alone(model), alone(before), strict=True)]
    taken = loss_and_gradients(Accelerator(cpu=True), objective, model, {"pairs": given}, 0.5, {"pairs": chunks})
    expected = float(torch.stack(moved).mean())
    assert expected > 1e-3 and float(taken.parts["keep"]) == pytest.approx(expected, abs=1e-5)
    assert float(taken.loss) == pytest.approx(float(taken.parts["composed"]) + 2 * expected, abs=1e-5)
    objective.after_step()
    # the start does not follow
    assert all(map(torch.equal, objective.teacher.model.state_dict().values(), before.state_dict().values()))


def test_it_learns_what_to_answer():
    model, given = student().train(), batch(ids=(1, 2, 3, 4))
    objective = ComposedObjective(model, ComposedObjectiveArguments())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = objective(model, given, 0.5).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def cell(number):
    return {"bytes": emoji()[number][0], "path": f"{number}.png"}


def test_queries_take_their_targets_from_the_gallery(tmp_path):
    gallery = [{"image": cell(number), "id": str(number)} for number in range(5)]
    queries = [{"image": cell(7), "text": "with a dog", "target": 3}, {"image": cell(8), "text": "red", "target": 3}]
    pq.write_table(pa.Table.from_pylist(gallery), tmp_path / "some_gallery.parquet")
    pq.write_table(pa.Table.from_pylist(queries), tmp_path / "some_queries.parquet")
    rows = open_composed([str(tmp_path / "some_queries.parquet")])
    first, second = rows.take([0, 1])
    assert first["target_image"] == second["target_image"] == emoji()[3][0] and first["image"] == emoji()[7][0]
    assert first["id"] == second["id"] and rows.ids()[0] == rows.ids()[1]
    (tmp_path / "some_gallery.parquet").unlink()
    with pytest.raises(PairDataError, match="expected its gallery beside it, .*some_gallery.parquet"):
        open_composed([str(tmp_path / "some_queries.parquet")])


def write_queries(folder, queries) -> str:
    """A gallery of three, the second without a picture, and queries that are each right but for what they change."""
    gallery = [{"image": cell(0)}, {"image": None}, {"image": cell(2)}]
    pq.write_table(pa.Table.from_pylist(gallery), folder / "some_gallery.parquet")
    table = [{"image": cell(7), "text": "with a dog", "target": 2, **query} for query in queries]
    pq.write_table(pa.Table.from_pylist(table), folder / "some_queries.parquet")
    return str(folder / "some_queries.parquet")


@pytest.mark.parametrize(
    "query, expected",
    [
        ({"target": None}, "the target is null"),
        ({"target": 3}, "the target is row 3, and some_gallery.parquet has 3 rows"),
        ({"target": -1}, "the target is row -1"),
        ({"target": 1}, "the picture is null"),
        ({"image": None}, "the picture is null"),
        ({"image": {"bytes": b"", "path": None}}, "the picture is null"),
        ({"text": None}, "the text is null"),
        ({"text": " "}, "the text is empty"),
    ],
)
def test_a_bad_query_is_named_and_leaves_the_others(query, expected, tmp_path):
    source = write_queries(tmp_path, [{}, query, {"target": 0}])
    rows = open_composed([source], bad_rows="skip")
    assert list(rows.bad) == [1] and expected in rows.bad[1]
    assert len(rows.ids()) == 3 and [row["target_image"] for row in rows.take([0, 2])] == [
        cell(2)["bytes"],
        cell(0)["bytes"],
    ]
    with pytest.raises(PairDataError, match="1 of 3 rows"):
        open_composed([source])


@pytest.mark.parametrize(
    "column, value, expected",
    [
        ("target", 2.0, "the target must be a row of some_gallery.parquet, got float 2.0"),
        ("target", "2", "got str '2'"),
        ("target", True, "got bool True"),
        ("text", 7, "the text must be a string"),
        ("image", 7, "the picture must be bytes, a path"),
    ],
)
def test_a_column_of_another_type_is_named_row_by_row(column, value, expected, tmp_path):
    rows = open_composed([write_queries(tmp_path, [{column: value}] * 2)], bad_rows="skip")
    assert sorted(rows.bad) == [0, 1] and expected in rows.bad[0]


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"target_image": None}, "the picture is null"),
        ({"text": None}, "the text is null"),
        ({"id": 2.5}, "the id must be an int or a string, got float"),
        ({"id": [1]}, "the id must be an int or a string, got list"),
    ],
)
def test_a_bad_row_of_both_pictures_is_named(change, expected, tmp_path):
    row = {"image": cell(1), "text": "bigger", "target_image": cell(2), "id": None}
    pq.write_table(pa.Table.from_pylist([row, {**row, **change}]), tmp_path / "triples.parquet")
    rows = open_composed([str(tmp_path / "triples.parquet")], bad_rows="skip")
    assert list(rows.bad) == [1] and expected in rows.bad[1] and len(rows.ids()) == 2


def test_a_table_holds_both_pictures(tmp_path):
    table = [{"image": cell(1), "text": "bigger", "target_image": cell(2)}] * 2
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "triples.parquet")
    rows = open_composed([str(tmp_path / "triples.parquet")], clean=str.upper)
    assert [row["text"] for row in rows.take([0, 1])] == ["BIGGER", "BIGGER"] and len(set(rows.ids())) == 1
    pq.write_table(pa.table({"image": ["a.png"], "caption": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(PairDataError, match="without text, target_image: image, caption"):
        open_composed([str(tmp_path / "other.parquet")])


@pytest.mark.parametrize(
    "query, text",
    [
        ({"reference": "a", "target_hard": "b", "caption": "is red"}, "is red"),
        ({"candidate": "a", "target": "b", "captions": ["is red", "has a hat"]}, "is red and has a hat"),
    ],
    ids=["CIRR", "FashionIQ"],
)
def test_published_annotations_are_read(query, text, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(emoji()[0][0])
    wrong = [{**query, "captions" if "captions" in query else "caption": 3}, ["a", "b"]]
    (tmp_path / "cap.json").write_text(json.dumps([query, *wrong]), encoding="utf-8")
    rows = open_composed([str(tmp_path / "cap.json")], bad_rows="skip")
    (row,) = rows.take([0])
    assert (row["image"], row["target_image"]) == (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    assert row["text"] == text and sorted(rows.bad) == [1, 2]

    # CIRR takes a query's own reference out of the gallery, FashionIQ does not
    (tmp_path / "b.png").write_bytes(emoji()[1][0])
    (asked,) = evaluator([row, {**row, "image": row["target_image"]}], "set", ComposedArguments()).queries[:1]
    assert asked["choices"] == [0, 1] and asked["hidden"] == (1 if "caption" in query else None)
    with pytest.raises(PairDataError, match="2 of 3 rows"):
        open_composed([str(tmp_path / "cap.json")])


def chain(folder, as_paths):
    """Three queries, the target of each the reference of the next; the last asks for what the first does."""
    pictures = [emoji()[number][0] for number in range(3)]
    if as_paths:
        for number, content in enumerate(pictures):
            (folder / f"{number}.png").write_bytes(content)
        pictures = [f"{number}.png" for number in range(3)]
    steps = [(0, 1), (1, 2), (2, 1)]
    rows = [{"image": pictures[a], "target_image": pictures[b], "text": f"is {b}"} for a, b in steps]
    pq.write_table(pa.Table.from_pylist(rows), folder / "chain.parquet")
    return open_composed([str(folder / "chain.parquet")])


@pytest.mark.parametrize("as_paths", [False, True])
def test_a_reference_that_is_a_target_has_its_id_and_one_place_in_the_gallery(as_paths, tmp_path):
    rows = chain(tmp_path, as_paths)
    first, second, third = rows.take([0, 1, 2])
    assert first["id"] == third["id"] == second["reference_id"] and second["id"] == third["reference_id"]
    assert len({first["id"], second["id"], first["reference_id"]}) == 3
    assert References()([Example(None, row, None) for row in rows.take([1])])["reference_ids"] == rows.ids()[0]
    made = evaluator(rows, "set", ComposedArguments())
    assert len(made.gallery) == 3 and [query["choices"] for query in made.queries] == [[0, 1], [2, 0], [0, 2]]


def test_ids_of_a_table_are_its_references_too_and_must_be_ids(tmp_path):
    table = [{"image": cell(number), "text": "x", "target_image": cell(number + 1), "id": 7} for number in range(2)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "triples.parquet")
    rows = open_composed([str(tmp_path / "triples.parquet")])
    assert [row["reference_id"] == 7 for row in rows.take([0, 1])] == [False, True]
    # two pictures of one id stay two in the gallery
    assert len(evaluator(rows, "set", ComposedArguments()).gallery) == 3
    pq.write_table(pa.Table.from_pylist([{**row, "id": 0.5} for row in table]), tmp_path / "triples.parquet")
    with pytest.raises(PairDataError, match="the id must be an int or a string, got float"):
        open_composed([str(tmp_path / "triples.parquet")])


def test_a_family_without_a_joint_embedding_is_refused(tmp_path):
    directory = write_momo(tmp_path / "momo")
    with pytest.raises(ValueError, match="'momo' has no model that embeds a picture with words.*expected oner"):
        AutoModelForComposedRetrieval.from_pretrained(directory)

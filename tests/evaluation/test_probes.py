"""Probes of frozen features: features by hand, what can be learned is, LARS by its formula, sets in official files."""

import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import inputs_of
from PIL import Image
from tiny_oner import joint_batch

from oner.processing.data.row_checks import PairDataError
from oner.training.evaluation.features import image_features, pooled, text_features, text_pair_features
from oner.training.evaluation.image_sets import SETS, digits, open_labelled_images, open_named
from oner.training.evaluation.linear_probe import LinearRecipe, ProbeHead, fixed_features, lars, linear_probe
from oner.training.evaluation.probe import Split, probe

pytest.importorskip("sklearn")


def clouds(count: int, classes: int = 3, width: int = 6, seed: int = 0, spread: float = 0.3) -> Split:
    """Points round a corner of their class, classes in unequal numbers."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, generator=generator) ** 2 * classes).long()  # (n,)
    corners = torch.eye(width)[:classes]
    features = corners[labels] + spread * torch.randn(count, width, generator=generator)
    return Split(features, [f"class {label}" for label in labels.tolist()])


def test_features_are_states_of_the_tower(family):
    model = family.build()
    for kind in ("text", "image"):
        with torch.no_grad():
            output = model(**inputs_of(model, kind, joint_batch([3, 5])))
        states = output.last_hidden_state
        assert torch.equal(pooled(output), states[:, 0])
        real = {"text": [3, 5], "image": [16, 16]}[kind]
        means = torch.stack([state[1 : 1 + count].mean(0) for state, count in zip(states, real, strict=True)])
        assert torch.allclose(pooled(output, "mean"), means, atol=1e-6)
    with pytest.raises(ValueError, match="pool is 'max'; expected one of cls, mean"):
        pooled(output, "max")


def test_features_are_in_the_order_of_the_rows():
    """Whatever the batches; a text that occurs twice is read once."""
    read = []

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids=None, attention_mask=None, pixel_values=None):
            rows = input_ids if pixel_values is None else pixel_values.flatten(1)
            read.append(len(rows))
            return SimpleNamespace(last_hidden_state=rows.float().sum(1)[:, None, None])

    def processor(images=None, text=None, **options):
        if images is not None:
            return {"pixel_values": torch.stack([torch.tensor(np.array(one)).float() for one in images])}
        ids = torch.tensor([[len(one)] for one in text])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    texts = ["four", "seventy", "four", "a"]
    assert text_features(Tower(), processor, texts, batch_size=2).flatten().tolist() == [4, 7, 4, 1]
    assert read == [2, 1]
    images = [Image.new("RGB", (1, 1), (value, 0, 0)) for value in (5, 3, 9)]
    assert image_features(Tower(), processor, images, batch_size=2).flatten().tolist() == [5, 3, 9]
    with pytest.raises(ValueError, match="no pictures to read"):
        image_features(Tower(), processor, [])


def test_two_texts_are_held_against_each_other():
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
    assert text_pair_features(first, second).tolist() == [[1, 2, 3, -1, 2, 3, 3, -2]]


def test_a_probe_reads_what_is_there_and_nothing_else():
    train, test = clouds(300), clouds(200, seed=1)
    values = probe(train, test)
    assert values["logistic_accuracy"] > 0.9 and values["knn_accuracy"] > 0.9
    common = max(set(train.labels), key=train.labels.count)
    assert values["chance"] == pytest.approx(test.labels.count(common) / 200)
    # classes of unequal size: the mean over classes is another number
    assert values["logistic_mean_recall"] != values["logistic_accuracy"]
    # the same features with labels that say nothing
    order = np.random.default_rng(0).permutation(300)
    shuffled = Split(train.features, [train.labels[place] for place in order])
    assert probe(shuffled, test)["logistic_accuracy"] < 0.75


def test_the_strength_is_chosen_on_rows_that_the_seed_holds_out():
    train, test = clouds(120, spread=1.0), clouds(100, seed=1, spread=1.0)
    values = [probe(train, test, seed) for seed in (0, 0, 1, 2, 3)]
    assert values[0] == values[1]
    assert len({value["logistic_accuracy"] for value in values}) > 1
    assert len({value["knn_accuracy"] for value in values}) == 1


def test_a_rare_class_of_the_test_alone_counts_as_wrong():
    train, test = clouds(100), clouds(50, seed=1)
    more = Split(torch.cat([test.features, torch.ones(10, 6)]), [*test.labels, *["rare"] * 10])
    assert probe(train, more)["logistic_accuracy"] <= 50 / 60


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (Split(torch.zeros(0, 2), []), Split(torch.zeros(1, 2), ["a"]), "no rows of training"),
        (Split(torch.zeros(3, 2), ["a", "b"]), Split(torch.zeros(1, 2), ["a"]), "3 features and 2 labels of training"),
        (Split(torch.zeros(2, 2), ["a", "a"]), Split(torch.zeros(1, 2), ["a"]), "all rows of training are of the"),
        (
            Split(torch.zeros(2, 2), ["a", "b"]),
            Split(torch.zeros(1, 2), ["c"]),
            "no class in common: training has",
        ),
    ],
)
def test_what_cannot_be_probed_is_refused(train, test, message):
    with pytest.raises(ValueError, match=message):
        probe(train, test)


def test_lars_is_the_papers():
    """Two steps by hand; the trust of the matrix is .001 |p| / |g|, that of the bias 1."""
    head = ProbeHead(4, 3)
    weight, bias = head[1].weight, head[1].bias
    expected = [weight.detach().clone().double(), bias.detach().clone().double()]
    buffers = [torch.zeros_like(one) for one in expected]
    optimiser = lars(head, momentum=0.9)
    for step in range(2):
        gradients = [torch.full_like(weight, 0.5 + step), torch.full_like(bias, 2.0)]
        weight.grad, bias.grad = gradients
        for group in optimiser.param_groups:
            group["lr"] = 0.7
        optimiser.step()
        for place, gradient in enumerate(gradients):
            trust = 0.001 * expected[place].norm() / gradient.double().norm() if place == 0 else 1.0
            buffers[place] = 0.9 * buffers[place] + trust * gradient.double()
            expected[place] -= 0.7 * buffers[place]
    assert torch.allclose(weight.double(), expected[0], atol=1e-7) and torch.allclose(
        bias.double(), expected[1], atol=1e-6
    )


def test_maes_rate():
    recipe = LinearRecipe()
    assert recipe.rate(0, 16_384) == 0 and recipe.rate(5, 16_384) == pytest.approx(3.2)
    assert recipe.rate(10, 16_384) == pytest.approx(6.4) and recipe.rate(50, 16_384) == pytest.approx(3.2)
    assert recipe.rate(90, 16_384) == pytest.approx(0, abs=1e-9)


def test_maes_probe_learns():
    train, test = clouds(400), clouds(200, seed=1)
    recipe = LinearRecipe(base_learning_rate=100.0, batch_size=64, epochs=20, warmup_epochs=2)
    assert linear_probe(train, test, recipe)["linear_accuracy"] > 0.85
    untrained = linear_probe(train, test, LinearRecipe(epochs=0))["linear_accuracy"]
    assert untrained < 0.75
    before = torch.get_rng_state()
    linear_probe(train, test, LinearRecipe(epochs=0))
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_has_every_row_once_in_another_order():
    features = torch.arange(10.0)[:, None]
    epochs = fixed_features(features, torch.arange(10), batch_size=4)
    seen = [torch.cat([labels for _, labels in epochs(epoch)]).tolist() for epoch in (0, 0, 1)]
    assert seen[0] == seen[1] != seen[2] and sorted(seen[0]) == sorted(seen[2]) == list(range(10))
    assert all(torch.equal(rows[:, 0].long(), labels) for rows, labels in epochs(3))


def test_digits_part_their_rows_by_class():
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1438, 359) and set(test.labels) == set(range(10))
    assert all(abs(test.labels.count(label) / train.labels.count(label) - 0.25) < 0.02 for label in range(10))
    assert np.array(train[0]["image"]).shape == (8, 8) and np.array(train[0]["image"]).max() <= 255


def paint(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def test_a_folder_and_a_table_of_labelled_images(tmp_path):
    for number in range(2):
        paint(tmp_path / "cat" / f"{number}.png", (255, 0, 0))
        paint(tmp_path / "dog" / f"{number}.png", (0, 255, 0))
    rows = open_labelled_images(str(tmp_path))
    assert rows.labels == ["cat", "cat", "dog", "dog"] and rows[3]["label"] == "dog"
    (tmp_path / "rows.csv").write_text("file_name,breed\ncat/0.png,tabby\ndog/1.png,\ndog/0.png,husky\n")
    rows = open_labelled_images(str(tmp_path / "rows.csv"), "breed")
    assert rows.labels == ["tabby", "husky"] and rows[1]["image"].endswith("dog/0.png")
    with pytest.raises(PairDataError, match="no column 'age' for the labels"):
        open_labelled_images(str(tmp_path / "rows.csv"), "age")


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("labels", [["cat", "None", "NA", "null", "none", "nan"], ["01", "1", "007"], ["1", "1.0"]])
def test_labels_of_a_csv_are_the_texts_that_are_written(tmp_path, labels, ending):
    """None is taken for a missing one, and no two for one number."""
    for number in range(len(labels)):
        paint(tmp_path / f"{number}.png", (255, 0, 0))
    between = {"csv": ",", "tsv": "\t"}[ending]
    lines = [f"file_name{between}label", *(f"{number}.png{between}{label}" for number, label in enumerate(labels))]
    table = tmp_path / f"rows.{ending}"
    table.write_text("\n".join(lines) + "\n")
    rows = open_labelled_images(str(table))
    assert rows.labels == labels and rows[1]["image"].endswith("1.png")


def test_a_csv_of_labels_that_cannot_be_read_names_the_row(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_bytes(b"file_name,label\n0.png,cat\n1.png,caf\xe9\n")
    with pytest.raises(PairDataError, match=r"1 of 2 rows cannot be used .*\n  row 1: is not UTF-8 \(line 3\)"):
        open_labelled_images(str(table))
    table.write_text("file_name,label\n")
    with pytest.raises(PairDataError, match="no row has a label in the column 'label'"):
        open_labelled_images(str(table))


def test_the_fifteen_sets_are_those_of_table_3():
    assert len(SETS) == 15
    assert np.mean([one.reported for one in SETS.values()]) == pytest.approx(83.63, abs=0.01)


def test_sets_are_read_in_their_official_files(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 3), ("t10k", 2)):
        pixels = np.arange(count * 784, dtype=np.uint64).astype(np.uint8).tobytes()
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels)
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + bytes(range(count)))
    rows = open_named("mnist", str(tmp_path), "train")
    assert [rows[place]["label"] for place in range(len(rows))] == [0, 1, 2]
    assert len(open_named("mnist", str(tmp_path), "test")) == 2
    # two parts to learn from
    for part, count in (("train", 2), ("valid", 1), ("test", 1)):
        for name in ("positive", "negative"):
            for number in range(count):
                paint(tmp_path / "rendered-sst2" / part / name / f"{number}.png", (number, 0, 0))
    assert len(open_named("sst", str(tmp_path), "train")) == 6
    # no parts at all: so many of a class, the same each time
    for name in ("Forest", "River"):
        for number in range(1, 33):
            paint(tmp_path / "caltech101" / "101_ObjectCategories" / name / f"image_{number:04d}.jpg", (number, 0, 0))
    paint(tmp_path / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google" / "image_0001.jpg", (0, 0, 0))
    train, test = (open_named("caltech101", str(tmp_path), part) for part in ("train", "test"))
    assert (len(train), len(test)) == (60, 4) and not set(train.items.indices) & set(test.items.indices)
    paint(tmp_path / "imagenet" / "val" / "n01440764" / "a.png", (1, 2, 3))
    assert open_named("imagenet", str(tmp_path), "test").labels == ["n01440764"]


def test_a_set_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PairDataError, match="food101: torchvision finds no official files in"):
        open_named("food101", str(tmp_path), "train")
    with pytest.raises(PairDataError, match="imagenet/train: no such folder"):
        open_named("imagenet", str(tmp_path), "train")
    with pytest.raises(ValueError, match="unknown set of images 'food'; expected one of imagenet, food101"):
        open_named("food", str(tmp_path), "train")

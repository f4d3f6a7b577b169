"""Opens labelled images: the fifteen sets of MoMo's Table 3 by name, scikit-learn's digits, and any folder or table.

A row is {"image": anything that `open_image` opens, "label"}. torchvision reads a set's official files and splits; if
a
set has no official splits, they are drawn with a fixed seed in the sizes that CLIP uses.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import datasets as official

from oner.processing.data.row_checks import PairDataError

from .labels import IMAGE_COLUMNS, LABEL_COLUMNS, find_column, load_source, pictures_of

Part = Literal["train", "test"]
SPLIT_SEED = 0  # for sets without official splits


class LabelledImages(Sequence):
    """Lazily read rows of images and labels. `images` and `labels` have the same length."""

    def __init__(self, images: Sequence[Any], labels: Sequence[Hashable], key: str | None = None) -> None:
        self.images = images
        self.labels = labels
        self.key = key  # of the image in table rows

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        return {"image": image if self.key is None else image[self.key], "label": self.labels[index]}


class OfficialImages(Sequence):
    """A torchvision set, whose items are (image, class)."""

    def __init__(self, items: Dataset) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.items[index]
        return {"image": image, "label": label}


def open_labelled_images(
    source: str, label_column: str | None = None, image_column: str | None = None
) -> LabelledImages:
    """
    Opens a folder with one folder of images per class, or a table, saved data set or name on the Hub with a column of
    labels, which are numbers or names. Rows without a label are skipped.

    Raises:
        PairDataError: the source or column does not exist, there are several splits, or no row has a label.
    """
    data, folder = load_source(source)
    image_column = find_column(data, image_column, IMAGE_COLUMNS, "pictures", source)
    label_column = find_column(data, label_column, LABEL_COLUMNS, "labels", source)

    # if a data set names its classes, use the names: numbers of two sources may differ in meaning
    kind = data.features[label_column]
    labels = data[label_column][:]
    if isinstance(kind, datasets.ClassLabel):
        labels = [None if label is None or label < 0 else kind.int2str(label) for label in labels]
    images = pictures_of(data, image_column, folder)
    if isinstance(images.features[image_column], datasets.Image):
        images = images.cast_column(image_column, datasets.Image(decode=False))  # decoded as the processor does it
    named = [place for place, label in enumerate(labels) if label not in (None, "")]
    if not named:
        raise PairDataError(f"{source}: no row has a label in the column {label_column!r}")
    return LabelledImages(images.select(named), [labels[place] for place in named], image_column)


def digits(part: Part, seed: int = 0) -> LabelledImages:
    """
    scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; a fifth of each class, drawn by `seed`, is the test set.
    """
    from sklearn.datasets import load_digits

    drawn = load_digits()
    chosen = _places(part, drawn.target, seed, test_share=0.2)
    pictures = [Image.fromarray((drawn.images[place] * 255 / 16).astype(np.uint8)) for place in chosen]
    return LabelledImages(pictures, [int(drawn.target[place]) for place in chosen])


def _places(
    part: Part,
    labels: Iterable[Hashable],
    seed: int,
    test_share: float | None = None,
    train: int | None = None,
    test: int | None = None,
) -> list[int]:
    """Indices of a split in order: a number or share of each class; the rest belongs to the other split."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        groups[label].append(place)
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for _, places in sorted(groups.items()):
        places = generator.permutation(places).tolist()
        begin = round(len(places) * (1 - test_share)) if train is None else train
        chosen += places[:begin] if part == "train" else places[begin:][:test]
    return sorted(chosen)


Open = Callable[[str, Part, bool], Sequence[Mapping[str, Any]]]


def _folder(name: str, test: str) -> Open:
    """Class folders in ROOT/NAME/train and ROOT/NAME/TEST. Own code, since torchvision's ImageNet would unpickle."""

    def rows(root: str, part: Part, download: bool) -> LabelledImages:
        place = Path(root) / name / ("train" if part == "train" else test)
        if not place.is_dir():
            raise PairDataError(f"{place}: no such folder; expected it to contain one folder of pictures per class")
        return open_labelled_images(str(place))

    return rows


def _hub(name: str, image: str, label: str) -> Open:
    """A set on the Hub, since torchvision's CIFAR unpickles its files, and we never unpickle."""

    def rows(root: str, part: Part, download: bool) -> LabelledImages:
        data = datasets.load_dataset(name, split=part).cast_column(image, datasets.Image(decode=False))
        return LabelledImages(data, data[label][:], image)

    return rows


def _official(make: Callable[..., Dataset], train: Iterable[Any], test: Iterable[Any], key: str = "split") -> Open:
    """A torchvision set, with the names of its training and test splits."""

    def rows(root: str, part: Part, download: bool) -> OfficialImages:
        names = train if part == "train" else test
        return OfficialImages(ConcatDataset([make(root, **{key: name}, download=download) for name in names]))

    return rows


def _drawn(make: Callable[..., Dataset], labels: Callable[[Any], Sequence[int]], train: int, test: int | None) -> Open:
    """A set without official splits: a number of images per class for training, and a number, or all others, for
    testing."""

    def rows(root: str, part: Part, download: bool) -> OfficialImages:
        items = make(root, download=download)
        return OfficialImages(Subset(items, _places(part, labels(items), SPLIT_SEED, train=train, test=test)))

    return rows


class NamedSet(NamedTuple):
    """A set of Table 3: how to open it, and MoMo's (base) result in per cent."""

    open: Open
    reported: float


SETS = {
    "imagenet": NamedSet(_folder("imagenet", "val"), 75.7),
    "food101": NamedSet(_official(official.Food101, ["train"], ["test"]), 90.7),
    "cifar10": NamedSet(_hub("uoft-cs/cifar10", "img", "label"), 95.0),
    "cifar100": NamedSet(_hub("uoft-cs/cifar100", "img", "fine_label"), 80.5),
    "cars": NamedSet(_official(official.StanfordCars, ["train"], ["test"]), 71.6),
    "aircraft": NamedSet(_official(official.FGVCAircraft, ["trainval"], ["test"]), 51.2),
    "dtd": NamedSet(_official(official.DTD, ["train", "val"], ["test"]), 79.7),
    "pets": NamedSet(_official(official.OxfordIIITPet, ["trainval"], ["test"]), 91.7),
    "caltech101": NamedSet(_drawn(official.Caltech101, lambda items: items.y, 30, None), 92.2),
    "flowers102": NamedSet(_official(official.Flowers102, ["train", "val"], ["test"]), 97.8),
    "mnist": NamedSet(_official(official.MNIST, [True], [False], "train"), 97.0),
    "stl10": NamedSet(_official(official.STL10, ["train"], ["test"]), 98.2),
    "eurosat": NamedSet(_drawn(official.EuroSAT, lambda items: items.targets, 1000, 500), 95.8),
    "gtsrb": NamedSet(_official(official.GTSRB, ["train"], ["test"]), 80.7),
    "sst": NamedSet(_official(official.RenderedSST2, ["train", "val"], ["test"]), 56.7),
}


def open_named(name: str, root: str, part: Part, download: bool = False) -> Sequence[Mapping[str, Any]]:
    """
    A split of a set of Table 3, from its official files in `root`, downloaded if `download`.

    Raises:
        ValueError: the name is unknown.
        PairDataError: the files are missing.
    """
    if name not in SETS:
        raise ValueError(f"unknown set of images {name!r}; expected one of {', '.join(SETS)}")
    try:
        return SETS[name].open(root, part, download)
    except (RuntimeError, OSError) as error:
        raise PairDataError(f"{name}: torchvision finds no official files in {root}: {error}") from error

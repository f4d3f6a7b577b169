"""Batches of small real pictures through the collator, as training reads them."""

import dataclasses

import datasets
import pyarrow.parquet as pq
from torch.utils.data import DataLoader

from oner.processing.data.augmentation import Crop, TrainingImageTransform
from oner.processing.data.collation import Collator, Reader
from oner.processing.data.layouts import JointLayout, SpecialTokens
from oner.processing.data.masking import ALL_PATCHES, Dropping, Masking, Replacement
from oner.processing.data.quarantine import StandIns
from oner.processing.data.sampling import PairBatchSampler
from oner.processing.data.sources import PairTrainingSet


def real_pairs(emoji_folder, count=40):
    """Encoded pictures, and one caption of each."""
    table = pq.read_table(emoji_folder / "test_style.parquet").slice(0, count)
    pictures = [cell["bytes"] for cell in table["image"].to_pylist()]
    return pictures, [captions[0] for captions in table["captions"].to_pylist()]


def dataset_of(pairs, count=None, **changes):
    """The first rows as a data set, with other columns or cells."""
    pictures, texts = pairs
    return datasets.Dataset.from_dict({"image": pictures[:count], "text": texts[:count], **changes})


def special_of(tokenizer, **changes):
    """The ids of a vocabulary that was trained here."""
    ids = {"image": 1, "cls": 3, "mask": 4, "pad": 0, "vocab_size": len(tokenizer)}
    return SpecialTokens(**{**ids, "others": tokenizer.all_special_ids, **changes})


def collator_of(tokenizer, image_transform=None, layout=JointLayout, seed=3, source="the data set", **options):
    """Of pairs in patches of 8; options of the masking, of the special ids or of the reader."""
    if image_transform is None:
        crop = Crop(crop_margin=0.2, horizontal_flip=0.5, color_jitter=0.3, rand_augment="rand-m7-n2")
        image_transform = TrainingImageTransform(16, crop)
    masking = Masking(**taken(options, [one.name for one in dataclasses.fields(Masking)]))
    special = special_of(tokenizer, **taken(options, ["image", "cls", "mask", "pad", "vocab_size"]))
    where = layout(special, options.pop("patch_size", 8))
    corruption = Dropping(masking) if masking.corruption == "drop" else Replacement(masking, special)
    keeping = options.pop("keeping", ALL_PATCHES)
    reader = Reader(tokenizer, image_transform, **options)
    return Collator(reader, where, corruption, seed=seed, source=source, keeping=keeping)


def taken(options, names):
    return {name: options.pop(name) for name in names if name in options}


def loader_of(rows, collator, steps, batch_size=4, workers=0, skipping=True, **options):
    """One process's batches; with `skipping`, bad rows are replaced."""
    sampler = PairBatchSampler(len(rows), batch_size, seed=3, total_steps=steps, **options)
    data = PairTrainingSet(rows, StandIns(rows, sampler.order, steps) if skipping else None)
    return DataLoader(data, batch_sampler=sampler, collate_fn=collator, num_workers=workers)

"""Batches of small real pictures through the collator, as training reads them."""

import datasets
import pyarrow.parquet as pq
from torch.utils.data import DataLoader

from oner.processing.data.augmentation import TrainingImageTransform
from oner.processing.data.collation import PairCollator
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


def collator_of(tokenizer, **options):
    layout = {"image_token_id": 1, "cls_token_id": 3, "mask_token_id": 4, "pad_token_id": 0, "patch_size": 8}
    transform = TrainingImageTransform(16, margin=0.2, hflip=0.5, color_jitter=0.3, rand_augment="rand-m7-n2")
    return PairCollator(tokenizer, transform, vocab_size=len(tokenizer), seed=3, **{**layout, **options})


def loader_of(rows, collator, steps, batch_size=4, workers=0, skipping=True, **options):
    """One process's batches; with `skipping`, bad rows are replaced."""
    sampler = PairBatchSampler(len(rows), batch_size, seed=3, total_steps=steps, **options)
    data = PairTrainingSet(rows, StandIns(rows, sampler.order, steps) if skipping else None)
    return DataLoader(data, batch_sampler=sampler, collate_fn=collator, num_workers=workers)

"""Pictures to train on, with or without captions beside them."""

import dataclasses
from pathlib import Path

import datasets

from oner.processing.data.rows import PairRows, PairStream
from oner.processing.pipeline_image_text_retrieval import list_pictures

from .arguments import DataArguments
from .opening import open_training_pairs

# what makes of a folder more than a heap of pictures
TABLES = ("metadata.*", "*.parquet", "*.tar", "state.json", "dataset_dict.json")


def open_training_pictures(data: DataArguments) -> PairRows | PairStream:
    """`open_training_pairs`, and folders of bare pictures besides, whose files' names stand where captions would."""
    sources = [_with_names(Path(entry)) if _is_heap(Path(entry)) else entry for entry in data.train_data]
    return open_training_pairs(dataclasses.replace(data, train_data=sources))


def _is_heap(folder: Path) -> bool:
    return folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in TABLES) and bool(list_pictures(folder))


def _with_names(folder: Path) -> datasets.Dataset:
    files = list_pictures(folder)
    return datasets.Dataset.from_dict({"file_name": files, "text": [Path(file).stem for file in files]})

"""Batches and answers: processor, data, masks, the retrieval pipeline and its index. Hub-portable, like modeling."""

from .image_augmentation import TrainingImageTransform
from .image_processing_vl import ImageDecodeError, OneRImageProcessor, open_image
from .pipeline_image_text_retrieval import ImageTextRetrievalPipeline
from .processing_vl import OneRProcessor
from .retrieval_index import RetrievalIndex
from .vl_collation import PairCollator
from .vl_dataset import PairDataError, open_pairs
from .vl_tokenizer import tokenizer_from_vocab, train_tokenizer

__all__ = [
    "ImageDecodeError",
    "ImageTextRetrievalPipeline",
    "OneRImageProcessor",
    "OneRProcessor",
    "PairCollator",
    "PairDataError",
    "RetrievalIndex",
    "TrainingImageTransform",
    "open_image",
    "open_pairs",
    "tokenizer_from_vocab",
    "train_tokenizer",
]

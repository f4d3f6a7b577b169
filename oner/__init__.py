"""One representation for text, images and the two mixed: unified vision-language models for transformers.

Importing this package registers its families with transformers' Auto classes and its pipeline by name, as soon as
transformers loads them; nothing heavy is imported before something is used.
"""

import os as _os
from typing import TYPE_CHECKING as _TYPE_CHECKING

_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if not _os.path.isdir(_os.path.join(__path__[0], "modeling")) and _os.path.isdir(_os.path.join(_root, "modeling")):
    __path__.append(_root)  # a source checkout: the rooms stand beside this folder

from .registration import watch as _watch  # noqa: E402

if _TYPE_CHECKING:
    from .modeling import (
        DiscreteVAE,
        DiscreteVAEConfig,
        OneRConfig,
        OneRForImageClassification,
        OneRForImageTextRetrieval,
        OneRForMaskedLM,
        OneRForPreTraining,
        OneRModel,
        SimlaConfig,
        SimlaForImageTextRetrieval,
        SimlaForMaskedLM,
        SimlaForPreTraining,
        SimlaForTextAssignment,
        SimlaForVisualEntailment,
        SimlaForVisualQuestionAnswering,
        SimlaForVisualReasoning,
        SimlaModel,
    )
    from .processing.data.sources import open_rows
    from .processing.image_processing_vl import OneRImageProcessor, open_image
    from .processing.pipeline_image_text_retrieval import ImageTextRetrievalPipeline
    from .processing.processing_vl import OneRProcessor
    from .processing.retrieval_index import RetrievalIndex
    from .processing.vl_tokenizer import tokenizer_from_vocab, train_tokenizer

__version__ = "0.1.0"

# family -> what transformers' auto classes give for it; a new family adds its entry here
_FAMILIES = {
    "oner": {
        "AutoConfig": "OneRConfig",
        "AutoModel": "OneRModel",
        "AutoModelForPreTraining": "OneRForPreTraining",
        "AutoModelForZeroShotImageClassification": "OneRForImageTextRetrieval",
        "AutoModelForMaskedLM": "OneRForMaskedLM",
        "AutoModelForImageClassification": "OneRForImageClassification",
        "AutoImageProcessor": "OneRImageProcessor",
        "AutoProcessor": "OneRProcessor",
    },
    "simla": {
        "AutoConfig": "SimlaConfig",
        "AutoModel": "SimlaModel",
        "AutoModelForPreTraining": "SimlaForPreTraining",
        "AutoModelForZeroShotImageClassification": "SimlaForImageTextRetrieval",
        "AutoModelForMaskedLM": "SimlaForMaskedLM",
        "AutoModelForVisualQuestionAnswering": "SimlaForVisualQuestionAnswering",
        "AutoModelForSequenceClassification": "SimlaForVisualEntailment",
        "AutoImageProcessor": "OneRImageProcessor",
        "AutoProcessor": "OneRProcessor",
    },
    # no family, but a part that SIMLA's needs: the image tokenizer
    "discrete_vae": {"AutoConfig": "DiscreteVAEConfig", "AutoModel": "DiscreteVAE"},
}

__all__ = [
    "DiscreteVAE",
    "DiscreteVAEConfig",
    "ImageTextRetrievalPipeline",
    "OneRConfig",
    "OneRForImageClassification",
    "OneRForImageTextRetrieval",
    "OneRForMaskedLM",
    "OneRForPreTraining",
    "OneRImageProcessor",
    "OneRModel",
    "OneRProcessor",
    "RetrievalIndex",
    "SimlaConfig",
    "SimlaForImageTextRetrieval",
    "SimlaForMaskedLM",
    "SimlaForPreTraining",
    "SimlaForTextAssignment",
    "SimlaForVisualEntailment",
    "SimlaForVisualQuestionAnswering",
    "SimlaForVisualReasoning",
    "SimlaModel",
    "open_image",
    "open_rows",
    "tokenizer_from_vocab",
    "train_tokenizer",
]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in ("modeling", "processing", "training"):
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # processing first: its own names are imported one by one, modeling's all at once
    processing = import_module(f"{__name__}.processing")
    room = processing if name in processing.__all__ else import_module(f"{__name__}.modeling")
    value = getattr(room, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "modeling", "processing", "training"})


_watch(_FAMILIES)

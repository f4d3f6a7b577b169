"""Batches and answers: processor, data, masks, the retrieval pipeline and its index. Published with every model.

Names are imported when they are used: a processor needs neither `datasets` nor timm, which take half a second each.
"""

from importlib import import_module as _import_module

# name -> file that defines it
_FILES = {
    "Collator": "data.collation",
    "ImageDecodeError": "image_processing_vl",
    "ImageTextMatchingPipeline": "pipeline_image_text_matching",
    "ImageTextRetrievalPipeline": "pipeline_image_text_retrieval",
    "PairDataError": "data.sources",
    "RetrievalIndex": "retrieval_index",
    "TrainingImageTransform": "data.augmentation",
    "VisionLanguageImageProcessor": "image_processing_vl",
    "VisionLanguageProcessor": "processing_vl",
    "VisualEntailmentPipeline": "pipeline_visual_entailment",
    "VisualGroundingPipeline": "pipeline_visual_grounding",
    "VisualQuestionAnsweringPipeline": "pipeline_visual_question_answering",
    "open_image": "image_processing_vl",
    "open_mixture": "data.mixture",
    "open_rows": "data.sources",
    "tokenizer_from_vocab": "vl_tokenizer",
    "train_tokenizer": "vl_tokenizer",
}
__all__ = [
    "Collator",
    "ImageDecodeError",
    "ImageTextMatchingPipeline",
    "ImageTextRetrievalPipeline",
    "PairDataError",
    "RetrievalIndex",
    "TrainingImageTransform",
    "VisionLanguageImageProcessor",
    "VisionLanguageProcessor",
    "VisualEntailmentPipeline",
    "VisualGroundingPipeline",
    "VisualQuestionAnsweringPipeline",
    "open_image",
    "open_mixture",
    "open_rows",
    "tokenizer_from_vocab",
    "train_tokenizer",
]


def __getattr__(name: str) -> object:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    # found once, then an attribute like any other
    value = getattr(_import_module(f"{__name__}.{_FILES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Unified vision-language models for transformers: one representation for text, images and both combined.

Importing this package registers its families with transformers' auto classes and its tasks with `pipeline`.
"""

import os as _os

# in a source checkout, modeling/, processing/ and training/ are beside this folder; installed, inside it
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if not _os.path.isdir(_os.path.join(__path__[0], "modeling")) and _os.path.isdir(_os.path.join(_root, "modeling")):
    __path__.append(_root)

from .modeling import (  # noqa: E402
    CodisConfig,
    CodisForImageTextRetrieval,
    CodisForMaskedLM,
    CodisForPreTraining,
    CodisForSequenceClassification,
    CodisForTextAssignment,
    CodisForVisualEntailment,
    CodisForVisualQuestionAnswering,
    CodisForVisualReasoning,
    CodisModel,
    DiscreteVAE,
    DiscreteVAEConfig,
    MomoConfig,
    MomoForImageClassification,
    MomoForImageTextRetrieval,
    MomoForMaskedLM,
    MomoForPreTraining,
    MomoForSequenceClassification,
    MomoForVisualQuestionAnswering,
    MomoModel,
    OneRConfig,
    OneRForImageClassification,
    OneRForImageTextRetrieval,
    OneRForMaskedLM,
    OneRForPreTraining,
    OneRForSequenceClassification,
    OneRModel,
    SimlaConfig,
    SimlaForImageTextRetrieval,
    SimlaForMaskedLM,
    SimlaForPreTraining,
    SimlaForSequenceClassification,
    SimlaForTextAssignment,
    SimlaForVisualEntailment,
    SimlaForVisualQuestionAnswering,
    SimlaForVisualReasoning,
    SimlaModel,
)
from .processing.data.sources import open_rows  # noqa: E402
from .processing.image_processing_vl import VisionLanguageImageProcessor, open_image  # noqa: E402
from .processing.pipeline_image_text_retrieval import ImageTextRetrievalPipeline  # noqa: E402
from .processing.processing_vl import VisionLanguageProcessor  # noqa: E402
from .processing.retrieval_index import RetrievalIndex  # noqa: E402
from .processing.vl_tokenizer import tokenizer_from_vocab, train_tokenizer  # noqa: E402
from .registration import register_family, register_pipelines  # noqa: E402

__version__ = "0.1.0"

# family -> the classes that transformers' auto classes return for it; a new family adds its entry here
FAMILIES = {
    "codis": {
        "AutoConfig": CodisConfig,
        "AutoModel": CodisModel,
        "AutoModelForPreTraining": CodisForPreTraining,
        "AutoModelForZeroShotImageClassification": CodisForImageTextRetrieval,
        "AutoModelForMaskedLM": CodisForMaskedLM,
        "AutoModelForVisualQuestionAnswering": CodisForVisualQuestionAnswering,
        "AutoModelForSequenceClassification": CodisForVisualEntailment,
        "AutoImageProcessor": VisionLanguageImageProcessor,
        "AutoProcessor": VisionLanguageProcessor,
    },
    "momo": {
        "AutoConfig": MomoConfig,
        "AutoModel": MomoModel,
        "AutoModelForPreTraining": MomoForPreTraining,
        "AutoModelForZeroShotImageClassification": MomoForImageTextRetrieval,
        "AutoModelForMaskedLM": MomoForMaskedLM,
        "AutoModelForImageClassification": MomoForImageClassification,
        "AutoModelForVisualQuestionAnswering": MomoForVisualQuestionAnswering,
        "AutoModelForSequenceClassification": MomoForSequenceClassification,
        "AutoImageProcessor": VisionLanguageImageProcessor,
        "AutoProcessor": VisionLanguageProcessor,
    },
    "oner": {
        "AutoConfig": OneRConfig,
        "AutoModel": OneRModel,
        "AutoModelForPreTraining": OneRForPreTraining,
        "AutoModelForZeroShotImageClassification": OneRForImageTextRetrieval,
        "AutoModelForMaskedLM": OneRForMaskedLM,
        "AutoModelForImageClassification": OneRForImageClassification,
        "AutoModelForSequenceClassification": OneRForSequenceClassification,
        "AutoImageProcessor": VisionLanguageImageProcessor,
        "AutoProcessor": VisionLanguageProcessor,
    },
    "simla": {
        "AutoConfig": SimlaConfig,
        "AutoModel": SimlaModel,
        "AutoModelForPreTraining": SimlaForPreTraining,
        "AutoModelForZeroShotImageClassification": SimlaForImageTextRetrieval,
        "AutoModelForMaskedLM": SimlaForMaskedLM,
        "AutoModelForVisualQuestionAnswering": SimlaForVisualQuestionAnswering,
        "AutoModelForSequenceClassification": SimlaForVisualEntailment,
        "AutoImageProcessor": VisionLanguageImageProcessor,
        "AutoProcessor": VisionLanguageProcessor,
    },
    # not a family: the image tokenizer that SIMLA needs
    "discrete_vae": {"AutoConfig": DiscreteVAEConfig, "AutoModel": DiscreteVAE},
}

for _model_type, _classes in FAMILIES.items():
    register_family(_model_type, _classes)
register_pipelines()

__all__ = [
    "CodisConfig",
    "CodisForImageTextRetrieval",
    "CodisForMaskedLM",
    "CodisForPreTraining",
    "CodisForSequenceClassification",
    "CodisForTextAssignment",
    "CodisForVisualEntailment",
    "CodisForVisualQuestionAnswering",
    "CodisForVisualReasoning",
    "CodisModel",
    "DiscreteVAE",
    "DiscreteVAEConfig",
    "ImageTextRetrievalPipeline",
    "MomoConfig",
    "MomoForImageClassification",
    "MomoForImageTextRetrieval",
    "MomoForMaskedLM",
    "MomoForPreTraining",
    "MomoForSequenceClassification",
    "MomoForVisualQuestionAnswering",
    "MomoModel",
    "OneRConfig",
    "OneRForImageClassification",
    "OneRForImageTextRetrieval",
    "OneRForMaskedLM",
    "OneRForPreTraining",
    "OneRForSequenceClassification",
    "OneRModel",
    "RetrievalIndex",
    "SimlaConfig",
    "SimlaForImageTextRetrieval",
    "SimlaForMaskedLM",
    "SimlaForPreTraining",
    "SimlaForSequenceClassification",
    "SimlaForTextAssignment",
    "SimlaForVisualEntailment",
    "SimlaForVisualQuestionAnswering",
    "SimlaForVisualReasoning",
    "SimlaModel",
    "VisionLanguageImageProcessor",
    "VisionLanguageProcessor",
    "open_image",
    "open_rows",
    "tokenizer_from_vocab",
    "train_tokenizer",
]

"""One representation for text, images and the two mixed: unified vision-language models for transformers.

Importing this package registers its families with transformers' Auto classes and its pipeline by name.
"""

import os as _os

_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if not _os.path.isdir(_os.path.join(__path__[0], "modeling")) and _os.path.isdir(_os.path.join(_root, "modeling")):
    __path__.append(_root)  # a source checkout: the rooms stand beside this folder

from transformers import (  # noqa: E402
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY  # noqa: E402

from .modeling import (  # noqa: E402
    OneRConfig,
    OneRForImageClassification,
    OneRForImageTextRetrieval,
    OneRForMaskedLM,
    OneRForPreTraining,
    OneRModel,
)
from .processing import (  # noqa: E402
    ImageTextRetrievalPipeline,
    OneRImageProcessor,
    OneRProcessor,
    RetrievalIndex,
    open_image,
    open_pairs,
    tokenizer_from_vocab,
    train_tokenizer,
)

__version__ = "0.1.0"

AutoConfig.register("oner", OneRConfig, exist_ok=True)
OneRConfig.register_for_auto_class()


class _RegisteredPipelines:
    """`config.custom_pipelines` as `pipeline()` reads it: empty, because the tasks are registered below.

    A checkpoint names its pipelines' code for those who lack oner; with such an entry `pipeline()` asks for trust
    even where an installed package serves the task. The entry itself stays in the instance, and in what is saved.
    """

    def __get__(self, config, owner=None) -> dict:
        return {}

    def __set__(self, config, value: dict) -> None:
        config.__dict__["custom_pipelines"] = value


OneRConfig.custom_pipelines = _RegisteredPipelines()
for _auto, _model in (
    (AutoModel, OneRModel),
    (AutoModelForPreTraining, OneRForPreTraining),
    (AutoModelForZeroShotImageClassification, OneRForImageTextRetrieval),
    (AutoModelForMaskedLM, OneRForMaskedLM),
    (AutoModelForImageClassification, OneRForImageClassification),
):
    _auto.register(OneRConfig, _model, exist_ok=True)
    _model.register_for_auto_class(_auto.__name__)
AutoImageProcessor.register(OneRConfig, image_processor_classes={"torchvision": OneRImageProcessor}, exist_ok=True)
OneRImageProcessor.register_for_auto_class()
AutoProcessor.register(OneRConfig, OneRProcessor, exist_ok=True)
OneRProcessor.register_for_auto_class()
PIPELINE_REGISTRY.register_pipeline(
    "image-text-retrieval",
    pipeline_class=ImageTextRetrievalPipeline,
    pt_model=AutoModelForZeroShotImageClassification,
    type="multimodal",
)

__all__ = [
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
    "open_image",
    "open_pairs",
    "tokenizer_from_vocab",
    "train_tokenizer",
]

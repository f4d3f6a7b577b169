"""Models: configurations and `PreTrainedModel` classes. Each file travels to the Hub inside every published model."""

from .configuration_oner import ONER_SIZES, OneRConfig
from .modeling_oner import (
    OneRForImageClassification,
    OneRForImageTextRetrieval,
    OneRForMaskedLM,
    OneRModel,
    OneRPreTrainedModel,
)
from .modeling_oner_pretraining import OneRForPreTraining

__all__ = [
    "ONER_SIZES",
    "OneRConfig",
    "OneRForImageClassification",
    "OneRForImageTextRetrieval",
    "OneRForMaskedLM",
    "OneRForPreTraining",
    "OneRModel",
    "OneRPreTrainedModel",
]

"""Models: configurations and `PreTrainedModel` classes. Each file travels to the Hub inside every published model."""

from .configuration_dvae import DISCRETE_VAE_SIZES, DiscreteVAEConfig
from .configuration_oner import ONER_SIZES, OneRConfig
from .configuration_simla import SIMLA_SIZES, SimlaConfig
from .modeling_dvae import DiscreteVAE
from .modeling_oner import (
    OneRForImageClassification,
    OneRForImageTextRetrieval,
    OneRForMaskedLM,
    OneRModel,
    OneRPreTrainedModel,
)
from .modeling_oner_pretraining import OneRForPreTraining
from .modeling_simla import SimlaForImageTextRetrieval, SimlaForMaskedLM, SimlaModel, SimlaPreTrainedModel
from .modeling_simla_pretraining import SimlaForPreTraining
from .modeling_simla_tasks import (
    SimlaForTextAssignment,
    SimlaForVisualEntailment,
    SimlaForVisualQuestionAnswering,
    SimlaForVisualReasoning,
)

__all__ = [
    "DISCRETE_VAE_SIZES",
    "ONER_SIZES",
    "SIMLA_SIZES",
    "DiscreteVAE",
    "DiscreteVAEConfig",
    "OneRConfig",
    "OneRForImageClassification",
    "OneRForImageTextRetrieval",
    "OneRForMaskedLM",
    "OneRForPreTraining",
    "OneRModel",
    "OneRPreTrainedModel",
    "SimlaConfig",
    "SimlaForImageTextRetrieval",
    "SimlaForMaskedLM",
    "SimlaForPreTraining",
    "SimlaForTextAssignment",
    "SimlaForVisualEntailment",
    "SimlaForVisualQuestionAnswering",
    "SimlaForVisualReasoning",
    "SimlaModel",
    "SimlaPreTrainedModel",
]

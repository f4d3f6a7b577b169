"""Models: configurations and `PreTrainedModel` classes. Every published model contains these files."""

from .configuration_codis import CODIS_SIZES, CodisConfig
from .configuration_dvae import DISCRETE_VAE_SIZES, DiscreteVAEConfig
from .configuration_momo import MOMO_SIZES, MomoConfig
from .configuration_oner import ONER_SIZES, OneRConfig
from .configuration_simla import SIMLA_SIZES, SimlaConfig
from .modeling_codis import (
    CodisForImageTextRetrieval,
    CodisForMaskedLM,
    CodisForPreTraining,
    CodisForSequenceClassification,
    CodisForTextAssignment,
    CodisForVisualEntailment,
    CodisForVisualQuestionAnswering,
    CodisForVisualReasoning,
    CodisModel,
    CodisPreTrainedModel,
)
from .modeling_dvae import DiscreteVAE
from .modeling_momo import (
    MomoForImageClassification,
    MomoForImageTextRetrieval,
    MomoForSequenceClassification,
    MomoForVisualQuestionAnswering,
    MomoModel,
    MomoPreTrainedModel,
)
from .modeling_momo_decoders import MomoForMaskedLM
from .modeling_momo_pretraining import MomoForPreTraining
from .modeling_oner import (
    OneRForImageClassification,
    OneRForImageTextRetrieval,
    OneRForMaskedLM,
    OneRForSequenceClassification,
    OneRModel,
    OneRPreTrainedModel,
)
from .modeling_oner_pretraining import OneRForPreTraining
from .modeling_simla import SimlaForImageTextRetrieval, SimlaForMaskedLM, SimlaModel, SimlaPreTrainedModel
from .modeling_simla_pretraining import SimlaForPreTraining
from .modeling_simla_tasks import (
    SimlaForSequenceClassification,
    SimlaForTextAssignment,
    SimlaForVisualEntailment,
    SimlaForVisualQuestionAnswering,
    SimlaForVisualReasoning,
)

__all__ = [
    "CODIS_SIZES",
    "DISCRETE_VAE_SIZES",
    "MOMO_SIZES",
    "ONER_SIZES",
    "SIMLA_SIZES",
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
    "CodisPreTrainedModel",
    "DiscreteVAE",
    "DiscreteVAEConfig",
    "MomoConfig",
    "MomoForImageClassification",
    "MomoForImageTextRetrieval",
    "MomoForMaskedLM",
    "MomoForPreTraining",
    "MomoForSequenceClassification",
    "MomoForVisualQuestionAnswering",
    "MomoModel",
    "MomoPreTrainedModel",
    "OneRConfig",
    "OneRForImageClassification",
    "OneRForImageTextRetrieval",
    "OneRForMaskedLM",
    "OneRForPreTraining",
    "OneRForSequenceClassification",
    "OneRModel",
    "OneRPreTrainedModel",
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
    "SimlaPreTrainedModel",
]

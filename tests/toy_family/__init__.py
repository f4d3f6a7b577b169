"""A small family of two portions, texts and pairs, added from outside by docs/adding_a_family.md and nothing else."""

from oner import VisionLanguageImageProcessor, VisionLanguageProcessor
from oner.registration import register_family
from oner.training.objectives.objective import OBJECTIVES

from .modeling_toy import ToyConfig, ToyForPreTraining, ToyModel

# the entry of oner/__init__.py, and the line of training/objectives/objective.py
register_family(
    "toy",
    {
        "AutoConfig": ToyConfig,
        "AutoModel": ToyModel,
        "AutoModelForPreTraining": ToyForPreTraining,
        "AutoImageProcessor": VisionLanguageImageProcessor,
        "AutoProcessor": VisionLanguageProcessor,
    },
)
OBJECTIVES["toy"] = ("toy_family.objective_toy", "ToyObjective", "ToyObjectiveArguments")

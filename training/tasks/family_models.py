"""Auto classes for tasks for which transformers has none."""

from typing import Any

from transformers import AutoConfig, PreTrainedModel


class FamilyModels:
    """
    An auto class for a task: loads the model class of the source's family.

    Args:
        what: Describes the model in messages: "has no model {what}".
        models: Model class by family; a new family adds its own.
    """

    def __init__(self, what: str, models: dict[str, type[PreTrainedModel]]):
        self.what = what
        self.models = models

    def from_pretrained(self, source: str, **options: Any) -> PreTrainedModel:
        """The model of the family of `source`. Raises `ValueError` for a family that has none."""
        # the run's configuration takes precedence
        config = options.get("config") or AutoConfig.from_pretrained(source)
        if config.model_type not in self.models:
            raise ValueError(
                f"family {config.model_type!r} has no model {self.what}; expected {' or '.join(self.models)}"
            )
        return self.models[config.model_type].from_pretrained(source, **options)

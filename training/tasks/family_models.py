"""Auto classes of tasks for which transformers has none."""

from typing import Any

from transformers import AutoConfig, PreTrainedModel


class FamilyModels:
    """
    Stands where transformers has no auto class: loads the model `what` of whichever family a directory is of.

    Args:
        what: what messages call it.
        models: by family; a new family adds its own.
    """

    def __init__(self, what: str, models: dict[str, type[PreTrainedModel]]):
        self.what = what
        self.models = models

    def from_pretrained(self, source: str, **options: Any) -> PreTrainedModel:
        """The model of the family that `source` is of. Raises `ValueError` for a family that has none."""
        # the run's configuration decides, where there is one
        config = options.get("config") or AutoConfig.from_pretrained(source)
        if config.model_type not in self.models:
            raise ValueError(
                f"family {config.model_type!r} has no model {self.what}; expected {' or '.join(self.models)}"
            )
        return self.models[config.model_type].from_pretrained(source, **options)

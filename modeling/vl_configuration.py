"""What the configurations of all families share: how they treat the pipelines that a repository names."""

from typing import Any

from transformers import PreTrainedConfig


class VisionLanguageConfig(PreTrainedConfig):
    """
    Keeps `custom_pipelines`, the list in config.json of the pipelines whose code lies beside the weights.

    `pipeline()` asks for trust as soon as a configuration has that attribute, even where an installed package serves
    the task. So where `oner` has registered its pipelines the list is set aside on load, and written back on save.
    Where it has not, the attribute stays, and `trust_remote_code=True` runs the code.
    """

    # `oner` sets both on the classes that it registers; on those that travel with the weights they stay so
    pipelines_are_registered = False
    # (model, directory) -> nothing: writes all code files beside what a model has saved there
    write_code = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._set_pipelines_aside()

    def save_pretrained(self, *args, **kwargs):
        super().save_pretrained(*args, **kwargs)
        # a pipeline that saves itself has set the attribute before
        self._set_pipelines_aside()

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        named = values.pop("pipelines_aside", {}) | values.get("custom_pipelines", {})
        return values | {"custom_pipelines": named} if named else values

    def _set_pipelines_aside(self) -> None:
        named = self.__dict__.get("custom_pipelines")
        if named and self.pipelines_are_registered:
            self.pipelines_aside = self.__dict__.get("pipelines_aside", {}) | named
            del self.custom_pipelines


__all__ = ["VisionLanguageConfig"]

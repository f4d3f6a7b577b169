"""Base of all configurations: the pipelines that a repository names, and ids of special tokens."""

from typing import Any

from transformers import PreTrainedConfig


class VisionLanguageConfig(PreTrainedConfig):
    """
    Handles `custom_pipelines`, the list in config.json of pipelines whose code is stored with the weights.

    `pipeline()` asks for trust if a configuration has that attribute, even if an installed package provides
    the task. So if `oner` has registered its pipelines, the list is removed on load and written back on save.
    Otherwise the attribute stays, and `trust_remote_code=True` runs the code.
    """

    # tokens that are not words
    special_ids = ("pad_token_id", "image_token_id", "cls_token_id", "mask_token_id")
    # `oner` sets both on the classes that it registers; classes loaded from a model repository keep these values
    pipelines_are_registered = False
    # (model, directory) -> nothing: writes all code files beside what a model has saved there
    write_code = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._set_pipelines_aside()

    def _check_special_ids(self) -> None:
        """Raises `ValueError` unless all ids that are not None are in the vocabulary and distinct."""
        ids = {name: getattr(self, name) for name in self.special_ids if getattr(self, name) is not None}
        outside = {name: value for name, value in ids.items() if not 0 <= value < self.vocab_size}
        if outside:
            raise ValueError(f"{outside} are not ids in [0, {self.vocab_size - 1}] (vocab_size {self.vocab_size})")
        if len(set(ids.values())) < len(ids):
            raise ValueError(f"the special ids must differ from each other, got {ids}")

    def save_pretrained(self, *args, **kwargs):
        super().save_pretrained(*args, **kwargs)
        # saving a pipeline sets the attribute before
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

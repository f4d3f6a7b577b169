"""Configuration of the toy family."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class ToyConfig(PreTrainedConfig):
    """Texts and images through the same layers; a pair is read as text and image apart."""

    model_type = "toy"
    pair_layout = "separate"

    vocab_size: int = 300
    hidden_size: int = 16
    image_size: int = 32
    patch_size: int = 16
    num_channels: int = 3
    max_text_length: int = 8
    dropout: float | int = 0.1
    pad_token_id: int | None = 0
    cls_token_id: int = 101
    mask_token_id: int = 103
    image_token_id: int = 1

    @classmethod
    def from_size(cls, size: str, **overrides) -> "ToyConfig":
        """There is one size."""
        return cls(**overrides)

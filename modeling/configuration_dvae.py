"""Configuration of the discrete image tokenizer (DALL-E's dVAE, whose codes BEiT and SIMLA predict)."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from .vl_configuration import VisionLanguageConfig

# name -> (hidden_size, blocks_per_group, num_codes, codebook_dim). base is DALL-E's; nano is for 32-pixel images and
# one CPU core
DISCRETE_VAE_SIZES = {"nano": (32, 2, 512, 64), "base": (256, 2, 8192, 128)}


@strict
class DiscreteVAEConfig(VisionLanguageConfig):
    r"""
    Configuration of a [`DiscreteVAE`]. The defaults are those of DALL-E's public weights, 53.79 M parameters in the
    encoder and 43.83 M in the decoder (Ramesh et al., 2021, appendix A.1, and its code).

    Args:
        num_codes (`int`): Size of the visual vocabulary.
        hidden_size (`int`): Channels of the encoder's first group; the four groups have 1, 2, 4 and 8 times as many.
        blocks_per_group (`int`): Residual blocks in each of the four groups of encoder and decoder.
        codebook_dim (`int`): Width of the decoder's code embeddings.
        num_channels (`int`): Colour channels of an image.
        image_size (`int`): Side of the training images in pixels; any multiple of 8 is accepted.
        decoder (`bool`): Whether to build the decoder. Computing codes needs the encoder alone.
        reconstruction (`"logit_laplace"` or `"squared"`): Reconstruction loss: DALL-E's logit-Laplace likelihood with
            a predicted scale per value, or the squared error. The first suits photographs; on drawings with plain
            backgrounds, the background soon dominates it.
        kl_weight (`float`): Weight of KL(codes || uniform), in nats per position, added to the reconstruction loss,
            a mean over values (BEiT's authors and others train without it).
        pixel_margin (`float`): `map_pixels` first maps pixels to [margin, 1 - margin] (DALL-E: .1).
    """

    model_type = "discrete_vae"

    num_codes: int = 8192
    hidden_size: int = 256
    blocks_per_group: int = 2
    codebook_dim: int = 128
    num_channels: int = 3
    image_size: int = 112
    decoder: bool = True
    reconstruction: Literal["logit_laplace", "squared"] = "logit_laplace"
    kl_weight: float | int = 0.0
    pixel_margin: float | int = 0.1

    @property
    def factor(self) -> int:
        """Side in pixels of the square that one code covers: three of the four groups end in a pooling by 2."""
        return 8

    def validate_architecture(self):
        """Raises `ValueError` with the name of the invalid field."""
        for name in ("num_codes", "hidden_size", "blocks_per_group", "codebook_dim", "num_channels", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

        # the blocks' bottleneck, the poolings, and a range in which logits are finite
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4 for the bottleneck, got {self.hidden_size}")
        if self.image_size % self.factor:
            raise ValueError(f"image_size must be a multiple of {self.factor}, got {self.image_size}")
        if not 0 < self.pixel_margin < 0.5:
            raise ValueError(f"pixel_margin must lie between 0 and 0.5, got {self.pixel_margin}")
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight must not be negative, got {self.kl_weight}")

    @classmethod
    def from_size(cls, size: str, **overrides) -> "DiscreteVAEConfig":
        """The configuration of a named size (`DISCRETE_VAE_SIZES`), any field overridden. Raises `ValueError`."""
        if size not in DISCRETE_VAE_SIZES:
            raise ValueError(f"unknown size {size!r}; expected one of {', '.join(DISCRETE_VAE_SIZES)}")
        names = ("hidden_size", "blocks_per_group", "num_codes", "codebook_dim")
        fields = dict(zip(names, DISCRETE_VAE_SIZES[size], strict=True))
        if size == "nano":
            fields["image_size"] = 32
        return cls(**{**fields, **overrides})


__all__ = ["DISCRETE_VAE_SIZES", "DiscreteVAEConfig"]

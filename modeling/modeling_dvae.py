"""The discrete image tokenizer: encodes an image as a grid of codes, and back (DALL-E's dVAE; Ramesh et al., 2021).

B images, H x W pixels in [0, 1], h x w = H/8 x W/8 code positions, N = h*w in row-major order, K codes, E code width.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils import is_tracing
from transformers.utils.generic import can_return_tuple

from .configuration_dvae import DiscreteVAEConfig
from .vl_inputs import check_finite, check_image_size
from .vl_saving import SavedWhole

# sides of a block's four kernels: the 1 x 1 is last in the encoder, first in the decoder
ENCODER_KERNELS, DECODER_KERNELS = (3, 3, 3, 1), (1, 3, 3, 3)
GROUPS = 4


@dataclass
class DiscreteVAEOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): Reconstruction loss plus weighted KL; None without a
            decoder.
        logits (`torch.FloatTensor` of shape `(B, K, h, w)`): Logits of the codes, in fp32.
        codes (`torch.LongTensor` of shape `(B, N)`): Most likely code at each position, row-major.
        reconstruction (`torch.FloatTensor` of shape `(B, C, H, W)`, *optional*): Reconstructed pixels in [0, 1].
        reconstruction_loss (`torch.FloatTensor` of shape `()`, *optional*): Mean over values.
        kl (`torch.FloatTensor` of shape `()`): KL(codes || uniform) in nats, mean over positions.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    kl: torch.FloatTensor | None = None


class ResidualBlock(nn.Module):
    """
    x + gain * f(x), where f is four convolutions, each after a ReLU, with a bottleneck of a quarter of the channels.

    Args:
        channels_in, channels_out (`int`): If they differ, the skip path is a 1 x 1 convolution.
        kernels: Sides of the four kernels.
        gain (`float`): 1 / layers², which keeps the sum of the residuals small in deep stacks.
    """

    def __init__(self, channels_in: int, channels_out: int, kernels: tuple[int, ...], gain: float):
        super().__init__()

        # a bottleneck of a quarter of the channels
        widths = (channels_in, *[channels_out // 4] * 3, channels_out)
        self.gain = gain
        self.convs = nn.ModuleList(
            nn.Conv2d(narrow, wide, side, padding=side // 2)
            for narrow, wide, side in zip(widths, widths[1:], kernels, strict=False)
        )
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, channels_in, H, W) -> (B, channels_out, H, W)."""
        residual = hidden
        for conv in self.convs:
            residual = conv(F.relu(residual))
        return self.skip(hidden) + self.gain * residual


class ResidualGroup(nn.Sequential):
    """Blocks of one width; the first also maps from the previous group's width."""

    def __init__(self, config: DiscreteVAEConfig, channels_in: int, channels_out: int, kernels: tuple[int, ...]):
        gain = 1 / (GROUPS * config.blocks_per_group) ** 2
        widths = (channels_in, *[channels_out] * config.blocks_per_group)
        super().__init__(*(ResidualBlock(one, channels_out, kernels, gain) for one in widths[:-1]))


class DiscreteVAEEncoder(nn.Module):
    """Images to code logits. Groups of 1, 2, 4 and 8 times `hidden_size`, with max-pooling by 2 between them."""

    def __init__(self, config: DiscreteVAEConfig):
        super().__init__()
        widths = [config.hidden_size * 2**group for group in range(GROUPS)]
        self.input = nn.Conv2d(config.num_channels, widths[0], 7, padding=3)
        self.groups = nn.ModuleList(
            ResidualGroup(config, before, width, ENCODER_KERNELS)
            for before, width in zip([widths[0], *widths], widths, strict=False)
        )
        self.output = nn.Conv2d(widths[-1], config.num_codes, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mapped pixels (B, C, H, W) -> (B, K, h, w)."""
        hidden = self.input(pixels)  # (B, hidden_size, H, W)
        for place, group in enumerate(self.groups):
            hidden = group(F.max_pool2d(hidden, 2) if place else hidden)
        return self.output(F.relu(hidden).to(self.output.weight.dtype))


class CodeProjection(nn.Conv2d):
    """A 1 x 1 convolution of code probabilities, soft or one-hot; `embed` looks ids up instead."""

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Ids (B, h, w) -> (B, E, h, w)."""
        return (F.embedding(codes, self.weight[:, :, 0, 0].t()) + self.bias).permute(0, 3, 1, 2)


class DiscreteVAEDecoder(nn.Module):
    """Codes to the mean and log scale of each value. The encoder's widths in reverse order, upsampling by 2."""

    def __init__(self, config: DiscreteVAEConfig):
        super().__init__()
        widths = [config.hidden_size * 2**group for group in reversed(range(GROUPS))]
        self.input = CodeProjection(config.num_codes, config.codebook_dim, 1)
        self.groups = nn.ModuleList(
            ResidualGroup(config, before, width, DECODER_KERNELS)
            for before, width in zip([config.codebook_dim, *widths], widths, strict=False)
        )
        self.output = nn.Conv2d(widths[-1], 2 * config.num_channels, 1)

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        """(B, E, h, w) -> (B, 2C, H, W)."""
        hidden = embedded.to(self.output.weight.dtype)
        for place, group in enumerate(self.groups):
            hidden = group(F.interpolate(hidden, scale_factor=2, mode="nearest") if place else hidden)
        return self.output(F.relu(hidden))


class DiscreteVAE(SavedWhole, PreTrainedModel):
    """
    The tokenizer. `get_codebook_indices` encodes images to codes, `decode` maps codes to images, `forward` trains.

    Args:
        config (`DiscreteVAEConfig`): The configuration.
    """

    config: DiscreteVAEConfig
    base_model_prefix = "discrete_vae"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # Trainer then divides the loss by the accumulation steps
    accepts_loss_kwargs = False
    _no_split_modules = ["ResidualBlock"]
    # as in DALL-E's code under half precision: code logits and code embeddings stay in fp32
    _keep_in_fp32_modules_strict = ["encoder.output", "decoder.input"]
    # an encoder alone may load a full checkpoint
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: DiscreteVAEConfig):
        super().__init__(config)
        self.encoder = DiscreteVAEEncoder(config)
        self.decoder = DiscreteVAEDecoder(config) if config.decoder else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """DALL-E's initialisation: N(0, 1 / fan-in), biases zero."""
        if isinstance(module, nn.Conv2d):
            init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            init.zeros_(module.bias)

    def map_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[0, 1] -> [margin, 1 - margin], where the logit is finite. Any shape."""
        margin = self.config.pixel_margin
        return (1 - 2 * margin) * pixel_values + margin

    def unmap_pixels(self, mapped: torch.Tensor) -> torch.Tensor:
        """Inverse of `map_pixels`, clamped to [0, 1]. Any shape."""
        margin = self.config.pixel_margin
        return ((mapped - margin) / (1 - 2 * margin)).clamp(0, 1)

    def check_pixels(self, pixel_values: torch.Tensor) -> None:
        """Raises `ValueError` for a wrong shape or, on a CPU and outside tracing, for values outside [0, 1]."""
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values are {pixel_values.dtype}; expected floats in [0, 1]")
        check_image_size(pixel_values, self.config.num_channels, self.config.factor, None)
        if not pixel_values.numel():
            raise ValueError(f"pixel_values have shape {tuple(pixel_values.shape)}; expected one picture at least")

        # reading values synchronises an accelerator and breaks a compiled graph
        if pixel_values.device.type != "cpu" or is_tracing(pixel_values):
            return
        check_finite(pixel_values)
        low, high = pixel_values.min().item(), pixel_values.max().item()
        if low < 0 or high > 1:
            raise ValueError(
                f"pixel_values lie in [{low:.3g}, {high:.3g}]; expected [0, 1]: the tokenizer takes pictures as they "
                f"are, neither normalised by mean and deviation nor in 0 to 255"
            )

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in [0, 1] -> logits (B, K, h, w) in fp32. Raises `ValueError` as `check_pixels` does."""
        self.check_pixels(pixel_values)
        pixels = self.map_pixels(pixel_values).to(self.encoder.input.weight.dtype)
        # channels-last is a fifth faster on a CPU, and the preferred layout of half precision on a GPU
        return self.encoder(pixels.contiguous(memory_format=torch.channels_last)).float()

    @torch.no_grad()
    def get_codebook_indices(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Codes of images: (B, C, H, W) in [0, 1] -> (B, N) int64, row-major.

        They are computed in the precision of the weights, outside autocast: targets must not depend on the precision
        of the run that predicts them.
        """
        with torch.autocast(pixel_values.device.type, enabled=False):
            return self.encode(pixel_values).argmax(1).flatten(1)

    def decode(self, codes: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """
        Decodes codes to images: (B, N), row-major, -> (B, C, H, W) in [0, 1].

        Args:
            grid: (h, w); square if None.

        Raises:
            ValueError: there is no decoder, ids are outside [0, K), or N does not match the grid.
        """
        if codes.ndim != 2 or codes.is_floating_point() or not codes.numel():
            raise ValueError(f"codes are {codes.dtype} of shape {tuple(codes.shape)}; expected whole numbers (B, N)")
        side = math.isqrt(codes.shape[1])
        height, width = grid or (side, side)
        if height * width != codes.shape[1]:
            raise ValueError(
                f"got {codes.shape[1]} codes a picture, which do not make a grid of {height} x {width}; expected as "
                f"many, or `grid`"
            )

        # reading ids is free on a CPU only
        if codes.device.type == "cpu" and not is_tracing(codes):
            low, high = codes.min().item(), codes.max().item()
            if low < 0 or high >= self.config.num_codes:
                raise ValueError(f"codes lie in [{low}, {high}]; expected [0, {self.config.num_codes - 1}]")

        # the means are the most likely values
        means, _ = self._draw(self._need_decoder().input.embed(codes.view(-1, height, width)))
        return self.unmap_pixels(means.sigmoid())

    def _need_decoder(self) -> DiscreteVAEDecoder:
        if self.decoder is None:
            raise ValueError("this DiscreteVAE has no decoder (config.decoder is false); it can only give codes")
        return self.decoder

    def _draw(self, embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, E, h, w) -> mean and log scale of the logits of mapped pixels, (B, C, H, W) each, fp32."""
        return self.decoder(embedded).float().chunk(2, dim=1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        temperature: float | None = None,
        hard: bool = False,
        kl_weight: float | None = None,
        **kwargs,
    ) -> DiscreteVAEOutput:
        """
        Encodes and, with a decoder, reconstructs.

        Args:
            pixel_values (`(B, C, H, W)`): Pixels in [0, 1].
            temperature: Temperature of the Gumbel-softmax relaxation (DALL-E: 1 down to 1/16); None decodes the
                argmax codes, which pass no gradient to the encoder.
            hard: Whether the relaxation uses the sampled code forward and the soft one backward (straight-through).
            kl_weight: Overrides the configuration's.

        Raises:
            ValueError: the errors of `check_pixels`, or `temperature` is not above 0.
        """
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected a number above 0, or none for the codes")

        # codes and their KL to the uniform distribution
        logits = self.encode(pixel_values)  # (B, K, h, w)
        log_probabilities = logits.log_softmax(1)  # (B, K, h, w)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(1).mean()
        output = DiscreteVAEOutput(
            logits=logits, codes=logits.argmax(1).flatten(1), kl=math.log(self.config.num_codes) - entropy
        )
        if self.decoder is None:
            return output

        # argmax codes, or a differentiable relaxation
        if temperature is None:
            embedded = self.decoder.input.embed(logits.argmax(1))  # (B, E, h, w)
        else:
            chosen = F.gumbel_softmax(logits, tau=temperature, hard=hard, dim=1)
            embedded = self.decoder.input(chosen.to(self.decoder.input.weight.dtype))  # (B, E, h, w)

        # the reconstruction and its loss
        means, log_scales = self._draw(embedded)  # (B, C, H, W) each
        output.reconstruction = self.unmap_pixels(means.sigmoid())
        output.reconstruction_loss = self.reconstruction_loss(pixel_values, means, log_scales)
        weight = self.config.kl_weight if kl_weight is None else kl_weight
        output.loss = output.reconstruction_loss + weight * output.kl
        return output

    def reconstruction_loss(
        self, pixel_values: torch.Tensor, means: torch.Tensor, log_scales: torch.Tensor
    ) -> torch.Tensor:
        """
        Mean over values, 0-dim. All arguments are (B, C, H, W); `means` and `log_scales` are those of the logit of a
        mapped pixel x.

        logit_laplace: ln 2b + ln x(1 - x) + |logit x - mean| / b, with b the scale (Ramesh et al., appendix A.3);
        squared: squared error of pixels in [0, 1]; the scale is not used.
        """
        mapped = self.map_pixels(pixel_values.float())  # (B, C, H, W)

        # the mapping narrows the range; dividing by its square gives the error of the original pixels
        if self.config.reconstruction == "squared":
            return (means.sigmoid() - mapped).square().mean() / (1 - 2 * self.config.pixel_margin) ** 2
        distance = (mapped.logit() - means).abs() * (-log_scales).exp()
        return (math.log(2) + log_scales + (mapped * (1 - mapped)).log() + distance).mean()


__all__ = ["DiscreteVAE", "DiscreteVAEOutput"]

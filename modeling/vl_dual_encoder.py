"""What families with a tower for images and a tower for texts share: SIMLA, and such as ALBEF.

B pairs, R rows of text, C images, N patches, S = 1 + N, T positions of a text, D width, P embedding width.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .vl_embeddings import ConvStem, LinearStem, interpolate_positions
from .vl_features import RetrievalFeatures
from .vl_fusion import FusionLayer, TextEmbeddings, context_mask_of, self_mask
from .vl_heads import HeadLinear
from .vl_inputs import check_inputs
from .vl_layers import PreNormLayer


class VisionEmbeddings(nn.Module):
    """
    Patches, [CLS] and learned positions. (B, C, H, W) -> (B, 1 + N, D).

    Args:
        config (`PreTrainedConfig`): Of a family.
        mask_token (`bool`): Whether there is a token to stand for a masked patch.
    """

    def __init__(self, config: PreTrainedConfig, mask_token: bool = False):
        super().__init__()
        self.config = config
        stem = ConvStem if config.stem == "conv" else LinearStem
        self.stem = stem(config.patch_size, config.num_channels, config.hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if mask_token else None
        places = 1 + (config.position_image_size // config.patch_size) ** 2
        self.position_embeddings = nn.Parameter(torch.zeros(1, places, config.hidden_size))

    @torch.no_grad()
    def reset(self) -> None:
        """[CLS] and positions N(0, `initializer_range`), the mask token zeros (ViT, BEiT)."""
        init.normal_(self.cls_token, std=self.config.initializer_range)
        init.normal_(self.position_embeddings, std=self.config.initializer_range)
        if self.mask_token is not None:
            init.zeros_(self.mask_token)

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """The table for a grid (h, w), bicubic but for its first row, which is [CLS]'s. -> (1, 1 + h*w, D)."""
        table = self.position_embeddings  # (1, 1 + side², D)
        side = math.isqrt(table.shape[1] - 1)
        patches = interpolate_positions(table[0, 1:], (side, side), grid)  # (h*w, D)
        return torch.cat([table[:, :1], patches[None]], dim=1)

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Masked patches (B, N) become the mask token, before positions are added (BEiT)."""
        p = self.config.patch_size
        grid = (pixel_values.shape[-2] // p, pixel_values.shape[-1] // p)
        patches = self.stem(pixel_values.to(self.cls_token.dtype))  # (B, N, D)
        # what is masked is not seen at all
        if bool_masked_pos is not None:
            patches = torch.where(bool_masked_pos[..., None], self.mask_token.to(patches.dtype), patches)  # (B, N, D)
        cls = self.cls_token.to(patches.dtype).expand(patches.shape[0], -1, -1)  # (B, 1, D)
        return torch.cat([cls, patches], dim=1) + self.positions(grid).to(patches.dtype)  # (B, 1 + N, D)


class VisionEncoder(nn.Module):
    """A pre-norm ViT. (B, C, H, W) -> (B, 1 + N, D) after its final norm. Arguments as of `VisionEmbeddings`."""

    def __init__(self, config: PreTrainedConfig, mask_token: bool = False):
        super().__init__()
        self.embeddings = VisionEmbeddings(config, mask_token)
        self.layers = nn.ModuleList([PreNormLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        hidden_states = self.embeddings(pixel_values, bool_masked_pos)  # (B, 1 + N, D)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return self.norm(hidden_states)


class TextEncoder(nn.Module):
    """
    One stack of layers for a text alone and for a text that reads a context by cross-attention.

    The first `num_text_layers` read a text alone. `num_fusion_layers` more stand above them, have cross-attention, and
    take the text's states from below (ALBEF: 6 and 6). Where there are none, the text's own layers have
    cross-attention, and begin at the text's embeddings when they fuse (SIMLA, section 2.5).

    Attributes:
        first_fusion (`int`): The first layer with cross-attention.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        depth = config.num_text_layers + config.num_fusion_layers

        # without layers of fusion above them, all layers fuse
        self.first_fusion = config.num_text_layers if config.num_fusion_layers else 0
        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList([FusionLayer(config, number >= self.first_fusion) for number in range(depth)])

    def begin(self, input_ids: torch.Tensor, key_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """A text below the first layer that could read a context, for `alone` and `fuse`. (R, T) -> (R, T, D)."""
        embeddings = self.embeddings(input_ids)  # (R, T, D)
        return self._through(self.layers[: self.first_fusion], embeddings, key_mask, **kwargs)

    def alone(self, hidden_states: torch.Tensor, key_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """The rest of the layers that read a text alone; none where others fuse. (R, T, D) -> (R, T, D)."""
        layers = self.layers[self.first_fusion : self.config.num_text_layers]
        return self._through(layers, hidden_states, key_mask, **kwargs)

    def _through(
        self, layers: Iterable[FusionLayer], hidden_states: torch.Tensor, key_mask: torch.Tensor | None, **kwargs
    ) -> torch.Tensor:
        mask = self_mask(self.config, hidden_states, key_mask)
        for layer in layers:
            hidden_states = layer(hidden_states, mask, **kwargs)  # (R, T, D)
        return hidden_states

    def fuse(
        self,
        hidden_states: torch.Tensor,
        key_mask: torch.Tensor | None,
        context: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        context_index: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        The layers with cross-attention: (R, T, D) -> (R, T, D).

        Args:
            hidden_states (`(R, T, D)`): From `begin`, or vectors that pass as embeddings.
            key_mask (`(R, T)`): 1 for real positions; None for all.
            context (`(C, S, D)`): What cross-attention reads.
            context_mask (`(R, S)`): Its real positions, by row; None for all.
            context_index (`(R,)`): Which context a row reads; row r reads context r when None.
        """
        # what may be attended in the text, and in the context
        mask = self_mask(self.config, hidden_states, key_mask)
        across = context_mask_of(self.config, hidden_states, context, context_mask)
        for layer in self.layers[self.first_fusion :]:
            hidden_states = layer(hidden_states, mask, context, across, context_index, **kwargs)  # (R, T, D)
        return hidden_states


class DualEncoderPreTrainedModel(PreTrainedModel):
    """Base of a family's classes; the family names `config`, `base_model_prefix` and its heads' weights."""

    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # Trainer divides a loss by its accumulation steps where the model does not
    accepts_loss_kwargs = False
    _no_split_modules = ["PreNormLayer", "FusionLayer"]
    _supports_sdpa = True
    # texts attend images of another length, which flash attention's padding helper cannot take apart
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": [PreNormLayer, FusionLayer],
        # ends of names: of a list of two classes, transformers before 5.14 takes the second for the crossed
        "attentions": ".attention",
        "cross_attentions": ".cross_attention",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """ViT's and BERT's N(0, .02); heads and patches keep torch's own, as in ALBEF's code."""
        if isinstance(module, (HeadLinear, VisionEmbeddings)):
            module.reset()
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(getattr(module, "temperature", None), nn.Parameter):
            init.constant_(module.temperature, self.config.temperature)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.text.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.text.embeddings.word_embeddings = value


class DualEncoder(RetrievalFeatures):
    """
    Beside a family's `DualEncoderPreTrainedModel`: both towers, and the projections into the contrastive space.

    Args:
        config (`PreTrainedConfig`): Of the family.
        add_pooling_layer (`bool`, defaults to `True`): Whether to have the projections.

    Attributes:
        masks_images (`bool`): Whether the family ever completes masked images, by a token in place of patches.
    """

    masks_images = False

    def __init__(self, config: PreTrainedConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.vision = VisionEncoder(config, self.masks_images)
        self.text = TextEncoder(config)
        self.vision_projection = HeadLinear(config.hidden_size, config.projection_dim) if add_pooling_layer else None
        self.text_projection = HeadLinear(config.hidden_size, config.projection_dim) if add_pooling_layer else None
        self.post_init()

    def encode_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """Texts without an image: (R, T) -> (R, T, D)."""
        beginning = self.text.begin(input_ids, attention_mask, **kwargs)  # (R, T, D)
        return self.text.alone(beginning, attention_mask, **kwargs)

    def fuse(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_states: torch.Tensor,
        context_index: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Texts (R, T) that read images (C, S, D), each the one that `context_index` (R,) says. -> (R, T, D)."""
        beginning = self.text.begin(input_ids, attention_mask, **kwargs)  # (R, T, D)
        return self.text.fuse(beginning, attention_mask, image_states, context_index=context_index, **kwargs)

    def project_images(self, image_states: torch.Tensor) -> torch.Tensor | None:
        """[CLS] in the contrastive space, (C, S, D) -> (C, P); None of a tower without projections."""
        return None if self.vision_projection is None else self.vision_projection(image_states[:, 0])

    def project_texts(self, text_states: torch.Tensor) -> torch.Tensor | None:
        """Likewise of texts alone: (R, T, D) -> (R, P)."""
        return None if self.text_projection is None else self.text_projection(text_states[:, 0])

    def embed_images(self, image_states: torch.Tensor) -> torch.Tensor:
        """As `project_images`, of unit length."""
        return nn.functional.normalize(self.project_images(image_states), dim=-1)

    def embed_texts(self, text_states: torch.Tensor) -> torch.Tensor:
        """As `project_texts`, of unit length."""
        return nn.functional.normalize(self.project_texts(text_states), dim=-1)

    def resize_positions(self, image_size: int) -> None:
        """Reads images of another size from now on, with a table of positions of its own to learn. In place."""
        side = image_size // self.config.patch_size
        embeddings = self.vision.embeddings

        # interpolated from the old table; what was frozen stays frozen
        table = embeddings.positions((side, side)).detach().clone()
        embeddings.position_embeddings = nn.Parameter(table, embeddings.position_embeddings.requires_grad)
        self.config.image_size = self.config.position_image_size = image_size


class ImageTextMatching:
    """Beside `RetrievalFeatures`: what a class with the matching head `itm_head` over a dual encoder can be asked."""

    def match(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_states: torch.FloatTensor | None = None,
        context_index: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """
        Do text and image belong together? Logits (R, 2), the second for yes.

        Args:
            input_ids, attention_mask (`(R, T)`): The texts.
            pixel_values: An image for each, R of them.
            image_states (`(C, S, D)`): `last_hidden_state` of `get_image_features`, kept from before.
            context_index (`(R,)`): Which image each text is held against; text r against image r if None.

        Raises:
            ValueError: neither images nor their states, or both; what the tower raises.
        """
        # either images or what was made of them
        if (pixel_values is None) == (image_states is None):
            raise ValueError("match expects either pixel_values or image_states, and got both or neither")
        check_inputs(self.tower, input_ids, attention_mask, pixel_values)
        if image_states is None:
            image_states = self.tower.vision(pixel_values)  # (R, S, D)

        # without an index text r is held against image r
        if context_index is None and image_states.shape[0] != input_ids.shape[0]:
            raise ValueError(f"got {len(input_ids)} texts and {len(image_states)} pictures; expected as many of each")
        return self.matching_logits(input_ids, attention_mask, image_states, context_index)

    def matching_logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_states: torch.Tensor,
        context_index: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """`match` of what was checked before. (R, T), (C, S, D) -> (R, 2)."""
        fused = self.tower.fuse(input_ids, attention_mask, image_states, context_index, **kwargs)  # (R, T, D)
        return self.itm_head(fused[:, 0])


__all__ = ["DualEncoder", "DualEncoderPreTrainedModel", "ImageTextMatching", "TextEncoder", "VisionEncoder"]

"""What families with a tower for images and a tower for texts share: SIMLA, and such as ALBEF.

B pairs, R rows of text, C images, N patches, S = 1 + N, T positions of a text, D width, P embedding width.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .vl_features import RetrievalFeatures
from .vl_fusion import FusionLayer
from .vl_heads import HeadLinear
from .vl_inputs import check_inputs
from .vl_layers import PreNormLayer
from .vl_text import TextEncoder
from .vl_vision import VisionEmbeddings, VisionEncoder


class DualEncoderPreTrainedModel(PreTrainedModel):
    """Base of a family's classes; the family names `config`, `base_model_prefix` and its heads' weights."""

    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
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
        if context_index is None and len(image_states) != len(input_ids):
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


__all__ = ["DualEncoder", "DualEncoderPreTrainedModel", "ImageTextMatching"]

"""SIMLA: a visual encoder below, a text encoder that reads its states by cross-attention above (Khan et al., 2022).

B pairs, R rows of text, C pictures, L positions of the joint layout, N patches, S = 1 + N, W word slots, T = 1 + W,
D width, P embedding width, V words of the vocabulary. The text encoder runs with cross-attention or, for text alone,
without; it may also run over the tokens of a picture.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_simla import SimlaConfig
from .vl_embeddings import ConvStem, LinearStem, interpolate_positions
from .vl_features import CosineRetrieval, MaskedWords, RetrievalFeatures
from .vl_fusion import FusionLayer, TextEmbeddings, context_mask_of, self_mask
from .vl_gradcam import GroundedMatching
from .vl_heads import HeadLinear, LanguageModelHead
from .vl_inputs import check_inputs, check_one_modality, check_pairs, check_patch_mask
from .vl_layers import PreNormLayer
from .vl_outputs import (
    CLS_TOKEN,
    PADDING_TOKEN,
    PATCH_TOKEN,
    WORD_TOKEN,
    VisionLanguageModelOutput,
)

# what a repository with these weights offers, whichever class saved it
AUTO_MAP = {
    "AutoConfig": "configuration_simla.SimlaConfig",
    "AutoModel": "modeling_simla.SimlaModel",
    "AutoModelForZeroShotImageClassification": "modeling_simla.SimlaForImageTextRetrieval",
    "AutoModelForMaskedLM": "modeling_simla.SimlaForMaskedLM",
}


class SimlaVisionEmbeddings(nn.Module):
    """Patches, [CLS] and learned positions. (B, C, H, W) -> (B, 1 + N, D)."""

    def __init__(self, config: SimlaConfig):
        super().__init__()
        self.config = config
        stem = ConvStem if config.stem == "conv" else LinearStem
        self.stem = stem(config.patch_size, config.num_channels, config.hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        places = 1 + (config.position_image_size // config.patch_size) ** 2
        self.position_embeddings = nn.Parameter(torch.zeros(1, places, config.hidden_size))

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """The table for a grid (h, w), bicubic but for its first row, which is [CLS]'s. -> (1, 1 + h*w, D)."""
        table = self.position_embeddings
        side = math.isqrt(table.shape[1] - 1)
        patches = interpolate_positions(table[0, 1:], (side, side), grid)
        return torch.cat([table[:, :1], patches[None]], dim=1)

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Masked patches (B, N) become the mask token, before positions are added (BEiT)."""
        p = self.config.patch_size
        grid = (pixel_values.shape[-2] // p, pixel_values.shape[-1] // p)
        patches = self.stem(pixel_values.to(self.cls_token.dtype))  # (B, N, D)
        if bool_masked_pos is not None:
            check_patch_mask(bool_masked_pos, len(pixel_values), grid[0] * grid[1])
            patches = torch.where(bool_masked_pos[..., None], self.mask_token.to(patches.dtype), patches)
        cls = self.cls_token.to(patches.dtype).expand(len(patches), -1, -1)
        return torch.cat([cls, patches], dim=1) + self.positions(grid).to(patches.dtype)


class SimlaVisionEncoder(nn.Module):
    """E_v: a pre-norm ViT. (B, C, H, W) -> (B, 1 + N, D) after its final norm."""

    def __init__(self, config: SimlaConfig):
        super().__init__()
        self.embeddings = SimlaVisionEmbeddings(config)
        self.layers = nn.ModuleList([PreNormLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        hidden_states = self.embeddings(pixel_values, bool_masked_pos)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return self.norm(hidden_states)


class SimlaTextEncoder(nn.Module):
    """E_l without a context, E_mm with one: the same weights but for cross-attention (section 2.5)."""

    def __init__(self, config: SimlaConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList([FusionLayer(config) for _ in range(config.num_text_layers)])

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_mask: torch.Tensor | None,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        context_index: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`(R, L, D)`): From `embeddings`.
            key_mask (`(R, L)`): 1 for real positions; None for all.
            context (`(C, S, D)`): What cross-attention reads; none at all without it.
            context_mask (`(R, S)`): Its real positions, by row; None for all.
            context_index (`(R,)`): Which context a row reads; row r reads context r when None.
        """
        mask = self_mask(self.config, hidden_states, key_mask)
        across = None if context is None else context_mask_of(self.config, hidden_states, context, context_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, context, across, context_index, **kwargs)
        return hidden_states

    def keyword_attention(
        self, hidden_states: torch.Tensor, key_mask: torch.Tensor | None, context: torch.Tensor
    ) -> torch.Tensor:
        """What the multimodal [CLS] attends among the words in the last layer (supplement 3). -> (R, H, L)."""
        mask = self_mask(self.config, hidden_states, key_mask)
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, mask, context)
        return self.layers[-1](hidden_states, first_row=True, key_mask=key_mask)


class SimlaPreTrainedModel(PreTrainedModel):
    config: SimlaConfig
    base_model_prefix = "simla"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["PreNormLayer", "FusionLayer"]
    _supports_sdpa = True
    # words attend pictures of another length, which flash attention's padding helper cannot take apart
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": [PreNormLayer, FusionLayer],
        # ends of names: of a list of two classes, transformers before 5.14 takes the second for the crossed
        "attentions": ".attention",
        "cross_attentions": ".cross_attention",
    }
    # one checkpoint serves every class: what a class has no use for is left behind in silence
    _keys_to_ignore_on_load_unexpected = [
        r"(vision|text)_projection\.", r"^(itm|lm|mim|concept)_head\.", r"^temperature$", r"^(classifier|decoder)\.",
    ]  # fmt: skip

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """ViT's and BERT's N(0, .02); heads and patches keep torch's own, as in ALBEF's code."""
        if isinstance(module, HeadLinear):
            module.reset()
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, SimlaVisionEmbeddings):
            init.normal_(module.cls_token, std=self.config.initializer_range)
            init.normal_(module.position_embeddings, std=self.config.initializer_range)
            init.zeros_(module.mask_token)
        elif isinstance(getattr(module, "temperature", None), nn.Parameter):
            init.constant_(module.temperature, self.config.temperature)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self, "simla", self).text.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        getattr(self, "simla", self).text.embeddings.word_embeddings = value

    def save_pretrained(self, *args, **kwargs) -> None:
        # transformers would list only the class that is saved; a repository serves all of them
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(*args, **kwargs)


class SimlaFeatures(RetrievalFeatures):
    """Positions are counted from the left, so a text in the joint layout closes up where its placeholders were."""

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Text alone: (B, L) -> `pooler_output` (B, P). The joint layout is accepted; its placeholders are passed over.
        Raises `ValueError` when pictures come along.
        """
        check_one_modality("get_text_features", input_ids, pixel_values, self.config.patch_size)
        is_word = input_ids != self.config.image_token_id
        real = is_word.long() if attention_mask is None else attention_mask * is_word
        order = (real == 0).long().argsort(dim=1, stable=True)  # words first, in their order
        words = torch.where(is_word, input_ids, self.config.pad_token_id or 0).gather(1, order)
        features = self._features(
            self.tower(input_ids=words, attention_mask=real.gather(1, order), return_dict=True, **kwargs)
        )
        places = order.argsort(dim=1)[..., None].expand_as(features.last_hidden_state)
        features.last_hidden_state = features.last_hidden_state.gather(1, places)
        return features

    @can_return_tuple
    def get_multimodal_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Picture and text in the joint layout. The states are fused; `pooler_output` (B, P) is the mean of the two unit
        embeddings, for SIMLA has no embedding of the two together: its own answer to pairs is the matching score.

        Raises `ValueError` when either is missing.
        """
        features = super().get_multimodal_features(input_ids, attention_mask, pixel_values, return_dict=True, **kwargs)
        tower = self.tower
        cls = tower.vision(pixel_values)[:, 0]
        image = nn.functional.normalize(tower.vision_projection(cls), dim=-1)
        text_ids, text_mask = tower.split_layout(input_ids, attention_mask, pixel_values)
        text = nn.functional.normalize(tower.text_projection(tower.encode_texts(text_ids, text_mask)[:, 0]), dim=-1)
        features.pooler_output = (image + text) / 2
        return features


class SimlaModel(SimlaFeatures, SimlaPreTrainedModel):
    """
    Both encoders and the projections into the contrastive space. Reads text, pictures, or pairs.

    Args:
        config (`SimlaConfig`): The configuration.
        add_pooling_layer (`bool`, defaults to `True`): Whether to have the projections.
    """

    def __init__(self, config: SimlaConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.vision = SimlaVisionEncoder(config)
        self.text = SimlaTextEncoder(config)
        self.vision_projection = HeadLinear(config.hidden_size, config.projection_dim) if add_pooling_layer else None
        self.text_projection = HeadLinear(config.hidden_size, config.projection_dim) if add_pooling_layer else None
        self.post_init()

    def encode_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """Words without a picture: (R, T) -> (R, T, D)."""
        return self.text(self.text.embeddings(input_ids), attention_mask, **kwargs)

    def fuse(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_states: torch.Tensor,
        context_index: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Words (R, T) that read pictures (C, S, D), each the one that `context_index` (R,) says. -> (R, T, D)."""
        words = self.text.embeddings(input_ids)
        return self.text(words, attention_mask, image_states, context_index=context_index, **kwargs)

    def split_layout(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor,
        masked_input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[CLS] and words of pairs in the joint layout: (B, L) -> ids and mask (B, T). Raises `ValueError`."""
        p = self.config.patch_size
        n_patches = (pixel_values.shape[-2] // p) * (pixel_values.shape[-1] // p)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_pairs(input_ids, mask, masked_input_ids, self.config.image_token_id, n_patches)
        return tuple(torch.cat([part[:, :1], part[:, 1 + n_patches :]], dim=1) for part in (input_ids, mask))

    def resize_positions(self, image_size: int) -> None:
        """Reads pictures of another size from now on, with a table of positions of its own to learn. In place."""
        side = image_size // self.config.patch_size
        embeddings = self.vision.embeddings
        table = embeddings.positions((side, side)).detach().clone()
        embeddings.position_embeddings = nn.Parameter(table, embeddings.position_embeddings.requires_grad)
        self.config.image_size = self.config.position_image_size = image_size

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisionLanguageModelOutput:
        r"""
        Args:
            input_ids (`(B, L)`): [CLS], a placeholder per patch if there are pictures, words, padding on the right.
            attention_mask (`(B, L)`): 1 for real tokens, 0 for padding.
            pixel_values (`(B, C, H, W)`): Normalised pictures; alone they are laid out as [CLS] and patches.
            bool_masked_pos (`(B, N)`): Patches to replace by the mask token.
            interpolate_pos_encoding: Accept other picture sizes by interpolating the positions.

        Of pairs, the first place and the words hold the states of the multimodal encoder, the patches those of the
        visual encoder, and `pooler_output` is None: see `get_multimodal_features`.

        Raises:
            ValueError: neither input, a picture of a wrong size, too long a text, ids out of range, NaN pixels, or
                placeholders that do not match the patches.
        """
        check_inputs(self, input_ids, attention_mask, pixel_values, interpolate_pos_encoding)
        if bool_masked_pos is not None and pixel_values is None:
            raise ValueError("got bool_masked_pos, which masks patches, but pixel_values is None")
        if pixel_values is None:
            hidden_states = self.encode_texts(input_ids, attention_mask, **kwargs)
            pooled = None if self.text_projection is None else self.text_projection(hidden_states[:, 0])
        else:
            hidden_states, pooled = self.vision(pixel_values, bool_masked_pos, **kwargs), None
            places = hidden_states.shape[1]
            if input_ids is not None and input_ids.shape[1] > places:
                text_ids, text_mask = self.split_layout(input_ids, attention_mask, pixel_values)
                fused = self.fuse(text_ids, text_mask, hidden_states, **kwargs)
                hidden_states = torch.cat([fused[:, :1], hidden_states[:, 1:], fused[:, 1:]], dim=1)
            elif self.vision_projection is not None:
                pooled = self.vision_projection(hidden_states[:, 0])
        return VisionLanguageModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=pooled,
            token_types=self._token_types(input_ids, attention_mask, hidden_states),
        )

    def _token_types(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, states: torch.Tensor
    ) -> torch.Tensor:
        """What each place is, (B, L)."""
        if input_ids is None:
            types = torch.full(states.shape[:2], PATCH_TOKEN, device=states.device)
        else:
            types = torch.full_like(input_ids, WORD_TOKEN)
            types = types.masked_fill(input_ids == self.config.image_token_id, PATCH_TOKEN)
            if attention_mask is not None:
                types = types.masked_fill(attention_mask == 0, PADDING_TOKEN)
        types[:, 0] = CLS_TOKEN
        return types

    def pool(self, hidden_states: torch.Tensor, token_types: torch.Tensor | None = None) -> torch.Tensor:
        """The [CLS] state, of whatever was read. (B, L, D) -> (B, D)."""
        return hidden_states[:, 0]


class SimlaMatching(GroundedMatching, SimlaFeatures):
    """What every class with the matching head `itm_head` over the tower `simla` can be asked."""

    def match(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_states: torch.FloatTensor | None = None,
        context_index: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """
        Do text and picture belong together (equation 5)? Logits (R, 2), the second for yes.

        Args:
            input_ids, attention_mask: Pairs in the joint layout (R, L) with `pixel_values` (R, C, H, W); or texts
                (R, T) with `image_states`.
            image_states (`(C, S, D)`): `last_hidden_state` of `get_image_features`, kept from before.
            context_index (`(R,)`): Which picture each text is held against; text r against picture r if None.

        Raises:
            ValueError: neither pictures nor their states, or both; what [`SimlaModel`] raises.
        """
        if (pixel_values is None) == (image_states is None):
            raise ValueError("match expects either pixel_values or image_states, and got both or neither")
        if image_states is None:
            outputs = self.simla(input_ids, attention_mask, pixel_values, return_dict=True)
            return self.itm_head(outputs.last_hidden_state[:, 0])
        check_inputs(self.simla, input_ids, attention_mask, None)
        if context_index is None and len(image_states) != len(input_ids):
            raise ValueError(f"got {len(input_ids)} texts and {len(image_states)} pictures; expected as many of each")
        return self.itm_head(self.simla.fuse(input_ids, attention_mask, image_states, context_index)[:, 0])


class SimlaForImageTextRetrieval(SimlaMatching, CosineRetrieval, SimlaPreTrainedModel):
    """
    Pictures against texts by cosine, then the best of them by matching (section 3.6: the slower encoder re-ranks).
    `AutoModelForZeroShotImageClassification` returns this class.
    """

    def __init__(self, config: SimlaConfig):
        super().__init__(config)
        self.simla = SimlaModel(config)
        self.temperature = nn.Parameter(torch.zeros(1))  # not 0-dim: ZeRO-3 cannot partition a scalar
        self.itm_head = HeadLinear(config.hidden_size, 2)
        self.post_init()

    def scaled(self, cosines: torch.Tensor) -> torch.Tensor:
        return cosines / self.temperature


class SimlaForMaskedLM(MaskedWords, SimlaPreTrainedModel):
    """BERT's language-model head on the multimodal encoder, or on the text encoder when there is no picture."""

    _tied_weights_keys = {"lm_head.decoder.weight": "simla.text.embeddings.word_embeddings.weight"}

    def __init__(self, config: SimlaConfig):
        super().__init__(config)
        self.simla = SimlaModel(config, add_pooling_layer=False)
        self.lm_head = LanguageModelHead(config, config.text_layer_norm_eps)
        self.post_init()


__all__ = [
    "SimlaForImageTextRetrieval",
    "SimlaForMaskedLM",
    "SimlaModel",
    "SimlaPreTrainedModel",
]

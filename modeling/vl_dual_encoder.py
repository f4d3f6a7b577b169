"""Shared code of families with an image tower and a text tower: SIMLA, CODIS, ALBEF.

B pairs, R rows of text, C images, N patches, S = 1 + N, T positions of a text, D width, P embedding width.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from .vl_embeddings import ConvStem, LinearStem, interpolate_positions
from .vl_features import RetrievalFeatures
from .vl_fusion import FusionLayer, TextEmbeddings, context_mask_of, self_mask
from .vl_heads import HeadLinear
from .vl_inputs import check_inputs
from .vl_layers import PreNormLayer
from .vl_outputs import VisionLanguageModelOutput, token_types_of


class VisionEmbeddings(nn.Module):
    """
    Embeddings of [CLS] and patches with learned positions. (B, C, H, W) -> (B, 1 + N, D).

    Args:
        config (`PreTrainedConfig`): The family's configuration.
        mask_token (`bool`): Whether to add a token that replaces masked patches.
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
        """Draws [CLS] and positions from N(0, `initializer_range`) and zeroes the mask token (ViT, BEiT)."""
        init.normal_(self.cls_token, std=self.config.initializer_range)
        init.normal_(self.position_embeddings, std=self.config.initializer_range)
        if self.mask_token is not None:
            init.zeros_(self.mask_token)

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """Interpolates the patch positions to a grid (h, w), bicubically; [CLS] keeps its row. -> (1, 1 + h*w, D)."""
        table = self.position_embeddings  # (1, 1 + side², D)
        side = math.isqrt(table.shape[1] - 1)
        patches = interpolate_positions(table[0, 1:], (side, side), grid)  # (h*w, D)
        return torch.cat([table[:, :1], patches[None]], dim=1)

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Replaces masked patches (B, N) by the mask token, before positions are added (BEiT)."""
        p = self.config.patch_size
        grid = (pixel_values.shape[-2] // p, pixel_values.shape[-1] // p)
        patches = self.stem(pixel_values.to(self.cls_token.dtype))  # (B, N, D)
        # the encoder sees nothing of masked patches
        if bool_masked_pos is not None:
            patches = torch.where(bool_masked_pos[..., None], self.mask_token.to(patches.dtype), patches)  # (B, N, D)
        cls = self.cls_token.to(patches.dtype).expand(patches.shape[0], -1, -1)  # (B, 1, D)
        return torch.cat([cls, patches], dim=1) + self.positions(grid).to(patches.dtype)  # (B, 1 + N, D)


class VisionEncoder(nn.Module):
    """A pre-norm ViT. (B, C, H, W) -> (B, 1 + N, D) after its final norm. Arguments as in `VisionEmbeddings`."""

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
    One stack of layers that encodes a text alone, or a text that reads a context by cross-attention.

    The first `num_text_layers` read a text alone. `num_fusion_layers` more above them have cross-attention and take
    the text layers' output as input (ALBEF: 6 and 6). If there are none, the text layers themselves have
    cross-attention, and fusion starts from the text's embeddings (SIMLA, section 2.5).

    Attributes:
        first_fusion (`int`): Index of the first layer with cross-attention.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        depth = config.num_text_layers + config.num_fusion_layers

        # without separate fusion layers, all layers have cross-attention
        self.first_fusion = config.num_text_layers if config.num_fusion_layers else 0
        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList([FusionLayer(config, number >= self.first_fusion) for number in range(depth)])

    def begin(self, input_ids: torch.Tensor, key_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """Runs the layers below the first with cross-attention, for `alone` and `fuse`. (R, T) -> (R, T, D)."""
        embeddings = self.embeddings(input_ids)  # (R, T, D)
        return self._through(self.layers[: self.first_fusion], embeddings, key_mask, **kwargs)

    def alone(self, hidden_states: torch.Tensor, key_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """Runs the remaining text layers (none if there are fusion layers), without context. (R, T, D) -> same."""
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
        Runs the layers with cross-attention: (R, T, D) -> (R, T, D).

        Args:
            hidden_states (`(R, T, D)`): Output of `begin`, or vectors in place of embeddings.
            key_mask (`(R, T)`): 1 for real positions; None if all are real.
            context (`(C, S, D)`): Keys and values of cross-attention.
            context_mask (`(R, S)`): 1 for real positions of each row's context; None if all are real.
            context_index (`(R,)`): Index of each row's context; row r reads context r if None.
        """
        # masks of self-attention and of cross-attention
        mask = self_mask(self.config, hidden_states, key_mask)
        across = context_mask_of(self.config, hidden_states, context, context_mask)
        for layer in self.layers[self.first_fusion :]:
            hidden_states = layer(hidden_states, mask, context, across, context_index, **kwargs)  # (R, T, D)
        return hidden_states


class DualEncoderPreTrainedModel(PreTrainedModel):
    """Base of a family's classes; the family sets `config`, `base_model_prefix` and the keys of its heads."""

    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # Trainer then divides the loss by the accumulation steps
    accepts_loss_kwargs = False
    _no_split_modules = ["PreNormLayer", "FusionLayer"]
    _supports_sdpa = True
    # texts attend to images of another length, which flash attention's padding helper does not support
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": [PreNormLayer, FusionLayer],
        # name suffixes: given two classes, transformers before 5.14 records the second as cross-attention
        "attentions": ".attention",
        "cross_attentions": ".cross_attention",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """ViT's and BERT's N(0, .02); heads and patch projections keep torch's default, as in ALBEF's code."""
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
    Mixin for a family's `DualEncoderPreTrainedModel`: both towers, and the projections into the contrastive space.

    Args:
        config (`PreTrainedConfig`): The family's configuration.
        add_pooling_layer (`bool`, defaults to `True`): Whether to add the projections.

    Attributes:
        masks_images (`bool`): Whether the family trains on masked images, and so needs a mask token for patches.
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
        """Encodes texts without an image: (R, T) -> (R, T, D)."""
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
        """Encodes texts (R, T) that read images (C, S, D), chosen by `context_index` (R,). -> (R, T, D)."""
        beginning = self.text.begin(input_ids, attention_mask, **kwargs)  # (R, T, D)
        return self.text.fuse(beginning, attention_mask, image_states, context_index=context_index, **kwargs)

    def text_output(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
    ) -> VisionLanguageModelOutput:
        """The tower's output for texts alone. (R, T)."""
        states = self.encode_texts(input_ids, attention_mask, **kwargs)  # (R, T, D)
        return VisionLanguageModelOutput(
            last_hidden_state=states,
            pooler_output=self.project_texts(states),  # (R, P)
            token_types=token_types_of(None, attention_mask),  # (R, T)
        )

    def image_output(self, image_states: torch.Tensor) -> VisionLanguageModelOutput:
        """The tower's output for images alone, from the states of the visual tower. (C, S, D)."""
        return VisionLanguageModelOutput(
            last_hidden_state=image_states,
            pooler_output=self.project_images(image_states),  # (C, P)
            token_types=token_types_of(image_states, None),  # (C, S)
        )

    def project_images(self, image_states: torch.Tensor) -> torch.Tensor | None:
        """Projects [CLS] into the contrastive space, (C, S, D) -> (C, P); None for a tower without projections."""
        return None if self.vision_projection is None else self.vision_projection(image_states[:, 0])

    def project_texts(self, text_states: torch.Tensor) -> torch.Tensor | None:
        """Same for texts alone: (R, T, D) -> (R, P)."""
        return None if self.text_projection is None else self.text_projection(text_states[:, 0])

    def embed_images(self, image_states: torch.Tensor) -> torch.Tensor:
        """`project_images`, normalised to unit length."""
        return nn.functional.normalize(self.project_images(image_states), dim=-1)

    def embed_texts(self, text_states: torch.Tensor) -> torch.Tensor:
        """`project_texts`, normalised to unit length."""
        return nn.functional.normalize(self.project_texts(text_states), dim=-1)

    def resize_positions(self, image_size: int) -> None:
        """Switches to another image size, in place, with a learnable position table for that size."""
        side = image_size // self.config.patch_size
        embeddings = self.vision.embeddings

        # interpolated from the old table; a frozen table stays frozen
        table = embeddings.positions((side, side)).detach().clone()
        embeddings.position_embeddings = nn.Parameter(table, embeddings.position_embeddings.requires_grad)
        self.config.image_size = self.config.position_image_size = image_size


class ImageTextMatching:
    """Mixin beside `RetrievalFeatures`: image-text matching with the head `itm_head` over a dual encoder."""

    def matching_context(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Image states for `match`, computed once per image for any number of texts. (C, ...) -> (C, S, D)."""
        return self.get_image_features(pixel_values=pixel_values, return_dict=True).last_hidden_state

    def match(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_states: torch.FloatTensor | None = None,
        context_index: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """
        Scores whether text and image belong together: logits (R, 2), the second for a match.

        Args:
            input_ids, attention_mask (`(R, T)`): The texts.
            pixel_values: R images, one per text.
            image_states (`(C, S, D)`): Earlier output of `matching_context`, instead of images.
            context_index (`(R,)`): Index of the image that each text is scored with; None pairs text r with image r.

        Raises:
            ValueError: neither or both of images and their states are given, and the errors of the tower.
        """
        # either images or their states
        if (pixel_values is None) == (image_states is None):
            raise ValueError("match expects either pixel_values or image_states, and got both or neither")
        check_inputs(self.tower, input_ids, attention_mask, pixel_values)
        if image_states is None:
            image_states = self.tower.vision(pixel_values)  # (R, S, D)

        # without an index, text r is scored with image r
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
        """`match` without input checks. (R, T), (C, S, D) -> (R, 2)."""
        fused = self.tower.fuse(input_ids, attention_mask, image_states, context_index, **kwargs)  # (R, T, D)
        return self.itm_head(fused[:, 0])


class FusedPredictions:
    """Mixin for a model with `itm_head` and `lm_head`: predicts matching and masked tokens in one run."""

    def predict_fused(
        self,
        output: ModelOutput,
        texts: torch.Tensor | None,
        text_mask: torch.Tensor,
        negatives: tuple[torch.Tensor, torch.Tensor] | None,
        masked_texts: torch.Tensor | None,
        mlm_places: torch.Tensor | None,
        fuse: Callable[..., torch.Tensor],
    ) -> None:
        """
        Fuses all texts that read an unmasked image in one run. Fills `itm_logits` and `mlm_logits` of `output`, which
        holds `image_states` (B, S, D).

        Args:
            texts, masked_texts (`(B, T, ...)`): Ids or states, as `fuse` takes them; `masked_texts` may be None.
            text_mask (`(B, T)`): 1 for real positions.
            negatives (`(B,)` twice): Index of each text's negative image and of each image's negative text, or None.
            mlm_places (`(M,)`): Indices into the flat (B, T) of the tokens to predict; all if None.
            fuse: Maps rows of text, their mask, the image states and `context_index` to (R, T, D).
        """
        # rows of text, and the index of the image that each reads
        count = text_mask.shape[0]
        own = torch.arange(count, device=text_mask.device)  # (B,)
        rows = []
        masks = []
        images = []
        if negatives is not None:
            other_images, other_texts = negatives
            rows += [texts, texts, texts[other_texts]]
            masks += [text_mask, text_mask, text_mask[other_texts]]
            images += [own, other_images, own]
        if masked_texts is not None:
            rows.append(masked_texts)
            masks.append(text_mask)
            images.append(own)
        if not rows:
            return

        # one run, so that each image's keys and values are computed once
        states = fuse(torch.cat(rows), torch.cat(masks), output.image_states, context_index=torch.cat(images))

        # split: pairs are classified from [CLS], masked texts from their tokens
        matched = 0 if negatives is None else 3 * count
        if matched:
            output.itm_logits = self.itm_head(states[:matched, 0])  # (3B, 2)
        if masked_texts is not None:
            states = states[matched:]  # (B, T, D)
            if mlm_places is not None:
                states = states.flatten(0, 1).index_select(0, mlm_places)  # (M, D)
            output.mlm_logits = self.lm_head(states)  # (M, V) or (B, T, V)


def check_passes(passes: Sequence[str], known: Sequence[str], needs: Mapping[str, tuple[str, object]]) -> None:
    """Raises `ValueError` for passes not in `known`, or if the value in `needs` (pass -> name, value) is None."""
    if unknown := [name for name in passes if name not in known]:
        raise ValueError(f"unknown passes {unknown}; expected any of {list(known)}")
    for name, (what, given) in needs.items():
        if name in passes and given is None:
            raise ValueError(f"the pass {name!r} needs {what}, got None")


# chooses a negative image for each text and a negative text for each image: image_embeds, text_embeds (B, P),
# temperature (1,) -> two index tensors (B,)
ChooseNegatives = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

__all__ = [
    "ChooseNegatives",
    "DualEncoder",
    "DualEncoderPreTrainedModel",
    "FusedPredictions",
    "ImageTextMatching",
    "TextEncoder",
    "VisionEncoder",
    "check_passes",
]

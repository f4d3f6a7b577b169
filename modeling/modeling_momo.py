"""MoMo: one encoder for texts, images and pairs, trained by masked reconstruction (Chada et al., 2023).

B rows, L positions, N = h*w patches, T tokens of a text, D width, P embedding width. A sequence is [CLS], N patches, T
tokens; either part may be missing. The same layers read all three kinds.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_momo import MomoConfig
from .vl_embeddings import PatchProjection
from .vl_features import CosineRetrieval, RetrievalFeatures
from .vl_heads import HeadLinear
from .vl_inputs import check_inputs
from .vl_layers import PreNormLayer, SelfAttention
from .vl_one_tower import OneTowerEmbeddings, SineTables
from .vl_outputs import PATCH_TOKEN, TEXT_TOKEN, VisionLanguageModelOutput
from .vl_ragged import Joined, Ragged, through_layers
from .vl_saving import SavedWhole
from .vl_task_heads import ImageClassification, PairClassificationHead


class MomoPreTrainedModel(SavedWhole, PreTrainedModel):
    """Base of the family's classes: weight initialisation, saving, and the features that transformers supports."""

    config: MomoConfig
    base_model_prefix = "momo"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["PreNormLayer"]
    # Trainer then divides the loss by the accumulation steps
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": PreNormLayer, "attentions": SelfAttention}
    # all classes load the same checkpoint: weights that a class does not use are ignored without a warning
    _keys_to_ignore_on_load_unexpected = [
        r"(image|text)_projection\.", r"^(itm|lm)_head\.", r"^logit_scale$", r"^classifier\.",
        r"^(shared|image|text|pair|pair_image|pair_text)_decoder\.",
    ]  # fmt: skip

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """MAE's initialisation: Xavier for linear layers, N(0, .02) for embeddings; torch's default for heads."""
        # transformers calls this only for modules that hold parameters or buffers themselves, so each case is a leaf
        if isinstance(module, (HeadLinear, PatchProjection)):
            module.reset()
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, SineTables):
            module.reset_tables()
            if hasattr(module, "mask_token"):
                init.normal_(module.mask_token, std=self.config.initializer_range)
        elif hasattr(module, "logit_scale"):
            init.constant_(module.logit_scale, -math.log(self.config.temperature))
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.embeddings.word_embeddings = value


class MomoModel(RetrievalFeatures, MomoPreTrainedModel):
    """
    The encoder. Takes texts, images, or both; `pooler_output` is the retrieval embedding, not normalised: [CLS]
    projected by the modality's own layer.

    Args:
        config (`MomoConfig`): The configuration.
        add_pooling_layer (`bool`, defaults to `True`): Whether to add the projections.
    """

    def __init__(self, config: MomoConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = OneTowerEmbeddings(config)
        self.layers = nn.ModuleList([PreNormLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.image_projection = HeadLinear(config.hidden_size, config.projection_dim) if add_pooling_layer else None
        self.text_projection = HeadLinear(config.hidden_size, config.projection_dim) if add_pooling_layer else None
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        dropped: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisionLanguageModelOutput:
        r"""
        Args:
            input_ids (`(B, L)`): [CLS], one placeholder per patch if there are images, tokens, padding on the right.
            attention_mask (`(B, L)`): 1 for real tokens, 0 for padding.
            pixel_values (`(B, C, H, W)`): Normalised images; without ids the sequence is [CLS] and patches.
            dropped (`(B, L)`): True for positions that are masked from attention. They keep their text positions.
            interpolate_pos_encoding: Accept other image sizes by interpolating the 2-D positions.

        A pair's `pooler_output` (B, P) is the mean of its two unit embeddings, each modality encoded alone as in
        contrastive training, or the image's embedding if the text is empty; to score pairs, use the matching head.
        `hidden_states` then hold these two passes before the pair's own.

        Raises:
            ValueError: neither input is given, an image has the wrong size, a text is too long, ids are out of range,
                pixels are NaN, or placeholders do not match the patches.
        """
        check_inputs(self, input_ids, attention_mask, pixel_values, interpolate_pos_encoding)

        # one sequence of the given inputs
        hidden_states, token_types = self.embeddings(input_ids, attention_mask, pixel_values)
        mask = attention_mask if input_ids is not None else None  # (B, L)
        if dropped is not None:
            mask = ~dropped if mask is None else (mask != 0) & ~dropped

        # for the embedding of a pair, encode each modality alone
        pooled = None
        pair = input_ids is not None and pixel_values is not None
        if pair and self.image_projection is not None:
            seen = torch.ones_like(token_types, dtype=torch.bool) if mask is None else mask != 0  # (B, L)
            image = self.encode(hidden_states, seen & (token_types != TEXT_TOKEN), **kwargs)  # (B, L, D)
            text = self.encode(hidden_states, seen & (token_types != PATCH_TOKEN), **kwargs)  # (B, L, D)
            both = (self.embed_images(image[:, 0]) + self.embed_texts(text[:, 0])) / 2  # (B, P)
            has_text = (seen & (token_types == TEXT_TOKEN)).any(1, keepdim=True)  # (B, 1)
            pooled = torch.where(has_text, both, self.image_projection(image[:, 0]))

        # the whole sequence
        states = self.encode(hidden_states, mask, **kwargs)  # (B, L, D)
        if not pair and self.image_projection is not None:
            project = self.image_projection if input_ids is None else self.text_projection
            pooled = project(states[:, 0])  # (B, P)
        return VisionLanguageModelOutput(last_hidden_state=states, pooler_output=pooled, token_types=token_types)

    def encode(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """Runs the layers on padded sequences (B, L, D); `mask` (B, L) is nonzero where attention is allowed."""
        mask = create_bidirectional_mask(self.config, hidden_states, mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, **kwargs)
        return self.norm(hidden_states)

    def encode_visible(self, passes: list[tuple[torch.Tensor, Ragged]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Runs the layers on the visible tokens of several batches, packed; see `through_layers`."""
        return through_layers(self.layers, self.norm, self.config, passes, self.training)

    def embed_images(self, cls: torch.Tensor) -> torch.Tensor:
        """Projects [CLS] of images to unit vectors in the contrastive space. (B, D) -> (B, P)."""
        return nn.functional.normalize(self.image_projection(cls), dim=-1)

    def embed_texts(self, cls: torch.Tensor) -> torch.Tensor:
        """Same for texts."""
        return nn.functional.normalize(self.text_projection(cls), dim=-1)

    def match_states(self, cls: torch.Tensor, patches: Ragged, words: Ragged) -> torch.Tensor:
        """Encodes embedded images and texts together and returns [CLS]. (R, D) and R rows of each -> (R, D)."""
        ((states, _),) = self.encode_visible([(cls, Joined.of([patches, words]).whole)])
        return states


class Matching:
    """Mixin for a `MomoPreTrainedModel` with `momo`, `logit_scale` and `itm_head`: image-text matching."""

    @property
    def temperature(self) -> torch.Tensor:
        """The learned divisor of cosines, clamped to its range. (1,)."""
        return (-self.logit_scale).exp().clamp(*self.config.temperature_range)

    def matching_context(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Image states for `match`, computed once per image for any number of texts. (C, ...) -> (C, N, D)."""
        check_inputs(self.momo, None, None, pixel_values)
        return self.momo.embeddings.embed_patches(pixel_values)

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
            input_ids, attention_mask (`(R, L)`): The texts; image placeholders among the ids are ignored.
            pixel_values: R images, one per text.
            image_states (`(C, N, D)`): Earlier output of `matching_context`, instead of images.
            context_index (`(R,)`): Index of the image that each text is scored with; None pairs text r with image r.

        Raises:
            ValueError: neither or both of images and their states are given, and the errors of the tower.
        """
        if (pixel_values is None) == (image_states is None):
            raise ValueError("match expects either pixel_values or image_states, and got both or neither")
        if pixel_values is not None:
            image_states = self.matching_context(pixel_values)  # (R, N, D)
        if context_index is None and image_states.shape[0] != input_ids.shape[0]:
            raise ValueError(f"got {len(input_ids)} texts and {len(image_states)} pictures; expected as many of each")

        # embed the texts without placeholders
        is_text = input_ids != self.config.image_token_id  # (R, L)
        attention_mask = is_text.long() if attention_mask is None else attention_mask * is_text
        input_ids = torch.where(is_text, input_ids, self.config.pad_token_id or 0)
        check_inputs(self.momo, input_ids, attention_mask, None)
        embedded, token_types = self.momo.embeddings(input_ids, attention_mask, None)  # (R, L, D), (R, L)

        # each row's image and words; a text may be empty
        patches = image_states if context_index is None else image_states.index_select(0, context_index)  # (R, N, D)
        places = (token_types == TEXT_TOKEN).flatten().nonzero().flatten()  # (n,)
        words = Ragged.of_rectangle(embedded).keep(places)
        cls = self.momo.match_states(embedded[:, 0], Ragged.of_rectangle(patches), words)  # (R, D)
        return self.itm_head(cls)


class MomoForImageTextRetrieval(Matching, CosineRetrieval, MomoPreTrainedModel):
    """
    Scores images against texts by cosine, then re-ranks the best with the matching head.
    `AutoModelForZeroShotImageClassification` returns this class.
    """

    def __init__(self, config: MomoConfig):
        super().__init__(config)
        self.momo = MomoModel(config)
        self.logit_scale = nn.Parameter(torch.zeros(1))  # not 0-dim: ZeRO-3 cannot partition a scalar
        self.itm_head = HeadLinear(config.hidden_size, 2)
        self.post_init()

    def scaled(self, cosines: torch.Tensor) -> torch.Tensor:
        return cosines / self.temperature


class MomoForImageClassification(ImageClassification, MomoPreTrainedModel):
    """Image classification: a linear layer on [CLS] of an image, or of an image with a text that guides it."""

    main_input_name = "pixel_values"

    def __init__(self, config: MomoConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.momo = MomoModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class MomoForSequenceClassification(MomoPreTrainedModel):
    """Text classification, or regression if there is one label: a linear layer on [CLS] of a text or a pair."""

    def __init__(self, config: MomoConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.momo = MomoModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """`logits` (B, labels); `labels` (B,), integers for classes and floats for a regression."""
        if input_ids is None:
            raise ValueError("MomoForSequenceClassification expects input_ids, got None")
        outputs = self.momo(input_ids, attention_mask, pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(outputs.last_hidden_state[:, 0])  # (B, labels)
        loss = self.loss_function(labels, logits, self.config) if labels is not None else None
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def freeze_unused(self) -> None:
        """Freezes the image stem: a data-parallel engine would wait for its gradients for ever."""
        self.momo.embeddings.stem.requires_grad_(False)


class MomoForVisualQuestionAnswering(MomoPreTrainedModel):
    """
    Visual question answering as classification on [CLS] of the pair, into `config.num_labels` answers (3,129 for
    VQAv2 in FLAVA's protocol, which section 4.1 follows).
    """

    def __init__(self, config: MomoConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.momo = MomoModel(config, add_pooling_layer=False)
        self.classifier = PairClassificationHead(config.hidden_size, 2 * config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """
        `logits` (B, answers). `labels` are class indices (B,), trained with cross-entropy, or soft targets
        (B, answers) in [0, 1], trained with binary cross-entropy summed over answers.
        """
        if input_ids is None or pixel_values is None:
            raise ValueError(f"{type(self).__name__} answers about pictures: it expects input_ids and pixel_values")
        outputs = self.momo(input_ids, attention_mask, pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(outputs.last_hidden_state[:, 0])  # (B, answers)
        loss = None
        if labels is not None and labels.ndim == 1:
            loss = nn.functional.cross_entropy(logits.float(), labels)
        elif labels is not None:
            losses = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
            loss = losses.sum(1).mean()
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def answer_scores(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Probability of each answer of `config.id2label`, given the inputs of `forward`: (B, answers) in [0, 1]."""
        return self(**inputs).logits.float().sigmoid()


__all__ = [
    "Matching",
    "MomoForImageClassification",
    "MomoForImageTextRetrieval",
    "MomoForSequenceClassification",
    "MomoForVisualQuestionAnswering",
    "MomoModel",
    "MomoPreTrainedModel",
]

"""MoMo's decoders, which reconstruct masked positions, and the masked language model built from them.

B rows, N patches, L positions, n tokens of all rows of a batch, v of them visible, D width of the encoder, E width of
a decoder, V vocabulary size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import MaskedLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_momo import MomoConfig
from .modeling_momo import MomoModel, MomoPreTrainedModel
from .vl_features import TokenPredictions
from .vl_heads import LanguageModelHead
from .vl_layers import PreNormLayer
from .vl_one_tower import SineTables, at_placeholders, text_places
from .vl_outputs import PATCH_TOKEN, TEXT_TOKEN
from .vl_ragged import Joined, Ragged, through_layers


class DecoderWidths:
    """The configuration that layers read, with a decoder's widths; the attention implementation is the encoder's."""

    def __init__(self, config: MomoConfig):
        self.model = config
        self.hidden_size = config.decoder_hidden_size
        self.num_attention_heads = config.decoder_num_attention_heads
        self.intermediate_size = 4 * config.decoder_hidden_size
        self.hidden_act = config.hidden_act
        self.layer_norm_eps = config.layer_norm_eps
        self.attention_dropout = config.attention_dropout

    @property
    def _attn_implementation(self) -> str:
        # read on each use: it may be set on a model after its layers are built
        return self.model._attn_implementation


class Unseen(NamedTuple):
    """
    Decoder input of one modality of a batch.

    Attributes:
        seen (`(v, D)`): The encoder's states of the visible tokens.
        places (`(v,)`): Indices of the visible tokens among all n, ascending.
        row (`(n,)`), each: Row of each of the n tokens and tokens per row, as in [`Ragged`].
        positions (`(n, E)`): Position embeddings of the n tokens.
    """

    seen: torch.Tensor
    places: torch.Tensor
    row: torch.Tensor
    each: int | None
    positions: torch.Tensor


class MomoDecoder(SineTables):
    """
    MAE's decoder: layers over the encoder's states of visible tokens and [MASK] elsewhere, plus sines (section 3.1).

    Args:
        config (`MomoConfig`): The configuration.
        pixels (`bool`): Whether to add a head that predicts pixels.
    """

    def __init__(self, config: MomoConfig, pixels: bool):
        super().__init__(config, config.decoder_hidden_size)
        self.widths = DecoderWidths(config)
        self.embed = nn.Linear(config.hidden_size, config.decoder_hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_hidden_size))
        self.layers = nn.ModuleList([PreNormLayer(self.widths) for _ in range(config.decoder_num_hidden_layers)])
        self.norm = nn.LayerNorm(config.decoder_hidden_size, eps=config.layer_norm_eps)
        patch = config.patch_size**2 * config.num_channels
        self.pixel_head = nn.Linear(config.decoder_hidden_size, patch) if pixels else None

    def forward(self, cls: torch.Tensor, parts: Sequence[Unseen]) -> tuple[torch.Tensor, ...]:
        """[CLS] (B, D) and the modalities of a batch -> the states of all tokens of each modality, (n, E)."""
        # visible tokens, projected to the decoder's width
        sizes = [len(cls), *(len(part.seen) for part in parts)]
        cls, *seen = self.embed(torch.cat([cls, *(part.seen for part in parts)])).split(sizes)

        # [MASK] at every other position
        whole = []
        for part, states in zip(parts, seen, strict=True):
            tokens = self.mask_token[0].to(states.dtype).expand(len(part.row), -1)  # (n, E)
            tokens = tokens.index_copy(0, part.places, states) + part.positions.to(states.dtype)
            whole.append(Ragged(tokens, part.row, len(cls), part.each))
        joined = Joined.of(whole)
        ((_, states),) = through_layers(self.layers, self.norm, self.widths, [(cls, joined.whole)], self.training)
        return joined.apart(states)

    def complete(
        self,
        states: torch.Tensor,
        token_types: torch.Tensor,
        dropped: torch.Tensor,
        attention_mask: torch.Tensor | None,
        patches: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        `forward` for padded sequences that keep every position: no shape depends on `dropped`.

        Args:
            states (`(B, L, D)`): The encoder's states; it did not see the positions that are `dropped` (B, L).
            token_types (`(B, L)`): Type of each position.
            attention_mask (`(B, L)`, *optional*): Positions that this decoder may attend to.
            patches (`(N, E)`, *optional*): Position embeddings of the patches, if there are images.

        Returns:
            (B, L, E).
        """
        hidden = self.embed(states)  # (B, L, E)
        hidden = torch.where(dropped[..., None], self.mask_token.to(hidden.dtype), hidden)

        # [CLS] has no position, as in MAE
        places = text_places(token_types, self.config.max_text_length)  # (B, L)
        positions = self.text_positions[places] * (token_types == TEXT_TOKEN)[..., None]  # (B, L, E)
        if patches is not None:
            table = at_placeholders(patches.expand(len(states), -1, -1), token_types)  # (B, L, E)
            positions = torch.where((token_types == PATCH_TOKEN)[..., None], table, positions)
        hidden = hidden + positions.to(hidden.dtype)

        # the whole sequence
        mask = create_bidirectional_mask(self.config, hidden, attention_mask)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask)
        return self.norm(hidden)


class WordHead(LanguageModelHead):
    """BERT's head: from the decoder's to the word embeddings' width, then their tied table. (..., E) -> (..., V)."""

    def __init__(self, config: MomoConfig):
        super().__init__(config)
        self.dense = nn.Linear(config.decoder_hidden_size, config.hidden_size)


class Decoders(TokenPredictions):
    """Mixin for `MomoPreTrainedModel`: the decoders that its configuration names, and the language-model head."""

    def add_decoders(self, config: MomoConfig, kinds: Sequence[str]) -> None:
        """Adds the decoders of `kinds` as attributes, whose names appear in the keys of checkpoints."""
        for name in decoder_names(config, kinds):
            setattr(self, name, MomoDecoder(config, pixels=name not in ("text_decoder", "pair_text_decoder")))
        self.lm_head = WordHead(config)

    @property
    def pairs_apart(self) -> bool:
        """Whether each modality of a pair has its own decoder."""
        return self.config.pair_decoder == "separate" and not self.config.shared_decoder

    def decoder(self, kind: str) -> MomoDecoder:
        """Decoder of `image`, `text`, `pair`, `pair_image` or `pair_text`. Raises `ValueError` if there is none."""
        name = "shared_decoder" if self.config.shared_decoder else f"{kind}_decoder"
        found = getattr(self, name, None)
        if found is None:
            raise ValueError(f"there is no {name}: decoders are {list(self.config.decoders)}, those of another stage")
        return found


def decoder_names(config: MomoConfig, kinds: Sequence[str]) -> tuple[str, ...]:
    """Attribute names of the decoders of these kinds."""
    if config.shared_decoder:
        return ("shared_decoder",)
    separate = config.pair_decoder == "separate"
    pairs = ("pair_image_decoder", "pair_text_decoder") if separate else ("pair_decoder",)
    return tuple(name for kind in kinds for name in (pairs if kind == "pair" else (f"{kind}_decoder",)))


class MomoForMaskedLM(Decoders, MomoPreTrainedModel):
    """
    Masked language modelling: the encoder does not see [MASK]; the text decoder predicts its tokens, or the pair
    decoder if there is an image.
    """

    # the loss is a mean over all tokens of a step, across its accumulated batches
    accepts_loss_kwargs = True
    _tied_weights_keys = {"lm_head.decoder.weight": "momo.embeddings.word_embeddings.weight"}

    def __init__(self, config: MomoConfig):
        super().__init__(config)
        self.momo = MomoModel(config, add_pooling_layer=False)
        self.add_decoders(config, ("text", "pair") if "pair" in config.decoders else ("text",))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """
        `logits` (B, L, V) correspond to the positions of `input_ids`; `labels` (B, L) are -100 where there is no loss.
        The loss is the sum divided by `num_items_in_batch`, which Trainer counts over the batches of a step; the mean
        if None.

        Raises:
            ValueError: no ids, an image but no pair decoder, and the errors of the tower.
        """
        if input_ids is None:
            raise ValueError(f"{type(self).__name__} expects input_ids, got None")
        dropped = input_ids == self.config.mask_token_id  # (B, L)
        outputs = self.momo(input_ids, attention_mask, pixel_values, dropped=dropped, return_dict=True, **kwargs)

        # decode the whole sequence
        kind = "text"
        if pixel_values is not None:
            kind = "pair_text" if self.pairs_apart else "pair"
        decoder = self.decoder(kind)
        patches = None if pixel_values is None else decoder.positions_of(pixel_values)  # (N, E)
        mask = attention_mask
        if kind == "pair_text":
            # this decoder reads the text alone
            text = outputs.token_types != PATCH_TOKEN  # (B, L)
            mask = text if mask is None else (mask != 0) & text
        states = decoder.complete(outputs.last_hidden_state, outputs.token_types, dropped, mask, patches)  # (B, L, E)
        logits = self.lm_head(states)  # (B, L, V)
        loss = None
        if labels is not None:
            options = {"vocab_size": self.config.vocab_size, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, **options)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["Decoders", "MomoDecoder", "MomoForMaskedLM", "Unseen", "decoder_names"]

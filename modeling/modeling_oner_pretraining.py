"""One pretraining step of OneR with all streams in one call: the five inputs of the paper's figure in one batch.

B pairs, N patches, K of them kept, W slots of a text, L = 1 + N + W, n tokens of the packed batch, D width,
P embedding width, M masked tokens, V vocabulary size. F(X|Y): X's tokens as queries, Y's as keys and values (equation
3); F(X) = F(X|X).
"""

from dataclasses import replace

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from .configuration_oner import OneRConfig
from .modeling_oner import OneRModel, OneRPreTrainedModel
from .vl_features import RetrievalFeatures, TokenPredictions
from .vl_heads import ContrastiveHead, LanguageModelHead, PixelHead
from .vl_inputs import check_inputs, check_kept_patches, check_masks, check_pairs, patch_count
from .vl_layers import Stream, attends_unpadded, sequences_of, split_streams
from .vl_outputs import VisionLanguagePreTrainingOutput

REPRESENTATIONS = ("image", "text", "mix", "image_text", "context")
MASKED_STREAMS = ("image", "text", "image_text")
# representation -> the streams that it is computed from
SOURCES = {
    "image": ("image",),
    "text": ("text",),
    "mix": ("image", "text"),
    "image_text": ("image_text",),
    "context": ("image", "text", "image|text", "text|image"),
}


class OneRForPreTraining(TokenPredictions, RetrievalFeatures, OneRPreTrainedModel):
    """
    The tower with all trained heads: projector and predictor (MoCo-v3), a language-model head tied to the
    word embeddings, a pixel head. It computes representations and logits; losses, teacher and negatives belong to the
    objective.
    """

    _tied_weights_keys = {"lm_head.decoder.weight": "oner.embeddings.word_embeddings.weight"}

    def __init__(self, config: OneRConfig):
        super().__init__(config)
        self.oner = OneRModel(config)
        self.predictor = self._make_predictor()
        self.text_predictor = self._make_predictor() if config.two_heads else None
        self.lm_head = LanguageModelHead(config)
        self.pixel_head = PixelHead(config)
        if config.learnable_temperature:
            self.logit_scale = nn.Parameter(torch.zeros(1))  # not 0-dim: ZeRO-3 cannot partition a scalar
        self.post_init()

    def _make_predictor(self) -> ContrastiveHead:
        return ContrastiveHead.from_config(self.config, self.config.projection_dim, self.config.predictor_layers)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        pixel_values: torch.FloatTensor | None = None,
        masked_input_ids: torch.LongTensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        kept_patches: torch.LongTensor | None = None,
        text_index: torch.LongTensor | None = None,
        mlm_index: torch.LongTensor | None = None,
        representations: tuple[str, ...] = ("image", "text", "mix", "image_text"),
        masked_streams: tuple[str, ...] = MASKED_STREAMS,
        contrast_masked: bool = True,
        predict: bool = True,
        checked: bool = False,
        **kwargs,
    ) -> VisionLanguagePreTrainingOutput:
        r"""
        Args:
            input_ids, attention_mask (`(B, L)`): Pairs in the joint layout; texts alone are [CLS] and tokens.
            pixel_values (`(B, C, H, W)`): Their images; None for texts alone, which have only the stream `text`.
            masked_input_ids (`(B, L)`): The same ids after masking; None for clean inputs (the teacher's).
            bool_masked_pos (`(B, N)`): True for masked patches; None for clean images.
            kept_patches (`(B, K)`): Indices of the patches that the streams read, which keep their positions; None for
                all. Images with masked patches are read whole, because the masked ones are predicted.
            text_index (`(n_text,)`): Indices of the real tokens in a flat (B, W). Computed from the mask when None;
                given by the collator so that neither a compiled graph nor an accelerator has to synchronise for it.
            mlm_index (`(M,)`): Which of these tokens to predict; without it there are no `mlm_logits`.
            representations: Contrastive embeddings to return, of `image`, `text`, `mix` (their mean), `image_text`
                (the concatenated sequence), `context` (the mean of F(I|T) and F(T|I)).
            masked_streams: Streams with masked modelling, of `image`, `text`, `image_text`.
            contrast_masked: Whether the contrastive embeddings come from the masked inputs, in the same pass
                (appendix C, "a single forward pass"), or from clean ones in streams of their own.
            predict: Apply the predictor (online network) or stop at the projector (teacher).
            checked: Whether texts and images were already validated; the shapes of masks are checked in any case.

        Raises:
            ValueError: unknown names, errors of [`OneRModel`], a mixed representation with two heads, texts
                alone for a representation that needs images, or kept patches where every stream has masked ones.
        """
        self._check_request(representations, masked_streams, texts_alone=pixel_values is None)
        n_patches = 0 if pixel_values is None else patch_count(pixel_values, self.config.patch_size)
        if not checked:
            check_inputs(self.oner, input_ids, attention_mask, pixel_values)
            check_pairs(input_ids, attention_mask, self.config.image_token_id, n_patches)
        check_masks(input_ids, pixel_values, masked_input_ids, bool_masked_pos, self.config.patch_size)
        if kept_patches is not None:
            check_kept_patches(kept_patches, len(input_ids), n_patches)
            if contrast_masked and bool_masked_pos is not None:
                raise ValueError("got kept_patches and bool_masked_pos for the same streams; expected one of the two")
        text_mask = attention_mask[:, 1 + n_patches :]  # (B, W)
        if text_index is None:
            text_index = text_mask.flatten().nonzero().flatten()  # (n_text,)

        # the requested representations, and the streams that they need
        masks_anything = masked_input_ids is not None or bool_masked_pos is not None
        ids = masked_input_ids if masked_input_ids is not None else input_ids
        read = kept_patches if bool_masked_pos is None else None
        masked = self._embed(ids[:, 1 + n_patches :], pixel_values, bool_masked_pos, read, text_index)
        contrast_names = {source for name in representations for source in SOURCES[name]}
        modelled = set(masked_streams) if masks_anything else set()
        if contrast_masked or not masks_anything:
            wanted = [(name, name, masked) for name in sorted(contrast_names | modelled)]
        else:
            clean = self._embed(input_ids[:, 1 + n_patches :], pixel_values, None, kept_patches, text_index)
            wanted = [(name, name, clean) for name in sorted(contrast_names)]
            wanted += [("masked " + name, name, masked) for name in sorted(modelled)]

        # all streams in one pass
        packed, streams = self._pack(wanted, text_index, text_mask)  # (n, D)
        states = split_streams(self._encode(packed, streams, text_mask), list(streams.values()))

        # contrastive embeddings, masked tokens, masked patches
        prefix = "" if contrast_masked or not masks_anything else "masked "
        output = VisionLanguagePreTrainingOutput(
            logit_scale=self.logit_scale if self.config.learnable_temperature else None,
            embeddings=self._represent(states, streams, representations, predict) if representations else {},
            mlm_logits={},
            pixel_predictions={},
        )
        if masked_input_ids is not None and mlm_index is not None:
            texts = {name: states[prefix + name][1] for name in masked_streams if name != "image"}
            output.mlm_logits = self._predict_tokens(texts, mlm_index)
        if bool_masked_pos is not None:
            patches = {name: states[prefix + name][0][:, 1:] for name in masked_streams if name != "text"}
            output.pixel_predictions = {name: self.pixel_head(rows) for name, rows in patches.items()}
        return output

    def _check_request(
        self, representations: tuple[str, ...], masked_streams: tuple[str, ...], texts_alone: bool
    ) -> None:
        for got, known, what in (
            (representations, REPRESENTATIONS, "representations"),
            (masked_streams, MASKED_STREAMS, "masked_streams"),
        ):
            if unknown := [name for name in got if name not in known]:
                raise ValueError(f"unknown {what} {unknown}; expected any of {list(known)}")
        if self.config.two_heads and (mixed := [name for name in representations if name not in ("image", "text")]):
            raise ValueError(f"two_heads has no head for {mixed}; expected only 'image' and 'text'")
        if texts_alone and (pictured := [name for name in (*representations, *masked_streams) if name != "text"]):
            raise ValueError(f"there are no pixel_values for {pictured}; expected only 'text' of texts alone")

    def _embed(
        self,
        text_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        bool_masked_pos: torch.Tensor | None,
        kept_patches: torch.Tensor | None,
        text_index: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Stem and tokens once for every stream: [CLS] (B, 1, D), patches (B, N or K, D), real tokens (n_text, D)."""
        embeddings = self.oner.embeddings
        cls = embeddings.embed_cls(len(text_ids))  # (B, 1, D)

        # real tokens only: padding is never embedded
        text = embeddings.embed_tokens(text_ids.flatten()[text_index], text_index % text_ids.shape[1])  # (n_text, D)
        if pixel_values is None:
            return cls.to(text.dtype), None, text

        # the stem sees the whole image: its convolutions need a patch's neighbours, its norm the statistics of
        # inference
        patches = embeddings.embed_patches(pixel_values, bool_masked_pos)  # (B, N, D)
        if kept_patches is not None:
            patches = patches.take_along_dim(kept_patches[..., None], 1)  # (B, K, D)

        # under autocast the stem gives half precision and the table fp32
        dtype = torch.promote_types(patches.dtype, text.dtype)
        return cls.to(dtype), patches.to(dtype), text.to(dtype)

    def _pack(
        self,
        wanted: list[tuple[str, str, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]],
        text_index: torch.Tensor,
        text_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, Stream]]:
        """Concatenates streams into (n, D): for each, [CLS] (and patches) as a rectangle, then its text, if any."""
        tokens, streams = [], {}
        for name, kind, (cls, patches, text) in wanted:
            queries = kind.split("|")[0]
            prefix = torch.cat([cls, patches], dim=1) if "image" in queries else cls  # (B, S, D)
            reads = "text" in queries
            streams[name] = Stream(
                name=name,
                batch_size=prefix.shape[0],
                prefix=prefix.shape[1],
                text_slots=text_mask.shape[1] if reads else 0,
                text_index=text_index if reads else None,
            )
            tokens.append(prefix.flatten(0, 1))
            if reads:
                tokens.append(text)
        return torch.cat(tokens), streams

    def _encode(self, packed: torch.Tensor, streams: dict[str, Stream], text_mask: torch.Tensor) -> torch.Tensor:
        """The transformer layers over all streams. (n, D) -> (n, D)."""
        listed = list(streams.values())
        if "|" not in "".join(streams) and attends_unpadded(self.config, listed, packed, self.training):
            # reorder once for all layers so that each row's tokens are contiguous
            places, sequences = sequences_of(listed, text_mask)
            packed = torch.empty_like(packed).index_copy(0, places, packed)  # (n, D)
            for layer in self.oner.layers:
                packed = layer(packed, None, sequences)
            return self.oner.norm(packed.index_select(0, places))

        # each stream padded for its own attention call, over itself or its context
        own = []
        for stream in streams.values():
            stream.set_mask(self.config, stream.key_mask(text_mask), like=packed)
            own.append(stream)
        crossed = [
            self._cross(name, stream, streams, text_mask, packed) if "|" in name else stream
            for name, stream in streams.items()
        ]

        # with "last_layer" only the last layer uses the context
        last = len(self.oner.layers) - 1
        for number, layer in enumerate(self.oner.layers):
            early = self.config.context_states == "last_layer" and number < last
            packed = layer(packed, None, own if early else crossed)  # (n, D)
        return self.oner.norm(packed)

    def _cross(
        self, name: str, stream: Stream, streams: dict[str, Stream], text_mask: torch.Tensor, packed: torch.Tensor
    ) -> Stream:
        """F(X|Y): the stream "X|Y" with keys and values from Y's own stream, or from "Y|X" with co-attention."""
        query, key = name.split("|")
        context = streams[f"{key}|{query}" if self.config.context_states == "co_attention" else key]
        crossed = replace(stream, context=context.name)
        crossed.set_mask(self.config, context.key_mask(text_mask, skip_cls=not self.config.context_cls), like=packed)
        return crossed

    def _pool(self, prefix: torch.Tensor, text: torch.Tensor | None, stream: Stream) -> torch.Tensor:
        """F(X) of a stream: its [CLS] state, or the mean over its patches and tokens (equation 16). -> (B, D)."""
        if self.config.pooling == "cls":
            return prefix[:, 0]

        # sum patches from the rectangle, and tokens by the row that they belong to
        total, count = prefix[:, 1:].sum(1), prefix.new_full((stream.batch_size, 1), prefix.shape[1] - 1)
        if text is not None:
            row = stream.text_index // stream.text_slots
            total = total.index_add(0, row, text)  # (B, D)
            count = count.index_add(0, row, text.new_ones(text.shape[0], 1))  # (B, 1)
        return total / count.clamp_min(1)

    def _represent(
        self,
        tokens: dict[str, tuple[torch.Tensor, torch.Tensor | None]],
        streams: dict[str, Stream],
        representations: tuple[str, ...],
        predict: bool,
    ) -> dict[str, torch.Tensor]:
        """Pooled states through the heads, mixed where `mixup_space` says (equations 2 to 4). -> (B, P) each."""
        # F(X) of every stream that is needed, computed once
        sources = sorted({source for name in representations for source in SOURCES[name]})
        parts = {"mix": ("image", "text"), "context": ("image|text", "text|image")}
        states = {name: self._pool(*tokens[name], streams[name]) for name in sources}  # (B, D) each

        # mix before the projector, or after it with or without normalisation
        space = self.config.mixup_space
        if space == "hidden":
            states = {name: self._mean(states, parts.get(name, (name,))) for name in representations}
            states = self._through(self.oner.projector, self.oner.text_projector, states)
        else:
            states = self._through(self.oner.projector, self.oner.text_projector, states)
            if space == "normalized":
                states = {name: nn.functional.normalize(state, dim=-1) for name, state in states.items()}
            states = {name: self._mean(states, parts.get(name, (name,))) for name in representations}
        return self._through(self.predictor, self.text_predictor, states) if predict else states

    @staticmethod
    def _mean(states: dict[str, torch.Tensor], names: tuple[str, ...]) -> torch.Tensor:
        return sum(states[name] for name in names) / len(names)

    def _through(
        self, head: ContrastiveHead, text_head: ContrastiveHead | None, states: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """(B, ·) each -> (B, P) each, in one call of the head so that all streams share its batch statistics."""
        # one head per modality, one call per stream, or one call for all
        if text_head is not None:
            return {name: (text_head if name == "text" else head)(state) for name, state in states.items()}
        if self.config.head_statistics == "separate":
            return {name: head(state) for name, state in states.items()}
        chunks = head(torch.cat(list(states.values()))).chunk(len(states))
        return dict(zip(states, chunks, strict=True))

    def _predict_tokens(self, texts: dict[str, torch.Tensor], mlm_index: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of the masked tokens only, all streams in one product with the vocabulary. -> (M, V) each."""
        if not texts:
            return {}
        masked = torch.cat([states.index_select(0, mlm_index) for states in texts.values()])  # (streams * M, D)
        return dict(zip(texts, self.lm_head(masked).chunk(len(texts)), strict=True))


__all__ = ["OneRForPreTraining"]

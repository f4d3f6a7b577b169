"""MoMo's pre-training forward: masked images, texts and pairs, contrastive embeddings, and matching in one call.

B rows, N patches, W slots of a text, n tokens of all texts of a batch, L = 1 + N + W positions of a pair, D width of
the encoder, E of a decoder, P embedding width, K masked patches, M masked tokens, V vocabulary size.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils import is_tracing, logging
from transformers.utils.generic import can_return_tuple

from .configuration_momo import MomoConfig
from .modeling_momo import Matching, MomoModel, MomoPreTrainedModel
from .modeling_momo_decoders import Decoders, Unseen, decoder_names
from .vl_dual_encoder import ChooseNegatives, check_passes
from .vl_features import RetrievalFeatures
from .vl_heads import HeadLinear
from .vl_inputs import check_inputs, check_padding, check_pairs, check_patch_mask, patch_count
from .vl_ragged import Joined, Ragged, complement

logger = logging.get_logger(__name__)

PASSES = ("image", "text", "pair", "contrast", "match")


@dataclass
class MomoPreTrainingOutput(ModelOutput):
    """
    Args:
        logit_scale (`(1,)`): The learnable logarithm of the inverse temperature.
        embeddings (`dict`): Unit vectors (B, P) of `image` and `text`, each encoded alone and unmasked.
        pixel_predictions (`dict`): Predicted pixels (K, p*p*C) of the masked patches of `image` or `pair`.
        mlm_logits (`dict`): Logits (M, V) of the masked tokens of `text` or `pair`.
        itm_logits (`(3B, 2)`): Matching logits of the pairs, of each text with its negative image, and of each image
            with its negative text.
    """

    logit_scale: torch.FloatTensor | None = None
    embeddings: dict[str, torch.FloatTensor] | None = None
    pixel_predictions: dict[str, torch.FloatTensor] | None = None
    mlm_logits: dict[str, torch.FloatTensor] | None = None
    itm_logits: torch.FloatTensor | None = None


@dataclass
class Embedded:
    """
    Embedded images and texts of a batch before the encoder, with the indices of visible and masked tokens. Fields of
    a modality that the batch lacks, or that is not masked, are None.

    Attributes:
        cls (`(B, D)`): [CLS] embedding of each row.
        patches, words (`Ragged`): All B * N patches and n words.
        seen_patches, hidden_patches (`(B * N - K,)`, `(K,)`): Indices of visible and masked patches.
        seen_words, hidden_words (`(n - M,)`, `(M,)`): Indices of visible and masked words.
        word_slots (`(n,)`): Position of each word in its text.
        pixel_values (`(B, C, H, W)`): The images, whose size determines the position table.
    """

    cls: torch.Tensor
    pixel_values: torch.Tensor | None
    patches: Ragged | None = None
    words: Ragged | None = None
    seen_patches: torch.Tensor | None = None
    hidden_patches: torch.Tensor | None = None
    seen_words: torch.Tensor | None = None
    hidden_words: torch.Tensor | None = None
    word_slots: torch.Tensor | None = None

    def seen(self) -> list[Ragged]:
        """The visible patches and the visible words."""
        return [self.patches.keep(self.seen_patches), self.words.keep(self.seen_words)]


class MomoForPreTraining(Decoders, Matching, RetrievalFeatures, MomoPreTrainedModel):
    """
    The encoder with everything that is trained: decoders, a language-model head tied to the word embeddings, the
    temperature, and the matching head. It computes predictions, embeddings and logits; the objective owns losses and
    negative sampling.
    """

    _tied_weights_keys = {"lm_head.decoder.weight": "momo.embeddings.word_embeddings.weight"}

    def __init__(self, config: MomoConfig):
        super().__init__(config)
        self.momo = MomoModel(config)
        self.add_decoders(config, config.decoders)
        self.logit_scale = nn.Parameter(torch.zeros(1))  # not 0-dim: ZeRO-3 cannot partition a scalar
        self.itm_head = HeadLinear(config.hidden_size, 2)
        self.post_init()

    def save_pretrained(self, save_directory, *args, state_dict: dict | None = None, **kwargs) -> None:
        """Saves without the decoders unless `save_decoders` is set: the paper discards them after each stage."""
        if not self.config.save_decoders:
            state_dict = self.state_dict() if state_dict is None else state_dict
            left = (*decoder_names(self.config, self.config.decoders), "lm_head")
            state_dict = {name: value for name, value in state_dict.items() if name.partition(".")[0] not in left}
            logger.warning(f"{', '.join(left)} of this stage are left behind (save_decoders in the configuration)")
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        text_index: torch.LongTensor | None = None,
        mlm_index: torch.LongTensor | None = None,
        mim_index: torch.LongTensor | None = None,
        passes: tuple[str, ...] = ("pair", "contrast"),
        choose_negatives: ChooseNegatives | None = None,
        match_masked: bool = False,
        checked: bool = False,
        **kwargs,
    ) -> MomoPreTrainingOutput:
        r"""
        The encoder sees visible tokens only (section 3.3). The collator gives the three index tensors so that the
        accelerator need not synchronise; without them, `text_index` and `mim_index` are found from the masks.

        Args:
            input_ids, attention_mask (`(B, L)`): Texts alone, or pairs in the processor's joint layout; without a mask
                nothing is padding.
            pixel_values (`(B, C, H, W)`): Images alone, or those of the pairs.
            bool_masked_pos (`(B, N)`): True for masked patches.
            text_index (`(n,)`): Indices of the real tokens in the flat (B, W).
            mlm_index (`(M,)`): Indices of the masked tokens among those n.
            mim_index (`(K,)`): Indices of the masked patches in the flat (B, N).
            passes: What to compute: `image` (masked patches), `text` (masked tokens), `pair` (both, from the visible
                tokens of both), `contrast` (unmasked images and texts, each alone), `match` (unmasked pairs and
                negatives).
            choose_negatives: For "match"; called after the embeddings of "contrast". A function of tensors.
            match_masked: Whether "match" reads only the visible tokens, as "pair" does.
            checked: Whether texts and images were already validated.

        Raises:
            ValueError: a pass is unknown or lacks an input that it needs, the configuration has no such decoder, and
                the errors of [`MomoModel`].
        """
        needs = {
            "image": ("bool_masked_pos", bool_masked_pos),
            "text": ("mlm_index", mlm_index),
            "pair": ("bool_masked_pos and mlm_index", None if mlm_index is None else bool_masked_pos),
            "match": ("choose_negatives", choose_negatives),
        }
        check_passes(passes, PASSES, needs)
        if "match" in passes and "contrast" not in passes:
            raise ValueError(f"the pass 'match' needs 'contrast' beside it, got {list(passes)}")
        if input_ids is not None and attention_mask is None:
            attention_mask = torch.ones_like(input_ids)  # (B, L)
        self._check(input_ids, attention_mask, pixel_values, bool_masked_pos, checked)
        batch = self._embed(input_ids, attention_mask, pixel_values, bool_masked_pos, text_index, mlm_index, mim_index)

        # everything that needs no negatives, in one run of the encoder
        pair = Joined.of(batch.seen()) if "pair" in passes else None
        rows: dict[str, Ragged] = {}
        if "image" in passes:
            rows["image"] = batch.patches.keep(batch.seen_patches)
        if "text" in passes:
            rows["text"] = batch.words.keep(batch.seen_words)
        if pair is not None:
            rows["pair"] = pair.whole
        if "contrast" in passes:
            rows |= {"whole image": batch.patches, "whole text": batch.words}
        encoded = self.momo.encode_visible([(batch.cls, part) for part in rows.values()])
        states = dict(zip(rows, encoded, strict=True))  # [CLS] (B, D) and tokens (n, D) of each

        # masked patches and tokens
        output = MomoPreTrainingOutput(self.logit_scale, embeddings={}, pixel_predictions={}, mlm_logits={})
        if "image" in passes:
            self._predict(output, "image", batch, states["image"][0], image=states["image"][1])
        if "text" in passes:
            self._predict(output, "text", batch, states["text"][0], text=states["text"][1])
        if pair is not None:
            image, text = pair.apart(states["pair"][1])
            self._predict(output, "pair", batch, states["pair"][0], image=image, text=text)

        # image and text embeddings, then matching with negatives chosen from them
        if "contrast" in passes:
            output.embeddings["image"] = self.momo.embed_images(states["whole image"][0])  # (B, P)
            output.embeddings["text"] = self.momo.embed_texts(states["whole text"][0])  # (B, P)
        if "match" in passes:
            negatives = choose_negatives(*output.embeddings.values(), (-self.logit_scale).exp())  # (B,), (B,)
            output.itm_logits = self._match(batch, *negatives, match_masked)  # (3B, 2)
        return output

    def _check(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        bool_masked_pos: torch.Tensor | None,
        checked: bool,
    ) -> None:
        n_patches = None if pixel_values is None else patch_count(pixel_values, self.config.patch_size)
        if not checked:
            check_inputs(self.momo, input_ids, attention_mask, pixel_values)
            if input_ids is not None and pixel_values is not None:
                check_pairs(input_ids, attention_mask, self.config.image_token_id, n_patches)
            elif input_ids is not None and input_ids.device.type == "cpu" and not is_tracing(input_ids):
                check_padding(attention_mask)
        if bool_masked_pos is not None and pixel_values is not None:
            check_patch_mask(bool_masked_pos, len(pixel_values), n_patches)

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        bool_masked_pos: torch.Tensor | None,
        text_index: torch.Tensor | None,
        mlm_index: torch.Tensor | None,
        mim_index: torch.Tensor | None,
    ) -> Embedded:
        """Embeds patches and words once, for all passes."""
        embeddings = self.momo.embeddings
        rows = len(input_ids if pixel_values is None else pixel_values)  # B
        batch = Embedded(embeddings.embed_cls(rows)[:, 0], pixel_values)
        head = 1

        # all patches of each image
        if pixel_values is not None:
            head += patch_count(pixel_values, self.config.patch_size)
            batch.patches = Ragged.of_rectangle(embeddings.embed_patches(pixel_values))  # B * N
            if bool_masked_pos is not None:
                hidden = bool_masked_pos.flatten().nonzero().flatten() if mim_index is None else mim_index  # (K,)
                batch.hidden_patches = hidden
                batch.seen_patches = complement(hidden, bool_masked_pos.numel())

        # real tokens only: padding is never embedded
        if input_ids is not None:
            ids = input_ids[:, head:]  # (B, W)
            if text_index is None:
                text_index = attention_mask[:, head:].flatten().nonzero().flatten()  # (n,)
            batch.word_slots = text_index % ids.shape[1]
            tokens = embeddings.embed_tokens(ids.flatten()[text_index], batch.word_slots)  # (n, D)
            batch.words = Ragged(tokens, text_index // ids.shape[1], rows)
            if mlm_index is not None:
                batch.hidden_words = mlm_index
                batch.seen_words = complement(mlm_index, len(text_index))
        return batch

    def _predict(
        self,
        output: MomoPreTrainingOutput,
        kind: str,
        batch: Embedded,
        cls: torch.Tensor,
        image: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
    ) -> None:
        """Decodes the encoder's states of one pass and predicts the masked tokens. Fills `output`."""
        # one decoder for all modalities, or one per modality of a pair
        joint = kind != "pair" or not self.pairs_apart
        image_decoder = self.decoder(kind if joint else "pair_image") if image is not None else None
        text_decoder = self.decoder(kind if joint else "pair_text") if text is not None else None
        parts: dict[str, Unseen] = {}
        if image is not None:
            table = image_decoder.positions_of(batch.pixel_values).repeat(len(cls), 1)  # (B * N, E)
            patches = batch.patches
            parts["image"] = Unseen(image, batch.seen_patches, patches.row, patches.each, table)
        if text is not None:
            positions = text_decoder.text_positions[batch.word_slots]  # (n, E)
            parts["text"] = Unseen(text, batch.seen_words, batch.words.row, None, positions)

        # states of all tokens, (n, E) each
        if joint:
            decoder = image_decoder if image is not None else text_decoder
            states = dict(zip(parts, decoder(cls, list(parts.values())), strict=True))
        else:
            decoders = {"image": image_decoder, "text": text_decoder}
            states = {name: decoders[name](cls, [part])[0] for name, part in parts.items()}

        # predictions at masked positions only
        if image is not None:
            masked = states["image"].index_select(0, batch.hidden_patches)  # (K, E)
            output.pixel_predictions[kind] = image_decoder.pixel_head(masked)
        if text is not None:
            masked = states["text"].index_select(0, batch.hidden_words)  # (M, E)
            output.mlm_logits[kind] = self.lm_head(masked)

    def _match(
        self, batch: Embedded, other_images: torch.Tensor, other_texts: torch.Tensor, masked: bool
    ) -> torch.Tensor:
        """Logits of pairs, of texts with negative images, and of images with negative texts. -> (3B, 2)."""
        patches, words = batch.seen() if masked else [batch.patches, batch.words]
        own = torch.arange(len(batch.cls), device=batch.cls.device)  # (B,)
        images = torch.cat([own, other_images, own])  # (3B,)
        texts = torch.cat([own, own, other_texts])  # (3B,)
        states = self.momo.match_states(batch.cls.repeat(3, 1), patches.select(images), words.select(texts))
        return self.itm_head(states)


__all__ = ["MomoForPreTraining", "MomoPreTrainingOutput"]

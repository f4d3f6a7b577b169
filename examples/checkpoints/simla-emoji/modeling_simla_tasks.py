"""SIMLA fine-tuned: questions, entailment, sentences about two pictures (section 3.4; ALBEF's protocol).

B pairs, L positions of the joint layout, N patches, S = 1 + N, T = L - N, D width.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_simla import SimlaConfig
from .modeling_simla import SimlaModel, SimlaPreTrainedModel
from .vl_fusion import FusionLayer, self_mask
from .vl_heads import HeadLinear
from .vl_inputs import check_inputs
from .vl_task_heads import (
    AnswerDecoder,
    AnswerGeneration,
    PairClassification,
    PairClassificationHead,
    check_two_pictures,
)

ENTAILMENT_LABELS = ("contradiction", "neutral", "entailment")
REASONING_LABELS = ("False", "True")


class SimlaTaskModel(SimlaPreTrainedModel):
    """A tower, without projections where they serve nothing, and what a task adds."""

    # one task's model begins where another's ended
    _keys_to_ignore_on_load_unexpected = [
        *SimlaPreTrainedModel._keys_to_ignore_on_load_unexpected, r"^assignment_head\.",
    ]  # fmt: skip

    def __init__(self, config: SimlaConfig, add_pooling_layer: bool = False):
        super().__init__(config)
        self.simla = SimlaModel(config, add_pooling_layer)

    def freeze_unused(self) -> None:
        """What no task's loss reaches: a data-parallel engine would wait for its gradient for ever."""
        self.simla.vision.embeddings.mask_token.requires_grad_(False)

    @torch.no_grad()
    def initialise_from(self, pretrained: PreTrainedModel) -> None:
        """Begins where another model of the family ended: its tower, and all of a head that can be had from it."""
        theirs = pretrained.base_model.state_dict()
        self.simla.load_state_dict({name: theirs[name] for name in self.simla.state_dict()})


class SimlaForVisualQuestionAnswering(AnswerGeneration, SimlaTaskModel):
    """Answers from the multimodal states of a question, by a decoder of `answer_decoder_layers` layers."""

    _tied_weights_keys = {"decoder.lm_head.decoder.weight": "decoder.embeddings.word_embeddings.weight"}

    def __init__(self, config: SimlaConfig):
        super().__init__(config)
        self.decoder = AnswerDecoder(config, min(config.answer_decoder_layers, config.num_text_layers))
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.decoder.lm_head.decoder = new_embeddings

    def _resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        # transformers knows of one table of words going in and one coming out; the decoder's reads the same words
        words, own = super()._resize_token_embeddings(*args, **kwargs), self.decoder.embeddings
        own.word_embeddings = self._get_resized_embeddings(own.word_embeddings, words.num_embeddings)
        return words

    def initialise_from(self, pretrained: PreTrainedModel) -> None:
        super().initialise_from(pretrained)
        self.initialise_decoder(getattr(pretrained, "lm_head", None))

    @torch.no_grad()
    def initialise_decoder(self, lm_head: nn.Module | None = None) -> None:
        """The decoder as the tower's last layers, its embeddings, and a language-model head if there is one."""
        text, decoder = self.simla.text, self.decoder
        decoder.embeddings.load_state_dict(text.embeddings.state_dict())
        for mine, theirs in zip(decoder.layers, text.layers[-len(decoder.layers) :], strict=True):
            mine.load_state_dict(theirs.state_dict())
        if lm_head is not None:
            decoder.lm_head.load_state_dict(lm_head.state_dict())


class SimlaForVisualEntailment(PairClassification, SimlaTaskModel):
    """Does the picture contradict the text, say nothing of it, or entail it? Labels 0, 1, 2 (ALBEF's code)."""

    def __init__(self, config: SimlaConfig):
        name_labels(config, ENTAILMENT_LABELS)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.classifier = PairClassificationHead(config.hidden_size, config.hidden_size, config.num_labels)
        self.post_init()


class SimlaTwoPictureModel(SimlaTaskModel):
    """
    Reads a text about two pictures. The upper half of the text encoder's layers stand twice, one after the other: of
    twelve, layers 6 to 11 make layers 6 to 17. Cross-attention alternates between the pictures from layer to layer,
    and the two of a pair share its keys and values (ALBEF's code; SIMLA's has it in the lower half too).
    """

    def __init__(self, config: SimlaConfig, add_pooling_layer: bool = False):
        super().__init__(config, add_pooling_layer)
        self.lower = config.num_text_layers // 2
        self.second_layers = nn.ModuleList([FusionLayer(config) for _ in range(config.num_text_layers - self.lower)])
        for mine, theirs in zip(self.second_layers, self.simla.text.layers[self.lower :], strict=True):
            mine.cross_attention.key = theirs.cross_attention.key
            mine.cross_attention.value = theirs.cross_attention.value
        self._tied_weights_keys = {
            f"second_layers.{place}.cross_attention.{part}.{kind}": (
                f"simla.text.layers.{self.lower + place}.cross_attention.{part}.{kind}"
            )
            for place in range(len(self.second_layers))
            for part in ("key", "value")
            for kind in ("weight", "bias")
        }

    def initialise_from(self, pretrained: PreTrainedModel) -> None:
        super().initialise_from(pretrained)
        self.initialise_second_layers()

    @torch.no_grad()
    def initialise_second_layers(self) -> None:
        """Each the copy of the layer before it."""
        for mine, theirs in zip(self.second_layers, self.simla.text.layers[self.lower :], strict=True):
            mine.load_state_dict(theirs.state_dict())

    def stack(self) -> Iterator[FusionLayer]:
        """The layers in their order."""
        yield from self.simla.text.layers[: self.lower]
        for pair in zip(self.simla.text.layers[self.lower :], self.second_layers, strict=True):
            yield from pair

    def read(
        self,
        text_ids: torch.Tensor,
        text_mask: torch.Tensor,
        states: torch.Tensor,
        chosen: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Texts (B, T) that read two of the pictures (C, S, D) each, by their places (B,) twice. [CLS], (B, D)."""
        hidden_states = self.simla.text.embeddings(text_ids)
        mask = self_mask(self.config, hidden_states, text_mask)
        for place, layer in enumerate(self.stack()):
            hidden_states = layer(hidden_states, mask, states, None, chosen[place % 2])
        return hidden_states[:, 0]


class SimlaForVisualReasoning(SimlaTwoPictureModel):
    """Is a sentence true of two pictures (NLVR2)? Labels 0 and 1."""

    def __init__(self, config: SimlaConfig):
        name_labels(config, REASONING_LABELS)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.classifier = PairClassificationHead(config.hidden_size, config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """
        `logits` (B, 2), the second for true, of texts in the joint layout of one picture (B, L) and of the two
        pictures of each, `pixel_values` (B, 2, C, H, W). `labels` (B,). Raises `ValueError` as the tower.
        """
        check_two_pictures(type(self).__name__, input_ids, pixel_values)
        for pictures in pixel_values.unbind(1):
            check_inputs(self.simla, input_ids, attention_mask, pictures)
        text = self.simla.split_layout(input_ids, attention_mask, pixel_values[:, 0])
        states = self.simla.vision(pixel_values.flatten(0, 1))  # (2B, S, D), the two of a text side by side
        first = torch.arange(0, len(states), 2, device=states.device)
        logits = self.classifier(self.read(*text, states, (first, first + 1)))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class SimlaForTextAssignment(SimlaTwoPictureModel):
    """
    Which of two pictures is a text's own, the first, the second or neither? ALBEF's step between pretraining and
    NLVR2, from pairs alone, by which the second layers learn their part.
    """

    def __init__(self, config: SimlaConfig):
        super().__init__(config, add_pooling_layer=True)
        self.assignment_head = HeadLinear(config.hidden_size, 3)
        self.post_init()

    def freeze_unused(self) -> None:
        super().freeze_unused()
        self.simla.vision_projection.requires_grad_(False)
        self.simla.text_projection.requires_grad_(False)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        choose: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """
        `logits` (B, 3) of pairs in the joint layout. `choose` takes the pictures' cosines (B, B), without gradient,
        and gives the places in the batch of the two pictures that each text is to read. Raises `ValueError` as the
        tower.
        """
        if input_ids is None or pixel_values is None or choose is None:
            raise ValueError(
                f"{type(self).__name__} expects input_ids, pixel_values and `choose`, got None among them"
            )
        check_inputs(self.simla, input_ids, attention_mask, pixel_values)
        text = self.simla.split_layout(input_ids, attention_mask, pixel_values)
        states = self.simla.vision(pixel_values)
        with torch.no_grad():
            unit = F.normalize(self.simla.vision_projection(states[:, 0]).float(), dim=-1)
            chosen = choose(unit @ unit.T)
        return SequenceClassifierOutput(logits=self.assignment_head(self.read(*text, states, chosen)))


def name_labels(config: SimlaConfig, labels: tuple[str, ...]) -> None:
    """The task's labels, where the configuration names none of its own."""
    if all(name.startswith("LABEL_") for name in config.id2label.values()):
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}


__all__ = [
    "SimlaForTextAssignment",
    "SimlaForVisualEntailment",
    "SimlaForVisualQuestionAnswering",
    "SimlaForVisualReasoning",
]

"""Fine-tuning of dual encoders: answer generation, and texts that read two images (ALBEF's protocol).

B pairs, N patches, S = 1 + N, T positions of a text with its [CLS], C images, D width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .vl_fusion import FusionLayer, self_mask
from .vl_inputs import check_inputs
from .vl_task_heads import AnswerGeneration, check_two_images

ENTAILMENT_LABELS = ("contradiction", "neutral", "entailment")
REASONING_LABELS = ("False", "True")


class DualEncoderTask:
    """Mixin for a family's task models: initialisation from a pretrained model, and freezing of unused weights."""

    def freeze_unused(self) -> None:
        """Freezes the mask token, which no task uses: a data-parallel engine would wait for its gradient for ever."""
        mask_token = self.base_model.vision.embeddings.mask_token
        if mask_token is not None:
            mask_token.requires_grad_(False)

    @torch.no_grad()
    def initialise_from(self, pretrained: PreTrainedModel) -> None:
        """Copies the tower of another model of the family; subclasses also copy what fits their heads."""
        theirs, tower = pretrained.base_model.state_dict(), self.base_model
        tower.load_state_dict({name: theirs[name] for name in tower.state_dict()})


class FusedAnswerGeneration(AnswerGeneration, DualEncoderTask):
    """`AnswerGeneration` whose decoder has the shape of the tower's last layers and is initialised from them."""

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.decoder.lm_head.decoder = new_embeddings

    def _resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        # transformers resizes one input and one output table; the decoder's input table must follow
        tokens, own = super()._resize_token_embeddings(*args, **kwargs), self.decoder.embeddings
        own.word_embeddings = self._get_resized_embeddings(own.word_embeddings, tokens.num_embeddings)
        return tokens

    def initialise_from(self, pretrained: PreTrainedModel) -> None:
        super().initialise_from(pretrained)
        self.initialise_decoder(getattr(pretrained, "lm_head", None))

    @torch.no_grad()
    def initialise_decoder(self, lm_head: nn.Module | None = None) -> None:
        """Copies the tower's last layers and embeddings, and the language-model head if given, into the decoder."""
        text, decoder = self.base_model.text, self.decoder
        decoder.embeddings.load_state_dict(text.embeddings.state_dict())
        for mine, theirs in zip(decoder.layers, text.layers[-len(decoder.layers) :], strict=True):
            mine.load_state_dict(theirs.state_dict())
        if lm_head is not None:
            decoder.lm_head.load_state_dict(lm_head.state_dict())


class TextReading(DualEncoderTask):
    """Mixin for tasks on texts alone: trains the layers that read a text without an image, and freezes the rest."""

    def freeze_unused(self) -> None:
        tower = self.base_model
        tower.vision.requires_grad_(False)
        tower.text.layers[self.config.num_text_layers :].requires_grad_(False)
        for layer in tower.text.layers[: self.config.num_text_layers]:
            if layer.cross_attention is not None:
                layer.cross_attention.requires_grad_(False)
                layer.cross_norm.requires_grad_(False)


class TwoImageReading(DualEncoderTask):
    """
    Reads a text about two images. Each fusion layer is followed by a second copy; if all layers fuse, only those of
    the upper half are (of twelve, layers 6 to 11 become layers 6 to 17). Cross-attention alternates between the images
    from layer to layer, and a layer and its copy share keys and values (ALBEF's code; SIMLA's alternates in the lower
    half too).

    Attributes:
        lower (`int`): Number of layers without a copy.
    """

    def add_second_layers(self, config: PreTrainedConfig) -> None:
        """Adds the second layers, sharing keys and values with the first. Call once, after the tower is built."""
        layers, prefix = self.base_model.text.layers, self.base_model_prefix
        self.lower = config.num_text_layers if config.num_fusion_layers else config.num_text_layers // 2
        self.second_layers = nn.ModuleList([FusionLayer(config) for _ in layers[self.lower :]])
        for mine, theirs in zip(self.second_layers, layers[self.lower :], strict=True):
            mine.cross_attention.key = theirs.cross_attention.key
            mine.cross_attention.value = theirs.cross_attention.value
        self._tied_weights_keys = {
            f"second_layers.{place}.cross_attention.{part}.{kind}": (
                f"{prefix}.text.layers.{self.lower + place}.cross_attention.{part}.{kind}"
            )
            for place in range(len(self.second_layers))
            for part in ("key", "value")
            for kind in ("weight", "bias")
        }

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # shared also if the configuration does not tie the embeddings
        return {**super().get_expanded_tied_weights_keys(all_submodels), **self._tied_weights_keys}

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """Lets transformers initialise and report shared weights that a checkpoint has under neither name."""
        tied, missing = self.all_tied_weights_keys, loading_info.missing_keys

        # both names are one parameter, which super() would mark as loaded by its second name
        found = {second: first for second, first in tied.items() if not {first, second} <= missing}
        self.all_tied_weights_keys = found
        super().mark_tied_weights_as_initialized(loading_info)
        self.all_tied_weights_keys = tied

    def initialise_from(self, pretrained: PreTrainedModel) -> None:
        super().initialise_from(pretrained)
        self.initialise_second_layers()

    @torch.no_grad()
    def initialise_second_layers(self) -> None:
        """Copies each layer's weights into its second copy."""
        for mine, theirs in zip(self.second_layers, self.base_model.text.layers[self.lower :], strict=True):
            mine.load_state_dict(theirs.state_dict())

    def fusion_stack(self) -> Iterator[FusionLayer]:
        """Yields the layers with cross-attention in order."""
        text = self.base_model.text
        yield from text.layers[text.first_fusion : self.lower]
        for pair in zip(text.layers[self.lower :], self.second_layers, strict=True):
            yield from pair

    def read(
        self,
        text_ids: torch.Tensor,
        text_mask: torch.Tensor | None,
        states: torch.Tensor,
        chosen: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """[CLS] (B, D) of texts (B, T), each reading two of the images (C, S, D), indexed by `chosen` (two (B,))."""
        hidden_states = self.base_model.text.begin(text_ids, text_mask)  # (B, T, D)
        mask = self_mask(self.config, hidden_states, text_mask)
        for place, layer in enumerate(self.fusion_stack()):
            hidden_states = layer(hidden_states, mask, states, None, chosen[place % 2])
        return hidden_states[:, 0]


class TwoImageReasoning(TwoImageReading):
    """Forward of a model with a `classifier`: whether a sentence is true of two images (NLVR2); labels 0 and 1."""

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
        `logits` (B, 2), the second for true, of texts (B, T) and two images per text, `pixel_values`
        (B, 2, C, H, W). `labels` (B,). Raises the `ValueError`s of the tower.
        """
        check_two_images(type(self).__name__, input_ids, pixel_values)
        first_images, second_images = pixel_values.unbind(1)  # (B, C, H, W) each
        check_inputs(self.base_model, input_ids, attention_mask, first_images)
        check_inputs(self.base_model, None, None, second_images)
        # rows 2i and 2i + 1 are the two images of text i
        states = self.base_model.vision(pixel_values.flatten(0, 1))  # (2B, S, D)
        first = torch.arange(0, states.shape[0], 2, device=states.device)  # (B,)
        cls = self.read(input_ids, attention_mask, states, (first, first + 1))  # (B, D)
        logits = self.classifier(cls)  # (B, 2)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class TextAssignment(TwoImageReading):
    """
    Forward of a model with an `assignment_head`: whether a text belongs to the first of two images, the second, or
    neither. ALBEF trains this on pairs between pretraining and NLVR2, to pretrain the second layers.
    """

    def freeze_unused(self) -> None:
        super().freeze_unused()
        self.base_model.vision_projection.requires_grad_(False)
        self.base_model.text_projection.requires_grad_(False)

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
        `logits` (B, 3) of texts (B, T) and images (B, C, H, W). `choose` maps the images' cosines (B, B), without
        gradient, to the batch indices of the two images that each text reads. Raises the `ValueError`s of the tower.
        """
        if input_ids is None or pixel_values is None or choose is None:
            raise ValueError(
                f"{type(self).__name__} expects input_ids, pixel_values and `choose`, got None among them"
            )
        tower = self.base_model
        check_inputs(tower, input_ids, attention_mask, pixel_values)
        states = tower.vision(pixel_values)  # (B, S, D)

        # similar images are hard negatives
        with torch.no_grad():
            unit = F.normalize(tower.vision_projection(states[:, 0]).float(), dim=-1)  # (B, P)
            chosen = choose(unit @ unit.T)
        cls = self.read(input_ids, attention_mask, states, chosen)  # (B, D)
        return SequenceClassifierOutput(logits=self.assignment_head(cls))  # (B, 3)


def name_labels(config: PreTrainedConfig, labels: tuple[str, ...]) -> None:
    """Sets the task's labels, unless the configuration names its own."""
    if all(name.startswith("LABEL_") for name in config.id2label.values()):
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}


__all__ = [
    "ENTAILMENT_LABELS",
    "REASONING_LABELS",
    "DualEncoderTask",
    "FusedAnswerGeneration",
    "TextAssignment",
    "TextReading",
    "TwoImageReading",
    "TwoImageReasoning",
    "name_labels",
]

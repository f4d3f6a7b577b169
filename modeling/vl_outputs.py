"""Model outputs. B pairs, L positions, N patches, W slots for a text's tokens, D width, P embedding width,
M masked tokens, V tokens of the vocabulary."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import ModelOutput

# type of a position, in `token_types`
CLS_TOKEN, PATCH_TOKEN, TEXT_TOKEN, PADDING_TOKEN = range(4)


@dataclass
class VisionLanguageModelOutput(ModelOutput):
    """
    Positions are [CLS], the patches of an image, the tokens of a text, and padding; a text alone has no patches and an
    image alone has no tokens: L is 1 + W, 1 + N, or 1 + N + W. `token_types` gives the type of each.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, L, D)`): States after the final norm.
        pooler_output (`torch.FloatTensor` of shape `(B, P)`): The retrieval embedding, not normalised.
        hidden_states, attentions: As everywhere in transformers, if requested.
        token_types (`torch.LongTensor` of shape `(B, L)`): 0 [CLS], 1 patch, 2 token of a text, 3 padding.
        cross_attentions: From text to image, if the family has such layers and attentions are requested.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    token_types: torch.LongTensor | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


def token_types_of(image_states: torch.Tensor | None, text_mask: torch.Tensor | None) -> torch.Tensor:
    """
    The type of each position, (B, L), for families that read image and text separately.

    Args:
        image_states (`(B, 1 + N, D)`): Of [CLS] and patches; None without an image.
        text_mask (`(B, 1 + W)`): 1 for [CLS] and real tokens; None without a text.
    """
    types = None
    if text_mask is not None:
        types = torch.where(text_mask != 0, TEXT_TOKEN, PADDING_TOKEN)  # (B, 1 + W)
    if image_states is not None:
        patches = torch.full_like(image_states[:, :, 0], PATCH_TOKEN, dtype=torch.long)  # (B, 1 + N)
        types = patches if types is None else with_patches(types, patches)
    return torch.where(torch.arange(types.shape[1], device=types.device) == 0, CLS_TOKEN, types)  # (B, L)


def with_patches(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """
    [CLS] of a text, the patches of its image, the text's tokens: (B, 1 + W, ...) and (B, 1 + N, ...) ->
    (B, 1 + N + W, ...). Uses indices because slices would fix the length in an exported graph.
    """
    length = text.shape[1]  # 1 + W
    patches = image.shape[1] - 1  # N
    place = torch.arange(length + patches, device=text.device)
    # index of each output position in the concatenated text and image; the image's [CLS] is left out
    source = torch.where(place > patches, place - patches, torch.where(place > 0, place + length, place))
    return torch.cat([text, image], dim=1).index_select(1, source)


def without_patches(values: torch.Tensor, length: int) -> torch.Tensor:
    """
    Removes the patches from values of [CLS], patches and text: (B, 1 + N + W, ...) -> (B, 1 + W, ...), `length` 1 + W.
    Values without patches are returned unchanged.
    """
    patches = values.shape[1] - length
    return torch.cat([values[:, :1], values[:, 1 + patches :]], dim=1) if patches else values


@dataclass
class VisionLanguagePreTrainingOutput(ModelOutput):
    """
    Args:
        logit_scale (`torch.FloatTensor` of shape `(1,)`, *optional*): The learnable inverse temperature, if any.
        embeddings (`dict[str, torch.FloatTensor]`): Contrastive embedding (B, P) of each representation asked for.
        mlm_logits (`dict[str, torch.FloatTensor]`): (M, V) of the masked tokens, for each stream that holds them.
        pixel_predictions (`dict[str, torch.FloatTensor]`): (B, N, p*p*C), for each stream that holds patches.
    """

    # a tensor first: ModelOutput would unfold a dict that is its first and only field
    logit_scale: torch.FloatTensor | None = None
    embeddings: dict[str, torch.FloatTensor] | None = None
    mlm_logits: dict[str, torch.FloatTensor] | None = None
    pixel_predictions: dict[str, torch.FloatTensor] | None = None


@dataclass
class ImageTextRetrievalOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): Symmetric InfoNCE, when `return_loss` and pairs given.
        logits_per_image (`torch.FloatTensor` of shape `(images, texts)`): Cosines over the temperature.
        logits_per_text (`torch.FloatTensor` of shape `(texts, images)`): Its transpose.
        image_embeds, text_embeds (`torch.FloatTensor` of shape `(·, P)`): Unit vectors.
        hidden_states, attentions: Of the text stream if there is one, else of the image stream, when asked for.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None

"""What models return. B pairs, L positions, N patches, D width, P embedding width, V words, M masked words."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import ModelOutput

CLS_TOKEN, PATCH_TOKEN, WORD_TOKEN, PADDING_TOKEN = range(4)


@dataclass
class VisionLanguageModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, L, D)`): States after the final norm.
        pooler_output (`torch.FloatTensor` of shape `(B, P)`): The retrieval embedding, not normalised.
        hidden_states, attentions: As everywhere in transformers, when asked for.
        token_types (`torch.LongTensor` of shape `(B, L)`): 0 [CLS], 1 patch, 2 word, 3 padding.
        cross_attentions: Of words to a picture, where a family has layers for it, when attentions are asked for.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    token_types: torch.LongTensor | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class VisionLanguagePreTrainingOutput(ModelOutput):
    """
    Args:
        logit_scale (`torch.FloatTensor` of shape `(1,)`, *optional*): The learnable inverse temperature, if any.
        embeddings (`dict[str, torch.FloatTensor]`): Contrastive embedding (B, P) of each representation asked for.
        mlm_logits (`dict[str, torch.FloatTensor]`): (M, V) of the masked words, for each stream that holds them.
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

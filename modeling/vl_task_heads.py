"""Task heads for any family: classification, and answers that a decoder generates or ranks.

They assume only that a tower takes pairs, in the joint or the separate layout, and returns the states of [CLS],
patches and text in this order. B pairs, L positions of the ids, N patches, T positions of the text ([CLS] and tokens),
D width, V vocabulary size, R answers (several per question), A tokens of an answer including start and end,
K candidates.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput, ModelOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .vl_fusion import FusionLayer, TextEmbeddings, context_mask_of, self_mask
from .vl_heads import HeadLinear, LanguageModelHead
from .vl_inputs import patch_count
from .vl_outputs import VisionLanguageModelOutput, without_patches

TEXT_DROPOUT = 0.1  # of BERT's and RoBERTa's classification heads
ROWS_AT_ONCE = 256  # batch size of ranking: answers whose logits over the vocabulary are in memory at once


@dataclass
class AnswerOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`, 0-dim, *optional*): Weighted sum over a question's answers, mean over questions.
        logits (`torch.FloatTensor` of shape `(R, A - 1, V)`, *optional*): Next-token logits of the answers.
        question_states (`torch.FloatTensor` of shape `(B, T, D)`): States that the decoder attends to.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    question_states: torch.FloatTensor | None = None


@dataclass
class AnswerRanking(ModelOutput):
    """
    Args:
        indices (`torch.LongTensor` of shape `(B, k)`): The k best candidates of each question, best first.
        scores (`torch.FloatTensor` of shape `(B, k)`): Log-likelihoods, counting the first token twice if asked for.
    """

    indices: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None


@dataclass
class WrittenAnswers(ModelOutput):
    """
    Args:
        sequences (`torch.LongTensor` of shape `(B, A)`): Tokens after the start token; padding after the end token.
        scores (`torch.FloatTensor` of shape `(B,)`): Log-likelihood divided by length ** `length_penalty`.
    """

    sequences: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None


class PairClassificationHead(nn.Sequential):
    """Linear, ReLU, Linear on a pair's [CLS] (section 3.4's "multi-layer perceptron"). (B, W) -> (B, C)."""

    def __init__(self, input_dim: int, hidden_dim: int, num_labels: int):
        super().__init__(HeadLinear(input_dim, hidden_dim), nn.ReLU(), HeadLinear(hidden_dim, num_labels))


class TextClassificationHead(nn.Sequential):
    """RoBERTa's head: dropout, a dense layer with tanh, dropout, a linear layer. (B, D) -> (B, labels)."""

    def __init__(self, hidden_size: int, num_labels: int):
        super().__init__(
            nn.Dropout(TEXT_DROPOUT),
            HeadLinear(hidden_size, hidden_size),
            nn.Tanh(),
            nn.Dropout(TEXT_DROPOUT),
            HeadLinear(hidden_size, num_labels),
        )


class AnswerDecoder(nn.Module):
    """
    A causal BERT that reads question and image by cross-attention (section 3.4: "auto-regressive decoder atop").

    Args:
        config (`PreTrainedConfig`): The family's configuration; without fields for a text stack, the tower's are used.
        num_layers (`int`): Number of layers, each with cross-attention.
    """

    def __init__(self, config: PreTrainedConfig, num_layers: int):
        super().__init__()
        self.config = config = text_stack_config(config)
        self.embeddings = TextEmbeddings(config)
        self.layers = nn.ModuleList([FusionLayer(config, is_causal=True) for _ in range(num_layers)])
        self.lm_head = LanguageModelHead(config, config.text_layer_norm_eps)

    def forward(
        self,
        answer_ids: torch.Tensor,
        question_states: torch.Tensor,
        question_mask: torch.Tensor,
        question_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Next-token logits (R, A, V). Padding is on the right, so the causal mask hides it from real tokens.

        Args:
            answer_ids (`(R, A)`): Answers, beginning with the start token.
            question_states, question_mask (`(B, T, D)` and `(B, T)`): States to attend to; 1 for real positions.
            question_index (`(R,)`): Index of the question that each row answers; row r answers question r if None.
        """
        if question_index is not None:
            question_mask = question_mask.index_select(0, question_index)
        hidden_states = self.embeddings(answer_ids)  # (R, A, D)
        mask = self_mask(self.config, hidden_states, None, causal=True)
        across = context_mask_of(self.config, hidden_states, question_states, question_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, question_states, across, question_index)
        return self.lm_head(hidden_states)  # (R, A, V)


def text_stack_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config`, or, if it has no fields for a post-norm text stack, a copy with those fields set from its tower."""
    if hasattr(config, "text_attention_heads"):
        return config
    config = copy.deepcopy(config)
    config.text_attention_heads = config.num_attention_heads
    config.text_intermediate_size = config.intermediate_size
    config.text_layer_norm_eps = 1e-12  # BERT's
    config.text_attention_dropout = config.attention_dropout
    config.hidden_dropout = getattr(config, "hidden_dropout", 0.0)
    config.max_position_embeddings = getattr(config, "max_position_embeddings", 512)
    return config


def answer_end(config: PreTrainedConfig) -> int:
    """The token that ends an answer: [SEP], or [CLS] for a vocabulary without it."""
    end = getattr(config, "sep_token_id", None)
    return config.cls_token_id if end is None else end


def answer_losses(
    logits: torch.Tensor,
    answer_ids: torch.Tensor,
    answer_mask: torch.Tensor,
    soft_labels: torch.Tensor | None = None,
    alpha: float | torch.Tensor = 0.0,
) -> torch.Tensor:
    """
    Loss of each answer, summed over the tokens after the start: (1 - alpha) CE(token) + alpha CE(soft labels).

    (R, A - 1, V), (R, A), (R, A), soft labels (R, A - 1, V) that sum to 1 -> (R,), in fp32 or fp64.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    real = answer_mask[:, 1:].to(logits.dtype)
    logs = logits.log_softmax(-1)
    losses = -logs.gather(-1, answer_ids[:, 1:, None])[..., 0]
    if soft_labels is not None:
        losses = (1 - alpha) * losses - alpha * (soft_labels * logs).sum(-1)
    return (losses * real).sum(1)


class PairClassification:
    """Forward of a model with a tower and a `classifier` of image-text pairs."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """`logits` (B, labels) of pairs in the tower's layout; `labels` (B,). Raises the tower's `ValueError`s."""
        if input_ids is None or pixel_values is None:
            raise ValueError(f"{type(self).__name__} reads pairs: it expects both input_ids and pixel_values")
        outputs = self.base_model(input_ids, attention_mask, pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(outputs.last_hidden_state[:, 0])  # (B, labels)
        return SequenceClassifierOutput(
            loss=None if labels is None else F.cross_entropy(logits.float(), labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ImageClassification:
    """Forward of a model with a tower and a `classifier` of images, alone or with a text that guides it."""

    def pooled(self, outputs: VisionLanguageModelOutput) -> torch.Tensor:
        """Input of the classifier (B, D), from the states (B, L, D): [CLS]."""
        return outputs.last_hidden_state[:, 0]

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """`logits` (B, classes); `labels` (B,)."""
        if pixel_values is None:
            raise ValueError(f"{type(self).__name__} expects pixel_values, got None")
        outputs = self.base_model(input_ids, attention_mask, pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(self.pooled(outputs))  # (B, classes)
        loss = self.loss_function(labels, logits, self.config) if labels is not None else None
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TextClassification:
    """
    Forward of a model with a tower and a `classifier` of texts, alone or with an image: classification, or regression
    if there is one label.
    """

    def pooled(self, outputs: VisionLanguageModelOutput) -> torch.Tensor:
        """Input of the classifier (B, D), from the states (B, L, D): [CLS]."""
        return outputs.last_hidden_state[:, 0]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """
        `logits` (B, labels) of texts, or of pairs in the tower's layout. `labels` (B,): classes, trained with
        cross-entropy, or scores, trained with the mean squared error. Raises the `ValueError`s of the tower.
        """
        if input_ids is None:
            raise ValueError(f"{type(self).__name__} expects input_ids, got None")
        outputs = self.base_model(input_ids, attention_mask, pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(self.pooled(outputs))  # (B, labels)
        return SequenceClassifierOutput(
            loss=None if labels is None else text_losses(logits, labels).mean(),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def text_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss of each text: squared error if there is one label, else cross-entropy. (B, C), (B,) -> (B,)."""
    if logits.shape[-1] == 1:
        return (logits[:, 0].float() - labels.float()).square()
    return F.cross_entropy(logits.float(), labels, reduction="none")


class TwoImageClassification:
    """
    Forward for two images and a text, with a tower that reads one image: it encodes the text with each image, and
    `classifier` takes both [CLS], concatenated (B, 2D) (UNITER's "pair"; families with cross-attention alternate
    between the images instead, see `TwoImageReading`).
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """`logits` (B, labels) of texts in the layout for one image and `pixel_values` (B, 2, C, H, W)."""
        check_two_images(type(self).__name__, input_ids, pixel_values)
        # the text with each of its two images
        twice = [None if part is None else part.repeat_interleave(2, 0) for part in (input_ids, attention_mask)]
        outputs = self.base_model(*twice, pixel_values.flatten(0, 1), return_dict=True, **kwargs)
        # concatenate both [CLS]
        cls = outputs.last_hidden_state[:, 0].unflatten(0, (-1, 2)).flatten(1)  # (2B, D) -> (B, 2D)
        logits = self.classifier(cls)  # (B, labels)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def check_two_images(name: str, input_ids: torch.Tensor | None, pixel_values: torch.Tensor | None) -> None:
    """Raises `ValueError` unless there are texts and two images per text (B, 2, C, H, W)."""
    if input_ids is None or pixel_values is None:
        raise ValueError(f"{name} reads texts about two pictures: it expects both input_ids and pixel_values")
    if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
        raise ValueError(
            f"pixel_values have shape {tuple(pixel_values.shape)}; expected (texts, 2, channels, height, width)"
        )


class AnswerGeneration:
    """Visual question answering for a model with a tower and a `decoder` ([`AnswerDecoder`])."""

    def read_questions(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pixel_values: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States of [CLS] and the question's tokens (B, T, D), and their mask (B, T), 1 for real tokens."""
        if input_ids is None or pixel_values is None:
            raise ValueError(f"{type(self).__name__} answers about pictures: it expects input_ids and pixel_values")
        states = self.base_model(input_ids, attention_mask, pixel_values, return_dict=True, **kwargs).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # (B, L)
        length = states.shape[1] - patch_count(pixel_values, self.config.patch_size)  # T
        return without_patches(states, length), without_patches(mask, length)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        answer_ids: torch.LongTensor | None = None,
        answer_mask: torch.LongTensor | None = None,
        answer_weights: torch.FloatTensor | None = None,
        answers_per_question: torch.LongTensor | None = None,
        soft_labels: torch.FloatTensor | None = None,
        alpha: float | torch.Tensor = 0.0,
        **kwargs,
    ) -> AnswerOutput:
        r"""
        Args:
            input_ids, attention_mask, pixel_values: Questions (B, L) and images, in the tower's layout of pairs.
            answer_ids, answer_mask (`(R, A)`): Start, tokens, end, padding; the answers to a question are adjacent.
            answer_weights (`(R,)`): Weight of each answer: the share of annotators who gave it. 1 if None.
            answers_per_question (`(B,)`): Number of answers to each question, with sum R; one each if None.
            soft_labels, alpha: As in `answer_losses`.

        Raises:
            ValueError: no questions or no images, the number of answers does not match the questions, and the errors
                of the tower.
        """
        states, mask = self.read_questions(input_ids, attention_mask, pixel_values, **kwargs)  # (B, T, D), (B, T)
        if answer_ids is None:
            return AnswerOutput(question_states=states)

        # index of each answer's question
        index = None
        if answers_per_question is not None:
            if answers_per_question.device.type == "cpu" and answers_per_question.sum() != answer_ids.shape[0]:
                raise ValueError(
                    f"answers_per_question sum to {int(answers_per_question.sum())}; got {answer_ids.shape[0]}"
                )
            questions = torch.arange(states.shape[0], device=states.device)
            index = questions.repeat_interleave(answers_per_question, output_size=answer_ids.shape[0])
        elif answer_ids.shape[0] != states.shape[0]:
            raise ValueError(
                f"got {answer_ids.shape[0]} answers to {states.shape[0]} questions, and no answers_per_question"
            )

        # next-token prediction
        logits = self.decoder(answer_ids[:, :-1], states, mask, index)  # (R, A - 1, V)
        real = torch.ones_like(answer_ids) if answer_mask is None else answer_mask
        losses = answer_losses(logits, answer_ids, real, soft_labels, alpha)  # (R,)
        losses = losses if answer_weights is None else losses * answer_weights
        return AnswerOutput(loss=losses.sum() / states.shape[0], logits=logits, question_states=states)

    @torch.no_grad()
    def rank_answers(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None,
        pixel_values: torch.FloatTensor,
        candidate_ids: torch.LongTensor,
        candidate_mask: torch.LongTensor,
        k: int = 128,
        count_first_token_twice: bool = True,
    ) -> AnswerRanking:
        """
        Selects the k candidates with the most likely first token and ranks them by log-likelihood.

        Args:
            candidate_ids, candidate_mask (`(K, A)`): Start, tokens, end, padding.
            count_first_token_twice: Whether to add the log-likelihood of the first token to that of the whole answer,
                as in ALBEF's and SIMLA's code; False follows the chain rule.
        """
        states, mask = self.read_questions(input_ids, attention_mask, pixel_values)
        k, length = min(k, candidate_ids.shape[0]), candidate_ids.shape[1]
        start = candidate_ids[:1, :1].expand(states.shape[0], 1)
        first = self.decoder(start, states, mask)[:, 0].float().log_softmax(-1)  # (B, V)
        firsts, chosen = first[:, candidate_ids[:, 1]].topk(k)  # (B, k)
        question = torch.arange(states.shape[0], device=states.device).repeat_interleave(k)
        losses = []
        for rows, index in zip(chosen.flatten().split(ROWS_AT_ONCE), question.split(ROWS_AT_ONCE), strict=True):
            ids, real = candidate_ids[rows], candidate_mask[rows]
            logits = self.decoder(ids[:, : length - 1], states, mask, index)
            losses.append(answer_losses(logits, ids, real))
        scores = -torch.cat(losses).view(-1, k)
        scores, order = (scores + firsts if count_first_token_twice else scores).sort(descending=True, stable=True)
        return AnswerRanking(indices=chosen.gather(1, order), scores=scores)

    @torch.no_grad()
    def generate_answers(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None,
        pixel_values: torch.FloatTensor,
        max_new_tokens: int = 10,
        num_beams: int = 1,
        length_penalty: float = 1.0,
    ) -> WrittenAnswers:
        """
        Generates answers with beam search, greedy with one beam. `max_new_tokens` includes the end token; a longer
        answer is truncated.
        """
        if max_new_tokens < 1 or not 1 <= num_beams <= self.config.vocab_size:
            raise ValueError(f"got max_new_tokens {max_new_tokens} and num_beams {num_beams}; expected 1 at least")
        states, mask = self.read_questions(input_ids, attention_mask, pixel_values)
        batch = states.shape[0]
        end = answer_end(self.config)
        pad = self.config.pad_token_id or 0
        rows = torch.arange(batch, device=states.device)
        index = rows.repeat_interleave(num_beams)
        sequences = torch.full((batch, num_beams, 1), self.config.cls_token_id, device=states.device)

        # all beams start equal, so only the first is active in the first step
        scores = torch.full((batch, num_beams), -torch.inf, device=states.device)
        scores[:, 0] = 0.0
        ended = torch.zeros_like(scores, dtype=torch.bool)
        lengths = torch.zeros_like(scores)
        for _ in range(max_new_tokens):
            logs = self.decoder(sequences.flatten(0, 1), states, mask, index)[:, -1].float().log_softmax(-1)
            logs = logs.view(batch, num_beams, -1)
            logs = logs.masked_fill(ended[..., None], -torch.inf)
            logs[..., pad] = torch.where(ended, 0.0, -torch.inf)  # finished beams are padded
            scores, places = (scores[..., None] + logs).flatten(1).topk(num_beams)
            beam, token = places // logs.shape[-1], places % logs.shape[-1]
            sequences = torch.cat([sequences[rows[:, None], beam], token[..., None]], dim=-1)
            ended, lengths = ended.gather(1, beam), lengths.gather(1, beam) + ~ended.gather(1, beam)
            ended = ended | (token == end)
            if ended.all():
                break
        scores = scores / lengths**length_penalty
        best = scores.argmax(1)
        return WrittenAnswers(sequences=sequences[rows, best, 1:], scores=scores[rows, best])


__all__ = [
    "AnswerDecoder",
    "AnswerGeneration",
    "AnswerOutput",
    "AnswerRanking",
    "ImageClassification",
    "PairClassification",
    "PairClassificationHead",
    "TextClassification",
    "TextClassificationHead",
    "TwoImageClassification",
    "WrittenAnswers",
    "answer_end",
    "answer_losses",
    "check_two_images",
    "text_losses",
    "text_stack_config",
]

"""SIMLA's task models: VQA, visual entailment, NLVR2, text classification (section 3.4; ALBEF's protocol)."""

from .configuration_simla import SimlaConfig
from .modeling_simla import SimlaModel, SimlaPreTrainedModel
from .vl_dual_tasks import (
    ENTAILMENT_LABELS,
    REASONING_LABELS,
    DualEncoderTask,
    FusedAnswerGeneration,
    TextAssignment,
    TextReading,
    TwoImageReasoning,
    name_labels,
)
from .vl_heads import HeadLinear
from .vl_task_heads import (
    AnswerDecoder,
    PairClassification,
    PairClassificationHead,
    TextClassification,
    TextClassificationHead,
)


class SimlaTaskModel(SimlaPreTrainedModel):
    """Base of the task models: a tower, with projections only where used."""

    # a task model may load another task's checkpoint
    _keys_to_ignore_on_load_unexpected = [
        *SimlaPreTrainedModel._keys_to_ignore_on_load_unexpected, r"^assignment_head\.",
    ]  # fmt: skip

    def __init__(self, config: SimlaConfig, add_pooling_layer: bool = False):
        super().__init__(config)
        self.simla = SimlaModel(config, add_pooling_layer)


class SimlaForVisualQuestionAnswering(FusedAnswerGeneration, SimlaTaskModel):
    """Generates answers from the multimodal states of a question with a decoder of `answer_decoder_layers` layers."""

    _tied_weights_keys = {"decoder.lm_head.decoder.weight": "decoder.embeddings.word_embeddings.weight"}

    def __init__(self, config: SimlaConfig):
        super().__init__(config)
        self.decoder = AnswerDecoder(config, min(config.answer_decoder_layers, config.num_text_layers))
        self.post_init()


class SimlaForVisualEntailment(PairClassification, DualEncoderTask, SimlaTaskModel):
    """Visual entailment: the image contradicts, is neutral to, or entails the text; labels 0, 1, 2 (ALBEF's code)."""

    def __init__(self, config: SimlaConfig):
        name_labels(config, ENTAILMENT_LABELS)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.classifier = PairClassificationHead(config.hidden_size, config.hidden_size, config.num_labels)
        self.post_init()


class SimlaForSequenceClassification(TextClassification, TextReading, SimlaTaskModel):
    """Classification of texts or text pairs (GLUE), from [CLS] of the text tower alone."""

    def __init__(self, config: SimlaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.classifier = TextClassificationHead(config.hidden_size, config.num_labels)
        self.post_init()


class SimlaForVisualReasoning(TwoImageReasoning, SimlaTaskModel):
    """Whether a sentence is true of two images (NLVR2); labels 0 and 1."""

    def __init__(self, config: SimlaConfig):
        name_labels(config, REASONING_LABELS)
        super().__init__(config)
        self.add_second_layers(config)
        self.num_labels = config.num_labels
        self.classifier = PairClassificationHead(config.hidden_size, config.hidden_size, config.num_labels)
        self.post_init()


class SimlaForTextAssignment(TextAssignment, SimlaTaskModel):
    """Three-way classification: a text belongs to the first of two images, to the second, or to neither."""

    def __init__(self, config: SimlaConfig):
        super().__init__(config, add_pooling_layer=True)
        self.add_second_layers(config)
        self.assignment_head = HeadLinear(config.hidden_size, 3)
        self.post_init()


__all__ = [
    "SimlaForSequenceClassification",
    "SimlaForTextAssignment",
    "SimlaForVisualEntailment",
    "SimlaForVisualQuestionAnswering",
    "SimlaForVisualReasoning",
]

"""Fine-tuning for generative question answering: VQA v2 with Visual Genome."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForVisualQuestionAnswering,
    PreTrainedConfig,
    PreTrainedModel,
)

from oner.modeling.vl_task_heads import answer_end
from oner.processing.data.layouts import SpecialTokens
from oner.processing.data.listed_rows import ListedRows
from oner.processing.data.task_collation import Answers
from oner.processing.data.task_rows import open_questions, read_answer_list
from oner.processing.processing_vl import VisionLanguageProcessor
from oner.processing.vl_captions import pre_question
from oner.training.evaluation.answers import AnswerEvaluator
from oner.training.objectives.answers import AnswerObjective, AnswerObjectiveArguments
from oner.training.publishing.model_loading import load_model
from oner.training.run.arguments import DataArguments
from oner.training.run.collators import task_collator

from .finetuning import Task, TaskArguments

TEST_WORDS = 50  # maximum words of a question in evaluation; 30 in training (ALBEF's code)


@dataclass
class AnswerArguments(AnswerObjectiveArguments, TaskArguments):
    """Options of the task: its data, and how answers are chosen."""

    BOUNDS: ClassVar[dict[str, str]] = {"answers_in_full": "[1, inf)", "answer_beams": "[1, inf)"}

    genome_folder: str | None = field(
        default=None, metadata={"help": "Folder of Visual Genome's picture paths; image_folder if none."}
    )
    eval_annotations: list[str] = field(
        default_factory=list, metadata={"help": "VQA v2's annotations of the questions in eval_data, to score by."}
    )
    answer_list: str | None = field(
        default=None, metadata={"help": "JSON list of the possible answers; if none, answers are generated freely."}
    )
    answers_in_full: int = field(
        default=128, metadata={"help": "Candidates whose full likelihood is computed (ALBEF's code: 128)."}
    )
    count_first_token_twice: bool = field(
        default=True, metadata={"help": "Rank as ALBEF's and SIMLA's code does; false: by the chain rule."}
    )
    answer_beams: int = field(default=1, metadata={"help": "Beams for freely generated answers."})
    answer_folder: str | None = field(
        default=None, metadata={"help": "Folder where each evaluation writes NAME.answers.json for VQA's server."}
    )


def open_rows(sources: Sequence[str], options: AnswerArguments, data: DataArguments, training: bool) -> ListedRows:
    # questions are cleaned by the captions' rules; evaluation allows longer ones than training
    clean = None
    if data.caption_rules == "albef":
        clean = pre_question if training else partial(pre_question, max_words=TEST_WORDS)

    return open_questions(
        # VQA v2 has separate files of answers for evaluation; training files contain them in each row
        list(sources) if training else [*sources, *options.eval_annotations],
        options.image_folder,
        options.genome_folder,
        answered=training,
        clean=clean,
        bad_rows="skip" if training else "raise",
    )


def answers(processor: VisionLanguageProcessor, config: PreTrainedConfig) -> Answers:
    # answers use the texts' tokenizer, and the end token with which the decoder is trained
    tokenizer = processor.tokenizer
    return Answers(tokenizer, SpecialTokens.of(config, tokenizer), answer_end(config))


def evaluator(rows: Sequence[Any], name: str, options: AnswerArguments) -> AnswerEvaluator:
    return AnswerEvaluator(
        rows,
        None if options.answer_list is None else read_answer_list(options.answer_list),
        name,
        options.eval_batch_size,
        k=options.answers_in_full,
        count_first_token_twice=options.count_first_token_twice,
        num_beams=options.answer_beams,
        folder=options.answer_folder,
    )


def load_answering(source: str, **options: Any) -> PreTrainedModel:
    """Loads a model; its decoder is initialised from the tower's last layers and MLM head unless `source` has one."""
    model = load_model(AutoModelForVisualQuestionAnswering, source, draws_heads=True, **options)
    if not hasattr(model, "initialise_from"):
        raise ValueError(f"{type(model).__name__} does not generate answers; expected --task answers")

    # a source of another class has no decoder: it was drawn at random and is now initialised
    if type(model).__name__ not in (AutoConfig.from_pretrained(source).architectures or ()):
        model.initialise_from(load_model(AutoModelForMaskedLM, source, draws_heads=True, **options))
    return model


VQA = Task(
    name="vqa",
    model=AutoModelForVisualQuestionAnswering,
    arguments=AnswerArguments,
    open_rows=open_rows,
    collator=partial(task_collator, targets=answers),
    evaluator=evaluator,
    objective=AnswerObjective,
    load=load_answering,
)

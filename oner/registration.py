"""Registers families with transformers' auto classes, and tasks with `pipeline`."""

from collections.abc import Mapping
from pathlib import Path

import transformers
from transformers import PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY

from .processing.pipeline_image_text_matching import ImageTextMatchingPipeline
from .processing.pipeline_image_text_retrieval import ImageTextRetrievalPipeline
from .processing.pipeline_visual_entailment import VisualEntailmentPipeline
from .processing.pipeline_visual_grounding import VisualGroundingPipeline
from .processing.pipeline_visual_question_answering import VisualQuestionAnsweringPipeline
from .processing.pipelines_built_in import BUILT_IN

# name of an auto class -> the family's class
Family = Mapping[str, type]

# pipeline -> auto class of the models that it works with; its `task_name` is its name in `pipeline`
PIPELINES = {
    ImageTextRetrievalPipeline: transformers.AutoModelForZeroShotImageClassification,
    ImageTextMatchingPipeline: transformers.AutoModelForZeroShotImageClassification,
    VisualGroundingPipeline: transformers.AutoModelForZeroShotImageClassification,
    VisualQuestionAnsweringPipeline: transformers.AutoModelForVisualQuestionAnswering,
    VisualEntailmentPipeline: transformers.AutoModelForSequenceClassification,
}


def register_family(model_type: str, classes: Family) -> None:
    """Registers a family's classes with the auto classes, and marks them to save their code with the weights."""
    config = classes["AutoConfig"]
    transformers.AutoConfig.register(model_type, config, exist_ok=True)
    config.register_for_auto_class()
    # so that `pipeline` uses the ones registered below, without trust_remote_code
    config.pipelines_are_registered = True
    # and so that every way of saving writes a complete repository
    config.write_code = staticmethod(_write_code)

    for name, model in classes.items():
        if name.startswith("AutoModel"):
            getattr(transformers, name).register(config, model, exist_ok=True)
            model.register_for_auto_class(name)

    if "AutoProcessor" in classes:
        images, processor = classes["AutoImageProcessor"], classes["AutoProcessor"]
        transformers.AutoImageProcessor.register(
            config, image_processor_classes={"torchvision": images}, exist_ok=True
        )
        images.register_for_auto_class()
        transformers.AutoProcessor.register(config, processor, exist_ok=True)
        processor.register_for_auto_class()


def _write_code(model: PreTrainedModel, directory: Path) -> None:
    # imported only when a model is saved: publishing imports much that registering does not need
    from .training.publishing.hub import write_code

    write_code(model, directory)


def register_pipelines() -> None:
    """Registers tasks that transformers lacks, and replaces its own that would read images differently."""
    for pipeline, models in PIPELINES.items():
        PIPELINE_REGISTRY.register_pipeline(
            pipeline.task_name, pipeline_class=pipeline, pt_model=models, type="multimodal"
        )
    for task, pipeline in BUILT_IN.items():
        PIPELINE_REGISTRY.supported_tasks[task] |= {"impl": pipeline}

"""Families enter transformers' registries when those registries are loaded, not when `import oner` is read.

transformers itself loads torch only when something of it is used. Registering a class means importing it, and with it
torch and torchvision: seconds, where `import transformers` takes half of one. So `import oner` only watches imports:
when the outermost import of something in transformers or oner ends, whatever has become loaded is served. Waiting for
the outermost one matters: `transformers.modeling_layers` loads the auto classes in its middle, and a model imported
there would find it half made.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Mapping

# auto class -> class of the family, by the room that makes it
Family = Mapping[str, str]
_WATCHED = ("transformers", "oner")


class _RegisteredPipelines:
    """`config.custom_pipelines` as `pipeline()` reads it: empty, because the tasks are registered here.

    A checkpoint names its pipelines' code for those who lack oner; with such an entry `pipeline()` asks for trust
    even where an installed package serves the task. The entry itself stays in the instance, and in what is saved.
    """

    def __get__(self, config, owner=None) -> dict:
        return {}

    def __set__(self, config, value: dict) -> None:
        config.__dict__["custom_pipelines"] = value


def register_models(families: Mapping[str, Family]) -> None:
    """Configurations and models with the auto classes, and as classes whose code travels with the weights."""
    transformers, modeling = importlib.import_module("transformers"), importlib.import_module("oner.modeling")
    for family, classes in families.items():
        config = getattr(modeling, classes["AutoConfig"])
        transformers.AutoConfig.register(family, config, exist_ok=True)
        config.register_for_auto_class()
        config.custom_pipelines = _RegisteredPipelines()
        for name, model in classes.items():
            if name.startswith("AutoModel"):
                getattr(transformers, name).register(config, getattr(modeling, model), exist_ok=True)
                getattr(modeling, model).register_for_auto_class(name)


def register_processors(families: Mapping[str, Family]) -> None:
    """Image processors and processors, likewise."""
    transformers, processing = importlib.import_module("transformers"), importlib.import_module("oner.processing")
    modeling = importlib.import_module("oner.modeling")
    for classes in families.values():
        if "AutoProcessor" not in classes:
            continue
        config = getattr(modeling, classes["AutoConfig"])
        images = getattr(processing, classes["AutoImageProcessor"])
        transformers.AutoImageProcessor.register(
            config, image_processor_classes={"torchvision": images}, exist_ok=True
        )
        images.register_for_auto_class()
        processor = getattr(processing, classes["AutoProcessor"])
        transformers.AutoProcessor.register(config, processor, exist_ok=True)
        processor.register_for_auto_class()


# task -> its pipeline, and the auto class of the models that serve it
PIPELINES = {
    "image-text-retrieval": ("ImageTextRetrievalPipeline", "AutoModelForZeroShotImageClassification"),
    "image-text-matching": ("ImageTextMatchingPipeline", "AutoModelForZeroShotImageClassification"),
    "visual-grounding": ("VisualGroundingPipeline", "AutoModelForZeroShotImageClassification"),
    "visual-question-answering": ("VisualQuestionAnsweringPipeline", "AutoModelForVisualQuestionAnswering"),
    "visual-entailment": ("VisualEntailmentPipeline", "AutoModelForSequenceClassification"),
}


def register_pipelines(families: Mapping[str, Family]) -> None:
    """The tasks, each for the models that have its methods."""
    transformers, processing = importlib.import_module("transformers"), importlib.import_module("oner.processing")
    pipelines = importlib.import_module("transformers.pipelines")
    for task, (name, auto_class) in PIPELINES.items():
        # transformers 5 refuses visual question answering by name, as a task that it no longer has
        getattr(pipelines, "REMOVED_TASKS", {}).pop(task, None)
        pipelines.PIPELINE_REGISTRY.register_pipeline(
            task,
            pipeline_class=getattr(processing, name),
            pt_model=getattr(transformers, auto_class),
            type="multimodal",
        )


# what is to be done as soon as one of these modules is there
_STEPS: tuple[tuple[Callable[[Mapping[str, Family]], None], tuple[str, ...]], ...] = (
    (register_models, ("transformers.models.auto.configuration_auto", "oner.modeling")),
    (
        register_processors,
        (
            "transformers.models.auto.processing_auto",
            "transformers.models.auto.image_processing_auto",
            "oner.processing.processing_vl",
            "oner.processing.image_processing_vl",
        ),
    ),
    (register_pipelines, ("transformers.pipelines", "oner.processing.pipeline_pairs")),
)


class Registrar(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it lets the other finders find, and looks up when the outermost watched import ends."""

    def __init__(self, families: Mapping[str, Family]):
        self.families = families
        self.done: set[Callable] = set()
        self._depth = threading.local()

    def find_spec(self, fullname: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in _WATCHED:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(fullname, path, target)
            if spec is not None:
                self._watch(spec)
                return spec
        return None

    def _watch(self, spec: importlib.machinery.ModuleSpec) -> None:
        execute = getattr(spec.loader, "exec_module", None)
        if execute is None or "exec_module" in vars(spec.loader):
            return  # nothing to run, or a loader of several modules that is watched already

        def exec_module(module) -> None:
            self._depth.value = getattr(self._depth, "value", 0) + 1
            try:
                execute(module)
            finally:
                self._depth.value -= 1
            if self._depth.value == 0:
                self.serve()

        # on the instance: transformers and inspect go on to see the loader they expect
        spec.loader.exec_module = exec_module

    def serve(self) -> None:
        """Whatever has become loaded is registered, each step once; one that fails is tried again at the next."""
        for step, modules in _STEPS:
            if step not in self.done and any(name in sys.modules for name in modules):
                self.done.add(step)
                try:
                    step(self.families)
                except BaseException:
                    self.done.discard(step)
                    raise


def watch(families: Mapping[str, Family]) -> Registrar:
    """Serves what is loaded already and everything that will be."""
    registrar = Registrar(families)
    sys.meta_path.insert(0, registrar)
    registrar.serve()
    return registrar

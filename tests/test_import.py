"""`import oner` registers the families and the tasks; the command line is ready before anything heavy is imported."""

import json
import subprocess
import sys

import pytest
import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

import oner
import oner.processing
from oner.registration import BUILT_IN, PIPELINES
from oner.training.conversion.command import OBJECTIVE, SOURCES
from oner.training.cost.estimate import DEVICES, SHARDS
from oner_command_line import COMMANDS

HEAVY = ("torch", "transformers", "datasets", "numpy", "oner")
# what the command line says before it has imported anything, and whether that is an error
SAID = {
    "--help": ("estimate", 0),
    "convert --help": ("--draw_missing", 0),
    "estimate --help": ("rtx4090", 0),
    "doctor --help": ("2 where RUN is no run", 0),
    "estmate": ("invalid choice: 'estmate'", 2),
    "convert --from nowhere a b": ("invalid choice: 'nowhere'", 2),
}


@pytest.mark.parametrize("name", oner.FAMILIES)
def test_auto_classes_give_the_family(name):
    classes = oner.FAMILIES[name]
    config = transformers.AutoConfig.for_model(name)
    assert type(config) is classes["AutoConfig"] and config._auto_class == "AutoConfig"
    for auto in (auto for auto in classes if auto.startswith("AutoModel")):
        model = getattr(transformers, auto)._model_mapping[type(config)]
        assert model is classes[auto] and model._auto_class == auto
    if "AutoProcessor" in classes:
        processor, images = PROCESSOR_MAPPING[type(config)], IMAGE_PROCESSOR_MAPPING[type(config)]["torchvision"]
        assert processor is classes["AutoProcessor"] and processor._auto_class == "AutoProcessor"
        assert images is classes["AutoImageProcessor"] and images._auto_class == "AutoImageProcessor"


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda pipeline: pipeline.task_name)
def test_pipeline_knows_the_task_by_name(pipeline):
    entry = transformers.pipelines.check_task(pipeline.task_name)[1]
    assert entry["impl"] is pipeline and entry["pt"] == (PIPELINES[pipeline],)


def test_the_tables_of_transformers_are_only_added_to():
    """Its own tasks, and those that it refuses by name, are those without oner; three of them read pictures our way
    for our models, and are what they were for others."""
    code = (
        "import json, transformers.pipelines as p\n"
        "print(json.dumps([sorted(p.PIPELINE_REGISTRY.supported_tasks), getattr(p, 'REMOVED_TASKS', {})]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tasks, removed = json.loads(done.stdout)
    ours = {pipeline.task_name for pipeline in PIPELINES}
    assert not ours & set(tasks) and set(PIPELINE_REGISTRY.supported_tasks) == ours | set(tasks)
    assert getattr(transformers.pipelines, "REMOVED_TASKS", {}) == removed  # older releases have no such table
    for task, cls in BUILT_IN.items():
        theirs = cls.__mro__[2] if cls.__mro__[1].__name__ == "ReadsPictures" else cls.__mro__[1]
        assert theirs.__module__.startswith("transformers.") and theirs is not transformers.Pipeline, task


@pytest.mark.parametrize("module", [oner, oner.processing], ids=lambda module: module.__name__)
def test_names_are_what_they_say(module):
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


def test_processing_names_every_file_of_its_names():
    assert set(oner.processing.__all__) == set(oner.processing._FILES)


@pytest.mark.parametrize("line", SAID)
def test_the_command_line_answers_before_anything_heavy_is_imported(line, root):
    code = (
        "import sys\nfrom oner_command_line import main\n"
        f"try:\n    main({line.split()!r})\n"
        f"finally:\n    print('IMPORTED', sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    said, status = SAID[line]
    assert done.returncode == status and said in done.stdout + done.stderr, done.stderr
    assert "IMPORTED []" in done.stdout


def test_the_command_line_offers_what_the_commands_have():
    """Choices and defaults are written down twice, there and where they mean something."""
    convert, estimate = COMMANDS["convert"].parser("convert"), COMMANDS["estimate"].parser("estimate")
    offered = {action.dest: action for parser in (convert, estimate) for action in parser._actions}
    assert offered["origin"].choices == sorted(SOURCES)
    assert offered["device"].choices == sorted(DEVICES)
    assert offered["sharding"].choices == sorted(SHARDS)
    assert offered["mfu"].default is None
    assert OBJECTIVE in offered["objective"].help


def test_every_command_has_its_module():
    from importlib import import_module

    assert all(callable(import_module(command.module).run) for command in COMMANDS.values())

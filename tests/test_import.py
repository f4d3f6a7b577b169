"""`import oner` registers the families and the tasks; the command line is ready before anything heavy is imported."""

import json
import subprocess
import sys
from ast import literal_eval
from dataclasses import MISSING, fields
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

import oner
import oner.processing
import oner_run_options as run_options
from oner.registration import BUILT_IN, PIPELINES
from oner.training.commands.evaluate import OWN_TASKS, TASKS
from oner.training.conversion.command import OBJECTIVE, SOURCES
from oner.training.cost.estimate import DEVICES, SHARDS
from oner.training.objectives.objective import OBJECTIVES, objective_classes
from oner.training.run.arguments import DATA, ModelArguments, RunArguments
from oner.training.run.collators import CAPTION_RULES
from oner.training.tasks.finetuning import TASKS as FINETUNED
from oner.training.tasks.finetuning import find_task
from oner_command_line import COMMANDS
from oner_evaluate_options import EVALUATIONS, OWN_EVALUATIONS

HEAVY = ("torch", "transformers", "datasets", "numpy", "oner")
# what the command line says before it has imported anything, and whether that is an error
SAID = {
    "--help": ("estimate", 0),
    "--version": (f"oner {oner.__version__}\n", 0),
    "convert --help": ("--draw_missing", 0),
    "estimate --help": ("rtx4090", 0),
    "doctor --help": ("2 RUN is not a run", 0),
    "estmate": ("'estmate' is none of train, ", 2),
    "estmate --count 2": ("did you mean estimate?", 2),
    "train --help": ("--help-all lists the other", 0),
    "train --help-all": ("the losses of momo", 0),
    "train --help-all --family simla": ("the losses of simla", 0),
    "finetune --task vqa --help": ("--answer_list", 0),
    "evaluate --help": ("--rerank_weight", 0),
    "search --help": ("an image to search for", 0),
    "index --help": ("run it again to continue", 0),
    "index nowhere photos-index": ("nowhere: no such folder or file", 2),
    "doctor nowhere": ("nowhere: no such folder or file", 2),
    "serve --help": ("--write-space", 0),
    "serve nowhere": ("nowhere is no run", 2),
    "serve model nowhere": ("nowhere: no such folder", 2),
    "compare --help": ("get_image_features", 0),
    "compare one": ("required: --data", 2),
    "publish --help": ("owner/photos --private", 0),
    "train": ("expected a FOLDER, or --config", 2),
    "train setup.cfg": ("setup.cfg is a file; expected a FOLDER", 2),
    "train nowhere": ("nowhere: no such folder", 2),
    "train --config oner_emojy": ("did you mean oner_emoji?", 2),
    "train --config oner_emoji --bach_size 3": ("did you mean --batch_size?", 2),
    "train --config oner_emoji --batch_size many": ("--batch_size is 'many'; expected int", 2),
    "train --config oner_emoji --mixed_precision bf17": ("did you mean bf16?", 2),
    "train --family simpla": ("did you mean simla?", 2),
    "finetune --task vqaa": ("did you mean vqa?", 2),
    "estimate --config oner_base_224 --epoch 3": ("did you mean --epochs?", 2),
    "search tests": ("give words, --image, or both", 2),
    "search tests red fruit": ('expected all words as one: "red fruit"', 2),
    "search nowhere words": ("nowhere: no such folder or file", 2),
    "doctor run --row 3": ("did you mean", 2),
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
        f"try:\n    sys.exit(main({line.split()!r}))\n"
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
    assert list(TASKS) == EVALUATIONS and OWN_TASKS == OWN_EVALUATIONS
    evaluate = {action.dest: action for action in COMMANDS["evaluate"].parser("evaluate")._actions}
    assert evaluate["caption_rules"].choices == tuple(CAPTION_RULES)


# without the toy that tests register
@pytest.mark.parametrize("named", [named for named in OBJECTIVES if named != "toy"])
def test_what_a_run_may_be_told_is_read_from_the_source_as_it_is(named):
    """Names, kinds, defaults and help that are answered without importing the dataclasses are theirs."""
    read = {option.name: option for group in run_options.run_options(named).values() for option in group}
    kinds = [ModelArguments, *DATA, RunArguments, objective_classes(named)[1]]
    there = {field.name: (field, hint) for kind in kinds for field, hint in hinted(kind)}
    assert read.keys() == there.keys()
    for name, (field, hint) in there.items():
        option = read[name]
        item = next(iter(get_args(hint))) if get_origin(hint) in (Union, UnionType) else hint
        assert option.many is (get_origin(item) is list)
        item = get_args(item)[0] if option.many else item
        assert option.choices == (get_args(item) if get_origin(item) is Literal else ())
        assert option.choices or option.kind == item.__name__
        assert option.help == field.metadata["help"]
        default = field.default if field.default is not MISSING else field.default_factory()
        try:
            told = literal_eval(option.default)
        except ValueError:  # an expression is shown as it is written: list, LOSSES, 1 / 30
            continue
        assert told == default


@pytest.mark.parametrize("task", FINETUNED)
def test_the_options_of_a_task_are_read_likewise(task):
    read = [option.name for option in run_options.task_options(task)]
    assert set(read) == {field.name for field in fields(find_task(task).arguments)} and len(read) == len(set(read))


def hinted(kind):
    return [(field, get_type_hints(kind)[field.name]) for field in fields(kind)]


def test_every_command_has_its_module():
    from importlib import import_module

    assert all(callable(import_module(command.module).run) for command in COMMANDS.values())


def test_words_may_stand_behind_options(tmp_path):
    options, rest = COMMANDS["search"].read("search", [str(tmp_path), "--top_k", "3", "red fruit"])
    assert (options.place, options.words, options.top_k, rest) == (str(tmp_path), "red fruit", 3, [])

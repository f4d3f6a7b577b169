"""`import oner` loads nothing heavy, and yet every way into transformers finds the families registered."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

REGISTERED = """
import sys
import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY
families = sys.modules["oner"]._FAMILIES
assert {"oner", "simla"} <= families.keys()
for family, classes in families.items():
    config = transformers.AutoConfig.for_model(family)
    said = (type(config).__name__, type(config).__module__.rpartition(".")[0], type(config)._auto_class)
    assert said == (classes["AutoConfig"], "oner.modeling", "AutoConfig"), said
    assert config.custom_pipelines == {}
    for auto in (name for name in classes if name.startswith("AutoModel")):
        model = getattr(transformers, auto)._model_mapping[type(config)]
        said = (model.__name__, model.__module__.rpartition(".")[0], model._auto_class)
        assert said == (classes[auto], "oner.modeling", auto), said
    if "AutoProcessor" in classes:
        assert PROCESSOR_MAPPING[type(config)]._auto_class == "AutoProcessor"
        assert IMAGE_PROCESSOR_MAPPING[type(config)]["torchvision"]._auto_class == "AutoImageProcessor"
for task in ("image-text-retrieval", "image-text-matching", "visual-grounding", "visual-question-answering",
             "visual-entailment"):
    assert PIPELINE_REGISTRY.check_task(task)[1]["impl"].task_name == task
"""
WAYS = {
    "bare": "import oner",
    "auto class": "import oner\nfrom transformers import AutoModel",
    "transformers first": "import transformers, oner\ntransformers.AutoConfig",
    "auto class first": "from transformers import AutoModel\nimport oner",
    "pipelines": "import oner\nfrom transformers import pipeline",
    "pipelines first": "import transformers.pipelines\nimport oner",
    # loads the auto classes in its own middle
    "layers": "import oner\nimport transformers.modeling_layers",
    "another model": "import oner\nfrom transformers import BertModel",
    "name": "from oner import OneRModel",
    "processing name": "from oner import open_rows",
    "modeling": "import oner.modeling",
    "file of a room": "from oner.processing.processing_vl import OneRProcessor",
    "training": "import oner.training.publishing.hub",
    "attribute": "import oner\noner.modeling.OneRModel",
}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_import_loads_neither_torch_nor_transformers():
    heavy = run("import json, sys, oner\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))")
    assert not {"torch", "transformers", "datasets", "timm", "numpy", "torchvision", "PIL"} & set(json.loads(heavy))


def test_the_command_line_loads_nothing_heavy_before_it_knows_what_to_do():
    code = "import sys, oner.command_line as c\ntry:\n c.main(['--help'])\nexcept SystemExit:\n pass\n"
    assert "torch" not in run(code + "print([name for name in sys.modules if name == 'torch'])").splitlines()[-1]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_finds_the_families(way):
    run(WAYS[way] + "\n" + REGISTERED)


@pytest.mark.parametrize("way", ["name", "file of a room"])
def test_a_class_that_came_by_itself_saves_its_code(way, tmp_path):
    """Without an auto class in sight: what is saved must still be loadable by those who lack oner."""
    code = {
        "name": "from oner import OneRConfig, OneRModel\n"
        "OneRModel(OneRConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, "
        "vocab_size=200, projection_hidden_size=8, projection_dim=8)).save_pretrained(path)",
        "file of a room": "from oner.processing.image_processing_vl import OneRImageProcessor\n"
        "OneRImageProcessor().save_pretrained(path)",
    }[way]
    run(f"path = {str(tmp_path)!r}\n{code}")
    expected = {"name": "modeling_oner.py", "file of a room": "image_processing_vl.py"}[way]
    assert (tmp_path / expected).is_file(), sorted(path.name for path in tmp_path.iterdir())


def test_names_are_what_they_say():
    run(
        "import oner\n"
        "assert set(oner.__all__) <= set(dir(oner))\n"
        "for name in oner.__all__: assert getattr(oner, name).__name__ == name, name\n"
        "import oner.processing as p\n"
        "assert set(p.__all__) == set(p._FILES)\n"
        "for name in p.__all__: assert getattr(p, name).__name__ == name, name\n"
    )
    for module in ("oner", "oner.processing"):
        with pytest.raises(AssertionError, match="has no attribute 'nonsense'"):
            run(f"import {module} as m\nm.nonsense")

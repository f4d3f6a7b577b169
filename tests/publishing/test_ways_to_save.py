"""Every way to save a published model, with oner and without, leaves a repository that loads with oner and without."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import save_probe
from families import FAMILIES, RETRIEVAL
from tiny_repository import emoji_rows, model_of, processor_of
from transformers import AutoModelForPreTraining, AutoModelForZeroShotImageClassification

from oner.training.publishing.hub import export_model
from oner.training.publishing.model_loading import load_model

# with oner here, without it in a process that has none; "in_place" saves where it loaded from
WITH = [*save_probe.WAYS, "in_place"]
WITHOUT = ["model_and_processor", "pipeline", "built_in_pipeline", "trainer", "in_place"]
WAYS = [f"with-{way}" for way in WITH] + [f"without-{way}" for way in WITHOUT]
CASES = [(name, way) for name in FAMILIES for way in WAYS]
# which pipelines a family's retrieval model serves, transformers' own two that read images among them
EMBEDS = {"image-text-retrieval", "image-feature-extraction", "zero-shot-image-classification"}
PIPELINES = {
    "codis": EMBEDS | {"image-text-matching", "visual-grounding"},
    "momo": EMBEDS | {"image-text-matching"},
    "oner": EMBEDS | {"visual-grounding"},
    "simla": EMBEDS | {"image-text-matching", "visual-grounding"},
}


def python(folder: Path, *arguments: str) -> None:
    """save_probe.py in a fresh interpreter, elsewhere, with caches of its own."""
    script = Path(save_probe.__file__)
    environment = os.environ | {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(script.parents[1])
    done = subprocess.run(
        [sys.executable, str(script), *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(emoji_folder, tmp_path_factory) -> Path:
    """FAMILY-published, and beside it FAMILY-WAY of each way."""
    folder = tmp_path_factory.mktemp("ways")
    rows = emoji_rows(emoji_folder)
    (folder / "photo.png").write_bytes(rows[0]["image"]["bytes"])
    without = []
    for name, family in FAMILIES.items():
        processor = processor_of(family, rows)
        published = str(export_model(model_of(family, processor), processor, folder / f"{name}-published"))
        for way in WITH:
            target = folder / f"{name}-with-{way}"
            if way == "merged_adapter" and find_spec("peft") is None:
                continue
            if way == "in_place":
                shutil.copytree(published, target)
                save_probe.save_model_and_processor(str(target), str(target), {})
            else:
                save_probe.WAYS[way](published, str(target), {})
        for way in WITHOUT:
            target = folder / f"{name}-without-{way}"
            source = published
            if way == "in_place":
                source = str(shutil.copytree(published, target))
            without.append(f"{source}:{target}:{'model_and_processor' if way == 'in_place' else way}")
    python(folder, "save", "remote", *without)
    return folder


@pytest.fixture(scope="module")
def loaded(folder) -> dict[str, dict[str, dict]]:
    """local or remote -> directory's name -> what loading it told."""
    directories = sorted(str(path) for path in folder.iterdir() if (path / "config.json").is_file())
    told = {}
    for mode in ("local", "remote"):
        out = folder / f"{mode}.json"
        python(folder, "load", mode, str(folder / "photo.png"), str(out), *directories)
        told[mode] = {Path(name).name: one for name, one in json.loads(out.read_text()).items()}
    return told


@pytest.mark.parametrize("mode", ["local", "remote"])
@pytest.mark.parametrize(("name", "way"), CASES, ids=[f"{name}-{way}" for name, way in CASES])
def test_it_loads_and_answers_as_the_published_does(name, way, mode, loaded):
    if f"{name}-{way}" not in loaded[mode]:
        pytest.skip("needs peft")
    published, saved = loaded["local"][f"{name}-published"], loaded[mode][f"{name}-{way}"]
    assert not saved["lost"] and saved["auto_map"] == published["auto_map"]
    assert set(saved["tasks"]) == PIPELINES[name] == set(published["tasks"])
    assert saved["types"] == published["types"]
    for answer in ("search", "classes", "pair"):
        assert saved[answer] == pytest.approx(published[answer], abs=1e-5), answer


@pytest.mark.parametrize(("name", "way"), CASES, ids=[f"{name}-{way}" for name, way in CASES])
def test_our_own_loader_takes_it(name, way, folder):
    directory = folder / f"{name}-{way}"
    if not directory.exists():
        pytest.skip("needs peft")
    model = load_model(AutoModelForZeroShotImageClassification, directory)
    assert type(model) is FAMILIES[name].classes[RETRIEVAL]


def test_in_place_keeps_the_weights(folder, family):
    before = AutoModelForPreTraining.from_pretrained(folder / f"{family.name}-published").state_dict()
    target = shutil.copytree(folder / f"{family.name}-published", folder / f"again-{family.name}")
    AutoModelForPreTraining.from_pretrained(target).save_pretrained(target)
    after = AutoModelForPreTraining.from_pretrained(target).state_dict()
    assert before.keys() == after.keys() and all((after[key] == value).all() for key, value in before.items())

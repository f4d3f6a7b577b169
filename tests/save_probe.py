"""Saves published models again, or loads what was saved, in a process with or without `oner`.

    python save_probe.py save remote SOURCE:TARGET:WAY ...      each way of WAYS that works without oner
    python save_probe.py load local|remote PICTURE OUT.json DIRECTORY ...

`remote` stands for a machine with transformers only, where the model's own code is trusted; see hub_probe.py.
"""

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

from hub_probe import TEXTS, NoOner

RETRIEVAL = "AutoModelForZeroShotImageClassification"


def save_model_and_processor(source: str, target: str, trust: dict[str, bool]) -> None:
    import transformers

    getattr(transformers, RETRIEVAL).from_pretrained(source, **trust).save_pretrained(target)
    transformers.AutoProcessor.from_pretrained(source, **trust).save_pretrained(target)


def save_processor_first(source: str, target: str, trust: dict[str, bool]) -> None:
    import transformers

    transformers.AutoProcessor.from_pretrained(source, **trust).save_pretrained(target)
    transformers.AutoModelForPreTraining.from_pretrained(source, **trust).save_pretrained(target)


def save_pipeline(source: str, target: str, trust: dict[str, bool]) -> None:
    import transformers

    transformers.pipeline("image-text-retrieval", model=source, **trust).save_pretrained(target)


def save_built_in_pipeline(source: str, target: str, trust: dict[str, bool]) -> None:
    import transformers

    transformers.pipeline("zero-shot-image-classification", model=source, **trust).save_pretrained(target)


def save_by_trainer(source: str, target: str, trust: dict[str, bool]) -> None:
    import transformers

    model = getattr(transformers, RETRIEVAL).from_pretrained(source, **trust)
    processor = transformers.AutoProcessor.from_pretrained(source, **trust)
    arguments = transformers.TrainingArguments(target, report_to=[], use_cpu=True)
    transformers.Trainer(model, arguments, processing_class=processor).save_model()


def save_merged_adapter(source: str, target: str, trust: dict[str, bool]) -> None:
    import peft
    import transformers

    model = getattr(transformers, RETRIEVAL).from_pretrained(source, **trust)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    adapted.merge_and_unload().save_pretrained(target)
    transformers.AutoProcessor.from_pretrained(source, **trust).save_pretrained(target)


# what leaves a repository: (source, target, trust in the model's own code) -> nothing
WAYS: dict[str, Callable[[str, str, dict[str, bool]], None]] = {
    "model_and_processor": save_model_and_processor,
    "processor_first": save_processor_first,
    "pipeline": save_pipeline,
    "built_in_pipeline": save_built_in_pipeline,
    "trainer": save_by_trainer,
    "merged_adapter": save_merged_adapter,
}


def load(directory: str, picture: str, trust: dict[str, bool]) -> dict[str, Any]:
    """What a directory offers, and its answers by the pipelines that load from it."""
    import torch
    import transformers
    from PIL import Image

    config = transformers.AutoConfig.from_pretrained(directory, **trust)
    with open(f"{directory}/config.json", encoding="utf-8") as file:
        pipelines = json.load(file)["custom_pipelines"]
    told: dict[str, Any] = {"tasks": sorted(pipelines), "auto_map": config.auto_map}

    # every name with its code
    named = [*config.auto_map.values(), *(entry["impl"] for entry in pipelines.values())]
    told["lost"] = [reference for reference in named if not defines(directory, reference)]

    # one of our pipelines and one of transformers' own
    search = transformers.pipeline("image-text-retrieval", model=directory, **trust)
    search.index_texts(TEXTS)
    found = {answer["item"]: answer["score"] for answer in search(image=Image.open(picture), top_k=2)}
    told["search"] = [found[text] for text in TEXTS]
    classify = transformers.pipeline("zero-shot-image-classification", model=directory, **trust)
    classes = {answer["label"]: answer["score"] for answer in classify(picture, candidate_labels=TEXTS)}
    told["classes"] = [classes[text] for text in TEXTS]

    # and the classes by themselves, on a pair in the processor's own layout
    processor = transformers.AutoProcessor.from_pretrained(directory, **trust)
    images = transformers.AutoImageProcessor.from_pretrained(directory, **trust)
    told["types"] = [type(part).__name__ for part in (search.model, processor, images)]
    pair = processor(images=[Image.open(picture)] * 2, text=TEXTS)
    with torch.no_grad():
        told["pair"] = search.model.get_multimodal_features(**pair).pooler_output.flatten().tolist()
    return told


def defines(directory: str, reference: str) -> bool:
    """Whether the file of `file.Class` is there and has the class."""
    file, name = reference.split(".")
    try:
        with open(f"{directory}/{file}.py", encoding="utf-8") as code:
            return f"class {name}" in code.read()
    except OSError:
        return False


def main(action: str, mode: str, *rest: str) -> None:
    warnings.simplefilter("ignore")
    if mode == "remote":
        sys.meta_path.insert(0, NoOner())
        trust = {"trust_remote_code": True}
    else:
        import oner  # noqa: F401

        trust = {}
    import torch

    torch.set_num_threads(1)
    if action == "save":
        for line in rest:
            source, target, way = line.split(":")
            WAYS[way](source, target, trust)
        return
    picture, out, *directories = rest
    told = {directory: load(directory, picture, trust) for directory in directories}
    with open(out, "w", encoding="utf-8") as file:
        json.dump(told, file)


if __name__ == "__main__":
    main(*sys.argv[1:])

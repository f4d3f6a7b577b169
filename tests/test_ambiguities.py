"""docs/ambiguities.md names fields that there are."""

import dataclasses
import inspect
import re
from typing import Any

from docs_pages import text_of

import oner
from oner.processing.data.augmentation import Crop
from oner.processing.data.masking import Masking
from oner.training.evaluation.localization import similarity_maps
from oner.training.evaluation.retrieval import MultimodalRetrievalEvaluator, RetrievalEvaluator
from oner.training.evaluation.zero_shot import ZeroShotClassificationEvaluator
from oner.training.objectives.oner import OneRObjectiveArguments
from oner.training.run.arguments import DataArguments, ModelArguments, RunArguments


def names_of(dataclass: type) -> set[str]:
    return {field.name for field in dataclasses.fields(dataclass)}


def options_of(*callables: Any) -> set[str]:
    return {name for function in callables for name in inspect.signature(function).parameters}


def test_ambiguities_name_real_fields():
    known = {
        "model": names_of(oner.OneRConfig),
        "objective": names_of(OneRObjectiveArguments),
        "data": names_of(DataArguments) | names_of(Crop) | names_of(Masking),
        "run": names_of(RunArguments) | names_of(ModelArguments),
        "evaluator": options_of(
            ZeroShotClassificationEvaluator, RetrievalEvaluator, MultimodalRetrievalEvaluator, similarity_maps
        ),
    }
    rows = re.findall(r"^\| (\d+) \|.*\| (.*?) \|$", text_of("docs/ambiguities.md"), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 28))
    for number, where in rows:
        if where == "none":
            continue
        for part in where.split("; "):
            group, _, fields = part.partition(": ")
            named = re.findall(r"`(\w+)`", fields)
            assert named and set(named) <= known[group], f"row {number}: {set(named) - known[group]} not in {group}"

"""Reads what the doctor checks: a run's log, its last checkpoint, its model, and a small sample of its rows.

n rows of the sample, P width of the embeddings, N places of codes.
"""

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForPreTraining, AutoProcessor, PreTrainedModel

from oner.modeling.modeling_dvae import DiscreteVAE
from oner.modeling.vl_features import RetrievalFeatures
from oner.processing.data.rows import PairRows
from oner.processing.data.sources import open_rows
from oner.processing.image_processing_vl import ImageDecodeError
from oner.processing.vl_tokenizer import unknown_words
from oner.training.evaluation.dvae import read_pictures
from oner.training.evaluation.embedding import Column, embed_images, embed_texts
from oner.training.evaluation.retrieval import RetrievalEvaluator
from oner.training.evaluation.sheets import evaluating
from oner.training.objectives.dvae import DiscreteVAEObjective, DiscreteVAEObjectiveArguments
from oner.training.objectives.objective import objective_classes
from oner.training.objectives.transport import plan_entropy, transport_plan
from oner.training.publishing.model_loading import load_model
from oner.training.run.arguments import Arguments, ModelArguments, RunArguments, data_arguments
from oner.training.run.checkpoint import STATE, list_checkpoints
from oner.training.run.collators import CAPTION_RULES
from oner.training.run.loading import Rows, open_training_rows
from oner.training.tasks.finetuning import find_task, task_arguments

LOG = "log.jsonl"
THUMBNAIL = 16  # side in pixels of the pictures that are compared for near duplicates
FEWEST = 16  # rows below which recall is not measured


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        directory: As given; a finished run has its model in `model`.
        arguments: Arguments of the run.
        task: The task that it is fine-tuned for; None for pretraining.
        lines: Lines of its log.
        step, processes: At the last checkpoint; 0 and 1 without one.
        uninformed: Loss of a model that has learned nothing, by name, for the losses in the log.
        distance: Between teacher and student as a share of the student's norm; None without a teacher.
        temperature, bounds: The model's learnable temperature and its range; None without a range.
        rows: Batch size of a process, for pairs if there are any.
        num_codes: Size of the codebook that the run trains; 0 without one.
    """

    directory: Path
    arguments: Arguments
    task: str | None
    lines: list[dict[str, Any]]
    step: int
    processes: int
    uninformed: dict[str, float]
    distance: float | None
    temperature: float | None
    bounds: tuple[float, float] | None
    rows: int
    num_codes: int

    @property
    def negatives(self) -> int:
        """Number of negatives of a row in a contrastive loss; 0 without one."""
        contrasts = [value for name, value in self.uninformed.items() if name != "itm"]
        return round(math.exp(contrasts[0])) - 1 if contrasts else 0

    @property
    def finished(self) -> bool:
        return (self.directory / "model" / "config.json").is_file()


@dataclass(frozen=True)
class Sample:
    """
    Attributes:
        captions, ids: Of n training rows; the ids are row numbers unless the run treats rows with equal ids as equal.
        pictures: Thumbnails (n, M) in [0, 1].
        unknown, tokens: Number of [UNK] and of all tokens in the captions.
        embeddings: Unit vectors (n, P) of pictures and of texts, if the model has embeddings.
        recalls: R@1 of training rows, R@1 of evaluation rows, and the number of rows of each.
        codes, num_codes: Codes (n, N) of an image tokenizer and its size, if the run uses one.
        nearest: Nearest codes of the run's codebook, for the picture and the text of one row per id.
        entropies: Entropy of the transport plans of these pictures and of these texts, in nats.
    """

    captions: list[list[str]]
    ids: list[Hashable]
    pictures: torch.Tensor
    unknown: int = 0
    tokens: int = 0
    embeddings: dict[str, torch.Tensor] | None = None
    recalls: tuple[float, float, int] | None = None
    codes: torch.Tensor | None = None
    num_codes: int = 0
    nearest: torch.Tensor | None = None
    entropies: dict[str, float] = field(default_factory=dict)


def read_run(directory: str | Path) -> Run:
    """
    Reads a run that has ended, was stopped, or is in progress.

    Raises:
        ValueError: the directory is not one of a run, or its files are not in the format of a run.
    """
    directory = Path(directory)
    lines = _read_log(directory / LOG)
    checkpoints = list_checkpoints(directory)
    config = directory / "model" / "results" / "training_config.json"

    # the arguments are in the last checkpoint, and in the finished model's directory
    state = _read_json(checkpoints[-1] / STATE) if checkpoints else {}
    told = state.get("arguments") or (_read_json(config) if config.is_file() else None)
    if told is None:
        raise ValueError(f"{directory}: no checkpoint and no model/results, so the run's arguments are unknown")
    arguments, objective = arguments_of(told)

    # losses of a model that has learned nothing; contrastive losses use the batches of pairs
    processes = _processes(checkpoints[-1]) if checkpoints else 1
    pairs = [portion for portion in arguments.portions().values() if portion.data.kind == "pairs"]
    batch_size = (pairs or [arguments.epoch_of()])[0].run.batch_size
    uninformed = objective.uninformed(arguments.objective, batch_size, processes) if objective else {}
    known = {name for line in lines for name in line}
    return Run(
        directory,
        arguments,
        told.get("task"),
        lines,
        state.get("step", 0),
        processes,
        {name: value for name, value in uninformed.items() if name in known},
        teacher_distance(checkpoints[-1]) if checkpoints else None,
        *_temperature(directory / "model"),
        batch_size // processes,
        _num_codes(checkpoints[-1]) if checkpoints and "codes_used" in known else 0,
    )


def arguments_of(told: Mapping[str, Any]) -> tuple[Arguments, type | None]:
    """
    Turns flat arguments into dataclasses, and finds the family's objective; None for a task with its own objective.

    Raises:
        ValueError: an unknown family or task.
    """
    objective: type | None
    family = told["family"]
    if "task" in told:
        task = find_task(told["task"])
        kind = task_arguments(task, family)
        objective = objective_classes(family)[0] if task.objective is None else None
    elif family == "discrete_vae":
        objective, kind = DiscreteVAEObjective, DiscreteVAEObjectiveArguments
    else:
        objective, kind = objective_classes(family)

    # removed arguments are ignored, new ones take their defaults
    parts = [
        one(**{field.name: told[field.name] for field in fields(one) if field.name in told})
        for one in (ModelArguments, RunArguments, kind)
    ]
    return Arguments(parts[0], data_arguments(told), parts[1], parts[2]), objective


def teacher_distance(checkpoint: Path) -> float | None:
    """|teacher - student| / |student| over their common weights; None without a teacher."""
    apart = norm = 0.0
    with (
        safe_open(checkpoint / "objective.safetensors", framework="pt") as kept,
        safe_open(checkpoint / "model.safetensors", framework="pt") as student,
    ):
        # without batch norm statistics, which each model keeps itself
        shared = set(student.keys())
        names = [name.removeprefix("teacher.") for name in kept.keys() if name.startswith("teacher.")]  # noqa: SIM118
        for name in names:
            if name in shared and "running_" not in name and "num_batches" not in name:
                own = student.get_tensor(name).double()
                apart += (kept.get_tensor(f"teacher.{name}").double() - own).square().sum().item()
                norm += own.square().sum().item()
    return (apart / norm) ** 0.5 if norm else None


def read_sample(run: Run, rows: Mapping[str, Rows] | None = None, count: int = 256) -> Sample:
    """
    Draws a sample of the training rows, the same each time, and evaluates the run's model on it.

    Args:
        rows: By portion, if they are already open.

    Raises:
        ValueError: the data are streamed, belong to a task, or have no images.
        PairDataError: the data no longer exist.
    """
    # the first portion that has pictures
    portions = {name: one for name, one in run.arguments.portions().items() if one.data.kind != "texts"}
    if run.task is not None or not portions:
        raise ValueError("rows of a task are not sampled" if run.task else "the rows contain no pictures")
    name, portion = next(iter(portions.items()))
    if portion.data.streaming:
        raise ValueError("streamed data are not sampled")
    taken = draw(open_training_rows(portion.data) if rows is None else rows[name], count)
    images = portion.data.kind == "images"

    # ids, if the run treats rows with equal ids as equal
    told = run.arguments.to_dict()
    same = told.get("match_ids") or told["one_row_per_id"]
    seen = {
        "captions": [row["captions"] for row in taken],
        "ids": [row["id"] if same else number for number, row in enumerate(taken)],
        "pictures": read_pictures(taken, THUMBNAIL).flatten(1),  # (n, M)
    }
    if not run.finished:
        return Sample(**seen)

    # outputs of its model
    directory = run.directory / "model"
    # heads that a family does not save, such as MoMo's decoders, are not used here
    auto = AutoModel if images else AutoModelForPreTraining
    model = load_model(auto, directory, draws_heads=True, dtype=torch.float32)
    seen |= _codes(model, told, taken)
    if isinstance(model, RetrievalFeatures):
        processor = AutoProcessor.from_pretrained(directory)
        seen |= _tokens(processor, portion, taken) | _standing(model, processor, portion, taken)
        if run.num_codes:
            seen |= _among_codes(model, told, seen["ids"], seen["embeddings"])
    return Sample(**seen)


def draw(rows: PairRows, count: int) -> list[dict[str, Any]]:
    """At most `count` rows with readable pictures, in their order, the same each time."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))  # (R,)
    places = sorted(place for place in order[:count].tolist() if place not in rows.bad)
    readable = []
    for row in rows.take(places):
        try:
            read_pictures([row], 1)
        except ImageDecodeError:
            continue
        readable.append(row)
    return readable


def _tokens(processor: Any, portion: Arguments, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    clean = CAPTION_RULES.get(portion.data.caption_rules) or str
    captions = [clean(caption) for row in rows for caption in row["captions"]]
    unknown, tokens, _ = unknown_words(processor.tokenizer, captions)
    return {"unknown": unknown, "tokens": tokens}


def _standing(model: PreTrainedModel, processor: Any, portion: Arguments, rows: list[dict[str, Any]]) -> dict:
    # embeddings of the sample: one text per picture, even if texts repeat
    data, run = portion.data, portion.run
    clean = CAPTION_RULES.get(data.caption_rules) or str
    embeddings = {"pictures": embed_images(model, processor, Column(rows, "image"))}  # (n, P)
    if portion.data.kind == "pairs":
        captions = [clean(row["captions"][0]) for row in rows]
        embeddings["texts"] = embed_texts(model, processor, captions)  # (n, P)
    standing = {"embeddings": embeddings}

    # recall among equally many training and evaluation rows
    options = {"ks": (1,), "captions": "first", "progress": False, "name": "rows"}
    options["clean_caption"] = CAPTION_RULES.get(data.caption_rules)
    if not run.eval_data:
        return standing
    columns = (data.image_column, data.text_column, data.id_column)
    others = draw(open_rows(run.eval_data[0], "pairs", *columns), len(rows))
    if len(others) < FEWEST:
        return standing
    recalls = [dict(RetrievalEvaluator(some, **options).run(model, processor))["rows/r_mean"]
               for some in (rows[: len(others)], others)]  # fmt: skip
    return {**standing, "recalls": (*recalls, len(others))}


def _codes(model: PreTrainedModel, told: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict:
    # for a run that trains a tokenizer or predicts the codes of one
    if not isinstance(model, DiscreteVAE):
        if told.get("image_tokenizer") is None or "mim" not in told["losses"]:
            return {}
        model = load_model(AutoModel, told["image_tokenizer"], dtype=torch.float32)
    with evaluating(model):
        codes = model.get_codebook_indices(read_pictures(rows, model.config.image_size))  # (n, N)
    return {"codes": codes, "num_codes": model.config.num_codes}


def _among_codes(model: PreTrainedModel, told: Mapping[str, Any], ids: Sequence[Hashable], embeddings: dict) -> dict:
    # rows with the same id may share codes, so only the first of each id counts
    first = list(dict(zip(reversed(ids), reversed(range(len(ids))), strict=True)).values())
    with evaluating(model):
        cosines = {side: model.codebook(vectors[first]) for side, vectors in embeddings.items()}  # (m, K)
    how = {name: told[f"ipot_{name}"] for name in ("beta", "outer", "inner")}
    plans = {side: transport_plan(1 - found, **how) for side, found in cosines.items()}  # (m, K)
    nearest = torch.cat([found.argmax(1) for found in cosines.values()])  # (2m,)
    return {"nearest": nearest, "entropies": {side: plan_entropy(plan).item() for side, plan in plans.items()}}


def _num_codes(checkpoint: Path) -> int:
    with safe_open(checkpoint / "model.safetensors", framework="pt") as weights:
        return weights.get_slice("codebook.weight").get_shape()[0]


def _temperature(model: Path) -> tuple[float | None, tuple[float, float] | None]:
    # only of a finished model with a temperature_range; models of tasks may have no temperature
    config = _read_json(model / "config.json") if (model / "config.json").is_file() else {}
    if "temperature_range" not in config:
        return None, None
    with safe_open(model / "model.safetensors", framework="pt") as weights:
        if "temperature" not in weights.keys():  # noqa: SIM118
            return None, None
        return weights.get_tensor("temperature").item(), tuple(config["temperature_range"])


def _processes(checkpoint: Path) -> int:
    # one row per process
    with safe_open(checkpoint / "random.safetensors", framework="pt") as generators:
        return generators.get_slice("cpu").get_shape()[0]


def _read_log(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the output_dir of a run, which contains its log")
    try:
        # without a last line that is still being written
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    except ValueError as error:
        raise ValueError(f"{path}: expected one JSON object per line: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object: {error}") from error

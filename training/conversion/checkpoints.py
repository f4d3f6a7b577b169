"""Converts state dicts in the format of SIMLA's and ALBEF's repositories to ours and back.

Most tensors are only renamed; a few have another layout. D width, N patches, P width of the contrastive space, Q rows
of a queue, V vocabulary size. Official names are the module names in codezakh/SIMLA and salesforce/ALBEF; each
family's entry in `OFFICIAL` maps them to ours.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from oner.modeling.vl_embeddings import interpolate_positions
from oner.training.publishing.model_loading import damage_of

from .families import OFFICIAL, OfficialFamily, family_of
from .names import Names, ties
from .report import ConversionReport, MissingWeightsError

# (P, Q) in a file, (Q, P) here
QUEUES = {"image_queue": "queue.image", "text_queue": "queue.text"}
POINTER = ("queue_ptr", "queue.pointer")
IDS = ("idx_queue", "queue.ids")
TEACHER = "teacher."
# initial values of missing weights that are not random
BEGINNINGS = {"mask_token": "zeros, as a mask token begins", "temperature": "as the configuration says"}


def resize_position_table(table: torch.Tensor, side: int) -> torch.Tensor:
    """
    Resizes learned positions to a grid with another side by bicubic interpolation, except the first row, which is
    [CLS]'s (ALBEF's code).
    (1, 1 + N, D) -> (1, 1 + side², D). Raises `ValueError` if the table is not one row plus a square.
    """
    places = table.shape[1] - 1  # N, [CLS] has no patch
    own = math.isqrt(places)
    if own * own != places:
        raise ValueError(f"a table of {table.shape[1]} positions is not [CLS] and a square of patches")
    patches = interpolate_positions(table[0, 1:], (own, own), (side, side))  # (side², D)
    return torch.cat([table[:, :1], patches[None]], dim=1)


def _count(names: Iterable[str], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return 1 + max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1)


def _head_count(width: int, given: int | None) -> int:
    if given is None and width % 64:
        raise ValueError(
            f"the width is {width}, not a multiple of 64 as in ViT and BERT, and no shape tells the number of "
            "attention heads; expected num_attention_heads"
        )
    return given or width // 64


def _bert_prefix(names: Iterable[str]) -> str:
    return "bert." if any(name.startswith("text_encoder.bert.") for name in names) else ""


def _layers(state: Mapping[str, torch.Tensor]) -> int:
    return _count(state, f"text_encoder.{_bert_prefix(state)}encoder.layer.")


def _model_class(state: Mapping[str, torch.Tensor], line: OfficialFamily) -> type[PreTrainedModel]:
    """The smallest class that has all heads of the file. Raises `ValueError` if a model of two images has no head."""
    if any(name.startswith("text_decoder.") for name in state):
        return line.answers
    if "ta_head.weight" in state:
        return line.assignment
    if "cls_head.2.weight" in state:
        return line.reasoning if _reads_two_images(state) else line.entailment
    if _reads_two_images(state):
        raise ValueError(
            "the text layers share their keys in pairs, as in a model of two images; expected cls_head or ta_head as "
            "well, got neither"
        )
    if any(name.startswith(line.pretraining_heads) for name in state):
        return line.pretraining
    return line.retrieval


def _reads_two_images(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether consecutive text layers share their cross-attention keys, as in a model of two images."""
    prefix = f"text_encoder.{_bert_prefix(state)}encoder.layer."
    keys = [state.get(f"{prefix}{layer}.crossattention.self.key.weight") for layer in range(_layers(state))]
    return any(one is not None and other is not None and torch.equal(one, other) for one, other in pairwise(keys))


def _stack(state: Mapping[str, torch.Tensor], line: OfficialFamily) -> int:
    """Number of text layers of a model of two images, 0 for others. Raises `ValueError` for an impossible number."""
    if _model_class(state, line) not in (line.reasoning, line.assignment):
        return 0
    if _layers(state) % 3:
        raise ValueError(
            f"the model of two pictures has {_layers(state)} text layers; expected a multiple of 3: the lower half of "
            "an encoder, and its upper half twice"
        )
    return _layers(state)


def _head_fields(state: Mapping[str, torch.Tensor], words: torch.Tensor) -> dict[str, Any]:
    """The configuration fields that the shapes of the heads determine."""
    fields: dict[str, Any] = {}
    for name, size in (("vision_proj.weight", "projection_dim"), ("mim_head.weight", "num_visual_codes")):
        if name in state:
            fields[size] = state[name].shape[0]

    # concepts are predicted from [CLS] or from its projection; the width tells which
    if "concept_head.weight" in state:
        reads = state["concept_head.weight"].shape[1]
        fields["concept_input"] = "projected" if reads == fields.get("projection_dim") else "cls"
    if "cls_head.2.weight" in state:
        fields["num_labels"] = state["cls_head.2.weight"].shape[0]
    if decoder_layers := _count(state, "text_decoder.bert.encoder.layer."):
        fields["answer_decoder_layers"] = decoder_layers

    # a file stores tied word embeddings twice, so only their values tell whether they are tied
    if (decoder := state.get("text_encoder.cls.predictions.decoder.weight")) is not None:
        fields["tie_word_embeddings"] = torch.equal(decoder, words)
    return fields


def _first_fusion(state: Mapping[str, torch.Tensor], bert: str) -> int:
    """Index of the first text layer with cross-attention; 0 if the file has none."""
    pattern = re.compile(rf"text_encoder\.{re.escape(bert)}encoder\.layer\.(\d+)\.crossattention\.")
    return min((int(match[1]) for name in state if (match := pattern.match(name))), default=0)


def infer_config(
    state: Mapping[str, torch.Tensor], family: str, image_size: int | None = None, **given: Any
) -> PreTrainedConfig:
    """
    Infers the configuration from the shapes in an official state dict.

    Args:
        state: Tensors by name, at least the student's.
        family: The family of the configuration, a key of `OFFICIAL`.
        image_size: Image size of the converted model; the position table's own if None.
        given: Fields that no shape determines, or that shall differ: heads, ids of special tokens, dropout.

    Raises:
        MissingWeightsError: a tensor is missing whose shape is needed.
        ValueError: fields contradict each other; the number of heads or special ids must be given.
    """
    line = family_of(family, OFFICIAL, "official checkpoints")

    # a misspelt field must not be silently overruled by the shapes
    if unknown := sorted(set(given) - set(line.config.__dataclass_fields__)):
        raise ValueError(f"{line.config.__name__} has no fields {unknown}")
    bert = _bert_prefix(state)

    def tensor(name: str) -> torch.Tensor:
        if name not in state:
            raise MissingWeightsError(f"the state dict has no {name}; expected an official SIMLA or ALBEF checkpoint")
        return state[name]

    words = tensor(f"text_encoder.{bert}embeddings.word_embeddings.weight")
    patch = tensor("visual_encoder.patch_embed.proj.weight")  # (D, C, p, p)
    positions = len(tensor(f"text_encoder.{bert}embeddings.position_embeddings.weight"))
    side = math.isqrt(tensor("visual_encoder.pos_embed").shape[1] - 1)

    # a model of two images has the upper half twice
    layers = _stack(state, line) * 2 // 3 or _layers(state)
    fields: dict[str, Any] = {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "num_hidden_layers": _count(state, "visual_encoder.blocks."),
        "num_attention_heads": _head_count(words.shape[1], given.pop("num_attention_heads", None)),
        "intermediate_size": len(tensor("visual_encoder.blocks.0.mlp.fc1.weight")),
        **line.depth(layers, _first_fusion(state, bert)),
        "text_intermediate_size": len(tensor(f"text_encoder.{bert}encoder.layer.0.intermediate.dense.weight")),
        "max_position_embeddings": positions,
        # pretraining reads 25 tokens and the downstream tasks 30, including [CLS]
        "max_text_length": min(24 if bert else 29, positions - 1),
        "image_size": image_size or side * patch.shape[-1],
        "patch_size": patch.shape[-1],
        "num_channels": patch.shape[1],
        **_head_fields(state, words),
    }

    # finally the configuration's own checks
    try:
        return line.config(**{**fields, **given})
    except (ValueError, TypeError, StrictDataclassError) as error:
        told = str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
        raise ValueError(f"the shapes alone give no valid configuration: {told}; give the missing fields") from error


@dataclass
class Conversion:
    """
    Attributes:
        model_class: The smallest class that has all heads of the file.
        config: The model's configuration.
        weights: The model's weights by name, without those in `report.missing`.
        objective: Tensors that only training needs: the teacher (names with the prefix "teacher.") and the queues.
        absent_heads: Modules of the class of which the file has no weight.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    objective: dict[str, torch.Tensor] = field(default_factory=dict)
    absent_heads: set[str] = field(default_factory=set)
    report: ConversionReport = field(default_factory=ConversionReport)


def from_official(
    state: Mapping[str, torch.Tensor],
    family: str,
    image_size: int | None = None,
    draw_missing: bool = False,
    fold_token_types: bool | None = None,
    **fields: Any,
) -> Conversion:
    """
    Converts an official state dict, of pretraining or of a downstream task, to ours.

    Args:
        state: Tensors by official name, from `read_weights`.
        family: The family of the new model, a key of `OFFICIAL`.
        image_size: Image size of the converted model; the position tables of student and teacher are resized to it.
        draw_missing: Accept that tower weights are missing in the file; they keep their random initialisation.
        fold_token_types: Add the first token type to every position, which is what a BERT with token types computes
            for a single text. If False, token types are left over, as SIMLA's code drops BERT's. If None, they are
            folded where the authors' code trains with them: ALBEF's BERT, and SIMLA's models of two images.
        fields: Configuration fields that `infer_config` cannot infer.

    Raises:
        MissingWeightsError: weights of a tower, or part of a head, are missing; names them.
        ValueError: see `infer_config`; a tensor's shape differs from the configuration's.
    """
    config = infer_config(state, family, image_size, **fields)
    line = OFFICIAL[family]
    done = Conversion(_model_class(state, line), config)
    stack = _stack(state, line)
    names = line.names(_bert_prefix(state), stack)

    # every tensor is either placed or listed as left over
    for name, tensor in state.items():
        _place(done, name, tensor, names)

    # changes beyond renaming
    if fold_token_types or (fold_token_types is None and (stack or line.token_types)):
        _fold_token_types(done, state, names)
    if "queue.image" in done.objective:  # pretraining keeps no ids: -100 is an entry without one
        done.objective.setdefault("queue.ids", torch.full((len(done.objective["queue.image"]),), -100))
    _resize(done, image_size)
    _check(done, names, draw_missing)
    if any(".cross_attention." in name for name in done.report.missing):
        done.report.notes.append(
            "ALBEF's text encoder is its lower layers, which have no cross-attention; SIMLA's is all of its layers, "
            "with and without cross-attention: the weights are a starting point for training, not the same model"
        )
    return done


def _momentum(name: str) -> tuple[bool, str]:
    """Whether the weight is the teacher's, and the student's name for it."""
    first, dot, rest = name.partition(".")
    return first.endswith("_m"), first.removesuffix("_m") + dot + rest


def _place(done: Conversion, name: str, tensor: torch.Tensor, names: Names) -> None:
    report = done.report
    of_teacher, own = _momentum(name)
    target = done.objective if of_teacher else done.weights
    prefix = TEACHER if of_teacher else ""

    # queues and their counters have their own names; the rest follows the family's table
    if name in QUEUES:
        done.objective[QUEUES[name]] = tensor.T.contiguous()
        report.used[name], report.changed[name] = QUEUES[name], "transposed to one row per entry, (P, Q) to (Q, P)"
    elif name in (POINTER[0], IDS[0]):
        ours = dict([POINTER, IDS])[name]
        done.objective[ours] = tensor.flatten()
        report.used[name] = ours
    # a file stores the bias of the language-model head under two names
    elif (ours := names(own.replace("predictions.bias", "predictions.decoder.bias"))) is not None:
        if tensor.ndim == 0:
            tensor = tensor.reshape(1)
            report.changed[name] = "reshaped to (1,): sharded training cannot split a scalar"

        # two copies of a tensor must be equal
        twin = target.get(prefix + ours)
        if twin is not None and not torch.equal(twin, tensor):
            report.left_over[name] = f"differs from the file's other tensor for {prefix}{ours}"
            return
        target[prefix + ours] = tensor
        report.used[name] = prefix + ours
    else:
        report.left_over[name] = _why(name)


def _why(name: str) -> str:
    if name.endswith("position_ids"):
        return "a buffer of position numbers, not needed here"
    if name.endswith("token_type_embeddings.weight"):
        return "our models have no token types (SIMLA's code drops them; fold_token_types keeps their effect)"
    return "our model has no module of that name"


def _fold_token_types(done: Conversion, state: Mapping[str, torch.Tensor], names: Names) -> None:
    for name, tensor in state.items():
        if name.endswith("token_type_embeddings.weight"):
            of_teacher, own = _momentum(name.replace("token_type", "position"))
            target, ours = (done.objective, TEACHER) if of_teacher else (done.weights, "")
            ours += names(own)
            target[ours] = target[ours] + tensor[0]
            done.report.left_over.pop(name)
            done.report.used[name] = ours
            done.report.changed[name] = "its first row was added to every position"


def _resize(done: Conversion, image_size: int | None) -> None:
    if image_size is None:
        return
    side = image_size // done.config.patch_size

    # both student and teacher, if the grid differs
    for official, target, prefix in (
        ("visual_encoder", done.weights, ""),
        ("visual_encoder_m", done.objective, TEACHER),
    ):
        ours = f"{prefix}{done.model_class.base_model_prefix}.vision.embeddings.position_embeddings"
        if ours in target and target[ours].shape[1] != 1 + side**2:
            before = math.isqrt(target[ours].shape[1] - 1)
            target[ours] = resize_position_table(target[ours], side)
            done.report.changed[f"{official}.pos_embed"] = f"{before} x {before} patches to {side} x {side}, bicubic"


def _check(done: Conversion, names: Names, draw_missing: bool) -> None:
    """Fills `report.missing`, and raises if the file lacks required weights."""
    # the shapes that the class expects, without allocating memory
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in done.model_class(done.config).state_dict().items()}

    # weights in the file that the class does not have
    for target, prefix in ((done.weights, ""), (done.objective, TEACHER)):
        strays = {n for n in target if n.startswith(prefix) and n.removeprefix(prefix) not in shapes}
        for official in [official for official, ours in done.report.used.items() if ours in strays]:
            del done.report.used[official]
            done.report.left_over[official] = f"{done.model_class.__name__} has no such weight"
        for name in strays:
            del target[name]

    # tied weights count as present
    tower = done.model_class.base_model_prefix
    if done.config.tie_word_embeddings:
        _tie(done.weights, "", tower)
        _tie(done.objective, TEACHER, tower)

    # shapes must match
    wrong = {
        name: f"{tuple(value.shape)}, expected {tuple(shapes[name.removeprefix(TEACHER)])}"
        for name, value in (done.weights | done.objective).items()
        if name.removeprefix(TEACHER) in shapes and value.shape != shapes[name.removeprefix(TEACHER)]
    }
    if wrong:
        raise MissingWeightsError(f"wrong shapes {dict(list(wrong.items())[:10])}")
    if damage := damage_of(done.weights | done.objective):
        raise MissingWeightsError(damage)

    # a wholly absent module is up to the caller; a partly absent one means a broken file
    there = {_module(name) for name in done.weights} | {tower}
    refused = []
    for name in sorted(shapes.keys() - done.weights.keys()):
        done.report.missing[name] = BEGINNINGS.get(name.rpartition(".")[2], "drawn at random")
        if _module(name) not in there:
            done.absent_heads.add(_module(name))
        elif done.report.missing[name] == "drawn at random":
            refused.append(name)
    if refused and not draw_missing:
        back = names.reverse
        raise MissingWeightsError(
            f"{len(refused)} weights are not in the checkpoint: {[back(name) or name for name in refused]}; expected "
            "all weights of the towers and of each head present, or draw_missing to initialise them at random"
        )


def _tie(weights: dict[str, torch.Tensor], prefix: str, tower: str) -> None:
    """Fills in tied weights. Raises `MissingWeightsError` if the file has two different tensors for one weight."""
    for name, source in ties((name.removeprefix(prefix) for name in weights), tower).items():
        kept = weights.setdefault(prefix + name, weights[prefix + source])
        if not torch.equal(kept, weights[prefix + source]):
            raise MissingWeightsError(f"{name} and {source} differ in the checkpoint; expected tied weights")
        weights[prefix + name] = weights[prefix + source]


def _module(name: str) -> str:
    """The tower or head that a weight belongs to."""
    first, second = [*name.split("."), ""][:2]
    return f"{first}.{second}" if second.endswith("_projection") else first


def to_official(
    weights: Mapping[str, torch.Tensor], family: str, objective: Mapping[str, torch.Tensor] | None = None
) -> tuple[dict[str, torch.Tensor], ConversionReport]:
    """
    The inverse of `from_official`: the state dict that the official scripts' `load_state_dict` expects. A model with
    a language-model head becomes a pretraining checkpoint, any other a checkpoint of its downstream task. Token types,
    which were folded into the positions, are written as zeros: without them the official scripts would keep BERT's.

    Args:
        weights: A model's state dict.
        family: Its family, a key of `OFFICIAL`.
        objective: Teacher and queues, named as in `Conversion.objective`. Without a teacher the momentum modules
            become
            copies of the student, as in the official constructor; text assignment has none.

    Raises:
        MissingWeightsError: weights of student or teacher do not exist in the official layout; names them.
    """
    # which official layout to write
    bert = "bert." if any(name.startswith("lm_head.") for name in weights) else ""
    second = {name.split(".")[1] for name in weights if name.startswith("second_layers.")}
    line = family_of(family, OFFICIAL, "official layout")
    names = line.names(bert, 3 * len(second)).reverse
    report = ConversionReport()

    # the teacher, or else the student
    objective = dict(objective or {})
    teacher = {name.removeprefix(TEACHER): t for name, t in objective.items() if name.startswith(TEACHER)}
    if not teacher and "assignment_head.weight" not in weights:
        alone = ("temperature", "itm_head.")
        teacher = {name: tensor for name, tensor in weights.items() if not name.startswith(alone)}
        report.notes.append("no teacher was given: the momentum modules are copies of the student")

    # student and teacher by official names, and the extra entries of the official files
    state = _by_official_names(weights, "", "", names, line.prefix, report)
    state |= _by_official_names(teacher, TEACHER, "_m", names, line.prefix, report)
    if report.left_over:
        raise MissingWeightsError(
            f"{len(report.left_over)} weights do not exist in the official layout: {list(report.left_over)[:10]}; "
            "expected a model that can be written completely"
        )
    _add_twins(state, bool(second) or line.token_types)

    # queues, one column per entry
    for official, ours in (*QUEUES.items(), POINTER):
        if ours in objective:
            state[official] = objective[ours].T.contiguous() if official in QUEUES else objective[ours]
            report.used[ours] = official
    if IDS[1] in objective and not bert:  # only the downstream models have such a buffer
        state[IDS[0]] = objective[IDS[1]][None]
        report.used[IDS[1]] = IDS[0]

    # the rest is listed, not dropped silently
    report.left_over |= {
        name: "the official layout has no such state"
        for name in objective
        if name not in report.used and not name.startswith(TEACHER)
    }
    return state, report


def _by_official_names(
    weights: Mapping[str, torch.Tensor], prefix: str, suffix: str, names: Names, tower: str, report: ConversionReport
) -> dict[str, torch.Tensor]:
    """The student, or with `prefix` and `suffix` the teacher, by official names. Fills `report`."""
    # the official files store tied weights under each of their names
    weights = dict(weights)
    for name, source in ties(weights, tower).items():
        weights.setdefault(name, weights[source])

    # one official name each; for the teacher that of the momentum module
    state = {}
    for name, tensor in weights.items():
        official = names(name)
        if official is None:
            report.left_over[prefix + name] = "the official layout has no such module"
            continue
        first, dot, rest = official.partition(".")
        state[first + suffix + dot + rest] = tensor.reshape(()) if official == "temp" else tensor
        report.used[prefix + name] = first + suffix + dot + rest
    return state


def _add_twins(state: dict[str, torch.Tensor], token_types: bool) -> None:
    """Adds the extra entries of an official state dict: the bias of the language-model head under its other name, the
    position buffer, and zeros for token types if its text encoder has them."""
    for name, tensor in list(state.items()):
        if name.endswith("cls.predictions.decoder.bias"):
            state[name.replace("decoder.bias", "bias")] = tensor
        elif name.endswith("embeddings.position_embeddings.weight"):
            state[name.replace("position_embeddings.weight", "position_ids")] = torch.arange(len(tensor))[None]
            if token_types:
                state[name.replace("position_embeddings", "token_type_embeddings")] = torch.zeros_like(tensor[:2])


__all__ = ["Conversion", "from_official", "infer_config", "resize_position_table", "to_official"]

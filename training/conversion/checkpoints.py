"""State dicts of SIMLA's and ALBEF's form to ours and back: names, and the few tensors that are laid out otherwise.

D width, N patches, P width of the contrastive space, Q rows of a queue, V words. Official names are those of the
modules in the repositories codezakh/SIMLA and salesforce/ALBEF; what they are in a family is its line in `OFFICIAL`.
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
# what a model begins with that no chance decides
BEGINNINGS = {"mask_token": "zeros, as a mask token begins", "temperature": "as the configuration says"}


def resize_position_table(table: torch.Tensor, side: int) -> torch.Tensor:
    """
    Learned positions for a grid of another side: bicubic, but for the first row, which is [CLS]'s (ALBEF's code).
    (1, 1 + N, D) -> (1, 1 + side², D). Raises `ValueError` for a table that is no square and one row.
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
            f"the width is {width}, no multiple of 64 as in ViT and BERT, and no shape tells the number of attention "
            f"heads; expected num_attention_heads"
        )
    return given or width // 64


def _bert_prefix(names: Iterable[str]) -> str:
    return "bert." if any(name.startswith("text_encoder.bert.") for name in names) else ""


def _layers(state: Mapping[str, torch.Tensor]) -> int:
    return _count(state, f"text_encoder.{_bert_prefix(state)}encoder.layer.")


def _model_class(state: Mapping[str, torch.Tensor], line: OfficialFamily) -> type[PreTrainedModel]:
    """The smallest class that has a place for all heads of the file. Raises `ValueError` where two images lack one."""
    if any(name.startswith("text_decoder.") for name in state):
        return line.answers
    if "ta_head.weight" in state:
        return line.assignment
    if "cls_head.2.weight" in state:
        return line.reasoning if _reads_two_images(state) else line.entailment
    if _reads_two_images(state):
        raise ValueError(
            "layers of text share their keys in pairs, as where a text reads two images; expected cls_head or ta_head "
            "beside them, got neither"
        )
    if any(name.startswith(line.pretraining_heads) for name in state):
        return line.pretraining
    return line.retrieval


def _reads_two_images(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether layers of text in a row share the keys by which each reads one of two images."""
    prefix = f"text_encoder.{_bert_prefix(state)}encoder.layer."
    keys = [state.get(f"{prefix}{layer}.crossattention.self.key.weight") for layer in range(_layers(state))]
    return any(one is not None and other is not None and torch.equal(one, other) for one, other in pairwise(keys))


def _stack(state: Mapping[str, torch.Tensor], line: OfficialFamily) -> int:
    """Layers of a model of two pictures, 0 for others. Raises `ValueError` for a number that none has."""
    if _model_class(state, line) not in (line.reasoning, line.assignment):
        return 0
    if _layers(state) % 3:
        raise ValueError(
            f"the model of two pictures has {_layers(state)} layers of text; expected a multiple of 3: half an "
            f"encoder, and twice the other half"
        )
    return _layers(state)


def _head_fields(state: Mapping[str, torch.Tensor], words: torch.Tensor) -> dict[str, Any]:
    """What the heads say of a configuration."""
    fields: dict[str, Any] = {}
    for name, size in (("vision_proj.weight", "projection_dim"), ("mim_head.weight", "num_visual_codes")):
        if name in state:
            fields[size] = state[name].shape[0]

    # concepts are read off [CLS] or off its projection; the width tells which
    if "concept_head.weight" in state:
        reads = state["concept_head.weight"].shape[1]
        fields["concept_input"] = "projected" if reads == fields.get("projection_dim") else "cls"
    if "cls_head.2.weight" in state:
        fields["num_labels"] = state["cls_head.2.weight"].shape[0]
    if decoder_layers := _count(state, "text_decoder.bert.encoder.layer."):
        fields["answer_decoder_layers"] = decoder_layers

    # a file holds tied words twice, so that only their values tell
    if (decoder := state.get("text_encoder.cls.predictions.decoder.weight")) is not None:
        fields["tie_word_embeddings"] = torch.equal(decoder, words)
    return fields


def _first_fusion(state: Mapping[str, torch.Tensor], bert: str) -> int:
    """The first layer of text with cross-attention; 0 of a file that has none."""
    pattern = re.compile(rf"text_encoder\.{re.escape(bert)}encoder\.layer\.(\d+)\.crossattention\.")
    return min((int(match[1]) for name in state if (match := pattern.match(name))), default=0)


def infer_config(
    state: Mapping[str, torch.Tensor], family: str, image_size: int | None = None, **given: Any
) -> PreTrainedConfig:
    """
    The configuration that the shapes of an official state dict tell.

    Args:
        state: Names and tensors of the student at least.
        family: Whose configuration, a key of `OFFICIAL`.
        image_size: Picture size to read from now on; the position table's own if None.
        given: Fields that no shape tells, or that are to differ: heads, ids of special tokens, dropout.

    Raises:
        MissingWeightsError: a name is not there whose shape is needed.
        ValueError: fields that do not fit; a number of heads or special ids that must be given.
    """
    line = family_of(family, OFFICIAL, "official checkpoints")

    # a misspelt field must not pass for one that the shapes overrule
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

    # the upper half stands twice in the model of two pictures
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
        # [CLS] included, pretraining reads 25 words and the downstream tasks 30
        "max_text_length": min(24 if bert else 29, positions - 1),
        "image_size": image_size or side * patch.shape[-1],
        "patch_size": patch.shape[-1],
        "num_channels": patch.shape[1],
        **_head_fields(state, words),
    }

    # the configuration's own checks speak last
    try:
        return line.config(**{**fields, **given})
    except (ValueError, TypeError, StrictDataclassError) as error:
        told = str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
        raise ValueError(f"the shapes alone make no configuration: {told}; give what they cannot tell") from error


@dataclass
class Conversion:
    """
    Attributes:
        model_class: The smallest class that has a place for all heads of the file.
        config: Of the model.
        weights: The model's, by name; what `report.missing` names is not among them.
        objective: What only training needs: the teacher ("teacher." before a model's name), the queues.
        absent_heads: Modules of the class of which the file has nothing at all.
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
    An official state dict, of pretraining or of a downstream task, as ours.

    Args:
        state: By official name; `read_weights` gives it.
        family: Whose model it becomes, a key of `OFFICIAL`.
        image_size: Picture size to read from now on, student and teacher; their tables are then resized.
        draw_missing: Accept weights of the towers that the file has not; they begin as the model draws them.
        fold_token_types: Add the first token type to every position, which is what a BERT with token types computes
            for a single text. If False they are left over, as SIMLA's code leaves those of BERT. If None they are
            folded where the authors' code trains with them: SIMLA's for models of two pictures, by ALBEF's BERT.
        fields: What `infer_config` cannot tell.

    Raises:
        MissingWeightsError: names the weights of a tower, or of a part of a head, that are not there.
        ValueError: what `infer_config` raises; tensors of another shape than the configuration has.
    """
    config = infer_config(state, family, image_size, **fields)
    line = OFFICIAL[family]
    done = Conversion(_model_class(state, line), config)
    stack = _stack(state, line)
    names = line.names(_bert_prefix(state), stack)

    # every tensor to its place, or to what is left over
    for name, tensor in state.items():
        _place(done, name, tensor, names)

    # what a renaming alone does not do
    if fold_token_types or (fold_token_types is None and (stack or line.token_types)):
        _fold_token_types(done, state, names)
    if "queue.image" in done.objective:  # pretraining keeps no ids: -100 is an entry without one
        done.objective.setdefault("queue.ids", torch.full((len(done.objective["queue.image"]),), -100))
    _resize(done, image_size)
    _check(done, names, draw_missing)
    if any(".cross_attention." in name for name in done.report.missing):
        done.report.notes.append(
            "ALBEF's text encoder is its lower layers, which read no picture; SIMLA's is all of them, with and "
            "without cross-attention: the weights are a beginning for training, not the same model"
        )
    return done


def _momentum(name: str) -> tuple[bool, str]:
    """Is it the teacher's, and the student's name of the same."""
    first, dot, rest = name.partition(".")
    return first.endswith("_m"), first.removesuffix("_m") + dot + rest


def _place(done: Conversion, name: str, tensor: torch.Tensor, names: Names) -> None:
    report = done.report
    of_teacher, own = _momentum(name)
    target = done.objective if of_teacher else done.weights
    prefix = TEACHER if of_teacher else ""

    # queues and their counters have names of their own; the rest goes by the family's
    if name in QUEUES:
        done.objective[QUEUES[name]] = tensor.T.contiguous()
        report.used[name], report.changed[name] = QUEUES[name], "a row for each entry, (P, Q) to (Q, P)"
    elif name in (POINTER[0], IDS[0]):
        ours = dict([POINTER, IDS])[name]
        done.objective[ours] = tensor.flatten()
        report.used[name] = ours
    # the bias of words has two names in a file
    elif (ours := names(own.replace("predictions.bias", "predictions.decoder.bias"))) is not None:
        if tensor.ndim == 0:
            tensor = tensor.reshape(1)
            report.changed[name] = "a vector of one: engines that spread parameters cannot split a scalar"

        # a tensor that stands twice must be the same twice
        twin = target.get(prefix + ours)
        if twin is not None and not torch.equal(twin, tensor):
            report.left_over[name] = f"differs from the other tensor of the file that is {prefix}{ours} here"
            return
        target[prefix + ours] = tensor
        report.used[name] = prefix + ours
    else:
        report.left_over[name] = _why(name)


def _why(name: str) -> str:
    if name.endswith("position_ids"):
        return "a buffer that counts; nothing here needs it"
    if name.endswith("token_type_embeddings.weight"):
        return "there are no token types here (SIMLA's code drops them; fold_token_types keeps what they did)"
    return "no module of that name here"


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

    # student and teacher alike, where the grid differs
    for official, target, prefix in (
        ("visual_encoder", done.weights, ""),
        ("visual_encoder_m", done.objective, TEACHER),
    ):
        ours = f"{prefix}{done.model_class.base_model_prefix}.vision.embeddings.position_embeddings"
        if ours in target and target[ours].shape[1] != 1 + side**2:
            before = math.isqrt(target[ours].shape[1] - 1)
            target[ours] = resize_position_table(target[ours], side)
            done.report.changed[f"{official}.pos_embed"] = f"{before} x {before} places to {side} x {side}, bicubic"


def _check(done: Conversion, names: Names, draw_missing: bool) -> None:
    """Fills `report.missing`, and raises where the file lacks what it must have."""
    # what the class expects, without its memory
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in done.model_class(done.config).state_dict().items()}

    # what the file has beside the network that it is of
    for target, prefix in ((done.weights, ""), (done.objective, TEACHER)):
        strays = {n for n in target if n.startswith(prefix) and n.removeprefix(prefix) not in shapes}
        for official in [official for official, ours in done.report.used.items() if ours in strays]:
            del done.report.used[official]
            done.report.left_over[official] = f"{done.model_class.__name__} has no such weight"
        for name in strays:
            del target[name]

    # tied weights count as there
    tower = done.model_class.base_model_prefix
    if done.config.tie_word_embeddings:
        _tie(done.weights, "", tower)
        _tie(done.objective, TEACHER, tower)

    # tensors of another shape than the class has
    wrong = {
        name: f"{tuple(value.shape)}, expected {tuple(shapes[name.removeprefix(TEACHER)])}"
        for name, value in (done.weights | done.objective).items()
        if name.removeprefix(TEACHER) in shapes and value.shape != shapes[name.removeprefix(TEACHER)]
    }
    if wrong:
        raise MissingWeightsError(f"wrong shapes {dict(list(wrong.items())[:10])}")
    if damage := damage_of(done.weights | done.objective):
        raise MissingWeightsError(damage)

    # a module absent as a whole is the caller's choice, a part of one is a broken file
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
            f"all of its towers and of the heads it has, or draw_missing, with which they are drawn at random"
        )


def _tie(weights: dict[str, torch.Tensor], prefix: str, tower: str) -> None:
    """Fills what is another weight too. Raises `MissingWeightsError` where the file has two that differ."""
    for name, source in ties((name.removeprefix(prefix) for name in weights), tower).items():
        kept = weights.setdefault(prefix + name, weights[prefix + source])
        if not torch.equal(kept, weights[prefix + source]):
            raise MissingWeightsError(f"{name} and {source} differ in the checkpoint; expected them to be one weight")
        weights[prefix + name] = weights[prefix + source]


def _module(name: str) -> str:
    """The tower, or the head, that a weight belongs to."""
    first, second = [*name.split("."), ""][:2]
    return f"{first}.{second}" if second.endswith("_projection") else first


def to_official(
    weights: Mapping[str, torch.Tensor], family: str, objective: Mapping[str, torch.Tensor] | None = None
) -> tuple[dict[str, torch.Tensor], ConversionReport]:
    """
    The way back: what the official scripts' `load_state_dict` expects, as far as it is there. A model with a head of
    words becomes a checkpoint of pretraining, any other one of its downstream task. Token types, which were folded
    into positions, come back as zeros: the official scripts would keep those of BERT that they began with.

    Args:
        weights: A model's state dict.
        family: Whose, a key of `OFFICIAL`.
        objective: Teacher and queues, named as in `Conversion.objective`. Without a teacher the momentum twins become
            copies of the student, as the official constructor makes them; text assignment has none.

    Raises:
        MissingWeightsError: names the weights, of student or teacher, that the official layout has no place for.
    """
    # which of the official layouts it becomes
    bert = "bert." if any(name.startswith("lm_head.") for name in weights) else ""
    second = {name.split(".")[1] for name in weights if name.startswith("second_layers.")}
    line = family_of(family, OFFICIAL, "official layout")
    names = line.names(bert, 3 * len(second)).reverse
    report = ConversionReport()

    # the teacher, or the student in its place
    objective = dict(objective or {})
    teacher = {name.removeprefix(TEACHER): t for name, t in objective.items() if name.startswith(TEACHER)}
    if not teacher and "assignment_head.weight" not in weights:
        alone = ("temperature", "itm_head.")
        teacher = {name: tensor for name, tensor in weights.items() if not name.startswith(alone)}
        report.notes.append("no teacher was given: the momentum twins are copies of the student")

    # student and teacher by official names, and what those files hold beside them
    state = _by_official_names(weights, "", "", names, line.prefix, report)
    state |= _by_official_names(teacher, TEACHER, "_m", names, line.prefix, report)
    if report.left_over:
        raise MissingWeightsError(
            f"{len(report.left_over)} weights have no place in the official layout: {list(report.left_over)[:10]}; "
            f"expected a model that can be written whole"
        )
    _add_twins(state, bool(second) or line.token_types)

    # queues, as columns
    for official, ours in (*QUEUES.items(), POINTER):
        if ours in objective:
            state[official] = objective[ours].T.contiguous() if official in QUEUES else objective[ours]
            report.used[ours] = official
    if IDS[1] in objective and not bert:  # only the downstream models have such a buffer
        state[IDS[0]] = objective[IDS[1]][None]
        report.used[IDS[1]] = IDS[0]

    # the rest is named rather than dropped in silence
    report.left_over |= {
        name: "the official layout has no such state"
        for name in objective
        if name not in report.used and not name.startswith(TEACHER)
    }
    return state, report


def _by_official_names(
    weights: Mapping[str, torch.Tensor], prefix: str, suffix: str, names: Names, tower: str, report: ConversionReport
) -> dict[str, torch.Tensor]:
    """The student, or with `prefix` and `suffix` the teacher. Fills `report`, with what has no place too."""
    # ties are written out, as those files have them
    weights = dict(weights)
    for name, source in ties(weights, tower).items():
        weights.setdefault(name, weights[source])

    # a name each, of the module's twin for the teacher
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
    """What an official state dict holds beside the weights: the bias of words by its other name, a buffer, and zeros
    for token types where its text encoder has any."""
    for name, tensor in list(state.items()):
        if name.endswith("cls.predictions.decoder.bias"):
            state[name.replace("decoder.bias", "bias")] = tensor
        elif name.endswith("embeddings.position_embeddings.weight"):
            state[name.replace("position_embeddings.weight", "position_ids")] = torch.arange(len(tensor))[None]
            if token_types:
                state[name.replace("position_embeddings", "token_type_embeddings")] = torch.zeros_like(tensor[:2])


__all__ = ["Conversion", "from_official", "infer_config", "resize_position_table", "to_official"]

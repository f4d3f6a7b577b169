"""Initialises a model's towers from published weights.

The image tower takes a ViT, DeiT, MAE or DINOv2, the text tower a BERT or MiniLM. A family's entry in
`families.TOWERS` maps the names of the file to ours. D width, N patches.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from oner.training.publishing.model_loading import damage_of

from .checkpoints import resize_position_table
from .families import TOWERS, TowerNames, family_of
from .layouts import Found, decoder_names, is_decoder, text_names, vision_names, what_was_joined
from .names import LANGUAGE_HEAD, MAE_DECODER, Names
from .reading import read_configuration, read_weights
from .report import ConversionReport, MissingWeightsError
from .shapes import TowerShape, text_shape, vision_shape

DRAWN = "random initialisation"
# fields that no shape determines but that change what the weights compute
UNSHAPED = ("num_attention_heads", "text_attention_heads", "hidden_act")
# fields that may differ from the file's: eps hardly changes the norms, and a longer table is truncated
FREE = ("layer_norm_eps", "text_layer_norm_eps", "max_position_embeddings")

Source = str | os.PathLike | Mapping[str, torch.Tensor]


def initialise(
    model: PreTrainedModel,
    vision: Source | None = None,
    text: Source | None = None,
    fold_token_types: bool = False,
) -> ConversionReport:
    """
    Fills the towers of a model of any family in place, and reports which weights it used.

    The image tower takes a ViT, DeiT, MAE encoder or DINOv2; its position table may be of another image size, and
    DINOv2's LayerScale is folded into the linear layers. The text tower takes a BERT with the same vocabulary; a
    single-tower family takes only its word embeddings. Cross-attention keeps its random initialisation, and so do the
    heads, except a language-model head if the file has one.

    Args:
        model: On the CPU.
        vision, text: A path or a name on the Hub for `read_weights`, or a state dict.
        fold_token_types: Add BERT's first token type to every position, so that texts are encoded as by BERT;
            SIMLA's code drops it.

    Raises:
        ValueError: the model's family has no entry in `TOWERS`.
        MissingWeightsError: tower weights are missing, of another shape, or of a part that a plain ViT or BERT does
            not have, such as register tokens; the number of heads or the activation differs from the file's
            configuration.
        CheckpointFileError: a file cannot be read.
    """
    towers = family_of(model.config.model_type, TOWERS, "towers to be filled")
    of_text = of_vision = ConversionReport()
    # the text first, because an image's [CLS] may be one of its words
    if text is not None:
        found = text_names(_weights(text))
        told = towers.text_fields(text_shape(found, _configuration(text)), {})
        note = _check_told(model.config, told, text)
        of_text = _fill_text(model, towers, found, fold_token_types)
        of_text.notes += note
    if vision is not None:
        found = vision_names(_weights(vision))
        told = towers.vision_fields(vision_shape(found, _configuration(vision)))
        note = _check_told(model.config, told, vision)
        of_vision = _fill_vision(model, towers, found)
        of_vision.notes += note
    return ConversionReport().merge(of_vision).merge(of_text)


def tower_fields(
    config_class: type[PreTrainedConfig],
    size: str,
    given: Mapping[str, Any],
    vision: Source | None = None,
    text: Source | None = None,
) -> dict[str, Any]:
    """
    The configuration fields of a new model that published towers determine and `given` leaves open.

    Args:
        config_class: The family's configuration class.
        size: The named size, for fields that no file determines.
        given: Fields that are already set.
        vision, text: As in `initialise`.

    Raises:
        ValueError: two towers, or a tower and `given`, contradict each other; the width is not that of `size`, and no
            configuration gives the number of heads; the family has no entry in `TOWERS`.
        MissingWeightsError, CheckpointFileError: a source is not a tower, or cannot be read.
    """
    towers = family_of(config_class.model_type, TOWERS, "towers to be filled")
    told = []
    if vision is not None:
        told.append(("initial_vision", towers.vision_fields(_shape(vision, vision_names, vision_shape))))
    if text is not None:
        told.append(("initial_text", towers.text_fields(_shape(text, text_names, text_shape), given)))

    # fields that both towers determine must agree
    fields, by = {}, {}
    for source, values in told:
        for name, value in values.items():
            if value is None or (name == "patch_size" and given.get("stem", config_class.stem) != "linear"):
                continue
            if name in fields and fields[name] != value:
                raise ValueError(
                    f"{name} is {fields[name]} in {by[name]} and {value} in {source}; expected towers with the same "
                    f"{name}"
                )
            fields[name] = value
            by[name] = source

    # given fields may differ only where the weights allow it
    wrong = {
        name: f"{value} in {by[name]}, {given[name]} given"
        for name, value in fields.items()
        if name in given and given[name] != value and name not in FREE
    }
    if wrong:
        raise ValueError(
            f"{wrong}: expected the files' own values, or none, in model_config; vocab_size comes from the tokenizer, "
            "which must have the file's vocabulary"
        )
    _check_heads(config_class, size, {**fields, **given}, vision is not None)
    return {name: value for name, value in fields.items() if name not in given}


def _check_heads(config_class: type[PreTrainedConfig], size: str, fields: Mapping[str, Any], vision: bool) -> None:
    own = config_class.from_size(size).hidden_size
    if vision and "num_attention_heads" not in fields and fields["hidden_size"] != own:
        raise ValueError(
            f"initial_vision has width {fields['hidden_size']}, size {size!r} has {own}, and no shape tells the "
            f"number of attention heads; expected a config.json beside the weights, a size of that width, or "
            f"num_attention_heads in model_config"
        )


def _shape(source: Source, names: Callable, shape: Callable) -> TowerShape:
    return shape(names(_weights(source)), _configuration(source))


def _weights(source: Source) -> dict[str, torch.Tensor]:
    return dict(source) if isinstance(source, Mapping) else read_weights(source)


def _configuration(source: Source) -> dict[str, Any]:
    return {} if isinstance(source, Mapping) else read_configuration(source)


def _check_told(config: PreTrainedConfig, told: Mapping[str, Any], source: Source) -> list[str]:
    """Compares heads and activation, which no shape determines, with the file's configuration. Returns a note if the
    file has none."""
    names = [name for name in UNSHAPED if name in told]
    for name in names:
        if told[name] not in (None, getattr(config, name)):
            raise MissingWeightsError(
                f"{name} is {told[name]!r} in the configuration beside {source} and {getattr(config, name)!r} in the "
                "model, so the same weights would compute something else"
            )
    if isinstance(source, Mapping) or not names or any(told[name] is not None for name in names):
        return []
    taken = ", ".join(f"{name} {getattr(config, name)}" for name in names)
    return [f"there is no configuration beside {source}; assumed the model's values: {taken}"]


@dataclass
class Filling:
    """
    Collects which tensor goes where, before anything is copied.

    Attributes:
        model, towers: The model, and its family's names.
        found: Name in the model -> tensor.
        strays: Names in the file that are unused for no known reason.
    """

    model: PreTrainedModel
    towers: TowerNames
    found: dict[str, torch.Tensor] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)
    report: ConversionReport = field(default_factory=ConversionReport)

    @property
    def tower(self) -> str:
        """Prefix of the tower's weights."""
        prefix = self.model.base_model_prefix
        return f"{prefix}." if hasattr(self.model, prefix) else ""

    def take(self, official: str, ours: str, tensor: torch.Tensor, change: str | None = None) -> None:
        """Assigns a tensor to our name; `official` may join several names with " + "."""
        parts = official.split(" + ")
        self.found[ours] = tensor
        self.report.used |= dict.fromkeys(parts, ours)
        change = change or what_was_joined(official)
        if change:
            self.report.changed |= dict.fromkeys(parts, change)

    def leave(self, official: str, name: str, why: str) -> None:
        """Lists a tensor as unused, for the family's reason or else for `why`."""
        said = next((reason for left, reason in self.towers.left.items() if name.startswith(left)), None)
        for part in official.split(" + "):
            self.report.left_over[part] = said or why
        if said is None:
            self.strays.append(name)

    @torch.no_grad()
    def copy(self, names: Names, begins: str) -> ConversionReport:
        """Copies into the model after all checks, so that an error leaves the model unchanged."""
        # layers that the model does not have: it is shallower, or of another architecture
        mine, back = self.model.state_dict(), names.reverse
        layers = [name for name in self.strays if name.startswith(("blocks.", "encoder.layer.", "layers."))]
        layers += [name for name in self.found if name not in mine]
        if layers:
            raise MissingWeightsError(
                f"the model lacks {len(layers)} of the file's layer weights: {layers[:10]}; expected a plain ViT or "
                f"BERT of {_depths(self.model.config)} layers"
            )

        # tower weights that the file does not have
        inside = [name for name in mine if name.startswith(self.tower + begins)]
        missing = [name for name in inside if name not in self.found]
        lacking = [
            name
            for name in missing
            if back(name.removeprefix(self.tower)) and not any(part in name for part in self.towers.begins_anew)
        ]
        if lacking:
            raise MissingWeightsError(
                f"{len(lacking)} weights are not in the checkpoint: {lacking[:10]}; expected all"
            )

        # shapes must match
        wrong = {
            name: f"{tuple(tensor.shape)}, expected {tuple(mine[name].shape)}"
            for name, tensor in self.found.items()
            if tensor.shape != mine[name].shape
        }
        if wrong:
            shapes = dict(list(wrong.items())[:10])
            raise MissingWeightsError(f"wrong shapes {shapes}: the checkpoint belongs to another model")
        if damage := damage_of(self.found):
            raise MissingWeightsError(damage)

        # everything fits: now change the model
        for name, tensor in self.found.items():
            mine[name].copy_(tensor)
        self.report.missing |= dict.fromkeys(missing, DRAWN)
        return self.report


def _depths(config: PreTrainedConfig) -> str:
    depths = [config.num_hidden_layers, *([config.num_text_layers] if hasattr(config, "num_text_layers") else [])]
    return " and ".join(map(str, depths))


def _fill_vision(model: PreTrainedModel, towers: TowerNames, state: Found) -> ConversionReport:
    filling, names = Filling(model, towers), Names(towers.vision)
    decoder = getattr(model, towers.mae_decoder or "", None)
    if decoder is not None:
        _take_decoder(filling, decoder_names(state))
    for name, (official, tensor) in state.items():
        ours = names(name)

        # first the tensors that need a change or are left out for a known reason
        if is_decoder(name, state):
            if decoder is None:
                filling.leave(official, name, "part of MAE's decoder, which is not used")
        elif name == "cls_token" and towers.cls_word is not None:
            _take_cls_word(filling, official, tensor)
        elif name == "pos_embed" and towers.fixed_positions is not None:
            filling.report.left_over[official] = _beside_sines(towers, model.config, tensor)
        elif name == "pos_embed":
            table, change = _position_table(tensor, model.config.position_image_size // model.config.patch_size)
            filling.take(official, filling.tower + ours, table, change)
        elif name == "mask_token" and ours is not None:
            _take_mask_token(filling, official, filling.tower + ours, tensor)
        elif name.startswith("patch_embed.") and model.config.stem == "conv":
            filling.report.left_over[official] = "our model has a convolutional stem"
        elif ours is None:
            filling.leave(official, name, "not part of a visual encoder's tokens and layers")
        else:
            filling.take(official, filling.tower + ours, tensor)
    return filling.copy(names, towers.vision_in)


def _take_decoder(filling: Filling, state: Found) -> None:
    """Takes all of MAE's decoder, or reports that the file has none."""
    names = Names(MAE_DECODER)
    prefix = f"{filling.towers.mae_decoder}."
    for name, (official, tensor) in state.items():
        if name == "pos_embed":
            filling.report.left_over[official] = "our positions are fixed sines"
        elif (ours := names(name)) is None:
            filling.leave(official, name, "not part of MAE's decoder")
        else:
            filling.take(official, prefix + ours, tensor)

    # an incomplete decoder would be worse than none
    mine = [name for name in filling.model.state_dict() if name.startswith(prefix)]
    lacking = [name for name in mine if name not in filling.found]
    if state and lacking:
        raise MissingWeightsError(f"{len(lacking)} weights are not in the checkpoint: {lacking[:10]}; expected all")
    filling.report.missing |= dict.fromkeys(lacking, DRAWN)


def _take_cls_word(filling: Filling, official: str, cls_token: torch.Tensor) -> None:
    config = filling.model.config
    ours = f"{filling.tower}embeddings.word_embeddings.weight"
    words = filling.model.state_dict()[ours].clone()  # (V, D)
    row = filling.towers.cls_word(config, cls_token)  # (D,)
    if row.shape == words[0].shape:
        words[config.cls_token_id] = row
        filling.take(
            official, ours, words, f"row {config.cls_token_id} of the word embeddings, [CLS]; the others stay"
        )
    else:
        filling.take(official, ours, cls_token)  # another width: `copy` raises


def _take_mask_token(filling: Filling, official: str, ours: str, token: torch.Tensor) -> None:
    # DINOv2 stores it as (1, D), others as (1, 1, D)
    if ours in filling.model.state_dict():
        filling.take(official, ours, token.reshape(1, 1, -1))
    else:
        filling.report.left_over[official] = "our model masks no patches"


def _beside_sines(towers: TowerNames, config: PreTrainedConfig, table: torch.Tensor) -> str:
    """Why a learned table (1, k + n*n, D) is unused where positions are fixed, and how far the two differ."""
    extra, own = _split_table(table)
    sines = towers.fixed_positions(config, own)  # (n*n, D)

    # only a table of the same size can be compared
    patches = table[0, extra:].to(sines.dtype)  # (n*n, D)
    if patches.shape != sines.shape:
        return "our positions are fixed sines"

    # MAE's rows for [CLS] are zeros: any other value is a difference too
    rest = 0.0 if extra == 0 else table[0, :extra].abs().max().item()
    apart = max((patches - sines).abs().max().item(), rest)
    if apart < 1e-5:
        return f"our positions are fixed sines, and so are the file's, of {own} x {own} patches"
    return f"our positions are fixed sines; the file's were learned, and differ from sines by up to {apart:.2g}"


def _split_table(table: torch.Tensor) -> tuple[int, int]:
    """
    (1, k + n*n, D) -> k and n. k is 1 for [CLS], 2 with a distillation token after it, 0 if all rows are patches.
    """
    # rows beyond the largest square belong to extra tokens
    own = math.isqrt(table.shape[1])
    extra = table.shape[1] - own**2
    if extra > 2:
        raise MissingWeightsError(f"a table of {table.shape[1]} positions is not [CLS] and a square of patches")
    return extra, own


def _position_table(table: torch.Tensor, side: int) -> tuple[torch.Tensor, str | None]:
    """(1, k + n*n, D) -> (1, 1 + side², D), and a description of the change; a distillation token is dropped."""
    extra, own = _split_table(table)
    done = []
    if extra == 0:
        table = torch.cat([table.new_zeros(1, 1, table.shape[2]), table], dim=1)  # (1, 1 + n*n, D)
        done.append("zeros were added for [CLS], which the table lacks")
    elif extra == 2:
        table = torch.cat([table[:, :1], table[:, 2:]], dim=1)  # (1, 1 + n*n, D)
        done.append("the distillation token's row was dropped")
    if own != side:
        table = resize_position_table(table, side)
        done.append(f"{own} x {own} patches to {side} x {side}, bicubic")
    return table, "; ".join(done) or None


def _fill_text(model: PreTrainedModel, towers: TowerNames, state: Found, fold_token_types: bool) -> ConversionReport:
    filling, names = Filling(model, towers), Names(towers.text)
    head = Names((f"cls.{left}", right) for left, right in LANGUAGE_HEAD)
    mine = model.state_dict()
    for name, (official, tensor) in state.items():
        if name == "cls.predictions.bias":
            ours = "lm_head.decoder.bias"
        elif (tower := names(name)) is not None:
            ours = filling.tower + tower
        else:
            ours = None if (part := head(name)) is None else f"lm_head.{part}"
        if ours is None or (ours.startswith("lm_head.") and ours not in mine):
            filling.leave(official, name, _why_not_text(name))
        else:
            filling.take(official, ours, tensor)

    # the position table last, because token types may be added to it
    _fit_positions(filling, state, fold_token_types)
    report = filling.copy(names, towers.text_in)

    # a head is not part of the tower and may be missing
    heads = (name for name in mine if name.startswith("lm_head.") and name != "lm_head.decoder.weight")
    report.missing |= {name: DRAWN for name in heads if name not in filling.found}
    return report


def _why_not_text(name: str) -> str:
    if name.endswith("token_type_embeddings.weight"):
        return "our models have no token types (SIMLA's code drops them; fold_token_types keeps their effect)"
    if name.endswith("position_ids"):
        return "a buffer of position numbers, not needed here"
    return "our model has no such part"


def _fit_positions(filling: Filling, state: Found, fold_token_types: bool) -> None:
    """Adds token types to the position table if asked for, and truncates it if the model has fewer positions."""
    found, report = filling.found, filling.report
    ours = f"{filling.tower}{Names(filling.towers.text)('embeddings.position_embeddings.weight')}"
    if ours not in found:
        return

    # a single text has type 0 everywhere, so its row can be added to every position
    types = state.get("embeddings.token_type_embeddings.weight")
    if fold_token_types and types is not None:
        found[ours] = found[ours] + types[1][0]
        report.left_over.pop(types[0])
        report.used[types[0]] = ours
        report.changed[types[0]] = "its first row was added to every position"

    # the first positions mean the same in either table
    rows = filling.model.config.max_position_embeddings
    if len(found[ours]) > rows:
        official = state["embeddings.position_embeddings.weight"][0]
        report.changed[official] = f"truncated to the first {rows} of {len(found[ours])} rows"
        found[ours] = found[ours][:rows]


__all__ = ["initialise", "tower_fields"]

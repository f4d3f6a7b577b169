"""Wrong input is refused in words by every family: what was got and what was expected."""

import inspect
import re

import pytest
import torch
from families import CLASSIFICATION, MASKED_LM, MODELS, PRETRAINING, RETRIEVAL, inputs_of
from tiny_oner import CLS, IMAGE, VOCAB, joint_batch, text_of
from torch import nn

from oner.modeling import vl_inputs

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def models(family) -> dict:
    """Auto class -> a tiny model."""
    return {auto: cls(family.tiny.tiny_config()).eval() for auto, cls in family.classes.items()}


def pixels(rows: int = 2, *, channels: int = 3, height: int = 16, width: int = 16, at: dict | None = None):
    values = torch.zeros(rows, channels, height, width)
    for place, value in (at or {}).items():
        values[place] = value
    return values


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


PLACEHOLDERS = [IMAGE] * 16
CASES = {
    "neither": ({}, "got neither input_ids nor pixel_values; expected text, pictures, or both"),
    "picture of a wrong size": (
        {"pixel_values": pixels(height=24, width=24)},
        "pictures are 24x24; expected 16x16 (or pass interpolate_pos_encoding=True to interpolate the positions)",
    ),
    "picture that is not square": ({"pixel_values": pixels(width=20)}, "pictures are 16x20; expected 16x16"),
    "picture between patches": (
        {"pixel_values": pixels(height=18), "interpolate_pos_encoding": True},
        "pictures are 18x16; expected multiples of the patch size 4",
    ),
    "grey picture": (
        {"pixel_values": pixels(channels=1)},
        "pixel_values have shape (2, 1, 16, 16); expected (pictures, 3, 16, 16)",
    ),
    "one picture without a batch": (
        {"pixel_values": torch.zeros(3, 16, 16)},
        "pixel_values have shape (3, 16, 16); expected (pictures, 3, 16, 16)",
    ),
    "too long a text": (
        {"input_ids": ids([CLS] + [9] * 13)},
        "a text has 13 tokens; expected at most 12 (config.max_text_length)",
    ),
    "too long a text beside a picture": (
        {"input_ids": ids([CLS] + PLACEHOLDERS + [9] * 14), "pixel_values": pixels(1)},
        "a text has 14 tokens; expected at most 12 (config.max_text_length)",
    ),
    "id beyond the vocabulary": (
        {"input_ids": ids([CLS, 9, VOCAB])},
        f"input_ids lie in [3, {VOCAB}]; expected ids in [0, {VOCAB - 1}]",
    ),
    "negative id": ({"input_ids": ids([CLS, -100])}, f"input_ids lie in [-100, 3]; expected ids in [0, {VOCAB - 1}]"),
    "NaN pixels": (
        {"pixel_values": pixels(4, at={(1, 0, 3, 3): NAN, (3, 2, 0, 0): INF})},
        "pixel_values hold NaN or infinity in rows [1, 3]; expected finite numbers",
    ),
    "placeholders without pictures": (
        {"input_ids": ids([CLS] + PLACEHOLDERS + [9])},
        "input_ids hold 16 image placeholders in a row but pixel_values is None",
    ),
    "too few placeholders": (
        {"input_ids": ids([CLS] + [IMAGE] * 15 + [9]), "pixel_values": pixels(1)},
        "input_ids hold 15 image placeholders (id 1) in a row; the pictures have 16 patches each",
    ),
    "too many placeholders": (
        {"input_ids": ids([CLS] + [IMAGE] * 17), "pixel_values": pixels(1)},
        "input_ids hold 17 image placeholders (id 1) in a row; the pictures have 16 patches each",
    ),
    "text without placeholders beside a picture": (
        {"input_ids": ids([CLS, 9]), "pixel_values": pixels(1)},
        "input_ids hold 0 image placeholders (id 1) in a row; the pictures have 16 patches each: "
        "lay both out together with VisionLanguageProcessor(images=..., text=...)",
    ),
    "placeholders that are masked out": (
        {
            "input_ids": ids([CLS] + PLACEHOLDERS),
            "attention_mask": ids([1] * 16 + [0]),
            "pixel_values": pixels(1),
        },
        "input_ids hold 15 image placeholders",
    ),
    "more texts than pictures": (
        {"input_ids": ids([CLS] + PLACEHOLDERS, [CLS] + PLACEHOLDERS), "pixel_values": pixels(1)},
        "got 2 texts and 1 pictures; expected as many of each",
    ),
    "a mask of another shape": (
        {"input_ids": ids([CLS, 9]), "attention_mask": ids([1, 1, 1])},
        "attention_mask has shape (1, 3); expected (1, 2), the shape of input_ids",
    ),
    "no [CLS]": ({"input_ids": ids([CLS, 9], [8, 9])}, "a row starts with id 8; expected [CLS] (3) first"),
    "padding on the left": (
        {"input_ids": ids([0, CLS, 9]), "attention_mask": ids([0, 1, 1])},
        "as VisionLanguageProcessor lays rows out (padding on the right)",
    ),
    "no rows": ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, "input_ids have shape (0, 4); expected (rows,"),
    "ids without a batch": (
        {"input_ids": torch.tensor([CLS, 9])},
        "input_ids have shape (2,); expected (rows, positions)",
    ),
    "ids that are not whole": (
        {"input_ids": torch.tensor([[3.0, 9.0]])},
        "input_ids are torch.float32; expected whole numbers",
    ),
    "patch mask of another shape": (
        {"pixel_values": pixels(2), "bool_masked_pos": torch.zeros(2, 9, dtype=torch.bool)},
        "bool_masked_pos has shape (2, 9); expected (2, 16)",
    ),
    "patch mask of numbers": (
        {"pixel_values": pixels(2), "bool_masked_pos": torch.zeros(2, 16, dtype=torch.long)},
        "bool_masked_pos is torch.int64; expected torch.bool",
    ),
    "patch mask without pictures": (
        {"input_ids": ids([CLS, 9]), "bool_masked_pos": torch.zeros(1, 16, dtype=torch.bool)},
        "got bool_masked_pos, which masks patches, but pixel_values is None",
    ),
}


APART = "and this family reads text and image apart; expected the text alone, as a processor with joint_layout=False"
# what a family that reads text and image apart says of these
OF_ANOTHER_LAYOUT = {
    "too long a text beside a picture": (
        {"input_ids": ids([CLS] + [9] * 14), "pixel_values": pixels(1)},
        "a text has 14 tokens; expected at most 12 (config.max_text_length)",
    ),
    "placeholders without pictures": (
        CASES["placeholders without pictures"][0],
        f"input_ids hold 16 image placeholders (id 1) in a row, {APART}",
    ),
    "too few placeholders": (
        CASES["too few placeholders"][0],
        f"input_ids hold 15 image placeholders (id 1) in a row, {APART}",
    ),
    "too many placeholders": (
        CASES["too many placeholders"][0],
        f"input_ids hold 17 image placeholders (id 1) in a row, {APART}",
    ),
    "text without placeholders beside a picture": (
        {"input_ids": ids([CLS, 9, 0, 9]), "attention_mask": ids([1, 1, 0, 1]), "pixel_values": pixels(1)},
        "in rows [0] attention_mask has a 0 before a 1; expected padding on the right only",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tower_refuses(case, models):
    inputs, message = CASES[case]
    if models[MODELS].config.pair_layout == "separate":
        inputs, message = OF_ANOTHER_LAYOUT.get(case, (inputs, message))
    if "bool_masked_pos" in inputs:
        skip_without_masks(models[MODELS])
    with pytest.raises(ValueError, match=re.escape(message)):
        models[MODELS](**inputs)


def skip_without_masks(tower: nn.Module) -> None:
    if "bool_masked_pos" not in inspect.signature(tower.forward).parameters:
        pytest.skip("this family masks no patches")


SERVED_BY_ALL = ["picture of a wrong size", "NaN pixels", "grey picture"]


@pytest.mark.parametrize("case", SERVED_BY_ALL)
def test_the_task_classes_refuse_pictures(case, models):
    inputs, message = CASES[case]
    for auto in {RETRIEVAL, CLASSIFICATION} & models.keys():
        with pytest.raises(ValueError, match=re.escape(message)):
            models[auto](**inputs)


@pytest.mark.parametrize("case", ["too long a text", "id beyond the vocabulary", "negative id", "no [CLS]"])
def test_the_task_classes_refuse_texts(case, models):
    inputs, message = CASES[case]
    for auto in {RETRIEVAL, MASKED_LM} & models.keys():
        with pytest.raises(ValueError, match=re.escape(message)):
            models[auto](**inputs)


def test_a_task_says_what_it_needs(models):
    pair = {"input_ids": ids([CLS, 9]), "pixel_values": pixels(2), "return_loss": True}
    for auto, call, message in (
        (MASKED_LM, {"pixel_values": pixels(1)}, "ForMaskedLM expects input_ids, got None"),
        (CLASSIFICATION, {"input_ids": ids([CLS, 9])}, "ForImageClassification expects pixel_values"),
        (RETRIEVAL, {}, "got neither input_ids nor pixel_values"),
        (RETRIEVAL, pair, "return_loss expects pairs, got 2 pictures and 1 texts"),
        (RETRIEVAL, {**pair, "input_ids": None}, "return_loss expects pairs, got one modality"),
    ):
        if auto in models:
            with pytest.raises(ValueError, match=re.escape(message)):
                models[auto](**call)


def test_features_of_one_kind_refuse_the_other(models):
    batch = joint_batch([2])
    both = inputs_of(models[MODELS], "pair", batch)
    for auto in (MODELS, RETRIEVAL, PRETRAINING):
        with pytest.raises(ValueError, match="get_text_features reads text alone; drop pixel_values or use get_multi"):
            models[auto].get_text_features(**both)
        with pytest.raises(ValueError, match="get_image_features reads pictures alone; drop input_ids or use get_mul"):
            models[auto].get_image_features(**both)
        with pytest.raises(ValueError, match="get_multimodal_features expects both input_ids and pixel_values"):
            models[auto].get_multimodal_features(**text_of(batch))


def mask_of(hidden: list[int]) -> torch.Tensor:
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, hidden] = 0
    return mask


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": pixels(2, height=24, width=24)}, "pictures are 24x24; expected 16x16"),
        ({"pixel_values": pixels(2, at={(0, 0, 0, 0): NAN})}, "pixel_values hold NaN or infinity in rows [0]"),
        ({"pixel_values": pixels(3)}, "got 2 texts and 3 pictures; expected as many of each"),
        ({"input_ids": torch.full((2, 20), 9)}, "a row starts with id 9; expected [CLS] (3) first"),
        (
            {"input_ids": ids([CLS, 9, 8, 7] + PLACEHOLDERS, [CLS] + PLACEHOLDERS + [9, 8, 7])},
            "image placeholders",
        ),
        (
            {"attention_mask": mask_of([18])},
            "in rows [1] attention_mask has a 0 before a 1; expected padding on the right",
        ),
        ({"attention_mask": mask_of([17, 18])}, "in rows [1] attention_mask has a 0 before a 1"),
        ({"attention_mask": mask_of([0])}, "in rows [1] attention_mask has a 0 before a 1"),
        (
            {"masked_input_ids": torch.zeros(2, 19, dtype=torch.long)},
            "the shape of input_ids",
        ),
        (
            {"bool_masked_pos": torch.zeros(2, 4, dtype=torch.bool)},
            "bool_masked_pos has shape (2, 4); expected (2, 16)",
        ),
    ],
)
def test_the_training_step_refuses(changes, message, family):
    student = family.build(PRETRAINING).train()
    objective, batch = family.objective(student), family.tiny.make_batch([3, 1])
    if student.config.pair_layout == "separate":
        changes = _apart(changes)
    if "bool_masked_pos" in changes:
        skip_without_masks(family.tower(student))
    if "masked_input_ids" in changes and "masked_input_ids" not in batch:
        pytest.skip("this family replaces no words")
    with pytest.raises(ValueError, match=re.escape(message)):
        objective(student, {**batch, **changes}, 0.0)


def _apart(changes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same of a text alone: without the sixteen places of its picture."""
    lengths = {"input_ids": 20, "attention_mask": 20}
    return {
        name: torch.cat([value[:, :1], value[:, 17:]], 1) if value.shape[1] == lengths.get(name) else value
        for name, value in changes.items()
    }


@pytest.fixture
def looks(monkeypatch) -> list[tuple[int, ...]]:
    """The shape of pixels each time that they are looked through."""
    seen, look = [], vl_inputs.check_finite
    monkeypatch.setattr(vl_inputs, "check_finite", lambda pixels: seen.append(tuple(pixels.shape)) or look(pixels))
    return seen


def test_a_batch_is_looked_through_once(family, models, looks):
    """By a step, teacher and all; and by whatever else is asked of a model."""
    student = family.build(PRETRAINING).train()
    objective, batch = family.objective(student), family.tiny.make_batch([3, 1])
    looks.clear()
    objective(student, batch, 0.5)
    assert looks == [(2, 3, 16, 16)]
    for auto, model in models.items():
        pair = inputs_of(model, "pair", batch)
        asked = [model.get_multimodal_features] if hasattr(model, "get_multimodal_features") else []
        asked += [getattr(model, name) for name in ("match", "ground") if hasattr(model, name)]
        asked += [model] if auto != PRETRAINING else []
        for one in asked:
            looks.clear()
            one(**pair)
            assert looks == [(2, 3, 16, 16)], (auto, one)


def test_ids_added_to_the_vocabulary_are_accepted(family):
    model = family.classes[MASKED_LM](family.tiny.tiny_config()).eval()
    model.resize_token_embeddings(VOCAB + 1)
    model(input_ids=ids([CLS, VOCAB]))
    with pytest.raises(ValueError, match=re.escape(f"expected ids in [0, {VOCAB}]")):
        model(input_ids=ids([CLS, VOCAB + 1]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_size": 36, "num_attention_heads": 5},
            "hidden_size (36) must be a multiple of num_att",
        ),
        ({"image_size": 18}, "image_size (18) must be a multiple of patch_size (4)"),
        ({"position_image_size": 18}, "position_image_size (18) must be a multiple of patch_size (4)"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"max_text_length": 0}, "max_text_length must be at least 1, got 0"),
        ({"temperature": 0}, "temperature"),
        ({"mask_token_id": VOCAB}, "{'mask_token_id': 50} are not ids in [0, 49] (vocab_size 50)"),
        ({"cls_token_id": -1}, "{'cls_token_id': -1} are not ids in [0, 49]"),
        ({"mask_token_id": CLS}, "the special ids must differ from each other, got {'pad_token_id': 0,"),
    ],
)
def test_configurations_that_do_not_fit_together(family, fields, message):
    # strict configurations wrap a validator's error in one of their own
    with pytest.raises(Exception, match=re.escape(message)):
        family.tiny.tiny_config(**fields)


def test_an_unknown_size(family):
    with pytest.raises(ValueError, match="unknown size 'gigantic'; expected one of nano, tiny, small, base"):
        type(family.tiny.tiny_config()).from_size("gigantic")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"losses": []}, "losses are []; expected a non-empty subset of"),
        ({"losses": ["itc", "itm", "nonsense"]}, "expected a non-empty subset of"),
        ({"losses": ["itc", "itc"]}, "losses are ['itc', 'itc']; expected each once"),
        (
            {"losses": ["itc"], "loss_weights": {"mlm": 2.0}},
            "loss_weights name ['mlm'], which are not among",
        ),
    ],
)
def test_an_objective_refuses_losses_that_it_does_not_know(family, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        family.objective(family.build(PRETRAINING), **arguments)

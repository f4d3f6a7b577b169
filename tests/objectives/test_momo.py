"""MoMo's step against an oracle in fp64 that reads one row after another and knows no packing, and what CMGA adds up.

T tokens of a row that a pass sees, D = 32 of the encoder, E = 16 of a decoder.
"""

import copy
import math

import pytest
import tiny_momo
import torch
from accelerate import Accelerator
from families import FAMILIES, PRETRAINING
from tiny_oner import CLS, joint_batch, naive_layer
from tiny_pretraining import forget_accelerator

from oner import MomoForPreTraining
from oner.modeling.vl_embeddings import patchify
from oner.training.objectives.momo import MomoObjective, MomoObjectiveArguments
from oner.training.run.gradient_cache import loss_and_gradients

FAMILY = FAMILIES["momo"]
N = 16
LENGTHS = [5, 1, 3, 4]
ALL = ["mlm", "mim", "itc", "cmm", "itm"]
FORMS = {"joint": {}, "separate": {"pair_decoder": "separate"}, "shared": {"shared_decoder": True}}


def build(losses: list[str], arguments: dict | None = None, **fields) -> tuple[MomoForPreTraining, MomoObjective]:
    torch.manual_seed(0)
    student = FAMILY.build(PRETRAINING, **fields).double().train()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student, FAMILY.objective(student, losses=losses, **(arguments or {}))


def batches() -> dict[str, dict[str, torch.Tensor]]:
    """Of texts, images and pairs, each with rows of its own; rows of images hide unequal numbers of patches."""
    texts = joint_batch([4, 2, 7], seed=3)
    keep = torch.tensor([0, *range(17, texts["input_ids"].shape[1])])
    texts["input_ids"], texts["attention_mask"] = texts["input_ids"][:, keep], texts["attention_mask"][:, keep]
    images = joint_batch([1, 1, 1], seed=4, dtype=torch.float64)
    images["bool_masked_pos"][1] = torch.arange(16) != 3
    pairs = tiny_momo.make_batch(LENGTHS, dtype=torch.float64)
    pairs["bool_masked_pos"][2] = torch.arange(16) > 5
    read = {
        "texts": ("input_ids", "attention_mask", "text_index", "mlm_index", "mlm_labels", "ids"),
        "images": ("pixel_values", "bool_masked_pos", "ids"),
        "pairs": tuple(pairs),
    }
    given = {"texts": texts, "images": images, "pairs": pairs}
    return {name: {part: given[name][part] for part in parts} for name, parts in read.items()}


class Row:
    """A row of a batch, every token by itself: vectors (D,), and which are hidden."""

    def __init__(self, model, batch: dict, number: int):
        embeddings, config = model.momo.embeddings, model.config
        words = embeddings.word_embeddings.weight
        self.cls = words[config.cls_token_id]
        self.patches, self.hidden_patches, self.pixels = [], [], None
        if "pixel_values" in batch:
            pixels = patchify(batch["pixel_values"][number : number + 1], 4)[0]  # (N, 48)
            weight = embeddings.stem.projection.weight.permute(0, 2, 3, 1).flatten(1)  # (D, 48)
            self.patches = list(pixels @ weight.T + embeddings.stem.projection.bias + embeddings.image_positions)
            self.hidden_patches = batch["bool_masked_pos"][number].nonzero().flatten().tolist()
            self.pixels = pixels
        self.words, self.hidden_words, self.ids = [], [], []
        if "input_ids" in batch:
            slots = batch["input_ids"].shape[1] - 1 - N * ("pixel_values" in batch)
            ids = batch["input_ids"][number, -slots:]
            real = [i for i, at in enumerate(batch["text_index"].tolist()) if at // slots == number]
            self.ids = ids[: len(real)].tolist()
            self.words = [words[one] + embeddings.text_positions[place] for place, one in enumerate(self.ids)]
            masked = batch["mlm_index"].tolist()
            self.hidden_words = [place for place, at in enumerate(real) if at in masked]

    def seen(self, what: str, whole: bool = False) -> list[torch.Tensor]:
        tokens, hidden = getattr(self, what), getattr(self, f"hidden_{what}")
        return [one for place, one in enumerate(tokens) if whole or place not in hidden]


def run(layers, norm, tokens: list[torch.Tensor]) -> torch.Tensor:
    states = torch.stack(tokens)[None]  # (1, T, D)
    for layer in layers:
        states = naive_layer(layer, states, states, torch.ones(1, states.shape[1], dtype=torch.bool))
    return norm(states)[0]


def encoded(model, row: Row, kinds: tuple[str, ...], whole: bool) -> list[torch.Tensor]:
    """[CLS], then what is seen of each kind."""
    parts = [row.seen(kind, whole) for kind in kinds]
    states = run(model.momo.layers, model.momo.norm, [row.cls, *(one for part in parts for one in part)])
    return list(states.split([1, *map(len, parts)]))


def decoded(model, decoder, row: Row, cls: torch.Tensor, seen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """States (E,) of every token of each kind."""
    tokens, sizes = [decoder.embed(cls)[0]], []
    for kind, states in seen.items():
        table = decoder.image_positions if kind == "patches" else decoder.text_positions
        states, hidden = list(decoder.embed(states)), getattr(row, f"hidden_{kind}")
        count = len(getattr(row, kind))
        sizes.append(count)
        tokens += [(decoder.mask_token[0, 0] if i in hidden else states.pop(0)) + table[i] for i in range(count)]
        assert not states
    made = run(decoder.layers, decoder.norm, tokens)[1:]
    return dict(zip(seen, made.split(sizes), strict=True))


def completed(model, batch: dict, kind: str, kinds: tuple[str, ...], norm_pixels: bool) -> dict[str, torch.Tensor]:
    """What is lost of each hidden patch and of each hidden word, by its kind."""
    lost = {"patches": [], "words": []}
    for number in range(len(batch["ids"])):
        row = Row(model, batch, number)
        cls, *states = encoded(model, row, kinds, whole=False)
        seen = dict(zip(kinds, states, strict=True))
        if kind == "pair" and model.config.pair_decoder == "separate":
            names = {"patches": "pair_image", "words": "pair_text"}
            made = {one: decoded(model, model.decoder(names[one]), row, cls, {one: seen[one]})[one] for one in kinds}
            pixel_head = model.pair_image_decoder.pixel_head
        else:
            made, pixel_head = decoded(model, model.decoder(kind), row, cls, seen), model.decoder(kind).pixel_head
        for place in row.hidden_patches if "patches" in kinds else ():
            target = row.pixels[place]
            if norm_pixels:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            lost["patches"].append((pixel_head(made["patches"][place]) - target).square().mean())
        for place in row.hidden_words if "words" in kinds else ():
            logits = model.lm_head(made["words"][place])
            lost["words"].append(logits.logsumexp(0) - logits[row.ids[place]])
    return {name: torch.stack(values).mean() for name, values in lost.items() if values}


def naive_parts(model, given: dict, norm_pixels: bool = True, directions: int = 2, itm_masked: bool = False) -> dict:
    pairs = given["pairs"]
    parts = {
        "mlm": completed(model, given["texts"], "text", ("words",), norm_pixels)["words"],
        "mim": completed(model, given["images"], "image", ("patches",), norm_pixels)["patches"],
        "cmm": sum(completed(model, pairs, "pair", ("patches", "words"), norm_pixels).values()),
    }

    # contrast of whole images and texts alone
    rows = [Row(model, pairs, number) for number in range(len(LENGTHS))]
    sides = {}
    for name, kind in (("image", "patches"), ("text", "words")):
        cls = torch.cat([encoded(model, row, (kind,), whole=True)[0] for row in rows])  # (B, D)
        vectors = getattr(model.momo, f"{name}_projection")(cls)
        sides[name] = vectors / vectors.norm(dim=1, keepdim=True)
    logits = sides["image"] @ sides["text"].T * model.logit_scale.exp()  # (B, B)
    losses = [(side.logsumexp(1) - side.diag()).mean() for side in (logits, logits.T)[:directions]]
    parts["itc"] = sum(losses) / len(losses)

    # pairs, each text with its negative image, each image with its negative text
    matched = []
    own = range(len(rows))
    images, texts = pairs["negative_images"].tolist(), pairs["negative_texts"].tolist()
    for image, text, label in [*((i, i, 1) for i in own), *((images[i], i, 0) for i in own),
                               *((i, texts[i], 0) for i in own)]:  # fmt: skip
        seen = [*rows[image].seen("patches", not itm_masked), *rows[text].seen("words", not itm_masked)]
        cls = run(model.momo.layers, model.momo.norm, [rows[image].cls, *seen])[0]
        logits = model.itm_head(cls)
        matched.append(logits.logsumexp(0) - logits[label])
    parts["itm"] = torch.stack(matched).mean()
    return parts


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, {}),
        ({"contrast": "image_to_text", "norm_pixels": False}, {"directions": 1, "norm_pixels": False}),
        ({"itm_masked": True, "loss_weights": {"itc": 2.0, "cmm": 0.5}}, {"itm_masked": True}),
    ],
)
def test_each_loss_and_the_gradient_of_all_are_the_oracles(form, arguments, options):
    given = batches()
    student, objective = build(ALL, arguments, **FORMS[form])
    oracle = copy.deepcopy(student)
    taken = objective(student, given, 0.5)
    taken.loss.backward()
    expected = naive_parts(oracle, given, **options)
    for name, part in expected.items():
        torch.testing.assert_close(taken.parts[name], part.detach(), rtol=1e-9, atol=1e-11, msg=name)
    weights = arguments.get("loss_weights", {})
    sum(weights.get(name, 1.0) * part for name, part in expected.items()).backward()
    for (name, one), other in zip(student.named_parameters(), oracle.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-7, atol=1e-10, msg=name)
    assert taken.parts["cmm"] == taken.parts["cmm_pixels"] + taken.parts["cmm_words"]


@pytest.fixture
def accelerator() -> Accelerator:
    forget_accelerator()
    yield Accelerator(cpu=True)
    forget_accelerator()


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_step_of_portions_has_the_sum_of_their_gradients(accelerator, chunks):
    """In one go and in chunks; a chunk's negatives are recorded, within itself."""
    given = batches()
    given["pairs"]["negative_images"] = given["pairs"]["negative_texts"] = torch.tensor([1, 0, 3, 2])
    student, objective = build(ALL)
    wanted = {name: torch.zeros_like(one) for name, one in student.named_parameters()}
    for name, portion in objective.portions.items():
        alone = copy.deepcopy(student)
        portion.take(alone, given[name], 0.5).loss.backward()
        for key, parameter in alone.named_parameters():
            wanted[key] += 0 if parameter.grad is None else parameter.grad
    if chunks > 1:
        for name in ("negative_images", "negative_texts"):
            given["pairs"][name] = given["pairs"][name] % 2
    taken = loss_and_gradients(accelerator, objective, student, given, 0.5, dict.fromkeys(given, chunks))
    assert set(ALL) <= taken.parts.keys() and list(objective.portions) == ["texts", "images", "pairs"]
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-8, atol=1e-11, msg=name)


def test_without_cmga_each_portion_is_a_step_of_its_own():
    _, objective = build(ALL, {"cmga": False})
    steps = objective.updates()
    assert [list(step.portions) for step in steps] == [["texts"], ["images"], ["pairs"]]
    _, together = build(ALL)
    assert together.updates() == (together,)


def test_negatives_follow_similarity_and_are_never_of_the_own_id():
    _, objective = build(["itc", "itm"])
    pairs = objective.portions["pairs"]
    images = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)
    texts = images.roll(1, 0)  # text i is like image i - 1
    ids = torch.tensor([0, 1, 2, 3, 4, 4])
    for _ in range(20):
        other_images, other_texts = pairs.negatives({"ids": ids}, images, texts, torch.tensor([0.01]))
        assert (ids[other_images] != ids).all() and (ids[other_texts] != ids).all()
    # so that image i - 1 is the hardest of text i, unless they are of one id
    assert other_images.tolist()[:5] == [5, 0, 1, 2, 3] and other_texts.tolist()[:4] == [1, 2, 3, 4]


def test_the_temperature_is_held_in_its_range():
    student, objective = build(["itc"])
    low, high = student.config.temperature_range
    assert (-math.log(high), -math.log(low)) == (0.0, pytest.approx(4.6052, abs=1e-4))
    for learned, held in ((9.0, -math.log(low)), (-3.0, -math.log(high))):
        student.logit_scale.data.fill_(learned)
        objective.before_step()
        assert student.logit_scale.item() == pytest.approx(held)
    assert student.logit_scale.requires_grad
    _, objective = build(["cmm"])
    assert not objective.student.logit_scale.requires_grad


def test_what_it_refuses():
    student, objective = build(["mlm"])
    with pytest.raises(ValueError, match="MoMo's encoder does not see them at all .*set corruption to drop"):
        objective(student, {**batches()["texts"], "masked_input_ids": torch.zeros(1)}, 0.0)
    with pytest.raises(ValueError, match=r"need decoders \['text', 'pair'\]; the model has \['image'\]: add"):
        build(["mlm", "cmm"], decoders=["image"])
    with pytest.raises(ValueError, match="contrast is 'text_to_image'; expected one of"):
        build(["itc"], {"contrast": "text_to_image"})


def test_texts_of_one_token_and_rows_with_nothing_hidden():
    """A loss without anything masked is zero, and has a graph."""
    given = tiny_momo.make_batch([1, 1], dtype=torch.float64)
    given |= {"mlm_index": torch.zeros(0, dtype=torch.long), "mlm_labels": torch.zeros(0, dtype=torch.long)}
    given["bool_masked_pos"] = torch.zeros_like(given["bool_masked_pos"])
    student, objective = build(["cmm"])
    taken = objective(student, given, 0.0)
    assert taken.loss.item() == 0 and given["input_ids"][0, 0] == CLS
    taken.loss.backward()
    assert all(one.grad is not None for one in student.parameters() if one.requires_grad)


def test_half_precision_computes_the_same_step():
    given = {name: {part: value.float() if value.is_floating_point() else value for part, value in batch.items()}
             for name, batch in batches().items()}  # fmt: skip
    student, objective = build(ALL)
    student.float()
    expected = objective(student, given, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        taken = objective(student, given, 0.5)
    taken.loss.backward()
    for name in ALL:
        assert taken.parts[name].item() == pytest.approx(expected.parts[name].item(), rel=0.05), name
    assert all(one.grad.isfinite().all() for one in student.parameters() if one.requires_grad)


def test_what_a_model_that_knows_nothing_pays():
    told = MomoObjective.uninformed(MomoObjectiveArguments(), batch_size=64, processes=4)
    assert told == {"itc": pytest.approx(math.log(64)), "itm": pytest.approx(0.6365, abs=1e-4)}

"""Official state dicts to ours and back, by tensors that are all different."""

import math

import pytest
import torch
from tiny_official import (
    P,
    Q,
    V,
    albef_shapes,
    answers_shapes,
    assignment_shapes,
    entailment_shapes,
    filled,
    fold_types,
    pretraining_shapes,
    retrieval_shapes,
    two_pictures_shapes,
)
from tiny_simla import simla_batch

from oner import CodisForPreTraining, SimlaForImageTextRetrieval, SimlaForPreTraining
from oner.modeling.modeling_simla_tasks import (
    SimlaForTextAssignment,
    SimlaForVisualEntailment,
    SimlaForVisualQuestionAnswering,
    SimlaForVisualReasoning,
)
from oner.training.conversion.checkpoints import from_official, infer_config, resize_position_table, to_official
from oner.training.conversion.names import Names, stacked_layer
from oner.training.conversion.report import ConversionReport, MissingWeightsError
from oner.training.objectives.simla import SimlaObjective, SimlaObjectiveArguments

HEADS = {"num_attention_heads": 4}


def same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def official() -> dict:
    return filled(pretraining_shapes())


def test_pretraining_there_and_back_is_the_same_for_every_name(official):
    done = from_official(official, "simla", **HEADS)
    assert done.model_class is SimlaForPreTraining
    assert set(done.report.used) | set(done.report.left_over) == set(official)
    assert set(done.report.left_over) == {
        "text_encoder.bert.embeddings.position_ids",
        "text_encoder_m.bert.embeddings.position_ids",
    }
    assert not done.report.missing
    state, report = to_official(done.weights, "simla", done.objective)
    same(official, state)
    assert set(report.left_over) == {"queue.ids"} and not report.notes


def test_the_model_takes_all_of_it_and_gives_it_back(official):
    done = from_official(official, "simla", **HEADS)
    model = SimlaForPreTraining(done.config)
    model.load_state_dict(done.weights)
    objective = SimlaObjective(model, SimlaObjectiveArguments(queue_size=Q))
    objective.load_state_dict(done.objective)
    state, _ = to_official(model.state_dict(), "simla", objective.state_dict())
    same(official, state)


def test_weights_stand_where_they_work(official):
    """A few by hand, of each kind of name; the whole of it is tests/parity's."""
    weights = from_official(official, "simla", **HEADS).weights
    for ours, theirs in (
        ("simla.vision.layers.1.attention.qkv.weight", "visual_encoder.blocks.1.attn.qkv.weight"),
        ("simla.text.layers.2.attention.proj.bias", "text_encoder.bert.encoder.layer.2.attention.output.dense.bias"),
        ("simla.text.layers.0.cross_norm.weight",
         "text_encoder.bert.encoder.layer.0.crossattention.output.LayerNorm.weight"),
        ("simla.text.layers.1.feed_forward.fc2.weight", "text_encoder.bert.encoder.layer.1.output.dense.weight"),
        ("lm_head.decoder.bias", "text_encoder.cls.predictions.bias"),
        ("simla.vision_projection.weight", "vision_proj.weight"),
    ):  # fmt: skip
        assert torch.equal(weights[ours], official[theirs]), ours
    assert weights["temperature"].shape == (1,) and weights["temperature"] == official["temp"]


def test_queues_are_rows(official):
    objective = from_official(official, "simla", **HEADS).objective
    assert objective["queue.image"].shape == (Q, P)
    assert torch.equal(objective["queue.text"][3], official["text_queue"][:, 3])
    assert objective["queue.pointer"].tolist() == [4] and (objective["queue.ids"] == -100).all()


def test_the_configuration_is_read_from_the_shapes(official):
    config = infer_config(official, "simla", num_attention_heads=4, hidden_dropout=0.0)
    told = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_text_layers)
    assert told == (16, 24, 2, 3)
    assert (config.text_intermediate_size, config.vocab_size, config.max_position_embeddings) == (24, 120, 40)
    assert (config.image_size, config.patch_size, config.projection_dim, config.num_visual_codes) == (16, 4, 6, 11)
    assert config.concept_input == "projected" and config.tie_word_embeddings and config.hidden_dropout == 0.0
    wide = {**official, "concept_head.weight": torch.zeros(V, 16)}
    assert infer_config(wide, "simla", **HEADS).concept_input == "cls"


def test_what_shapes_cannot_tell_must_be_given(official):
    with pytest.raises(ValueError, match="width is 16.*num_attention_heads"):
        infer_config(official, "simla")
    with pytest.raises(ValueError, match="no fields .'head_count'"):
        infer_config(official, "simla", **HEADS, head_count=3)
    small = {name: t[:90] if t.shape[:1] == (V,) else t for name, t in official.items()}
    with pytest.raises(ValueError, match="cls_token_id.*101.*give"):
        infer_config(small, "simla", **HEADS)
    with pytest.raises(MissingWeightsError, match="no text_encoder.embeddings.word_embeddings.weight.*official SIMLA"):
        infer_config({"blocks.0.norm1.weight": torch.zeros(3)}, "simla")


@pytest.mark.parametrize("side", [2, 6])
def test_positions_of_another_resolution(official, side):
    """Student and teacher, [CLS] row kept; what the model itself computes on the fly for such a picture."""
    before, after = (
        from_official(official, "simla", **HEADS),
        from_official(official, "simla", image_size=4 * side, **HEADS),
    )
    assert after.config.image_size == after.config.position_image_size == 4 * side
    name = "simla.vision.embeddings.position_embeddings"
    for table, old in (
        (after.weights[name], before.weights[name]),
        (after.objective[f"teacher.{name}"], before.objective[f"teacher.{name}"]),
    ):
        assert table.shape == (1, 1 + side**2, 16) and torch.equal(table[:, 0], old[:, 0])
    assert set(after.report.changed) >= {"visual_encoder.pos_embed", "visual_encoder_m.pos_embed"}
    model, resized = SimlaForPreTraining(before.config).eval(), SimlaForPreTraining(after.config).eval()
    model.load_state_dict(before.weights)
    resized.load_state_dict(after.weights)
    picture = torch.randn(1, 3, 4 * side, 4 * side)
    expected = model.simla(pixel_values=picture, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(resized.simla(pixel_values=picture).last_hidden_state, expected)


def cubic(distance: float, a: float = -0.75) -> float:
    """Keys' convolution kernel, with torch's a."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def naive_resize(table: torch.Tensor, side: int) -> torch.Tensor:
    """Place by place: centres of pixels aligned, edges repeated."""
    own = math.isqrt(table.shape[1] - 1)
    old, rows = table[0, 1:].view(own, own, -1).double(), [table[0, 0].double()]
    for y in range(side):
        for x in range(side):
            at_y, at_x = (y + 0.5) * own / side - 0.5, (x + 0.5) * own / side - 0.5
            total = torch.zeros(table.shape[2], dtype=torch.float64)
            for i in range(math.floor(at_y) - 1, math.floor(at_y) + 3):
                for j in range(math.floor(at_x) - 1, math.floor(at_x) + 3):
                    value = old[min(max(i, 0), own - 1), min(max(j, 0), own - 1)]
                    total += cubic(at_y - i) * cubic(at_x - j) * value
            rows.append(total)
    return torch.stack(rows)[None].float()


@pytest.mark.parametrize(("own", "side"), [(4, 6), (6, 4), (3, 3)])
def test_positions_are_resized_as_bicubic_is_defined(own, side):
    table = torch.randn(1, 1 + own * own, 5)
    torch.testing.assert_close(resize_position_table(table, side), naive_resize(table, side), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="table of 7"):
        resize_position_table(torch.zeros(1, 7, 5), side)


def test_retrieval_has_other_prefixes():
    official = filled(retrieval_shapes())
    done = from_official(official, "simla", **HEADS)
    assert done.model_class is SimlaForImageTextRetrieval and not done.report.missing
    assert done.config.max_text_length == 29
    model = SimlaForImageTextRetrieval(done.config)
    model.load_state_dict(done.weights)
    assert torch.equal(done.objective["queue.ids"], official["idx_queue"][0])
    state, report = to_official(model.state_dict(), "simla", done.objective)
    same(official, state)
    assert not report.left_over


@pytest.mark.parametrize(
    ("shapes", "model_class"),
    [
        (answers_shapes, SimlaForVisualQuestionAnswering),
        (entailment_shapes, SimlaForVisualEntailment),
        (two_pictures_shapes, SimlaForVisualReasoning),
    ],
)
def test_tasks_there_and_back(shapes, model_class):
    official = filled(shapes())
    done = from_official(official, "simla", **HEADS)
    assert done.model_class is model_class and not done.report.missing
    assert set(done.report.used) | set(done.report.left_over) == set(official)
    assert all(name.endswith("position_ids") for name in done.report.left_over)
    model = model_class(done.config)
    model.load_state_dict(done.weights)
    teacher = model_class(done.config)
    teacher.load_state_dict({name.removeprefix("teacher."): tensor for name, tensor in done.objective.items()})
    state, report = to_official(
        model.state_dict(), "simla", {f"teacher.{name}": tensor for name, tensor in teacher.state_dict().items()}
    )
    assert not report.left_over
    if model_class is SimlaForVisualReasoning:
        fold_types(official)
    same(official, state)


def test_text_assignment_there_and_back():
    """Two images and a head of three, without twins: neither a model of retrieval with half as many layers again."""
    official = filled(assignment_shapes())
    done = from_official(official, "simla", **HEADS)
    assert done.model_class is SimlaForTextAssignment and not done.report.missing
    assert done.config.num_text_layers == 4
    assert done.report.left_over.pop("temp") == "SimlaForTextAssignment has no such weight"
    assert all(name.endswith("position_ids") for name in done.report.left_over)
    model = SimlaForTextAssignment(done.config)
    model.load_state_dict(done.weights)
    state, report = to_official(model.state_dict(), "simla")
    assert not report.left_over and not report.notes
    fold_types(official)
    del official["temp"]
    same(official, state)


def test_what_reads_two_images_is_told_by_its_layers():
    """Not by two labels, which a text with one image may have, and never by nothing."""
    with pytest.raises(MissingWeightsError, match=r"classifier.2.weight': '\(2, 16\), expected \(3, 16\)"):
        from_official(filled(entailment_shapes(labels=2)), "simla", **HEADS)
    two = filled(two_pictures_shapes())
    headless = {name: tensor for name, tensor in two.items() if not name.startswith("cls_head")}
    with pytest.raises(ValueError, match="share their keys in pairs.*expected cls_head or ta_head"):
        from_official(headless, "simla", **HEADS)


@pytest.mark.parametrize("shapes", [two_pictures_shapes, assignment_shapes])
def test_token_types_come_back_as_zeros_that_change_nothing(shapes):
    """The official encoder adds a type to every position; its script keeps BERT's own where a file has none."""
    official = filled(shapes())
    done = from_official(official, "simla", **HEADS)
    state, _ = to_official(done.weights, "simla", done.objective)
    types = {name for name in official if name.endswith("token_type_embeddings.weight")}
    assert types and types == {name for name in state if name.endswith("token_type_embeddings.weight")}
    for name in types:
        positions = name.replace("token_type", "position")
        assert state[name].shape == official[name].shape and not state[name].any()
        assert torch.equal(state[positions] + state[name][0], official[positions] + official[name][0])


def test_what_cannot_be_written_whole_is_refused(official):
    config = infer_config(official, "simla", **HEADS)
    config.stem = "conv"
    weights = SimlaForPreTraining(config).state_dict()
    with pytest.raises(
        MissingWeightsError, match="do not exist in the official layout.*vision.embeddings.stem.layers.0"
    ):
        to_official(weights, "simla")
    plain = {name: tensor for name, tensor in weights.items() if ".stem.layers." not in name}
    teacher = {f"teacher.{name}": tensor for name, tensor in weights.items()}
    with pytest.raises(MissingWeightsError, match="teacher.simla.vision.embeddings.stem.layers.0"):
        to_official(plain, "simla", teacher)


def test_two_pictures_in_their_order():
    """Of the official eighteen layers: 0 to 5, then each of 6 to 11 and its second."""
    ours = [stacked_layer(layer, 18, "simla") for layer in range(18)]
    assert ours[:8] == [f"simla.text.layers.{layer}" for layer in range(7)] + ["second_layers.0"]
    assert ours[16:] == ["simla.text.layers.11", "second_layers.5"]
    assert from_official(filled(two_pictures_shapes()), "simla", **HEADS).config.num_text_layers == 4


def test_keys_that_two_pictures_do_not_share_are_refused():
    official = filled(two_pictures_shapes())
    official["text_encoder.encoder.layer.5.crossattention.self.key.bias"] = torch.ones(16)
    with pytest.raises(MissingWeightsError, match="second_layers.1.cross_attention.key.bias.*differ"):
        from_official(official, "simla", **HEADS)


def test_pictures_of_384_pixels_fit_a_bert_of_512_positions():
    """The official fine-tuning has 577 places for 512 positions of words, which no picture passes there."""
    config = from_official(filled(retrieval_shapes(side=7)), "simla", **HEADS).config
    assert config.num_patches + 1 > config.max_position_embeddings


def test_albef_is_taken_whole_as_codis_without_a_codebook():
    """Its token types are folded, and it comes back."""
    official = filled(albef_shapes())
    done = from_official(official, "codis", **HEADS)
    assert (done.config.num_text_layers, done.config.num_fusion_layers, done.config.num_codes) == (2, 1, 0)
    assert done.model_class is CodisForPreTraining and not done.report.missing and not done.report.notes
    assert all(name.endswith("position_ids") for name in done.report.left_over)
    assert done.report.used.keys() | done.report.left_over.keys() == official.keys()
    model = CodisForPreTraining(done.config)
    model.load_state_dict(done.weights)
    state, report = to_official(model.state_dict(), "codis", done.objective)
    fold_types(official)
    same(official, state)


def test_albef_lacks_what_simla_added_and_that_is_named():
    official = filled(albef_shapes())
    with pytest.raises(MissingWeightsError) as caught:
        from_official(official, "simla", **HEADS)
    assert "text_encoder.bert.encoder.layer.0.crossattention.self.query.weight" in str(caught.value)
    assert "layer.2.crossattention" not in str(caught.value) and "draw_missing" in str(caught.value)
    done = from_official(official, "simla", draw_missing=True, **HEADS)
    assert "text_encoder.bert.embeddings.token_type_embeddings.weight" in done.report.left_over
    drawn = {name for name, what in done.report.missing.items() if what == "drawn at random"}
    assert {name for name in drawn if ".layers." in name} == {
        f"simla.text.layers.{layer}.{part}.{kind}"
        for layer in (0, 1)
        for part in (*(f"cross_attention.{p}" for p in ("query", "key", "value", "proj")), "cross_norm")
        for kind in ("weight", "bias")
    }
    assert done.report.missing["simla.vision.embeddings.mask_token"].startswith("zeros")
    assert done.absent_heads == {"mim_head", "concept_head"} and "ALBEF" in done.report.notes[0]


def test_token_types_can_be_folded_into_positions():
    official = filled(albef_shapes())
    done = from_official(official, "simla", draw_missing=True, fold_token_types=True, **HEADS)
    for weights, m in ((done.weights, ""), ({k.removeprefix("teacher."): v for k, v in done.objective.items()}, "_m")):
        bert = f"text_encoder{m}.bert.embeddings"
        expected = official[f"{bert}.position_embeddings.weight"] + official[f"{bert}.token_type_embeddings.weight"][0]
        assert torch.equal(weights["simla.text.embeddings.position_embeddings.weight"], expected)
        assert f"{bert}.token_type_embeddings.weight" in done.report.used


@pytest.mark.parametrize(
    "name",
    ["visual_encoder.blocks.1.mlp.fc2.bias", "text_encoder.bert.encoder.layer.2.crossattention.self.key.weight",
     "text_encoder.cls.predictions.transform.dense.weight", "vision_proj.bias", "itm_head.weight"],
)  # fmt: skip
def test_what_is_missing_is_named(official, name):
    with pytest.raises(MissingWeightsError, match=f"1 weights.*{name}"):
        from_official({key: tensor for key, tensor in official.items() if key != name}, "simla", **HEADS)


def test_what_is_foreign_is_named(official):
    done = from_official(
        {**official, "other_head.weight": torch.zeros(3), "visual_encoder.fc": torch.zeros(2)}, "simla", **HEADS
    )
    assert {"other_head.weight", "visual_encoder.fc"} < set(done.report.left_over)
    assert "other_head.weight: our model has no module of that name" in done.report.describe()


def test_wrong_shapes_are_named(official):
    wrong = {**official, "itm_head.weight": torch.zeros(3, 16)}
    with pytest.raises(MissingWeightsError, match=r"itm_head.weight.*\(3, 16\), expected \(2, 16\)"):
        from_official(wrong, "simla", **HEADS)


@pytest.mark.parametrize(
    "name", ["visual_encoder.blocks.1.mlp.fc2.weight", "text_encoder_m.bert.embeddings.LayerNorm.bias"]
)
def test_numbers_that_are_none_are_named(official, name):
    broken = {**official, name: torch.full_like(official[name], float("nan"))}
    with pytest.raises(MissingWeightsError, match=r"1 damaged weights .*(fc2.weight|embeddings.norm.bias)': 'NaN'"):
        from_official(broken, "simla", **HEADS)
    if name.endswith("weight"):
        with pytest.raises(MissingWeightsError, match="fc2.weight': 'only zeros'"):
            from_official({**official, name: torch.zeros_like(official[name])}, "simla", **HEADS)


def test_an_untied_head_of_words_is_kept(official):
    name = "text_encoder.cls.predictions.decoder.weight"
    done = from_official({**official, name: official[name] + 1}, "simla", **HEADS)
    assert not done.config.tie_word_embeddings
    model = SimlaForPreTraining(done.config)
    model.load_state_dict(done.weights)
    assert torch.equal(model.lm_head.decoder.weight, official[name] + 1)
    assert torch.equal(model.simla.text.embeddings.word_embeddings.weight, official[name])


def test_two_biases_of_words_that_differ_are_no_silent_choice(official):
    name = "text_encoder.cls.predictions.decoder.bias"
    done = from_official({**official, name: official[name] + 1}, "simla", **HEADS)
    differing = {key: why for key, why in done.report.left_over.items() if "differs" in why}
    assert list(differing) in ([name], [name.replace("decoder.", "")])


def test_without_a_teacher_the_twins_are_copies(official):
    done = from_official(official, "simla", **HEADS)
    state, report = to_official(done.weights, "simla")
    assert torch.equal(state["mim_head_m.weight"], official["mim_head.weight"]) and "copies" in report.notes[0]
    assert {name for name in official if name not in state} == {"image_queue", "text_queue", "queue_ptr"}


def test_names_turn_round():
    names = Names([("a.#.b.c", "x.#.y"), ("d", "e")])
    assert names("a.12.b.c.weight") == "x.12.y.weight" and names("d") == "e" and names("d.bias") == "e.bias"
    assert names("a.b.c") is None and names("aa.1.b.c") is None and names("a.1.bXc.weight") is None
    assert names.reverse("x.12.y.bias") == "a.12.b.c.bias"


def test_reports_are_merged():
    one = ConversionReport(used={"a": "A"}, missing={"B": "drawn", "C": "drawn"})
    merged = one.merge(ConversionReport(used={"b": "B"}, left_over={"c": "no"}, missing={"A": "drawn"}))
    assert merged.missing == {"C": "drawn"} and merged.left_over == {"c": "no"}
    assert merged.describe().splitlines() == [
        "2 tensors used", "0 changed", "1 left over in the file:", "  c: no", "1 missing in the file:", "  C: drawn",
    ]  # fmt: skip


def test_a_converted_model_runs_a_step(official):
    batch = simla_batch([3, 5])
    done = from_official(official, "simla", **HEADS, cls_token_id=3, image_token_id=1, mask_token_id=4, sep_token_id=2)
    model = SimlaForPreTraining(done.config)
    model.load_state_dict(done.weights)
    objective = SimlaObjective(model, SimlaObjectiveArguments(queue_size=Q))
    objective.load_state_dict(done.objective)
    batch["visual_codes"] %= done.config.num_visual_codes
    del batch["keyword_targets"]
    loss, parts, _ = objective(model, batch, 0.5)
    assert torch.isfinite(loss) and set(parts) == {"itc", "itm", "mlm", "mim", "psl"}

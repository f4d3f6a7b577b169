"""What every family's classes promise alike: what goes in, what comes out, and what a checkpoint keeps.

B rows, L positions, N = 16 patches, W word slots, D width, P embedding width.
"""

import copy
import math

import pytest
import torch
from families import FAMILIES, KINDS, MASKED_LM, MODELS, PRETRAINING, RETRIEVAL, inputs_of
from tiny_oner import CLS, IMAGE, VOCAB, joint_batch, text_of
from torch import nn
from transformers.utils import logging

import oner
from oner.modeling.vl_outputs import PADDING_TOKEN
from oner.training.objectives.objective import OBJECTIVES
from oner.training.run.optimization import checkpoint_activations

# whose every weight a pretraining checkpoint holds
SERVED = (MODELS, PRETRAINING, RETRIEVAL, MASKED_LM)


def embedding_of(model, kind: str, batch: dict) -> torch.Tensor:
    """The retrieval embedding (B, P), by its method."""
    methods = {"text": "get_text_features", "image": "get_image_features", "pair": "get_multimodal_features"}
    return getattr(model, methods[kind])(**inputs_of(model, kind, batch)).pooler_output


@pytest.fixture(scope="module")
def tower(family):
    torch.manual_seed(0)
    return family.build()


def test_every_family_is_on_the_list():
    """Or none of these tests would have run on it."""
    assert FAMILIES.keys() == OBJECTIVES.keys() & oner.FAMILIES.keys()  # tests register others
    for family in FAMILIES.values():
        assert {MODELS, PRETRAINING, RETRIEVAL, MASKED_LM} <= family.classes.keys()
        assert set(family.run["losses"]) <= set(family.losses)


# what comes in and what comes out


def test_shapes_of_the_three_kinds(tower):
    batch, config = joint_batch([5, 0, 3]), tower.config
    pair, text, image = (tower(**inputs_of(tower, kind, batch)) for kind in ("pair", "text", "image"))
    for kind, output, length in (("pair", pair, 22), ("text", text, 6), ("image", image, 17)):
        assert output.last_hidden_state.shape == (3, length, config.hidden_size)
        assert output.pooler_output.shape == (3, config.projection_dim)
        torch.testing.assert_close(output.pooler_output, embedding_of(tower, kind, batch), rtol=0, atol=2e-6)
    assert text.token_types.tolist() == [[0, 2, 2, 2, 2, 2], [0, 3, 3, 3, 3, 3], [0, 2, 2, 2, 3, 3]]
    assert image.token_types.tolist() == [[0] + [1] * 16] * 3
    assert pair.token_types[1:].tolist() == [[0] + [1] * 16 + [3] * 5, [0] + [1] * 16 + [2, 2, 2, 3, 3]]


@pytest.mark.parametrize("kind", ["text", "pair"])
def test_padding_never_changes_a_result(tower, kind):
    lengths = [5, 0, 3, 1]
    tight_batch, loose_batch = joint_batch(lengths), joint_batch(lengths, slots=11)
    noisy_batch = dict(loose_batch, input_ids=loose_batch["input_ids"].clone())
    noisy_batch["input_ids"][loose_batch["attention_mask"] == 0] = 17  # whatever stands in the padding
    tight, embeddings = tower(**inputs_of(tower, kind, tight_batch)), embedding_of(tower, kind, tight_batch)
    real, tight = tight.token_types != PADDING_TOKEN, tight.last_hidden_state
    for batch in (loose_batch, noisy_batch):
        torch.testing.assert_close(embedding_of(tower, kind, batch), embeddings, rtol=0, atol=1e-5)
        loose = tower(**inputs_of(tower, kind, batch)).last_hidden_state[:, : tight.shape[1]]
        torch.testing.assert_close(loose[real], tight[real], rtol=0, atol=2e-5)
    for row in range(len(lengths)):  # and each row alone, without any padding
        inputs = {name: value[row : row + 1] for name, value in inputs_of(tower, kind, tight_batch).items()}
        keep = inputs["attention_mask"][0].bool()
        inputs.update(input_ids=inputs["input_ids"][:, keep], attention_mask=inputs["attention_mask"][:, keep])
        alone = tower(**inputs).last_hidden_state[0]
        torch.testing.assert_close(alone, tight[row][real[row]], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_order_does_not_matter(tower, kind):
    batch, order = joint_batch([5, 0, 3, 2]), torch.tensor([2, 0, 3, 1])
    moved = {name: batch[name][order] for name in ("input_ids", "attention_mask", "pixel_values")}
    states, other = (tower(**inputs_of(tower, kind, inputs)).last_hidden_state for inputs in (batch, moved))
    torch.testing.assert_close(other, states[order], rtol=0, atol=1e-5)
    embeddings, other = (embedding_of(tower, kind, inputs) for inputs in (batch, moved))
    torch.testing.assert_close(other, embeddings[order], rtol=0, atol=2e-6)


def test_words_and_pixels_are_read(tower):
    """Two words that change places, and a white stripe, are seen where they should be, and in no other row."""
    batch = joint_batch([5, 4])
    words, pixels = batch["input_ids"].clone(), batch["pixel_values"].clone()
    words[0, 18], words[0, 19] = batch["input_ids"][0, 19], batch["input_ids"][0, 18]
    pixels[1, :, 4:12] = 3.0
    assert not torch.equal(words, batch["input_ids"])
    changes = (
        (0, {**batch, "input_ids": words}, {"text", "pair"}),
        (1, {**batch, "pixel_values": pixels}, {"image", "pair"}),
    )
    for row, changed, sees in changes:
        for kind in KINDS:
            before, after = (
                tower(**inputs_of(tower, kind, inputs)).last_hidden_state[:, 0] for inputs in (batch, changed)
            )
            moved = torch.stack(
                [
                    (after - before).abs().amax(1),
                    (embedding_of(tower, kind, changed) - embedding_of(tower, kind, batch)).abs().amax(1),
                ]
            )
            assert moved[:, 1 - row].max() < 2e-6, kind
            assert (moved[:, row] > 1e-5).all() if kind in sees else moved[:, row].max() < 2e-6, kind


@pytest.mark.parametrize("learned", [1e4, -1e4, 0.0])
def test_logits_are_finite_and_in_order_whatever_temperature_was_learned(family, learned):
    """By a Trainer, say, which holds it in no range: no overflow, no division by zero, no signs turned round."""
    model = family.build(RETRIEVAL)
    if hasattr(model.config, "learnable_temperature"):
        model = family.build(RETRIEVAL, learnable_temperature=True)
    (temperature,) = (value for name, value in model.named_parameters() if name in ("temperature", "logit_scale"))
    temperature.data.fill_(learned)
    batch = joint_batch([5, 3])
    output = model(**text_of(batch), pixel_values=batch["pixel_values"])
    cosines = output.image_embeds @ output.text_embeds.T
    assert output.logits_per_image.isfinite().all()
    scales = output.logits_per_image / cosines
    assert (scales >= 0).all() and scales.max() < 1001


def test_features_of_each_kind(family, tower):
    batch = joint_batch([5, 0, 3])
    retrieval = family.classes[RETRIEVAL](tower.config).eval()
    family.tower(retrieval).load_state_dict(tower.state_dict())
    expected = {kind: embedding_of(tower, kind, batch) for kind in KINDS}
    laid_out = {
        "input_ids": torch.tensor([[CLS] + [IMAGE] * 16] * 3),
        "attention_mask": torch.ones(3, 17, dtype=torch.long),
    }
    for model in (tower, retrieval):
        text = model.get_text_features(**text_of(batch))
        assert text.last_hidden_state.shape == (3, 6, tower.config.hidden_size)
        image = model.get_image_features(batch["pixel_values"])
        if model.config.pair_layout == "joint":
            # its placeholders change nothing; and what a processor makes of pictures alone has no words
            joint = model.get_text_features(batch["input_ids"], batch["attention_mask"])
            unpadded = model.get_text_features(batch["input_ids"][:1])
            placed = model.get_image_features(batch["pixel_values"], **laid_out)
            torch.testing.assert_close(joint.pooler_output, text.pooler_output, rtol=0, atol=2e-6)
            torch.testing.assert_close(unpadded.pooler_output, text.pooler_output[:1], rtol=0, atol=2e-6)
            torch.testing.assert_close(placed.pooler_output, image.pooler_output, rtol=0, atol=2e-6)
        both = model.get_multimodal_features(**inputs_of(model, "pair", batch))
        for kind, got in (("text", text), ("image", image), ("pair", both)):
            torch.testing.assert_close(got.pooler_output, expected[kind], rtol=0, atol=2e-6, msg=kind)
        assert (both.pooler_output[0] - image.pooler_output[0]).abs().max() > 1e-3  # the words are read


def test_retrieval_compares_all_with_all(family):
    model, batch = family.build(RETRIEVAL, temperature=0.2), joint_batch([5, 1, 3])
    pixels = batch["pixel_values"][:2]
    output = model(**text_of(batch), pixel_values=pixels)
    image = nn.functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    text = nn.functional.normalize(model.get_text_features(**text_of(batch)).pooler_output, dim=-1)
    torch.testing.assert_close(output.logits_per_image, image @ text.T / 0.2)
    assert output.logits_per_image.shape == (2, 3)
    torch.testing.assert_close(output.logits_per_text, output.logits_per_image.T)
    pair = model(**inputs_of(model, "pair", batch), return_loss=True)
    loss = 0.0
    for logits in (pair.logits_per_image, pair.logits_per_text):
        loss += sum(-logits[i].log_softmax(0)[i] for i in range(3)) / 6
    torch.testing.assert_close(pair.loss, loss)
    assert model(pixel_values=pixels).logits_per_image is None


def test_masked_language_model_speaks_of_its_input_positions(family):
    model, batch = family.build(MASKED_LM), joint_batch([5, 2])
    inputs = inputs_of(model, "pair", batch)
    labels = inputs["input_ids"].clone()
    labels[inputs["attention_mask"] == 0] = -100
    output = model(**inputs, labels=labels)
    assert output.logits.shape == (*labels.shape, VOCAB)
    losses = [-output.logits[b, l].log_softmax(0)[labels[b, l]] for b, l in (labels >= 0).nonzero().tolist()]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())
    assert model(**text_of(batch)).logits.shape == (2, 6, VOCAB)


# ways to compute the same


def test_eager_equals_sdpa(family):
    model, batch = family.build(), joint_batch([5, 0, 3])
    outputs = []
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        output = model(**inputs_of(model, "pair", batch))
        parts = [output.last_hidden_state[output.token_types != PADDING_TOKEN].flatten()]
        parts += [embedding_of(model, kind, batch).flatten() for kind in KINDS]
        outputs.append(torch.cat(parts))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=5e-6)


def test_attentions_and_hidden_states_come_when_asked(family):
    model, batch = family.build(), joint_batch([5, 2])
    model.set_attn_implementation("eager")
    output = model(**text_of(batch), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == len(output.attentions) + 1 >= 2
    for states in output.hidden_states:
        assert states.shape == (2, 6, model.config.hidden_size)
    for weights in output.attentions:
        assert weights.shape[0] == 2 and weights.shape[2:] == (6, 6)
        assert weights[1, :, :, 3:].abs().max() == 0  # padding is never attended
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_gradient_checkpointing_changes_nothing(family):
    plain, batch = family.build(**family.tiny.APART).train(), joint_batch([5, 0, 3])
    saving = copy.deepcopy(plain)
    # renamed in transformers 5.23; the old name warns there
    checkpoint_activations(saving)
    layers = [module for module in saving.modules() if hasattr(module, "gradient_checkpointing")]
    assert len(layers) >= 2 and all(layer.gradient_checkpointing for layer in layers)
    for model in (plain, saving):
        for kind in KINDS:
            states = model(**inputs_of(model, kind, batch)).last_hidden_state
            (states.square().sum() + embedding_of(model, kind, batch).square().sum()).backward()
    reached = 0
    for (name, one), two in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            reached += 1
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-5, atol=1e-6, msg=name)
    # all but the mask token of an unmasked pass
    assert reached > 0.9 * len(list(plain.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(tower, kind):
    inputs = inputs_of(tower, kind, joint_batch([5, 0, 3]))
    torch.compiler.reset()
    compiled = torch.compile(tower, fullgraph=True, backend="eager")
    with torch.no_grad():
        output, expected = compiled(**inputs), tower(**inputs)
    assert output.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value)


def test_resolution_changes_by_interpolation(family, tower, tmp_path):
    pixels, width = torch.randn(2, 3, 24, 24), tower.config.hidden_size
    small = tower(pixel_values=pixels[:, :, :16, :16])
    tower.save_pretrained(tmp_path)
    larger = family.classes[MODELS].from_pretrained(tmp_path, image_size=24).eval()
    assert (larger.config.image_size, larger.config.position_image_size) == (24, 16)
    free = tower(pixel_values=pixels, interpolate_pos_encoding=True)
    torch.testing.assert_close(larger(pixel_values=pixels).last_hidden_state, free.last_hidden_state)
    assert free.last_hidden_state.shape == (2, 37, width)
    wide = tower(pixel_values=pixels[:, :, :16], interpolate_pos_encoding=True)
    assert wide.last_hidden_state.shape == (2, 1 + 4 * 6, width)
    same = tower(pixel_values=pixels[:, :, :16, :16], interpolate_pos_encoding=True)
    torch.testing.assert_close(same.last_hidden_state, small.last_hidden_state)


# initialisation and checkpoints


@pytest.fixture(scope="module")
def checkpoint(family, tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("pretrained")
    model = family.build(PRETRAINING)
    model.save_pretrained(folder)
    return folder, model


def test_one_pretraining_checkpoint_serves_every_class(family, auto, checkpoint, caplog):
    (folder, trained), cls = checkpoint, family.classes[auto]
    logger = logging.get_logger("transformers")
    propagate, logger.propagate = logger.propagate, True
    with caplog.at_level("WARNING"):
        model, report = cls.from_pretrained(folder, output_loading_info=True)
    logger.propagate = propagate
    source, prefix = trained.state_dict(), trained.base_model_prefix
    fresh = {name for name in model.state_dict() if name not in source and f"{prefix}.{name}" not in source}
    assert set(report["missing_keys"]) == fresh and not (fresh and auto in SERVED)
    assert not [name for name in fresh if name.startswith(f"{prefix}.")]
    assert not report["mismatched_keys"] and not report["unexpected_keys"]
    if not fresh:
        assert not caplog.records, caplog.text
    for name, value in model.state_dict().items():
        if name not in fresh:
            assert torch.equal(value, source.get(name, source.get(f"{prefix}.{name}"))), name
    loaded, tower = dict(family.tower(model).named_buffers()), family.tower(trained)
    for name, buffer in tower.named_buffers():  # non-persistent tables too
        assert name not in loaded or torch.equal(loaded[name], buffer), name
    assert all(parameter.requires_grad and parameter.ndim > 0 for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    batch = joint_batch([4, 2])
    for kind in KINDS:
        inputs = inputs_of(model, kind, batch)
        output = family.tower(model).eval()(**inputs).last_hidden_state
        torch.testing.assert_close(output, tower(**inputs).last_hidden_state)


def test_a_bare_tower_loads_into_every_class_whose_heads_are_drawn(family, auto, tmp_path):
    """A head that a checkpoint lacks is drawn as a new model's is: in its range, and not left as memory held it."""
    cls, tower = family.classes[auto], family.build()
    tower.save_pretrained(tmp_path)
    model, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    prefix = f"{model.base_model_prefix}."
    assert not [name for name in report["missing_keys"] if name.startswith(prefix)]
    for name, value in family.tower(model).state_dict().items():
        assert torch.equal(value, tower.state_dict()[name]), name
    torch.manual_seed(0)
    drawn, new = model.state_dict(), cls(tower.config).state_dict()
    for name in report["missing_keys"]:
        one, other = drawn[name].double(), new[name].double()
        assert torch.isfinite(one).all(), name
        if other.numel() == 1 or other.std() == 0:  # a constant: biases, norms, a temperature
            torch.testing.assert_close(one, other, msg=name)
        elif other.numel() > 60:
            assert 0.6 < (one.std() / other.std()).item() < 1.6, name


def test_no_parameter_is_a_scalar_and_all_are_drawn_alike(family, auto):
    """ZeRO-3 cannot partition a scalar; and a seed decides every weight."""
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(family.classes[auto](family.tiny.tiny_config()))
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert one.ndim > 0 and torch.equal(one, other), name


def test_dtype_survives_a_round_trip(family, tmp_path):
    cls, model = family.classes[RETRIEVAL], family.build(RETRIEVAL).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, dtype="auto").eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    for (name, one), two in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, two), name
    batch = joint_batch([5, 0, 3])
    output, expected = (one(**inputs_of(one, "pair", batch)) for one in (loaded, model))
    assert output.logits_per_image.dtype == torch.bfloat16
    torch.testing.assert_close(output.logits_per_image, expected.logits_per_image, rtol=0.02, atol=0.05)
    full = cls.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in full.parameters()} == {torch.float32}


@pytest.mark.parametrize("head", [MASKED_LM, PRETRAINING])
def test_the_words_are_tied_and_stay_tied(family, head, tmp_path):
    cls, model = family.classes[head], family.build(head)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    bias = loaded.get_output_embeddings().bias.detach().clone()
    loaded.resize_token_embeddings(VOCAB + 7)
    decoder, words = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert decoder.weight is words.weight and words.weight.shape == (VOCAB + 7, loaded.config.hidden_size)
    assert decoder.bias.shape == (VOCAB + 7,) and torch.equal(decoder.bias[:VOCAB], bias)
    assert loaded.config.vocab_size == VOCAB + 7
    if head == MASKED_LM:
        ids = torch.tensor([[CLS, VOCAB + 6, 9]])
        output = loaded(input_ids=ids, labels=ids)
        assert output.logits.shape == (1, 3, VOCAB + 7) and torch.isfinite(output.loss)


@pytest.mark.parametrize("more", [7, -1])
def test_a_resized_vocabulary_leaves_nothing_behind_and_reloads(family, auto, more, tmp_path):
    """Every part of the vocabulary's size goes along, keeps what it had, and comes back from disk."""
    model = family.build(auto)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sized = [name for name, value in before.items() if VOCAB in value.shape]
    model.resize_token_embeddings(VOCAB + more, mean_resizing=False)
    model.save_pretrained(tmp_path)
    again = family.classes[auto].from_pretrained(tmp_path)
    assert again.config.vocab_size == VOCAB + more and type(again) is type(model)
    state = again.state_dict()
    assert sized and state.keys() == before.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
        if name in sized:
            rows = min(VOCAB, VOCAB + more)
            assert len(value) == VOCAB + more and torch.equal(value[:rows], before[name][:rows]), name


# a training step


def test_every_parameter_has_a_gradient_or_is_frozen(family):
    """For each loss alone and for all together: a data-parallel engine would wait for a missing one for ever."""
    batch = family.tiny.make_batch([5, 3, 2, 4])
    for losses in (*([name] for name in family.pair_losses), list(family.pair_losses)):
        student = family.build(PRETRAINING).train()
        objective = family.objective(student, losses=losses)
        loss, parts, kept = objective(student, batch, 0.5)
        assert [name for name in parts if name in family.losses] == losses and all(
            math.isfinite(value) for value in parts.values()
        )
        loss.backward()
        wrong = [name for name, p in student.named_parameters() if (p.grad is None) == p.requires_grad]
        assert not wrong, f"{losses}: {wrong}"


def test_a_step_is_a_function_of_batch_and_generators(family):
    batch, seen = family.tiny.make_batch([5, 3, 2, 4]), []
    for _ in range(2):
        torch.manual_seed(4)
        student = family.build(PRETRAINING, **family.tiny.DRAWN).train()
        objective = family.objective(student)
        torch.manual_seed(5)
        loss, *_ = objective(student, batch, 0.5)
        loss.backward()
        seen.append((loss.detach(), [p.grad for p in student.parameters() if p.grad is not None]))
    assert torch.equal(seen[0][0], seen[1][0])
    assert all(torch.equal(*pair) for pair in zip(seen[0][1], seen[1][1], strict=True))


def test_an_objective_keeps_its_state_and_stands_still_when_told(family):
    """
    Teachers and queues move with an update and not without one, but that a teacher which follows before the step still
    comes nearer to a student that stands still; and they load as they were saved.
    """
    student = family.build(PRETRAINING, **family.tiny.APART).train()
    objective = family.objective(student)

    def take(applied: float) -> dict[str, torch.Tensor]:
        taken = objective(student, family.tiny.make_batch([5, 3, 2, 4]), 0.5)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.01 * applied * torch.randn_like(parameter))
        objective.after_step(torch.tensor(applied), taken.kept)
        return {name: value.clone() for name, value in objective.state_dict().items()}

    first = take(1.0)
    weights = {f"teacher.{name}": value.clone() for name, value in student.state_dict().items()}
    skipped = take(0.0)
    for name, value in first.items():
        if not torch.equal(value, skipped[name]):
            (teacher,) = objective.teachers()
            nearer = torch.lerp(value, weights[name], 1 - teacher.momentum)
            torch.testing.assert_close(skipped[name], nearer, rtol=0, atol=1e-7, msg=name)
    second = take(1.0)
    changed = {name.partition(".")[0] for name, value in first.items() if not torch.equal(value, second[name])}
    assert changed == {name.partition(".")[0] for name in first}
    objective.load_state_dict(first)
    assert all(torch.equal(value, first[name]) for name, value in objective.state_dict().items())

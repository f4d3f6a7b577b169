"""OneRModel and its task classes: what goes in, what comes out, and what a checkpoint keeps.

B rows, L positions, N = 16 patches, W word slots, D = 32 width, P = 8 embedding width.
"""

import os
import subprocess
import sys

import pytest
import torch
from tiny_oner import CLS, IMAGE, joint_batch, naive_layer, randomised, text_of, tiny_config
from torch import nn

from oner import (
    OneRConfig,
    OneRForImageClassification,
    OneRForImageTextRetrieval,
    OneRForMaskedLM,
    OneRForPreTraining,
    OneRModel,
)
from oner.modeling import ONER_SIZES

CLASSES = [OneRModel, OneRForPreTraining, OneRForImageTextRetrieval, OneRForMaskedLM, OneRForImageClassification]


def build(cls=OneRModel, **overrides):
    """Batch norm's running statistics are moved from 0 and 1 by one training pass."""
    model = randomised(cls(tiny_config(**overrides))).train()
    pixels = torch.randn(8, 3, model.config.image_size, model.config.image_size)
    with torch.no_grad():
        getattr(model, "oner", model)(pixel_values=pixels)
    return model.eval()


def joint_of(batch: dict) -> dict:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


# sizes


def test_parameter_counts_at_base():
    with torch.device("meta"):
        model = OneRForPreTraining(OneRConfig.from_size("base"))

    def count(*modules):
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    d = 768
    block = (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 4 * d
    stem = sum(9 * a * b + 2 * b for a, b in [(3, 96), (96, 192), (192, 384), (384, 768)]) + d * d + d
    words, trunk = 30522 * d, 12 * block + 2 * d
    tower = model.oner
    assert count(tower.layers, tower.norm) == trunk == 85_056_000
    assert count(tower.embeddings.stem) == stem == 4_079_712
    assert tower.embeddings.word_embeddings.weight.numel() == words == 23_440_896
    assert round((trunk + stem + words) / 1e6, 1) == 112.6
    projector = d * 4096 + 2 * 4096 + 4096 * 4096 + 2 * 4096 + 4096 * 256
    predictor = 256 * 4096 + 2 * 4096 + 4096 * 256
    assert count(tower.projector) == projector == 20_987_904
    assert count(model.predictor) == predictor == 2_105_344
    assert (round(projector / 1e6, 1), round(predictor / 1e6, 1)) == (21.0, 2.1)
    assert count(model.pixel_head) == d * d + d
    dense_norm_bias = (d * d + d) + 2 * d + 30522
    assert count(model) == trunk + stem + words + d + projector + predictor + (d * d + d) + dense_norm_bias


@pytest.mark.parametrize("size", ONER_SIZES)
def test_every_size_builds(size):
    width, depth, heads, hidden, projection = ONER_SIZES[size]
    with torch.device("meta"):
        model = OneRModel(OneRConfig.from_size(size))
    assert len(model.layers) == depth and model.norm.weight.shape == (width,)
    assert model.projector[0].weight.shape == (hidden, width)
    assert model.config.projection_dim == projection and width % heads == 0
    assert OneRConfig.from_size(size, image_size=96).image_size == 96


# what comes in and what comes out


def test_the_forward_pass_equals_a_naive_loop():
    model, batch = build(), joint_batch([5, 0, 3])
    states, _ = model.embeddings(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    keys = batch["attention_mask"].bool()
    for layer in model.layers:
        states = naive_layer(layer, states, states, keys)
    states = model.norm(states)
    output = model(**joint_of(batch))
    real = keys[..., None]
    torch.testing.assert_close(output.last_hidden_state * real, states * real, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.pooler_output, model.projector(states[:, 0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("kind", ["text", "joint"])
def test_padding_never_changes_a_result(kind, pooling):
    model = build(pooling=pooling, two_heads=True)
    lengths = [5, 0, 3, 1]
    pick = text_of if kind == "text" else joint_of
    tight = model(**pick(joint_batch(lengths)))
    loose_batch = pick(joint_batch(lengths, slots=11))
    noisy = dict(loose_batch, input_ids=loose_batch["input_ids"].clone())
    noisy["input_ids"][loose_batch["attention_mask"] == 0] = 17  # whatever stands in the padding
    width = tight.last_hidden_state.shape[1]
    real = pick(joint_batch(lengths))["attention_mask"].bool()
    for inputs in (loose_batch, noisy):
        loose = model(**inputs)
        torch.testing.assert_close(loose.pooler_output, tight.pooler_output, rtol=0, atol=2e-6)
        torch.testing.assert_close(
            loose.last_hidden_state[:, :width][real], tight.last_hidden_state[real], rtol=0, atol=5e-6
        )
    for row, length in enumerate(lengths):  # and each row alone, without any padding
        inputs = {name: value[row : row + 1] for name, value in pick(joint_batch(lengths)).items()}
        keep = inputs["attention_mask"][0].bool()
        inputs.update(input_ids=inputs["input_ids"][:, keep], attention_mask=inputs["attention_mask"][:, keep])
        if kind == "text" and pooling == "mean" and length == 0:
            continue  # no words: the mean of nothing, tested below
        alone = model(**inputs)
        torch.testing.assert_close(alone.pooler_output[0], tight.pooler_output[row], rtol=0, atol=2e-6)


def test_the_mean_of_an_empty_text_is_finite():
    model = build(pooling="mean")
    output = model(input_ids=torch.tensor([[CLS]]))
    torch.testing.assert_close(output.pooler_output, model.projector(torch.zeros(1, 32)))


def test_mean_pooling_reads_patches_and_words_only():
    model, batch = build(pooling="mean"), joint_batch([5, 2])
    output = model(**joint_of(batch))
    mean = output.last_hidden_state[1, 1:19].mean(0)  # 16 patches and 2 words
    torch.testing.assert_close(output.pooler_output[1], model.projector(mean[None])[0])


def test_a_picture_in_either_layout_is_the_same():
    model, pixels = build(), torch.randn(2, 3, 16, 16)
    ids = torch.tensor([[CLS] + [IMAGE] * 16] * 2)
    alone = model(pixel_values=pixels)
    laid_out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
    torch.testing.assert_close(laid_out.last_hidden_state, alone.last_hidden_state, rtol=0, atol=1e-6)
    assert torch.equal(laid_out.token_types, alone.token_types)


def test_features_of_each_kind():
    model, batch = build(two_heads=True), joint_batch([5, 0, 3])
    text = model.get_text_features(**text_of(batch))
    assert text.last_hidden_state.shape == (3, 6, 32)
    # the joint layout is accepted: its placeholders change nothing
    joint = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(joint.pooler_output, text.pooler_output, rtol=0, atol=2e-6)
    unpadded = model.get_text_features(batch["input_ids"][:1])
    torch.testing.assert_close(unpadded.pooler_output, text.pooler_output[:1], rtol=0, atol=2e-6)
    state = text.last_hidden_state[:, 0]
    torch.testing.assert_close(text.pooler_output, model.text_projector(state))
    image = model.get_image_features(batch["pixel_values"])
    torch.testing.assert_close(image.pooler_output, model.projector(image.last_hidden_state[:, 0]))
    both = model.get_multimodal_features(**joint_of(batch))
    torch.testing.assert_close(both.pooler_output, model(**joint_of(batch)).pooler_output)
    assert (both.pooler_output[0] - image.pooler_output[0]).abs().max() > 1e-3  # the words are read
    torch.testing.assert_close(both.pooler_output[1], image.pooler_output[1], rtol=0, atol=2e-6)  # row 1 has none


def test_retrieval_compares_all_with_all():
    model = build(OneRForImageTextRetrieval)
    batch = joint_batch([5, 1, 3])
    pixels = batch["pixel_values"][:2]
    output = model(**text_of(batch), pixel_values=pixels)
    image = nn.functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    text = nn.functional.normalize(model.get_text_features(**text_of(batch)).pooler_output, dim=-1)
    torch.testing.assert_close(output.logits_per_image, image @ text.T / 0.2)
    assert output.logits_per_image.shape == (2, 3)
    torch.testing.assert_close(output.logits_per_text, output.logits_per_image.T)
    joint = model(**joint_of(batch), return_loss=True)
    loss = 0.0
    for logits in (joint.logits_per_image, joint.logits_per_text):
        loss += sum(-logits[i].log_softmax(0)[i] for i in range(3)) / 6
    torch.testing.assert_close(joint.loss, loss)
    assert model(pixel_values=pixels).logits_per_image is None
    learnable = OneRForImageTextRetrieval(tiny_config(learnable_temperature=True, temperature=0.05))
    assert learnable.logit_scale.exp().item() == pytest.approx(20.0, rel=1e-5)
    learnable.eval().logit_scale.data.fill_(100.0)
    held = learnable(**text_of(batch), pixel_values=pixels)
    torch.testing.assert_close(held.logits_per_image, 100 * held.image_embeds @ held.text_embeds.T)


def test_classifier_reads_the_pooled_state():
    model, batch = build(OneRForImageClassification, num_labels=7), joint_batch([5, 2])
    output = model(pixel_values=batch["pixel_values"], labels=torch.tensor([3, 6]))
    state = model.oner(pixel_values=batch["pixel_values"]).last_hidden_state[:, 0]
    torch.testing.assert_close(output.logits, state @ model.classifier.weight.T + model.classifier.bias)
    expected = -(output.logits[0].log_softmax(0)[3] + output.logits[1].log_softmax(0)[6]) / 2
    torch.testing.assert_close(output.loss, expected)


def test_hidden_states_and_attentions_come_when_asked():
    model, batch = build(), joint_batch([5, 2])
    model.set_attn_implementation("eager")
    output = model(**joint_of(batch), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    embedded, _ = model.embeddings(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    torch.testing.assert_close(output.hidden_states[0], embedded)
    assert output.attentions[0].shape == (2, 4, 22, 22)
    assert output.attentions[0][1, :, :, 19:].abs().max() == 0  # padding is never attended
    torch.testing.assert_close(output.attentions[1].sum(-1), torch.ones(2, 4, 22))


# ways to compute the same


@pytest.mark.slow  # on the CPU each shape is compiled to C++ first
@torch.no_grad()
def test_flex_equals_sdpa():
    model, batch = build(), joint_batch([5, 0, 3])
    real = batch["attention_mask"].bool()
    expected = model(**joint_of(batch)).last_hidden_state[real]
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(**joint_of(batch)).last_hidden_state[real], expected, rtol=0, atol=5e-6)


# initialisation and checkpoints


def test_initialisation_is_maes():
    config = OneRConfig(
        vocab_size=3000, hidden_size=128, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=16,
        projection_hidden_size=200, projection_dim=64, stem="linear", cls_token_id=3, mask_token_id=4,
    )  # fmt: skip
    model = OneRForPreTraining(config)
    layer = model.oner.layers[0]

    def uniform_in(weight, bound):
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)

    uniform_in(layer.attention.qkv.weight, (6 / (128 + 3 * 128)) ** 0.5)  # MAE: the fused matrix as one
    uniform_in(layer.attention.proj.weight, (6 / 256) ** 0.5)
    uniform_in(layer.feed_forward.fc1.weight, (6 / (5 * 128)) ** 0.5)
    uniform_in(model.oner.embeddings.stem.projection.weight, (6 / (3 * 256 + 128)) ** 0.5)
    uniform_in(model.oner.projector[0].weight, 128**-0.5)  # torch's default, as MoCo-v3
    uniform_in(model.predictor[3].weight, 200**-0.5)
    for linear in (layer.attention.qkv, layer.attention.proj, layer.feed_forward.fc1, model.lm_head.dense):
        assert linear.bias.abs().max() == 0
    assert model.oner.embeddings.stem.projection.bias.abs().max() == 0
    words = model.oner.embeddings.word_embeddings.weight
    assert words.std().item() == pytest.approx(0.02, rel=0.02) and abs(words.mean().item()) < 1e-3
    assert model.oner.embeddings.patch_mask_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(layer.norm1.weight, torch.ones(128)) and layer.norm1.bias.abs().max() == 0


def test_conv_stem_keeps_torchs_initialisation():
    stem = OneRModel(tiny_config(hidden_size=128, patch_size=16)).embeddings.stem
    fan_in = 9 * 64
    weight = stem.layers[9].weight
    assert weight.shape == (128, 64, 3, 3)
    assert weight.abs().max() <= fan_in**-0.5
    assert weight.std().item() == pytest.approx(fan_in**-0.5 / 3**0.5, rel=0.05)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("pretrained")
    model = build(OneRForPreTraining, two_heads=True, learnable_temperature=True)
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("cls", CLASSES)
def test_a_second_head_a_temperature_and_computed_tables_are_served_too(cls, checkpoint):
    """Beside what test_families_models.py asks of the checkpoint of any family."""
    folder, trained = checkpoint
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    fresh = {"classifier.weight", "classifier.bias"} if cls is OneRForImageClassification else set()
    assert set(report["missing_keys"]) == fresh and not report["unexpected_keys"]
    source, tower = trained.state_dict(), getattr(model, "oner", model)
    for name, value in model.state_dict().items():
        if name not in fresh:
            assert torch.equal(value, source.get(name, source.get(f"oner.{name}"))), name
    for name in ("image_positions", "text_positions"):
        assert torch.equal(getattr(tower.embeddings, name), getattr(trained.oner.embeddings, name)), name


def test_missing_heads_are_initialised(tmp_path):
    build(OneRForImageTextRetrieval).save_pretrained(tmp_path)
    model, report = OneRForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    missing = {name.split(".")[0] for name in report["missing_keys"]}
    assert missing == {"predictor", "lm_head", "pixel_head"}
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model.predictor[0].weight.abs().max() <= 8**-0.5 and model.predictor[0].weight.std() > 0.1
    assert model.pixel_head.weight.abs().max() <= (6 / (32 + 48)) ** 0.5 and model.pixel_head.weight.std() > 0.05
    assert torch.equal(model.lm_head.norm.weight, torch.ones(32))
    assert torch.equal(model.predictor[1].running_var, torch.ones(16))
    # the tower has a fresh head in the classifier and its own weights below
    classifier = OneRForImageClassification.from_pretrained(tmp_path, num_labels=5)
    assert classifier.classifier.weight.shape == (5, 32) and torch.isfinite(classifier.classifier.weight).all()


@pytest.mark.parametrize("cls", CLASSES)
def test_no_parameter_is_a_scalar(cls):
    model = cls(tiny_config(learnable_temperature=True, two_heads=True))
    assert [name for name, parameter in model.named_parameters() if parameter.ndim == 0] == []
    if cls in (OneRForPreTraining, OneRForImageTextRetrieval):
        assert model.logit_scale.shape == (1,)


ZERO_INIT = """
import sys, torch, deepspeed
from transformers.integrations import HfDeepSpeedConfig
from oner import OneRForPreTraining
folder, rendezvous = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method="file://" + rendezvous, rank=0, world_size=1)
deepspeed.init_distributed("gloo")
plain = OneRForPreTraining.from_pretrained(folder)
setup = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
sharded = OneRForPreTraining.from_pretrained(folder)
fresh = OneRForPreTraining._from_config(plain.config)
for model in (sharded, fresh):
    parameters = dict(model.named_parameters())
    assert all(hasattr(p, "ds_shape") for p in parameters.values())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        for name, value in plain.named_parameters():
            assert parameters[name].shape == value.shape, name
            assert torch.isfinite(parameters[name]).all(), name
            assert model is fresh or torch.equal(parameters[name], value), name
        spread = fresh.oner.layers[0].attention.qkv.weight.std() if model is fresh else torch.tensor(0.12)
        assert 0.09 < spread.item() < 0.15, spread  # sqrt(2 / (32 + 96)) = 0.125
    for name, buffer in plain.named_buffers():
        if "positions" in name:
            assert torch.equal(dict(model.named_buffers())[name], buffer), name
print("zero.Init agrees")
"""


@pytest.mark.slow
def test_zero_init_keeps_weights_and_tables(checkpoint, tmp_path, root):
    pytest.importorskip("deepspeed", reason="install oner[deepspeed] to test ZeRO-3's zero.Init")
    folder, _ = checkpoint
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29555",
    }
    command = [sys.executable, "-c", ZERO_INIT, str(folder), str(tmp_path / "rendezvous")]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert "zero.Init agrees" in result.stdout, result.stderr[-3000:]

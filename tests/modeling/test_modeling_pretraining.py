"""The packed step against the passes it stands for, each run alone; in fp64, where they differ by rounding alone.

B pairs, L positions, N = 16 patches, W word slots, D = 32 width, P = 8 embedding width, M masked words.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from naive_streams import crossed_states, masks_of, three_kinds
from tiny_oner import joint_batch, randomised, tiny_config

from oner import OneRForMaskedLM, OneRForPreTraining
from oner.modeling import modeling_oner_pretraining, vl_layers
from oner.modeling.vl_layers import split_streams
from oner.training.run.optimization import checkpoint_activations

LENGTHS = [5, 0, 3, 1]
STEP = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "masked_input_ids",
    "bool_masked_pos",
    "text_index",
    "mlm_index",
)


@pytest.fixture(autouse=True)
def in_fp64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(**overrides) -> OneRForPreTraining:
    """In training mode, so that batch norms use the statistics of the batch."""
    return randomised(OneRForPreTraining(tiny_config(**overrides))).train()


def step_inputs(batch: dict, *without: str) -> dict:
    return {name: batch[name] for name in STEP if name not in without}


def pooled(model: OneRForPreTraining, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """F(X) by the definition: [CLS], or the mean over patches and words."""
    if model.config.pooling == "cls":
        return states[:, 0]
    rows = []
    for row in range(len(states)):
        content = states[row, 1:][mask[row, 1:]]
        rows.append(content.mean(0) if len(content) else torch.zeros_like(states[row, 0]))
    return torch.stack(rows)


def separate_states(model: OneRForPreTraining, batch: dict, masked: bool) -> dict[str, torch.Tensor]:
    """Three calls of the tower. (B, L, D) of each stream, after the final norm."""
    return {name: model.oner(**inputs).last_hidden_state for name, inputs in three_kinds(batch, masked).items()}


def expected_embeddings(model: OneRForPreTraining, batch: dict, masked: bool, names, predict=True) -> dict:
    """Equations 1 to 4 from separate passes; one call of each head over all rows."""
    states, masks = separate_states(model, batch, masked), masks_of(batch)
    pool = {name: pooled(model, state, masks[name]) for name, state in states.items()}
    if "context" in names:
        crossed = crossed_states(model, batch, masked)
        pool["image|text"] = pooled(model, crossed["image"], masks["image"])
        pool["text|image"] = pooled(model, crossed["text"], masks["text"])
    parts = {"mix": ("image", "text"), "context": ("image|text", "text|image")}
    space = model.config.mixup_space

    def mean(rows, name):
        return sum(rows[part] for part in parts.get(name, (name,))) / len(parts.get(name, (name,)))

    def through(head, rows):
        if model.config.head_statistics == "separate":
            return {name: head(row) for name, row in rows.items()}
        return dict(zip(rows, head(torch.cat(list(rows.values()))).split(len(batch["input_ids"])), strict=True))

    if space == "hidden":
        rows = through(model.oner.projector, {name: mean(pool, name) for name in names})
    else:
        used = {part for name in names for part in parts.get(name, (name,))}
        rows = through(model.oner.projector, {name: pool[name] for name in used})
        if space == "normalized":
            rows = {name: row / row.norm(dim=-1, keepdim=True) for name, row in rows.items()}
        rows = {name: mean(rows, name) for name in names}
    return through(model.predictor, rows) if predict else rows


def assert_same(got: dict, expected: dict) -> None:
    assert set(got) == set(expected)
    for name in expected:
        assert got[name].shape == expected[name].shape, name
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


ALL = ("image", "text", "mix", "image_text", "context")
READINGS = [
    {},
    {"pooling": "mean"},
    {"head_statistics": "separate"},
    {"head_norm": "layer"},
    {"head_norm": "none", "projector_layers": 1, "predictor_layers": 0},
    {"mixup_space": "projected"},
    {"mixup_space": "normalized"},
    {"context_states": "co_attention"},
    {"context_states": "last_layer"},
    {"stem": "linear"},
]


@pytest.mark.parametrize("reading", READINGS, ids=lambda reading: "-".join(map(str, reading.values())) or "default")
@pytest.mark.parametrize("given", [True, False], ids=["index", "no-index"])
def test_the_packed_step_equals_separate_passes(reading, given):
    model, batch = build(**reading), joint_batch(LENGTHS, slots=7)
    inputs = step_inputs(batch) if given else step_inputs(batch, "text_index")
    output = model(**inputs, representations=ALL)
    assert_same(output.embeddings, expected_embeddings(copy.deepcopy(model), batch, True, ALL))


def test_a_context_without_its_cls_and_every_caption_with_words():
    model, batch = build(context_cls=False), joint_batch([5, 2, 3, 1])
    output = model(**step_inputs(batch), representations=("context",))
    assert_same(output.embeddings, expected_embeddings(copy.deepcopy(model), batch, True, ("context",)))
    with_cls = copy.deepcopy(model)
    with_cls.config.context_cls = True
    other = with_cls(**step_inputs(batch), representations=("context",)).embeddings["context"]
    assert (other - output.embeddings["context"]).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_context_without_any_key_is_finite(implementation):
    model, batch = build(context_cls=False), joint_batch(LENGTHS)  # row 1 has no word
    model.set_attn_implementation(implementation)
    output = model(**step_inputs(batch), representations=("context",))
    output.embeddings["context"].square().sum().backward()
    assert torch.isfinite(output.embeddings["context"]).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_shared_statistics_are_one_batch_norm_over_all_streams():
    shared, batch = build(), joint_batch(LENGTHS)
    apart = copy.deepcopy(shared)
    apart.config.head_statistics = "separate"
    names = ("image", "text")
    one = shared(**step_inputs(batch), representations=names).embeddings
    two = apart(**step_inputs(batch), representations=names).embeddings
    # the last batch norm has no affine: its output is standardised over what it saw
    together = torch.cat([one["image"], one["text"]])
    torch.testing.assert_close(together.mean(0), torch.zeros(8), rtol=0, atol=1e-11)
    assert one["image"].mean(0).abs().max() > 0.05
    for name in names:
        torch.testing.assert_close(two[name].mean(0), torch.zeros(8), rtol=0, atol=1e-11)


def scalar_of(embeddings: dict, words: dict, pixels: dict) -> torch.Tensor:
    """A scalar that weighs every number differently."""
    generator = torch.Generator().manual_seed(3)
    total = 0.0
    for group in (embeddings, words, pixels):
        for name in sorted(group):
            value = group[name]
            total = total + (value * torch.randn(value.shape, generator=generator)).sum() / value.numel() ** 0.5
    return total


@pytest.mark.parametrize("contrast_masked", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_gradients_of_the_whole_step(contrast_masked, checkpointing):
    """Embeddings, words and pixels of all streams, and the gradient of every parameter."""
    packed, batch = build(), joint_batch(LENGTHS, slots=6)
    alone = copy.deepcopy(packed)
    if checkpointing:
        checkpoint_activations(packed)
    output = packed(**step_inputs(batch), representations=ALL, contrast_masked=contrast_masked)
    states = separate_states(alone, batch, masked=True)
    slots = batch["text_index"][batch["mlm_index"]]
    words, pixels = {}, {}
    for name, first in (("text", 1), ("image_text", 17)):
        logits = alone.lm_head(states[name][:, first:].flatten(0, 1))
        words[name] = logits[slots]
    for name in ("image", "image_text"):
        pixels[name] = alone.pixel_head(states[name][:, 1:17])
    embeddings = expected_embeddings(alone, batch, contrast_masked, ALL)
    assert_same(output.embeddings, embeddings)
    assert_same(output.mlm_logits, words)
    assert_same(output.pixel_predictions, pixels)
    assert words["text"].shape == (3, 50) and pixels["image"].shape == (4, 16, 48)

    scalar_of(output.embeddings, output.mlm_logits, output.pixel_predictions).backward()
    scalar_of(embeddings, words, pixels).backward()
    for (name, one), two in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None, name
        scale = two.grad.abs().max().clamp_min(1e-3).item()
        torch.testing.assert_close(
            one.grad, two.grad, rtol=1e-9, atol=1e-11 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_word_logits_equal_the_masked_language_model(tmp_path):
    model, batch = build().eval(), joint_batch(LENGTHS)
    model.save_pretrained(tmp_path)
    reader = OneRForMaskedLM.from_pretrained(tmp_path).eval()
    output = model(**step_inputs(batch), representations=())
    slots = batch["text_index"][batch["mlm_index"]]
    kinds = three_kinds(batch, masked=True)
    assert output.embeddings == {}
    for name, first in (("text", 1), ("image_text", 17)):
        logits = reader(**kinds[name]).logits[:, first:].flatten(0, 1)[slots]
        torch.testing.assert_close(output.mlm_logits[name], logits, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["image", "text", "image_text"])
def test_own_context_is_the_plain_pass(kind):
    """F(X|X) = F(X), through the module's own crossing."""
    model, batch = build(), joint_batch(LENGTHS, slots=6)
    text_mask = batch["attention_mask"][:, 17:]
    embedded = model._embed(batch["input_ids"][:, 17:], batch["pixel_values"], None, None, batch["text_index"])
    wanted = [(kind, kind, embedded), (f"{kind}|{kind}", f"{kind}|{kind}", embedded)]
    packed, streams = model._pack(wanted, batch["text_index"], text_mask)
    packed = model._encode(packed, streams, text_mask)
    parts = split_streams(packed, list(streams.values()))
    own, crossed = (stream.pad(*parts[name]) for name, stream in streams.items())
    torch.testing.assert_close(crossed, own, rtol=0, atol=1e-11)
    mask = masks_of(batch)[kind][..., None]
    plain = separate_states(model, batch, masked=False)[kind]
    torch.testing.assert_close(crossed * mask, plain * mask, rtol=1e-9, atol=1e-11)


def test_padding_and_clean_passes():
    model, names = build(), ("image", "text", "mix", "image_text", "context")
    tight = model(**step_inputs(joint_batch(LENGTHS)), representations=names)
    loose = model(**step_inputs(joint_batch(LENGTHS, slots=12)), representations=names)
    assert_same(loose.embeddings, tight.embeddings)
    assert_same(loose.mlm_logits, tight.mlm_logits)
    batch = joint_batch(LENGTHS)
    clean = model(**step_inputs(batch, "masked_input_ids", "bool_masked_pos", "mlm_index"), predict=False)
    names = ("image", "text", "mix", "image_text")
    assert_same(clean.embeddings, expected_embeddings(copy.deepcopy(model), batch, False, names, predict=False))
    assert clean.mlm_logits == {} and clean.pixel_predictions == {} and clean.logit_scale is None


def test_two_heads_give_each_modality_its_own():
    model, batch = build(two_heads=True), joint_batch(LENGTHS)
    output = model(**step_inputs(batch), representations=("image", "text"))
    states = separate_states(copy.deepcopy(model), batch, masked=True)
    image = model.predictor(model.oner.projector(states["image"][:, 0]))
    text = model.text_predictor(model.oner.text_projector(states["text"][:, 0]))
    assert_same(output.embeddings, {"image": image, "text": text})
    assert (model.oner.text_projector[0].weight - model.oner.projector[0].weight).abs().max() > 0.01


def test_only_the_streams_asked_for_are_answered():
    model, batch = build(), joint_batch(LENGTHS)
    output = model(**step_inputs(batch), representations=("text",), masked_streams=("text",))
    assert set(output.embeddings) == {"text"} and set(output.mlm_logits) == {"text"}
    assert output.pixel_predictions == {}
    output = model(**step_inputs(batch), representations=(), masked_streams=("image",))
    assert output.mlm_logits == {} and set(output.pixel_predictions) == {"image"}


def test_no_masked_words_give_empty_logits():
    model, batch = build(), joint_batch(LENGTHS)
    batch["mlm_index"] = torch.zeros(0, dtype=torch.long)
    output = model(**step_inputs(batch))
    assert output.mlm_logits["text"].shape == (0, 50) and output.mlm_logits["text"].requires_grad


def test_captions_may_all_be_empty():
    model, batch = build(), joint_batch([0, 0, 0])
    output = model(**step_inputs(batch), representations=ALL)
    assert_same(output.embeddings, expected_embeddings(copy.deepcopy(model), batch, True, ALL))


@pytest.mark.parametrize("contrast_masked", [True, False])
def test_compiles_without_a_graph_break(contrast_masked):
    model, batch = build().eval(), joint_batch(LENGTHS)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    wanted = {"representations": ALL, "contrast_masked": contrast_masked}
    output, expected = compiled(**step_inputs(batch), **wanted), model(**step_inputs(batch), **wanted)
    assert_same(output.embeddings, expected.embeddings)
    assert_same(output.mlm_logits, expected.mlm_logits)
    assert_same(output.pixel_predictions, expected.pixel_predictions)


@pytest.mark.parametrize("context_states", ["own", "co_attention"])
def test_eager_equals_sdpa(context_states):
    model, batch = build(context_states=context_states), joint_batch(LENGTHS, slots=8)
    model.set_attn_implementation("eager")
    eager = model(**step_inputs(batch), representations=ALL)
    model.set_attn_implementation("sdpa")
    assert_same(eager.embeddings, model(**step_inputs(batch), representations=ALL).embeddings)


@pytest.mark.slow  # on the CPU each shape is compiled to C++ first
@torch.no_grad()
def test_flex_equals_sdpa():
    model, batch = build(), joint_batch(LENGTHS, slots=8)
    expected = model(**step_inputs(batch), representations=ALL)
    model.set_attn_implementation("flex_attention")
    assert_same(model(**step_inputs(batch), representations=ALL).embeddings, expected.embeddings)


def test_the_learnable_temperature_travels_with_the_output():
    model = build(learnable_temperature=True, temperature=0.1)
    output = model(**step_inputs(joint_batch(LENGTHS)))
    assert output.logit_scale is model.logit_scale and output.logit_scale.exp().item() == pytest.approx(10, rel=1e-5)


def naive_varlen(query, key, value, starts, _, longest, __, scale):
    """Each sequence by itself. (n, H, d) three times, (R + 1,) -> (n, H, d)."""
    rows = []
    for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert 0 < end - first <= longest
        q, k, v = (part[first:end].transpose(0, 1) for part in (query, key, value))  # (H, L, d)
        rows.append(((q @ k.transpose(1, 2) * scale).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("contrast_masked", [True, False])
def test_rows_without_padding_attend_as_padded_ones_do(monkeypatch, contrast_masked):
    """What a GPU's kernel for unequal lengths is given, answered by a loop: same embeddings, logits and gradients."""
    batch = joint_batch([3, 0, 7, 1, 12], dtype=torch.float64)
    told = []
    for unpadded in (False, True):
        torch.manual_seed(0)
        model = randomised(OneRForPreTraining(tiny_config())).double().train()
        if unpadded:
            monkeypatch.setattr(vl_layers, "varlen_attn", naive_varlen)
            monkeypatch.setattr(modeling_oner_pretraining, "attends_unpadded", lambda *_: True)
        output = model(**step_inputs(batch), contrast_masked=contrast_masked)
        groups = {"embedding": output.embeddings, "words": output.mlm_logits, "pixels": output.pixel_predictions}
        values = {f"{kind} {name}": value for kind, group in groups.items() for name, value in group.items()}
        sum(value.square().sum() for value in values.values()).backward()
        gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        told.append((values, gradients))
    for one, other in zip(*told, strict=True):
        assert one.keys() == other.keys() and len(one) >= 8
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-11, msg=name)


def test_rows_are_unpadded_on_cuda_in_half_precision_only(monkeypatch):
    monkeypatch.setattr(vl_layers, "varlen_attn", naive_varlen)  # whatever the installed torch has
    config, like = tiny_config(), torch.empty(2, 32)
    stream = vl_layers.Stream("image", 2, 17)
    assert not vl_layers.attends_unpadded(config, [stream], like, training=True)
    # the question is asked of names and types alone
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    config._attn_implementation = "sdpa"
    assert vl_layers.attends_unpadded(config, [stream], on_gpu, training=True)
    assert not vl_layers.attends_unpadded(config, [replace(stream, context="text")], on_gpu, training=True)
    on_gpu.dtype = torch.float32
    assert not vl_layers.attends_unpadded(config, [stream], on_gpu, training=True)
    on_gpu.dtype = torch.bfloat16
    monkeypatch.setattr(vl_layers, "varlen_attn", None)
    assert not vl_layers.attends_unpadded(config, [stream], on_gpu, training=True)
    monkeypatch.undo()
    config._attn_implementation = "eager"
    assert not vl_layers.attends_unpadded(config, [stream], on_gpu, training=True)

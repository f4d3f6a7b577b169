"""Embeddings, attention and packing, each against what it says it computes.

B rows, L positions, N = 16 patches, T words, D = 32 width.
"""

from inspect import signature

import pytest
import torch
from tiny_oner import CLS, IMAGE, joint_batch, naive_attention, randomised, text_of, tiny_config
from torch import nn
from transformers.masking_utils import create_bidirectional_mask

from oner import OneRModel
from oner.modeling.vl_embeddings import ConvStem, LinearStem
from oner.modeling.vl_heads import ContrastiveHead
from oner.modeling.vl_layers import SelfAttention, Stream, eager_attention_forward, sequences_of, split_streams


def tower(**overrides) -> OneRModel:
    return randomised(OneRModel(tiny_config(**overrides))).eval()


def test_words_start_at_position_zero_in_every_layout():
    model, batch = tower(), joint_batch([4, 2])
    embeddings, text = model.embeddings, text_of(batch)
    alone, _ = embeddings(**text, pixel_values=None)
    joint, _ = embeddings(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    torch.testing.assert_close(joint[0, 17:], alone[0, 1:])
    table, words = embeddings.text_positions, embeddings.word_embeddings.weight
    torch.testing.assert_close(joint[0, 17 + 2], words[batch["input_ids"][0, 17 + 2]] + table[2])
    torch.testing.assert_close(alone[1, 0], words[CLS])  # [CLS] has MAE's zero position


def test_patches_stand_where_the_placeholders_are():
    model, batch = tower(), joint_batch([4, 2])
    joint, types = model.embeddings(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    picture, picture_types = model.embeddings(None, None, batch["pixel_values"])
    torch.testing.assert_close(joint[:, :17], picture)
    assert types[0].tolist() == [0] + [1] * 16 + [2] * 4
    assert types[1].tolist() == [0] + [1] * 16 + [2, 2, 3, 3]
    assert picture_types.tolist() == [[0] + [1] * 16] * 2
    # also when words come first
    ids = torch.tensor([[CLS, 9, 8] + [IMAGE] * 16]).expand(2, -1)
    moved, types = model.embeddings(ids, None, batch["pixel_values"])
    torch.testing.assert_close(moved[:, 3:], picture[:, 1:])
    assert types[0].tolist() == [0, 2, 2] + [1] * 16


def test_words_are_scaled_when_asked():
    plain = tower()
    scaled = tower(scale_word_embeddings=True)
    scaled.load_state_dict(plain.state_dict())
    ids = torch.tensor([[CLS, 9, 8]])
    table = plain.embeddings.text_positions[:2]
    one, _ = plain.embeddings(ids, None, None)
    many, _ = scaled.embeddings(ids, None, None)
    torch.testing.assert_close(many[:, 0], one[:, 0] * 32**0.5)
    torch.testing.assert_close(many[:, 1:] - table, (one[:, 1:] - table) * 32**0.5)


def test_masked_patches_become_the_mask_token():
    model, batch = tower(), joint_batch([2, 2])
    masked = batch["bool_masked_pos"]
    clean = model.embeddings.embed_patches(batch["pixel_values"])
    hidden = model.embeddings.embed_patches(batch["pixel_values"], masked)
    token = model.embeddings.patch_mask_token[0] + model.embeddings.image_positions
    torch.testing.assert_close(hidden[masked], token.expand(2, -1, -1)[masked])
    torch.testing.assert_close(hidden[~masked], clean[~masked])


@pytest.mark.parametrize("before", [False, True])
def test_masked_pixels_leak_through_the_stem_unless_zeroed_before(before):
    model, batch = tower(mask_before_stem=before), joint_batch([2])
    masked = torch.zeros(1, 16, dtype=torch.bool)
    masked[0, 5] = True  # row 1, column 1 of the grid: pixels 4 to 7
    other = batch["pixel_values"].clone()
    other[:, :, 4:8, 4:8] += 3.0
    one = model.embeddings.embed_patches(batch["pixel_values"], masked)
    two = model.embeddings.embed_patches(other, masked)
    assert torch.equal(one, two) == before


def test_conv_stem_halves_the_picture_at_each_stage():
    stem = ConvStem(patch_size=16, num_channels=3, hidden_size=768)
    convolutions = [layer for layer in stem.layers if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [96, 192, 384, 768, 768]
    assert [layer.stride[0] for layer in convolutions] == [2, 2, 2, 2, 1]
    small = ConvStem(4, 3, 32).eval()
    pixels = torch.randn(2, 3, 16, 24)
    assert small(pixels).shape == (2, 4 * 6, 32)
    maps = small.layers(pixels)
    torch.testing.assert_close(small(pixels)[1, 1 * 6 + 4], maps[1, :, 1, 4])  # row-major


def test_linear_stem_is_a_product_with_each_patch():
    stem, pixels = LinearStem(4, 3, 8), torch.randn(1, 3, 8, 8)
    kernel = stem.projection.weight.flatten(1)
    expected = kernel @ pixels[0, :, 4:8, 0:4].flatten() + stem.projection.bias
    torch.testing.assert_close(stem(pixels)[0, 2], expected)


def test_contrastive_head_has_moco_v3s_layers():
    head = ContrastiveHead(6, 10, 4, 3, "batch")
    kinds = [type(layer).__name__.removeprefix("Head") for layer in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
    assert head[1].affine and head[4].affine and not head[7].affine
    kinds = [type(layer).__name__.removeprefix("Head") for layer in ContrastiveHead(4, 10, 4, 2, "layer")]
    assert kinds == ["Linear", "LayerNorm", "ReLU", "Linear", "LayerNorm"]
    linear = ContrastiveHead(6, 10, 4, 1, "batch")
    assert [type(layer).__name__.removeprefix("Head") for layer in linear] == ["Linear"] and linear[0].bias is not None
    states = torch.randn(3, 6)
    assert ContrastiveHead(6, 10, 6, 0, "batch")(states) is states
    assert [type(layer).__name__.removeprefix("Head") for layer in ContrastiveHead(6, 9, 4, 2, "none")] == [
        "Linear",
        "ReLU",
        "Linear",
    ]


def attention_module(**overrides) -> SelfAttention:
    config = tiny_config(**overrides)
    config._attn_implementation = "eager"
    module = randomised(SelfAttention(config))
    nn.init.xavier_uniform_(module.qkv.weight, gain=3.0)
    return module


def test_attention_equals_a_naive_loop_over_heads():
    module, states = attention_module(), torch.randn(2, 5, 32)
    keys = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]]).bool()
    bias = torch.zeros(2, 1, 1, 5).masked_fill(~keys[:, None, None], torch.finfo(torch.float32).min)
    output, weights = module(states, bias)
    torch.testing.assert_close(output, naive_attention(module, states, states, keys), rtol=1e-4, atol=1e-5)
    assert weights.shape == (2, 4, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
    assert weights[1, :, :, [2, 4]].abs().max() == 0


def test_attention_to_both_splits_into_two_attentions():
    """Appendix A, equations 9 to 14, on the module's own queries, keys and values, head by head, in fp64."""
    module = attention_module().double()
    module.config._attn_implementation = "sdpa"  # eager takes its softmax in fp32
    x, y = torch.randn(1, 7, 32, dtype=torch.float64), torch.randn(1, 4, 32, dtype=torch.float64)
    (q, k_x, v_x), (_, k_y, v_y) = (module._heads(module.qkv(states)) for states in (x, y))  # each (1, H, L, d)

    def attend(keys, values):  # -> (1, L_X, D), before the output projection
        return module._attend(q, keys, values, None)[0]

    both = attend(torch.cat([k_x, k_y], 2), torch.cat([v_x, v_y], 2))  # f(X | X, Y)
    own, other = attend(k_x, v_x), attend(k_y, v_y)  # f(X | X), f(X | Y)
    mass_x = torch.einsum("hid,hjd->ihj", q[0], k_x[0]).div(8**0.5).exp().sum(-1)  # (L_X, H)
    mass_y = torch.einsum("hid,hjd->ihj", q[0], k_y[0]).div(8**0.5).exp().sum(-1)
    share = (mass_x / (mass_x + mass_y)).repeat_interleave(8, dim=1)[None]  # lambda_X, (1, L_X, D)
    assert share.std() > 0.05 and (own - other).abs().max() > 0.1  # the two differ and neither wins
    torch.testing.assert_close(both, share * own + (1 - share) * other, rtol=0, atol=1e-12)
    # the module's own forward over the concatenation is the same thing
    output, _ = module(torch.cat([x, y], dim=1))
    torch.testing.assert_close(output[:, :7], module.proj(both), rtol=0, atol=1e-12)


def two_streams() -> tuple[torch.Tensor, Stream, Stream]:
    """A text stream of lengths 2, 0, 3 in four slots, and a picture stream of 5 positions, packed behind it."""
    text = Stream("text", batch_size=3, prefix=1, text_slots=4, text_index=torch.tensor([0, 1, 8, 9, 10]))
    picture = Stream("image", batch_size=3, prefix=5)
    return torch.randn(3 + 5 + 15, 32), text, picture


def padded_streams(packed: torch.Tensor, text: Stream, picture: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    parts = split_streams(packed, [text, picture])
    return text.pad(*parts["text"]), picture.pad(*parts["image"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mask_in_fp32_leaves_attention_in_half_precision(dtype):
    # under autocast, products are in half precision and the mask in fp32, whose lowest value overflows there
    query, key, value = torch.randn(3, 1, 1, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.zeros(1, 1, 3, 3)
    mask[..., 2] = mask[..., 2, :] = torch.finfo(torch.float32).min
    output, weights = eager_attention_forward(nn.Identity(), query, key, value, mask, scaling=0.5)
    assert output.dtype == weights.dtype == dtype
    assert weights[0, 0, :2, 2].tolist() == [0, 0]
    scores = (query.float() * 0.5 @ key.float().mT)[0, 0, :2, :2]
    torch.testing.assert_close(weights[0, 0, :2, :2].float(), scores.softmax(-1), atol=0.01, rtol=0)
    torch.testing.assert_close(weights[0, 0, 2].float(), torch.full((3,), 1 / 3), atol=0.002, rtol=0)


def test_streams_split_pad_and_unpad():
    packed, text, picture = two_streams()
    parts = split_streams(packed, [text, picture])
    torch.testing.assert_close(parts["text"][0], packed[:3].view(3, 1, 32))
    torch.testing.assert_close(parts["text"][1], packed[3:8])
    assert parts["image"][1] is None
    padded, pictures = padded_streams(packed, text, picture)
    assert padded.shape == (3, 5, 32)
    torch.testing.assert_close(padded[:, 0], packed[:3])
    torch.testing.assert_close(padded[0, 1:3], packed[3:5])
    torch.testing.assert_close(padded[2, 1:4], packed[5:8])
    assert padded[1, 1:].abs().sum() == 0 and padded[0, 3:].abs().sum() == 0 and padded[2, 4].abs().sum() == 0
    torch.testing.assert_close(torch.cat(text.unpad(padded)), packed[:8])
    torch.testing.assert_close(pictures, packed[8:].view(3, 5, 32))
    torch.testing.assert_close(torch.cat(picture.unpad(pictures)), packed[8:])


def test_key_masks_say_what_may_be_attended():
    _, text, picture = two_streams()
    real = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    assert text.key_mask(real).tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert text.key_mask(real, skip_cls=True)[0].tolist() == [0, 1, 1, 0, 0]
    assert picture.key_mask(real) is None
    assert picture.key_mask(real, skip_cls=True).tolist() == [[0, 1, 1, 1, 1]] * 3


@pytest.mark.skipif(
    "allow_is_bidirectional_skip" not in signature(create_bidirectional_mask).parameters,
    reason="the installed transformers always asks",
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_accelerator_is_not_asked_for_the_values_of_a_mask(implementation):
    """A tensor without values stands for one whose values would have to be waited for."""
    module = attention_module()
    module.config._attn_implementation = implementation
    stream = Stream("text", batch_size=2, prefix=1, text_slots=3)
    stream.set_mask(module.config, torch.ones(2, 4, device="meta"), like=torch.empty(2, 4, 32, device="meta"))
    assert stream.attention_mask.shape == (2, 1, 4, 4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_attention_equals_attention_of_each_stream(implementation):
    packed, text, picture = two_streams()
    module = attention_module()
    module.config._attn_implementation = implementation
    real = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    for stream in (text, picture):
        stream.set_mask(module.config, stream.key_mask(real), like=packed)
    crossed = Stream("crossed", batch_size=3, prefix=5, context="text")
    crossed.set_mask(module.config, text.key_mask(real), like=packed)
    keys = text.key_mask(real).bool()
    everything = torch.ones(3, 5, dtype=torch.bool)
    texts, pictures = padded_streams(packed, text, picture)

    output, _ = module(packed, None, [text, picture])
    expected = naive_attention(module, texts, texts, keys)
    torch.testing.assert_close(output[:8], torch.cat(text.unpad(expected)), rtol=1e-4, atol=1e-5)
    expected = naive_attention(module, pictures, pictures, everything)
    torch.testing.assert_close(output[8:], torch.cat(picture.unpad(expected)), rtol=1e-4, atol=1e-5)

    output, _ = module(packed, None, [text, crossed])
    expected = naive_attention(module, pictures, texts, keys)
    torch.testing.assert_close(output[8:], torch.cat(picture.unpad(expected)), rtol=1e-4, atol=1e-5)


def test_crossed_streams_leave_flash_to_sdpa():
    """transformers' flash path pads queries by the keys' mask, so F(X|Y) takes sdpa there; the rest keeps flash."""
    packed, text, picture = two_streams()
    module = attention_module()
    real = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    crossed = Stream("crossed", batch_size=3, prefix=5, context="text")
    results = {}
    for implementation in ("sdpa", "flash_attention_2"):
        module.config._attn_implementation = implementation
        assert text.implementation(module.config) == implementation
        assert crossed.implementation(module.config) == "sdpa"
        crossed.set_mask(module.config, text.key_mask(real), like=packed)
        texts, pictures = padded_streams(packed, text, picture)
        query, (_, key, value) = module._heads(module.qkv(pictures))[0], module._heads(module.qkv(texts))
        results[implementation] = module._attend(query, key, value, crossed.attention_mask, "sdpa")[0]
    torch.testing.assert_close(results["flash_attention_2"], results["sdpa"])


def test_rows_of_packed_streams_lie_side_by_side():
    """What only an accelerator's kernel reads: each row's prefix, then its tokens, stream after stream."""
    text_mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    lengths, index = [4, 0, 2], text_mask.flatten().nonzero().flatten()
    streams = [Stream("text", 3, 1, 4, index), Stream("image", 3, 5), Stream("image_text", 3, 6, 4, index)]

    # every token is stream, row and position as one number
    rows = []
    for number, stream in enumerate(streams):
        sizes = [stream.prefix + (length if stream.text_slots else 0) for length in lengths]
        rows.append([[100 * number + 10 * row + place for place in range(size)] for row, size in enumerate(sizes)])
    packed = []
    for stream, tokens in zip(streams, rows, strict=True):
        packed += [token for row in tokens for token in row[: stream.prefix]]
        packed += [token for row in tokens for token in row[stream.prefix :]]
    places, sequences = sequences_of(streams, text_mask)
    packed = torch.tensor(packed)
    laid = torch.empty_like(packed).index_copy(0, places, packed)
    assert laid.tolist() == [token for tokens in rows for row in tokens for token in row]
    assert sequences.starts.diff().tolist() == [len(row) for tokens in rows for row in tokens]
    assert sequences.longest == 10

"""Public implementations with the same weights give the same numbers: transformers' ViTMAE and timm's ViT."""

import numpy as np
import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEModel

from oner import OneRConfig, OneRModel
from oner.modeling.vl_embeddings import interpolate_positions, patchify, sincos_1d, sincos_2d

WIDTH, LAYERS, HEADS, IMAGE, PATCH = 48, 3, 4, 32, 8


@pytest.fixture(scope="module")
def mae() -> ViTMAEModel:
    torch.manual_seed(0)
    config = ViTMAEConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=IMAGE,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
        mask_ratio=0.0,
    )
    model = ViTMAEModel(config).eval()
    # transformers 5.23 leaves the table of a fresh ViTMAE at zero: its own guard takes the projection for loaded
    model.embeddings.patch_embeddings.projection._is_hf_initialized = False
    model.embeddings.initialize_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ours(image_size: int = IMAGE) -> OneRModel:
    config = OneRConfig(
        vocab_size=200,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=image_size,
        patch_size=PATCH,
        stem="linear",
        projection_hidden_size=16,
        projection_dim=8,
    )
    return OneRModel(config).eval()


def copy_linear(target: torch.nn.Linear, source: torch.nn.Linear) -> None:
    target.load_state_dict(source.state_dict())


def with_mae_weights(mae: ViTMAEModel, image_size: int = IMAGE) -> OneRModel:
    model = ours(image_size)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[model.config.cls_token_id] = mae.embeddings.cls_token.flatten()
        model.embeddings.stem.projection.load_state_dict(mae.embeddings.patch_embeddings.projection.state_dict())
        for layer, source in zip(model.layers, mae.layers, strict=True):
            parts = [source.attention.q_proj, source.attention.k_proj, source.attention.v_proj]
            layer.attention.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            layer.attention.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
            copy_linear(layer.attention.proj, source.attention.o_proj)
            layer.norm1.load_state_dict(source.layernorm_before.state_dict())
            layer.norm2.load_state_dict(source.layernorm_after.state_dict())
            copy_linear(layer.feed_forward.fc1, source.mlp.fc1)
            copy_linear(layer.feed_forward.fc2, source.mlp.fc2)
        model.norm.load_state_dict(mae.layernorm.state_dict())
    return model


def run_mae(mae: ViTMAEModel, pixels: torch.Tensor, **kwargs) -> torch.Tensor:
    """MAE shuffles patches by noise even when it keeps them all: sorted noise keeps them in place."""
    count = (pixels.shape[-1] // PATCH) ** 2
    noise = torch.arange(count, dtype=torch.float32).expand(len(pixels), -1)
    return mae(pixels, noise=noise, **kwargs).last_hidden_state


def test_forward_and_gradients_equal_vit_mae(mae):
    model = with_mae_weights(mae)
    pixels = torch.randn(2, 3, IMAGE, IMAGE)
    mine, theirs = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
    output, expected = model(pixel_values=mine).last_hidden_state, run_mae(mae, theirs)
    assert output.shape == (2, 17, WIDTH)
    assert (output - expected).abs().max() <= 1e-5
    weights = torch.randn(expected.shape) / expected.numel() ** 0.5
    mae.zero_grad()
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    first, last = mae.layers[0], mae.layers[-1]
    pairs = {
        "pixels": (mine.grad, theirs.grad),
        "stem": (
            model.embeddings.stem.projection.weight.grad,
            mae.embeddings.patch_embeddings.projection.weight.grad,
        ),
        "[CLS]": (
            model.embeddings.word_embeddings.weight.grad[model.config.cls_token_id],
            mae.embeddings.cls_token.grad.flatten(),
        ),
        "keys": (model.layers[0].attention.qkv.weight.grad[WIDTH : 2 * WIDTH], first.attention.k_proj.weight.grad),
        "values": (model.layers[0].attention.qkv.bias.grad[2 * WIDTH :], first.attention.v_proj.bias.grad),
        "feed-forward": (model.layers[-1].feed_forward.fc1.weight.grad, last.mlp.fc1.weight.grad),
        "norm": (model.layers[-1].norm2.weight.grad, last.layernorm_after.weight.grad),
    }
    for name, (got, wanted) in pairs.items():
        assert wanted.abs().max() > 1e-4, name  # the comparison is of something
        assert (got - wanted).abs().max() <= 1e-5, name


def test_interpolated_positions_equal_vit_mae(mae):
    model = with_mae_weights(mae)
    pixels = torch.randn(2, 3, 48, 48)
    expected = run_mae(mae, pixels, interpolate_pos_encoding=True)
    output = model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    assert (output - expected).abs().max() <= 1e-5
    # a stage at a higher resolution keeps the table's own size in the config
    model.config.image_size, model.config.position_image_size = 48, IMAGE
    stage = OneRModel(model.config).eval()
    stage.load_state_dict(model.state_dict())
    assert (stage(pixel_values=pixels).last_hidden_state - expected).abs().max() <= 1e-5
    table = mae.embeddings.position_embeddings
    wanted = mae.embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + 36, WIDTH), 48, 48)
    torch.testing.assert_close(interpolate_positions(table[0, 1:], (4, 4), (6, 6)), wanted[0, 1:], rtol=0, atol=1e-6)


def test_positions_equal_vit_mae(mae):
    table = ours().embeddings.image_positions
    torch.testing.assert_close(table, mae.embeddings.position_embeddings[0, 1:].detach(), rtol=0, atol=1e-6)
    assert mae.embeddings.position_embeddings[0, 0].abs().max() == 0  # [CLS] has none, as ours


def test_positions_equal_a_naive_loop():
    """MAE's table: w_i = 10000^(-i/(D/4)); first half of D for the column, second for the row; [sin | cos]."""
    height, width, dim = 3, 5, 16
    expected = np.zeros((height * width, dim))
    for y in range(height):
        for x in range(width):
            for half, place in enumerate((x, y)):
                for i in range(dim // 4):
                    angle = place * 10000.0 ** (-i / (dim / 4))
                    expected[y * width + x, half * dim // 2 + i] = np.sin(angle)
                    expected[y * width + x, half * dim // 2 + dim // 4 + i] = np.cos(angle)
    table = sincos_2d(torch.arange(height), torch.arange(width), dim)
    assert table.dtype == torch.float64
    np.testing.assert_allclose(table.numpy(), expected, rtol=0, atol=1e-12)


def test_text_positions_equal_a_naive_loop():
    dim, length = 12, 64
    expected = np.zeros((length, dim))
    for place in range(length):
        for i in range(dim // 2):
            angle = place * 10000.0 ** (-2 * i / dim)
            expected[place, i], expected[place, dim // 2 + i] = np.sin(angle), np.cos(angle)
    np.testing.assert_allclose(sincos_1d(torch.arange(length), dim).numpy(), expected, rtol=0, atol=1e-12)
    model = ours()
    table = model.embeddings.text_positions
    assert table.shape == (64, WIDTH)
    np.testing.assert_allclose(table[5, 1].item(), np.sin(5 * 10000.0 ** (-2 / WIDTH)), rtol=0, atol=1e-6)
    assert not table.requires_grad and "embeddings.text_positions" not in model.state_dict()


def test_recomputed_positions_are_sines_at_the_middles_of_patches():
    config = ours().config
    config.image_size, config.position_image_size, config.position_interpolation = 64, 32, "recompute"
    table = OneRModel(config).embeddings.image_positions  # 8 x 8 places on a 4 x 4 grid
    row, column, i = 3, 6, 2
    # a patch of 8 x 8 is half as wide: the first two lie a quarter to either side of the first of 4 x 4
    assert [(place + 0.5) / 2 - 0.5 for place in (0, 1)] == [-0.25, 0.25]
    wanted = np.sin(((column + 0.5) / 2 - 0.5) * 10000.0 ** (-i / (WIDTH / 4)))
    np.testing.assert_allclose(table[row * 8 + column, i].item(), wanted, rtol=0, atol=1e-6)
    wanted = np.sin(((row + 0.5) / 2 - 0.5) * 10000.0 ** (-i / (WIDTH / 4)))
    np.testing.assert_allclose(table[row * 8 + column, WIDTH // 2 + i].item(), wanted, rtol=0, atol=1e-6)


def test_both_interpolations_put_a_patch_at_the_same_place():
    """Slow waves say where a patch is: the bicubic table differs from the sines by its own error, not by a shift."""
    tables = {}
    for how in ("bicubic", "recompute"):
        config = ours().config
        config.image_size, config.position_image_size, config.position_interpolation = 64, 32, how
        tables[how] = OneRModel(config).embeddings.image_positions.view(8, 8, WIDTH)[2:6, 2:6]
    slow = [WIDTH // 4 - 1, WIDTH // 2 + WIDTH // 4 - 1]  # the slowest sine of columns and of rows
    torch.testing.assert_close(tables["recompute"][..., slow], tables["bicubic"][..., slow], rtol=0, atol=1e-3)


def test_patchify_puts_channels_last():
    pixels = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).view(2, 3, 8, 12)
    patches = patchify(pixels, 4)
    assert patches.shape == (2, 6, 48)
    for patch, p, q, channel in [(0, 0, 0, 0), (4, 3, 2, 1), (5, 1, 3, 2)]:
        y, x = patch // 3 * 4 + p, patch % 3 * 4 + q
        assert patches[1, patch, (p * 4 + q) * 3 + channel] == pixels[1, channel, y, x]


def test_forward_and_gradients_equal_timm():
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(
        img_size=IMAGE, patch_size=PATCH, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS, num_classes=0
    ).eval()
    model = ours()
    with torch.no_grad():
        theirs.pos_embed[0, 0] = 0
        theirs.pos_embed[0, 1:] = model.embeddings.image_positions
        model.embeddings.word_embeddings.weight[model.config.cls_token_id] = theirs.cls_token.flatten()
        model.embeddings.stem.projection.load_state_dict(theirs.patch_embed.proj.state_dict())
        for layer, block in zip(model.layers, theirs.blocks, strict=True):
            layer.attention.qkv.load_state_dict(block.attn.qkv.state_dict())
            copy_linear(layer.attention.proj, block.attn.proj)
            layer.norm1.load_state_dict(block.norm1.state_dict())
            layer.norm2.load_state_dict(block.norm2.state_dict())
            copy_linear(layer.feed_forward.fc1, block.mlp.fc1)
            copy_linear(layer.feed_forward.fc2, block.mlp.fc2)
        model.norm.load_state_dict(theirs.norm.state_dict())
    pixels = torch.randn(2, 3, IMAGE, IMAGE)
    mine, other = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
    output, expected = model(pixel_values=mine).last_hidden_state, theirs.forward_features(other)
    assert (output - expected).abs().max() <= 1e-5
    weights = torch.randn(expected.shape) / expected.numel() ** 0.5
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    assert other.grad.abs().max() > 1e-4
    assert (mine.grad - other.grad).abs().max() <= 1e-5
    qkv = theirs.blocks[0].attn.qkv.weight.grad
    assert (model.layers[0].attention.qkv.weight.grad - qkv).abs().max() <= 1e-5

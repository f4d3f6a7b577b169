"""MAE's checkpoints in each layout: loss and gradient of transformers' ViTMAEForPreTraining, with the same noise."""

import pytest
import torch
from test_convert_towers import MAE, by_facebook, jittered, mae_positions
from tiny_momo import tiny_config
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from oner import MomoForPreTraining
from oner.training.conversion.reading import read_weights
from oner.training.conversion.report import MissingWeightsError
from oner.training.conversion.towers import initialise
from oner.training.objectives.momo import MomoObjective, MomoObjectiveArguments

WIDTH = 32
# where a gradient of ours and one of theirs are of the same weight
TOWER = {
    "embeddings.stem.projection.weight": "vit.embeddings.patch_embeddings.projection.weight",
    "layers.0.attention.proj.weight": "vit.layers.0.attention.o_proj.weight",
    "layers.1.feed_forward.fc2.bias": "vit.layers.1.mlp.fc2.bias",
    "norm.weight": "vit.layernorm.weight",
}
DECODER = {
    "embed.weight": "decoder.decoder_embed.weight",
    "mask_token": "decoder.mask_token",
    "layers.0.attention.proj.bias": "decoder.decoder_layers.0.attention.o_proj.bias",
    "layers.0.feed_forward.fc1.weight": "decoder.decoder_layers.0.mlp.fc1.weight",
    "norm.bias": "decoder.decoder_norm.bias",
    "pixel_head.weight": "decoder.decoder_pred.weight",
}


@pytest.fixture(scope="module")
def mae() -> ViTMAEForPreTraining:
    torch.manual_seed(0)
    sizes = {
        **MAE,
        "decoder_intermediate_size": 64,
        "mask_ratio": 0.75,
    }  # a decoder's layers are 4 times as wide inside
    model = jittered(ViTMAEForPreTraining(ViTMAEConfig(**sizes)))
    with torch.no_grad():
        # far from where MAE begins, so that gradients reach the stem
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.vit.embeddings.position_embeddings.copy_(mae_positions(4, 32))
        model.decoder.decoder_pos_embed.copy_(mae_positions(4, MAE["decoder_hidden_size"]))
    return model


def student(**fields) -> MomoForPreTraining:
    sizes = {"intermediate_size": 64, "decoders": ["image"], **fields}
    return MomoForPreTraining(tiny_config(**sizes))


def converted(mae: ViTMAEForPreTraining, layout: str, folder) -> tuple[MomoForPreTraining, object, dict]:
    state = mae.state_dict()
    source = state
    if layout == "facebook":
        source = state = by_facebook(mae)
    elif layout == "saved":
        mae.save_pretrained(folder)
        source = str(folder)
        state = read_weights(source)
    model = student()
    return model, initialise(model, vision=source), state


@pytest.mark.parametrize("norm_pixels", [True, False])
@pytest.mark.parametrize("layout", ["facebook", "transformers", "saved"])
def test_loss_and_gradient_are_vit_maes(mae, layout, norm_pixels, tmp_path):
    model, report, state = converted(mae, layout, tmp_path)
    torch.manual_seed(1)
    pixels, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    mae.zero_grad()
    mae.config.norm_pix_loss = norm_pixels
    theirs = mae(pixels, noise=noise)
    theirs.loss.backward()

    # MAE hides what its noise puts last
    hidden = theirs.mask.bool()
    assert hidden.sum(1).tolist() == [12, 12, 12]
    objective = MomoObjective(model, MomoObjectiveArguments(losses=["mim"], norm_pixels=norm_pixels))
    batch = {"pixel_values": pixels, "bool_masked_pos": hidden, "ids": torch.arange(3)}
    taken = objective(model.train(), batch, 0.0)
    taken.loss.backward()
    assert abs(taken.loss.item() - theirs.loss.item()) <= 1e-5
    gradients = dict(mae.named_parameters())
    names = {f"momo.{one}": other for one, other in TOWER.items()}
    names |= {f"image_decoder.{one}": other for one, other in DECODER.items()}
    for ours, name in names.items():
        expected = gradients[name].grad
        assert expected.abs().max() > 1e-3, name
        assert (model.get_parameter(ours).grad - expected).abs().max() <= 1e-4, name
    qkv = model.momo.layers[0].attention.qkv.weight.grad
    assert (qkv[WIDTH : 2 * WIDTH] - gradients["vit.layers.0.attention.k_proj.weight"].grad).abs().max() <= 1e-4
    cls = model.momo.embeddings.word_embeddings.weight.grad[model.config.cls_token_id]
    assert (cls - gradients["vit.embeddings.cls_token"].grad.flatten()).abs().max() <= 1e-4

    # every name of the file is said, and all of the tower and its decoder is filled
    assert report.used.keys() | report.left_over.keys() == state.keys()
    assert len(report.left_over) == 2 and all("sines" in why for why in report.left_over.values())
    filled = set(report.used.values())
    assert {name for name in model.state_dict() if name.startswith("image_decoder.")} <= filled
    unfilled = {name for name in model.state_dict() if name.startswith("momo.")} - filled
    assert unfilled == {f"momo.{kind}_projection.{part}" for kind in ("image", "text") for part in ("weight", "bias")}


def test_a_model_without_that_decoder_leaves_it_behind_and_a_part_of_one_is_refused(mae):
    model = student(decoders=["text", "pair"])
    report = initialise(model, vision=mae.state_dict())
    assert {why for name, why in report.left_over.items() if name.startswith("decoder.")} == {
        "part of MAE's decoder, which is not used"
    }
    state = {name: value for name, value in mae.state_dict().items() if name != "decoder.decoder_pred.bias"}
    with pytest.raises(MissingWeightsError, match=r"1 weights are not in the checkpoint: \['image_decoder.pixel_head"):
        initialise(student(), vision=state)
    encoder = {name: value for name, value in mae.state_dict().items() if not name.startswith("decoder.")}
    report = initialise(student(), vision=encoder)
    assert {name for name in report.missing if name.startswith("image_decoder.")}

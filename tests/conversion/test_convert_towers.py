"""Published towers into ours: what timm and transformers compute with their weights is what ours compute."""

import math
import re
from itertools import product

import pytest
import timm
import tiny_oner
import torch
from safetensors.torch import save_file
from tiny_codis import tiny_config as codis_config
from tiny_simla import tiny_config
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    DeiTConfig,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from oner import CodisModel, OneRForPreTraining, SimlaForImageTextRetrieval, SimlaForPreTraining
from oner.training.conversion.families import TOWERS
from oner.training.conversion.reading import read_weights
from oner.training.conversion.report import MissingWeightsError
from oner.training.conversion.towers import initialise
from oner.training.run.building import build_model
from oner.training.run.parsing import parse_arguments

WORDS = 50
HF_VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 16,
    "patch_size": 4, "layer_norm_eps": 1e-6,
}  # fmt: skip
HF_BERT = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32,
}  # fmt: skip


def jittered(model: torch.nn.Module) -> torch.nn.Module:
    """No bias at 0 and no norm at 1, so that a forgotten one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def simla(**fields) -> SimlaForPreTraining:
    sizes = {"intermediate_size": 64, "text_intermediate_size": 48}
    return SimlaForPreTraining(tiny_config(**{**sizes, **fields})).eval()


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_timm_vit_gives_the_same_states():
    vit = jittered(timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=3, num_classes=5))
    model = simla(hidden_size=192, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=16,
                  intermediate_size=768)  # fmt: skip
    report = initialise(model, vision=vit.state_dict())
    picture = torch.randn(2, 3, 32, 32)
    close(model.simla.vision(picture), vit.forward_features(picture))
    assert set(report.left_over) == {"head.weight", "head.bias"}
    assert set(report.missing) == {"simla.vision.embeddings.mask_token"}
    assert set(report.used) | set(report.left_over) == set(vit.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("kind", [ViTModel, ViTForImageClassification])
@pytest.mark.parametrize("saved", [False, True], ids=["in_memory", "as_saved"])
def test_transformers_vit_gives_the_same_states(tmp_path, kind, saved):
    """Names differ between the module and the file that `save_pretrained` writes."""
    vit = jittered(kind(ViTConfig(**HF_VIT)))
    source = vit.state_dict()
    if saved:
        vit.save_pretrained(tmp_path)
        source = str(tmp_path)
    model = simla()
    report = initialise(model, vision=source)
    picture = torch.randn(2, 3, 16, 16)
    close(model.simla.vision(picture), getattr(vit, "vit", vit)(picture).last_hidden_state)
    assert all("pooler" in name or "classifier" in name for name in report.left_over)


@torch.no_grad()
def test_a_deit_leaves_its_distillation_token_behind(tmp_path):
    """What DeiT's layers make of the sequence without that token; the report names it."""
    deit = jittered(DeiTModel(DeiTConfig(**HF_VIT)))
    deit.save_pretrained(tmp_path)
    model = simla()
    report = initialise(model, vision=tmp_path)
    picture = torch.randn(2, 3, 16, 16)
    states = deit.embeddings(picture)
    states = torch.cat([states[:, :1], states[:, 2:]], dim=1)
    for layer in deit.layers:
        states = layer(states)
        states = states[0] if isinstance(states, tuple) else states
    close(model.simla.vision(picture), deit.layernorm(states))
    assert "embeddings.distillation_token" in report.left_over
    assert "distillation" in report.changed["embeddings.position_embeddings"]


@torch.no_grad()
def test_a_deit_file_with_other_pictures(tmp_path):
    """DeiT's .pth keeps its weights under "model"; 4 x 4 places become 6 x 6 as timm resamples them."""
    kinds = {"pretrained": False, "depth": 2, "patch_size": 4, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 2}
    small = jittered(timm.create_model("deit_tiny_patch16_224", img_size=16, **kinds))
    torch.save({"model": small.state_dict()}, tmp_path / "deit.pth")
    model = simla(image_size=24, max_position_embeddings=40)
    report = initialise(model, vision=tmp_path / "deit.pth")
    assert report.changed == {"pos_embed": "4 x 4 patches to 6 x 6, bicubic"}
    table = small.pos_embed[:, 1:].transpose(1, 2).view(1, 32, 4, 4)
    table = torch.nn.functional.interpolate(table, (6, 6), mode="bicubic").flatten(2).transpose(1, 2)
    large = timm.create_model("deit_tiny_patch16_224", img_size=24, **kinds).eval()
    large.load_state_dict({**small.state_dict(), "pos_embed": torch.cat([small.pos_embed[:, :1], table], dim=1)})
    picture = torch.randn(2, 3, 24, 24)
    close(model.simla.vision(picture), large.forward_features(picture))


@torch.no_grad()
def test_a_table_without_cls():
    """timm's `no_embed_class`: [CLS] gets no position, which is a row of zeros."""
    vit = jittered(
        timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=4, depth=2, embed_dim=32,
                          num_heads=4, mlp_ratio=2, no_embed_class=True)
    )  # fmt: skip
    model = simla()
    initialise(model, vision=vit.state_dict())
    picture = torch.randn(2, 3, 16, 16)
    close(model.simla.vision(picture), vit.forward_features(picture))


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, WORDS, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return ids, mask


@torch.no_grad()
def test_bert_gives_the_same_states_where_token_types_are_zero():
    bert = jittered(BertModel(BertConfig(**HF_BERT)))
    bert.embeddings.token_type_embeddings.weight.zero_()
    model = simla()
    before = snapshot(model)
    report = initialise(model, text=bert.state_dict())
    ids, mask = texts()
    real = mask.bool()
    close(model.simla.encode_texts(ids, mask)[real], bert(ids, mask).last_hidden_state[real])
    assert set(report.left_over) == {
        "embeddings.token_type_embeddings.weight", "pooler.dense.weight", "pooler.dense.bias",
    }  # fmt: skip
    drawn = {name for name in before if "cross_" in name}
    assert {name for name in report.missing if not name.startswith("lm_head.")} == drawn
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in drawn)


@torch.no_grad()
def test_bert_with_its_token_types_folded():
    bert = jittered(BertModel(BertConfig(**HF_BERT)))
    model, plain = simla(), simla()
    report = initialise(model, text=bert.state_dict(), fold_token_types=True)
    initialise(plain, text=bert.state_dict())
    ids, mask = texts()
    real = mask.bool()
    expected = bert(ids, mask).last_hidden_state[real]
    close(model.simla.encode_texts(ids, mask)[real], expected)
    assert (plain.simla.encode_texts(ids, mask)[real] - expected).abs().max() > 1e-2
    assert report.used["embeddings.token_type_embeddings.weight"].endswith("position_embeddings.weight")


@torch.no_grad()
@pytest.mark.parametrize("old_names", [False, True])
def test_bert_brings_its_head_of_words(tmp_path, old_names):
    """bert-base-uncased's own file calls weights and biases of its norms gamma and beta."""
    bert = jittered(BertForPreTraining(BertConfig(**HF_BERT)))
    bert.bert.embeddings.token_type_embeddings.weight.zero_()
    state = bert.state_dict()
    if old_names:
        state = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in state.items()
            if "predictions.decoder" not in name
        }
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "bert.safetensors")
    model = simla()
    report = initialise(model, text=tmp_path / "bert.safetensors")
    ids, mask = texts()
    logits = model.lm_head(model.simla.encode_texts(ids, mask))
    close(logits[mask.bool()], bert(ids, mask).prediction_logits[mask.bool()])
    assert not any(name.startswith("lm_head.") for name in report.missing)
    assert model.lm_head.decoder.weight is model.simla.text.embeddings.word_embeddings.weight


def test_both_towers_in_one_report():
    vit, bert = ViTModel(ViTConfig(**HF_VIT)), BertModel(BertConfig(**HF_BERT))
    model = SimlaForImageTextRetrieval(tiny_config(intermediate_size=64, text_intermediate_size=48))
    report = initialise(model, vision=vit.state_dict(), text=bert.state_dict())
    assert set(report.used) | set(report.left_over) == set(vit.state_dict()) | set(bert.state_dict())
    assert {name.split(".")[1] for name in report.used.values()} == {"vision", "text"}
    assert "pooler.dense.bias: our model has no such part" in report.describe()


def test_longer_tables_of_words_are_cut():
    bert = BertModel(BertConfig(**{**HF_BERT, "max_position_embeddings": 45}))
    model = simla()
    report = initialise(model, text=bert.state_dict())
    table = model.simla.text.embeddings.position_embeddings.weight
    assert torch.equal(table, bert.embeddings.position_embeddings.weight[:32])
    assert report.changed["embeddings.position_embeddings.weight"] == "truncated to the first 32 of 45 rows"


def broken(state: dict, **changes) -> dict:
    return {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.bias": None}, "1 weights are not in the checkpoint.*simla.vision.norm.bias"),
        ({"blocks.0.attn.q_norm.weight": torch.ones(8)}, "blocks.0.attn.q_norm.weight.*plain ViT"),
        ({"blocks.2.norm1.weight": torch.ones(32)}, "simla.vision.layers.2.norm1.weight.*2 and 3 layers"),
        ({"patch_embed.proj.weight": torch.ones(32, 3, 8, 8)}, r"\(32, 3, 8, 8\), expected \(32, 3, 4, 4\)"),
        ({"pos_embed": torch.ones(1, 20, 32)}, "table of 20 positions"),
        ({"norm.bias": torch.full((32,), float("nan"))}, "1 damaged weights .*simla.vision.norm.bias': 'NaN'"),
        ({"norm.weight": torch.zeros(32)}, "1 damaged weights .*simla.vision.norm.weight': 'only zeros'"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(changes, message):
    vit = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=4, depth=2, embed_dim=32, num_heads=4,
        mlp_ratio=2,
    )  # fmt: skip
    model = simla()
    before = snapshot(model)
    with pytest.raises(MissingWeightsError, match=message):
        initialise(model, vision=broken(vit.state_dict(), **changes))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_vocabulary_does_not_fit():
    bert = BertModel(BertConfig(**{**HF_BERT, "vocab_size": 60}))
    with pytest.raises(MissingWeightsError, match=r"word_embeddings.weight.*\(60, 32\), expected \(50, 32\)"):
        initialise(simla(), text=bert.state_dict())


def test_keys_without_queries_are_refused():
    state = ViTModel(ViTConfig(**HF_VIT)).state_dict()
    with pytest.raises(MissingWeightsError, match="layers.1.attention.q_proj.bias.*all three"):
        initialise(simla(), vision=broken(state, **{"layers.1.attention.k_proj.bias": None}))


def test_a_family_without_a_line_is_told(monkeypatch):
    monkeypatch.delitem(TOWERS, "codis")
    with pytest.raises(ValueError, match="family 'codis' has no towers to be filled; expected one of .*oner, simla"):
        initialise(CodisModel(codis_config()), vision={})


@torch.no_grad()
def test_of_a_bert_the_upper_layers_read_images_by_attention_that_is_drawn():
    """And the lower ones texts, as ALBEF has it."""
    model = CodisModel(codis_config(intermediate_size=64, text_intermediate_size=48)).eval()
    vit, bert = jittered(ViTModel(ViTConfig(**HF_VIT))), jittered(BertModel(BertConfig(**HF_BERT, num_labels=2)))
    deeper = jittered(BertModel(BertConfig(**{**HF_BERT, "num_hidden_layers": 4})))
    with pytest.raises(MissingWeightsError, match="text.layers.3"):
        initialise(model, text=bert.state_dict())
    report = initialise(model, vit.state_dict(), deeper.state_dict(), fold_token_types=True)
    assert {name.split(".")[3] for name in report.missing} == {"cross_attention", "cross_norm"}
    ids, mask = texts()
    picture = torch.randn(3, 3, 16, 16)
    close(model.vision(picture), vit(picture).last_hidden_state)
    states = deeper(ids, mask, output_hidden_states=True).hidden_states[2]
    close(model.encode_texts(ids, mask)[mask.bool()], states[mask.bool()])


# MAE, into a tower with learned positions and into one with fixed sines

MAE = {**HF_VIT, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
       "decoder_intermediate_size": 32, "mask_ratio": 0.0}  # fmt: skip


def mae_positions(side: int, width: int) -> torch.Tensor:
    """MAE's fixed table, [CLS] first: the column's sines and cosines, then the row's. (1, 1 + side², D)."""
    rows = [[0.0] * width]
    for row, column in product(range(side), range(side)):
        angles = [[place / 10000 ** (4 * i / width) for i in range(width // 4)] for place in (column, row)]
        rows.append([turn(angle) for axis in angles for turn in (math.sin, math.cos) for angle in axis])
    return torch.tensor([rows])


def mae_model() -> ViTMAEForPreTraining:
    """Random, but for its positions, which MAE never trains."""
    model = jittered(ViTMAEForPreTraining(ViTMAEConfig(**MAE)))
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.copy_(mae_positions(4, 32))
    return model


def encoded(mae: ViTMAEForPreTraining, pixels: torch.Tensor) -> torch.Tensor:
    """The encoder's states of all patches, in their order: (B, 1 + N, D)."""
    return mae.vit(pixels, noise=torch.arange(16.0).expand(len(pixels), -1)).last_hidden_state


def by_facebook(mae: ViTMAEForPreTraining) -> dict[str, torch.Tensor]:
    """The names of facebook's mae_pretrain_*.pth, queries, keys and values as one matrix."""
    state, made = mae.state_dict(), {}
    for name, tensor in state.items():
        name = re.sub(r"^vit\.embeddings\.patch_embeddings\.projection", "patch_embed.proj", name)
        name = name.replace("vit.embeddings.cls_token", "cls_token")
        name = name.replace("vit.embeddings.position_embeddings", "pos_embed")
        name = re.sub(r"^vit\.layers", "blocks", name).replace("vit.layernorm", "norm")
        name = name.replace("decoder.mask_token", "mask_token")
        name = name.replace("decoder.decoder_layers", "decoder_blocks").replace("decoder.decoder_", "decoder_")
        name = name.replace("attention.o_proj", "attn.proj").replace("layernorm_before", "norm1")
        made[name.replace("layernorm_after", "norm2")] = tensor
    for name in [name for name in made if ".attention.q_proj." in name]:
        parts = [made.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        made[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return made


def mae_sources(folder) -> dict:
    """MAE in facebook's layout, transformers' in memory, as saved, and the encoder alone as timm has it."""
    mae = mae_model()
    mae.save_pretrained(folder)
    facebook = by_facebook(mae)
    alone = {name: tensor for name, tensor in facebook.items() if "decoder" not in name and name != "mask_token"}
    return {"mae": mae, "facebook": facebook, "transformers": mae.state_dict(), "saved": str(folder), "timm": alone}


def oner_model(**fields) -> OneRForPreTraining:
    return OneRForPreTraining(tiny_oner.tiny_config(**{"intermediate_size": 64, "stem": "linear", **fields})).eval()


@torch.no_grad()
@pytest.mark.parametrize("layout", ["facebook", "transformers", "saved", "timm"])
@pytest.mark.parametrize("scaled", [False, True])
def test_mae_is_oners_trunk(tmp_path, layout, scaled):
    sources = mae_sources(tmp_path)
    model = oner_model(scale_word_embeddings=scaled)
    before = snapshot(model)
    report = initialise(model, vision=sources[layout])
    picture = torch.randn(2, 3, 16, 16)
    close(model.oner(pixel_values=picture).last_hidden_state, encoded(sources["mae"], picture))
    # every name has a place in the report
    state = read_weights(sources[layout]) if layout == "saved" else sources[layout]
    assert report.used.keys() | report.left_over.keys() == state.keys()
    assert not report.used.keys() & report.left_over.keys()
    ours = {name for name in before if name.startswith("oner.")}
    assert set(report.used.values()) | report.missing.keys() == ours
    (positions,) = (why for name, why in report.left_over.items() if "pos" in name and "decoder" not in name)
    assert positions == "our positions are fixed sines, and so are the file's, of 4 x 4 patches"
    decoder = {name for name in report.left_over if "decoder" in report.left_over[name]}
    assert all("decoder" in name or name == "mask_token" for name in decoder) and bool(decoder) == (layout != "timm")
    # of the words only [CLS] is MAE's
    words, drawn = model.oner.embeddings.word_embeddings.weight, before["oner.embeddings.word_embeddings.weight"]
    changed = (words != drawn).any(1).nonzero().flatten().tolist()
    assert changed == [tiny_oner.CLS] and model.lm_head.decoder.weight is words
    assert torch.equal(model.oner.embeddings.patch_mask_token, before["oner.embeddings.patch_mask_token"])


@torch.no_grad()
@pytest.mark.parametrize("layout", ["facebook", "transformers", "saved", "timm"])
def test_mae_is_simlas_visual_encoder(tmp_path, layout):
    sources, model = mae_sources(tmp_path), simla()
    report = initialise(model, vision=sources[layout])
    picture = torch.randn(2, 3, 16, 16)
    close(model.simla.vision(picture), encoded(sources["mae"], picture))
    assert set(report.missing) == {"simla.vision.embeddings.mask_token"}
    assert not model.simla.vision.embeddings.mask_token.any()  # MAE's is of its decoder
    assert all("decoder" in why for why in report.left_over.values())


@torch.no_grad()
def test_a_trunk_with_words_of_bert_and_layers_of_mae(tmp_path):
    mae, bert, model = mae_model(), jittered(BertForPreTraining(BertConfig(**HF_BERT))), oner_model()
    report = initialise(model, mae.state_dict(), bert.state_dict())
    words, theirs = model.oner.embeddings.word_embeddings.weight, bert.bert.embeddings.word_embeddings.weight
    rest = [row for row in range(WORDS) if row != tiny_oner.CLS]
    assert torch.equal(words[rest], theirs[rest])
    assert torch.equal(words[tiny_oner.CLS], mae.vit.embeddings.cls_token[0, 0])
    assert torch.equal(model.lm_head.dense.weight, bert.cls.predictions.transform.dense.weight)
    picture = torch.randn(2, 3, 16, 16)
    close(model.oner(pixel_values=picture).last_hidden_state, encoded(mae, picture))
    assert report.left_over["bert.encoder.layer.0.output.dense.bias"] == "the single tower is initialised from the ViT"
    assert report.left_over["bert.embeddings.position_embeddings.weight"] == "our word positions are fixed sines"
    assert report.used.keys() | report.left_over.keys() == mae.state_dict().keys() | bert.state_dict().keys()


@torch.no_grad()
def test_what_a_trunk_cannot_take_is_said():
    """Learned positions, and a projection of patches where convolutions stand."""
    vit, model = jittered(ViTModel(ViTConfig(**HF_VIT))), oner_model(stem="conv")
    report = initialise(model, vision=vit.state_dict())
    assert report.left_over["embeddings.position_embeddings"].startswith("our positions are fixed sines; the file's")
    stem = "our model has a convolutional stem"
    assert report.left_over["embeddings.patch_embeddings.projection.weight"] == stem
    assert {name for name in report.missing if ".stem." in name} == {
        name for name in model.state_dict() if ".stem." in name
    }
    hidden = torch.randn(2, 5, 32)
    mine, theirs = model.oner.layers[1](hidden), vit.layers[1](hidden)
    close(mine, theirs[0] if isinstance(theirs, tuple) else theirs)
    before = snapshot(model)
    with pytest.raises(MissingWeightsError, match="oner.layers.1.norm1.bias"):
        initialise(model, vision=broken(vit.state_dict(), **{"layers.1.layernorm_before.bias": None}))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_run_begins_with_both(tmp_path):
    """`--initial_vision` and `--initial_text` of examples/pretrain.py."""
    vit, bert = ViTModel(ViTConfig(**HF_VIT)), BertForPreTraining(BertConfig(**HF_BERT))
    vit.save_pretrained(tmp_path / "vit")
    bert.save_pretrained(tmp_path / "bert")
    config = tiny_config(intermediate_size=64, text_intermediate_size=48)
    given = ["--family", "simla", "--train_data", "none", "--output_dir", str(tmp_path)]
    towers = ["--initial_vision", str(tmp_path / "vit"), "--initial_text", str(tmp_path / "bert")]
    model = build_model(parse_arguments([*given, *towers]), config)
    expected = simla()
    report = initialise(expected, tmp_path / "vit", tmp_path / "bert", fold_token_types=True)
    filled = set(report.used.values()) | {"lm_head.decoder.weight"}
    begun, drawn = expected.state_dict(), build_model(parse_arguments(given), config).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, begun[name] if name in filled else drawn[name]), name
    assert {name for name in begun if "cross_attention" in name or "itm_head" in name} <= begun.keys() - filled
    # as SIMLA's code begins
    dropped = build_model(parse_arguments([*given, *towers, "--fold_token_types", "false"]), config).state_dict()
    positions = "simla.text.embeddings.position_embeddings.weight"
    assert torch.equal(dropped[positions], bert.bert.embeddings.position_embeddings.weight)
    assert not torch.equal(dropped[positions], begun[positions])

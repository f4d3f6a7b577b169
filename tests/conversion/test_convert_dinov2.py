"""DINOv2 and MiniLM into every family's towers, of whatever width and depth the files are."""

import json

import pytest
import timm
import torch
from families import FAMILIES
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from oner.modeling.vl_embeddings import sincos_2d
from oner.training.conversion.families import TOWERS
from oner.training.conversion.report import MissingWeightsError
from oner.training.conversion.towers import initialise, tower_fields
from oner.training.cost.estimate import configuration_of
from oner.training.run.building import build_model, build_processor_and_config
from oner.training.run.parsing import parse_arguments

WORDS = 50
SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
DINO = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "mlp_ratio": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
# as MiniLM-L6-H384 is: heads half as wide as BERT's, six layers
MINILM = {
    "vocab_size": WORDS, "hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 96, "max_position_embeddings": 40,
}  # fmt: skip
# what no file tells of a small model
GIVEN = {"vocab_size": WORDS, "image_size": 16, "projection_dim": 8, "stem": "linear", "image_token_id": 1,
         "cls_token_id": 3, "mask_token_id": 4, "max_text_length": 12}  # fmt: skip
DUAL = {"sep_token_id": 2, "text_attention_dropout": 0.0, "hidden_dropout": 0.0}


def jittered(model: torch.nn.Module) -> torch.nn.Module:
    """No bias at 0, no norm and no scale at 1, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def given_of(family: str, **fields) -> dict:
    dual = FAMILIES[family].tiny.tiny_config().pair_layout == "separate"
    return {**GIVEN, **(DUAL if dual else {}), **fields}


def fresh(family: str, vision=None, text=None, size: str = "nano", **fields) -> torch.nn.Module:
    """A model of a named size whose shape is the files'; what it is filled with comes later."""
    given = given_of(family, **fields)
    told = tower_fields(CONFIG_MAPPING[family], size, given, vision, text)
    config = CONFIG_MAPPING[family].from_size(size, **told, **given)
    return FAMILIES[family].classes["AutoModelForPreTraining"](config).eval()


def image_states(family: str, model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    tower = FAMILIES[family].tower(model)
    return tower.vision(pixels) if hasattr(tower, "vision") else tower(pixel_values=pixels).last_hidden_state


def dino_model(family: str) -> Dinov2Model:
    """Random; for a family whose positions are sines, with the sines that it has."""
    dino = jittered(Dinov2Model(Dinov2Config(**DINO)))
    if TOWERS[family].fixed_positions is not None:
        ticks = torch.arange(4, dtype=torch.float64)
        with torch.no_grad():
            dino.embeddings.position_embeddings.zero_()
            dino.embeddings.position_embeddings[0, 1:] = sincos_2d(ticks, ticks, 48).float()
    return dino


def by_facebook(dino: Dinov2Model) -> dict[str, torch.Tensor]:
    """The names of facebook's dinov2_*_pretrain.pth, queries, keys and values as one matrix."""
    made = {}
    for name, tensor in dino.state_dict().items():
        name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("embeddings.position_embeddings", "pos_embed").replace("embeddings.", "")
        name = name.replace("encoder.layer", "blocks").replace("layernorm", "norm")
        name = name.replace("layer_scale1.lambda1", "ls1.gamma").replace("layer_scale2.lambda1", "ls2.gamma")
        made[name.replace("attention.o_proj", "attn.proj")] = tensor
    for name in [name for name in made if ".attention.q_proj." in name]:
        parts = [made.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        made[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return made


def sources_of(dino: Dinov2Model, folder) -> dict:
    """In facebook's layout, timm's, which keeps no mask token, transformers' in memory, and as saved."""
    dino.save_pretrained(folder)
    facebook = by_facebook(dino)
    vit = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, img_size=16, patch_size=4, depth=3, embed_dim=48, num_heads=6,
        mlp_ratio=2,
    )  # fmt: skip
    alone = {name: tensor for name, tensor in facebook.items() if name != "mask_token"}
    vit.load_state_dict(alone)
    return {"facebook": facebook, "timm": vit.state_dict(), "transformers": dino.state_dict(), "saved": folder}


@torch.no_grad()
@pytest.mark.parametrize("layout", ["facebook", "timm", "transformers", "saved"])
def test_dinov2_gives_the_same_states(tmp_path, family, layout):
    dino = dino_model(family.name)
    source = sources_of(dino, tmp_path)[layout]
    # of a state dict nothing tells the heads
    heads = {} if layout == "saved" else {"num_attention_heads": 6}
    model = fresh(family.name, vision=source, **heads)
    report = initialise(model, vision=source)
    pixels = torch.randn(2, 3, 16, 16)
    expected = dino(pixels).last_hidden_state
    torch.testing.assert_close(image_states(family.name, model, pixels), expected, atol=1e-5, rtol=1e-5)
    # every name has one place, and scales are told
    if layout != "saved":
        assert report.used.keys() | report.left_over.keys() == source.keys()
        assert not report.used.keys() & report.left_over.keys()
    scales = [name for name in report.used if name.endswith(("gamma", "lambda1"))]
    assert len(scales) == 6 and {report.changed[name] for name in scales} == {
        "LayerScale folded into its linear layer"
    }


@torch.no_grad()
def test_the_mask_token_where_patches_are_masked():
    """SIMLA masks patches by a token; CODIS masks none; OneR's is another token."""
    dino = dino_model("simla")
    source = by_facebook(dino)
    for family in FAMILIES:
        model = fresh(family, vision=source, num_attention_heads=6)
        report = initialise(model, vision=source)
        if family == "simla":
            assert torch.equal(model.simla.vision.embeddings.mask_token[0], source["mask_token"])
        else:
            assert "mask" in report.left_over["mask_token"]


def test_a_scale_without_what_it_scales():
    source = by_facebook(dino_model("simla"))
    model = fresh("simla", vision=source, num_attention_heads=6)
    del source["blocks.1.mlp.fc2.bias"]
    with pytest.raises(MissingWeightsError, match=r"blocks.1.ls2.gamma scales blocks.1.mlp.fc2.bias, which is not"):
        initialise(model, vision=source)


def test_registers_and_gates_are_refused(tmp_path):
    """Every layer reads a register, and a gated feed-forward is another function: neither folds into a plain ViT."""
    registers = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=2))
    gated = Dinov2Model(Dinov2Config(**DINO, use_swiglu_ffn=True))
    gated.save_pretrained(tmp_path / "gated")
    facebook = {"blocks.0.norm1.weight": torch.ones(48), "blocks.0.mlp.w12.weight": torch.ones(8, 48)}
    packed = timm.create_model(
        "vit_giant_patch14_dinov2", pretrained=False, img_size=16, patch_size=4, depth=1, embed_dim=48, num_heads=6,
        mlp_ratio=4,
    )  # fmt: skip
    model = fresh("simla", vision=by_facebook(dino_model("simla")), num_attention_heads=6)
    for source, why in (
        (registers.state_dict(), "embeddings.register_tokens.*register tokens, which every layer attends to"),
        ({"reg_token": torch.ones(1, 4, 48)}, "reg_token.*register tokens"),
        (gated.state_dict(), "gate_proj.*SwiGLU"),
        (tmp_path / "gated", "weights_in.*SwiGLU"),
        (facebook, "w12.*SwiGLU"),
        (packed.state_dict(), "blocks.0.mlp.fc1.weight.*SwiGLU"),
    ):
        with pytest.raises(MissingWeightsError, match=why):
            initialise(model, vision=source)


@torch.no_grad()
def test_both_towers_make_the_configuration(tmp_path, family):
    """A named size of 192 or 256 wide becomes what the files are; states are the towers' own."""
    dino, bert = dino_model(family.name), jittered(BertModel(BertConfig(**MINILM)))
    dino.save_pretrained(tmp_path / "vision")
    bert.save_pretrained(tmp_path / "text")
    model = fresh(family.name, tmp_path / "vision", tmp_path / "text")
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (48, 3, 6)
    assert (config.intermediate_size, config.patch_size, config.layer_norm_eps) == (96, 4, 1e-6)
    report = initialise(model, tmp_path / "vision", tmp_path / "text", fold_token_types=True)
    pixels = torch.randn(2, 3, 16, 16)
    states = image_states(family.name, model, pixels)
    torch.testing.assert_close(states, dino(pixels).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert not report.notes
    if not hasattr(family.tower(model), "vision"):
        words = family.tower(model).embeddings.word_embeddings.weight
        assert torch.equal(words[5:], bert.embeddings.word_embeddings.weight[5:])
        return

    # a text's states where the family's own layers end
    assert config.text_attention_heads == 12 and config.max_position_embeddings == 40
    depth = config.num_text_layers
    assert depth + getattr(config, "num_fusion_layers", 0) == 6 and depth == {"simla": 6, "codis": 3}[family.name]
    ids = torch.randint(5, WORDS, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    expected = bert(ids, mask, output_hidden_states=True).hidden_states[depth]
    mine = family.tower(model).encode_texts(ids, mask)
    torch.testing.assert_close(mine[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_halves_of_a_text_tower_as_they_are_asked_for(tmp_path):
    BertModel(BertConfig(**MINILM)).save_pretrained(tmp_path)
    codis = CONFIG_MAPPING["codis"]
    for asked, halves in (({"num_text_layers": 4}, (4, 2)), ({"num_fusion_layers": 1}, (5, 1)), ({}, (3, 3))):
        fields = {**tower_fields(codis, "nano", asked, text=tmp_path), **asked}
        assert (fields["num_text_layers"], fields["num_fusion_layers"]) == halves
    with pytest.raises(ValueError, match="num_fusion_layers': '2 in initial_text, 5 given'"):
        tower_fields(codis, "nano", {"num_text_layers": 4, "num_fusion_layers": 5}, text=tmp_path)


def test_what_contradicts_is_named_on_both_sides(tmp_path):
    Dinov2Model(Dinov2Config(**DINO)).save_pretrained(tmp_path / "vision")
    BertModel(BertConfig(**{**MINILM, "hidden_size": 96})).save_pretrained(tmp_path / "wide")
    BertModel(BertConfig(**MINILM)).save_pretrained(tmp_path / "text")
    simla = CONFIG_MAPPING["simla"]
    with pytest.raises(ValueError, match="hidden_size is 48 in initial_vision and 96 in initial_text"):
        tower_fields(simla, "nano", {}, tmp_path / "vision", tmp_path / "wide")
    with pytest.raises(ValueError, match="num_hidden_layers': '3 in initial_vision, 12 given'"):
        tower_fields(simla, "nano", {"num_hidden_layers": 12}, tmp_path / "vision")
    with pytest.raises(ValueError, match=r"vocab_size': '50 in initial_text, 70 given'.*from the tokenizer"):
        tower_fields(simla, "nano", {"vocab_size": 70}, text=tmp_path / "text")
    # these may differ: a longer table is cut
    free = {"max_position_embeddings": 20, "layer_norm_eps": 1e-5}
    fields = tower_fields(simla, "nano", free, tmp_path / "vision", tmp_path / "text")
    assert not fields.keys() & free.keys()
    # convolutions have patches of their own
    assert "patch_size" not in tower_fields(simla, "nano", {"stem": "conv"}, tmp_path / "vision")


def test_no_shape_tells_the_heads(tmp_path):
    """A bare file of another width than the size's is refused; of the same width the size's heads serve, and a note
    says so where the weights lie in a file."""
    dino = dino_model("simla")
    save_file(by_facebook(dino), tmp_path / "dino.safetensors")
    simla = CONFIG_MAPPING["simla"]
    with pytest.raises(ValueError, match="width 48, size 'nano' has 192, and no shape tells the number"):
        tower_fields(simla, "nano", {}, tmp_path / "dino.safetensors")
    model = fresh("simla", tmp_path / "dino.safetensors", num_attention_heads=6)
    report = initialise(model, tmp_path / "dino.safetensors")
    assert "num_attention_heads 6" in report.notes[0] and report.notes[0] in report.describe()

    # a configuration of another width lies there by chance
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 1024, "num_attention_heads": 16}))
    assert initialise(model, tmp_path / "dino.safetensors").notes == report.notes


def test_other_heads_or_another_activation_are_refused(tmp_path):
    dino = dino_model("simla")
    dino.save_pretrained(tmp_path)
    with pytest.raises(
        MissingWeightsError, match="num_attention_heads is 6 in the configuration beside .* and 4 in the"
    ):
        initialise(fresh("simla", by_facebook(dino), num_attention_heads=4), tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**said, "hidden_act": "relu"}))
    with pytest.raises(MissingWeightsError, match="hidden_act is 'relu' in the configuration"):
        initialise(fresh("simla", by_facebook(dino), num_attention_heads=6), tmp_path)
    assert fresh("simla", tmp_path).config.hidden_act == "relu"


def test_a_run_and_its_estimate_take_the_shape(tmp_path):
    """`--size small` is 384 wide; the files are 48, and the run's vocabulary must be the file's."""
    Dinov2Model(Dinov2Config(**DINO)).save_pretrained(tmp_path / "vision")
    BertModel(BertConfig(**MINILM)).save_pretrained(tmp_path / "text")
    (tmp_path / "vocab.txt").write_text("\n".join(SPECIAL + [f"w{number}" for number in range(WORDS - len(SPECIAL))]))
    given = ["--family", "simla", "--size", "small", "--train_data", "none", "--output_dir", str(tmp_path / "run")]
    given += ["--initial_vision", str(tmp_path / "vision"), "--initial_text", str(tmp_path / "text")]
    fields = {"image_size": 16, "max_text_length": 12, "cls_token_id": 3, "sep_token_id": 4, "mask_token_id": 5}
    given += ["--model_config", json.dumps(fields)]
    arguments = parse_arguments([*given, "--tokenizer", str(tmp_path / "vocab.txt")])
    processor, config = build_processor_and_config(arguments, {})
    for made in (config, configuration_of(arguments)):
        assert (made.hidden_size, made.num_hidden_layers, made.num_text_layers, made.patch_size) == (48, 3, 6, 4)
        assert (made.vocab_size, made.text_attention_heads) == (WORDS, 12)
    assert processor.image_processor.size["height"] == 16
    assert build_model(arguments, config).simla.text.layers[5].attention.query.weight.shape == (48, 48)

    # words of another vocabulary would be read by the wrong rows
    with (tmp_path / "vocab.txt").open("a") as file:
        file.write("\nmore")
    with pytest.raises(ValueError, match=r"vocab_size': '50 in initial_text, 51 given'"):
        build_processor_and_config(arguments, {})


def test_what_is_no_tower_is_told():
    simla = CONFIG_MAPPING["simla"]
    with pytest.raises(MissingWeightsError, match=r"no blocks.0.norm1.weight; it has \['a'\].*expected a ViT"):
        tower_fields(simla, "nano", {}, vision={"a": torch.ones(1)})
    with pytest.raises(MissingWeightsError, match="no embeddings.word_embeddings.weight; .*expected a BERT"):
        tower_fields(simla, "nano", {}, text={"a": torch.ones(1)})

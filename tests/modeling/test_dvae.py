"""The image tokenizer: layout by a naive oracle, codes, decoding, losses, bad inputs, training, the shipped one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pretraining import ROOT, load_example, read_log
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

import oner
from oner.modeling.configuration_dvae import DiscreteVAEConfig
from oner.modeling.modeling_dvae import DiscreteVAE, ResidualBlock
from oner.processing.data.sources import open_rows
from oner.training.doctor.command import examine
from oner.training.doctor.reading import read_run, read_sample
from oner.training.evaluation.dvae import ReconstructionEvaluator, code_perplexity, read_pictures
from oner.training.objectives.dvae import DiscreteVAEObjective, DiscreteVAEObjectiveArguments
from oner.training.objectives.objective import Targets
from oner.training.publishing.model_loading import load_model

SHIPPED = ROOT / "examples" / "checkpoints" / "emoji-tokenizer"
# set -> (times better than one colour, perplexity), at least; the card says 2.6, 173 and 3.6, 396
FLOORS = {"test_style": (2.3, 100), "test_concept": (3.1, 200)}
TINY = {"hidden_size": 8, "blocks_per_group": 1, "num_codes": 24, "codebook_dim": 8, "image_size": 16}


def tiny(**overrides) -> DiscreteVAE:
    """Random weights, but for a bias without which one code would win everywhere."""
    model = DiscreteVAE(DiscreteVAEConfig(**{**TINY, **overrides})).eval()
    with torch.no_grad():
        model.encoder.output.bias -= model.encode(torch.rand(8, 3, 16, 16)).mean((0, 2, 3))
    return model


def blocks(*shape: int) -> torch.Tensor:
    """Pictures with a colour of its own for each place, so that codes differ."""
    return torch.rand(shape).repeat_interleave(8, -2).repeat_interleave(8, -1)


def test_parameters_are_dalles():
    with torch.device("meta"):
        model = DiscreteVAE(DiscreteVAEConfig())
    encoder, decoder = (sum(one.numel() for one in part.parameters()) for part in (model.encoder, model.decoder))
    # BEiT's appendix and DALL-E's file: 53.8 M and 43.8 M
    assert (encoder, decoder) == (53_786_240, 43_829_766)
    assert model.encoder.output.weight.shape == (8192, 2048, 1, 1)


def naive_conv(pixels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(C, H, W) -> (O, H, W), a place at a time."""
    reach = weight.shape[-1] // 2
    padded = F.pad(pixels, [reach] * 4)
    height, width = pixels.shape[1:]
    result = torch.empty(len(weight), height, width)
    for y in range(height):
        for x in range(width):
            window = padded[:, y : y + 2 * reach + 1, x : x + 2 * reach + 1]
            result[:, y, x] = (weight * window).sum((1, 2, 3)) + bias
    return result


@pytest.mark.parametrize("channels", [(8, 8), (4, 8)])
@pytest.mark.parametrize("kernels", [(3, 3, 3, 1), (1, 3, 3, 3)])
def test_a_block_is_the_naive_one(channels, kernels):
    block = ResidualBlock(*channels, kernels, gain=1 / 64).eval()
    assert [tuple(conv.weight.shape) for conv in block.convs] == [
        (2, channels[0], kernels[0], kernels[0]),
        (2, 2, kernels[1], kernels[1]),
        (2, 2, kernels[2], kernels[2]),
        (8, 2, kernels[3], kernels[3]),
    ]
    pixels = torch.randn(channels[0], 5, 4)
    expected = pixels
    with torch.no_grad():
        for conv in block.convs:
            expected = naive_conv(expected.clamp(min=0), conv.weight, conv.bias)
        beside = pixels if channels[0] == channels[1] else naive_conv(pixels, block.skip.weight, block.skip.bias)
        torch.testing.assert_close(block(pixels[None])[0], beside + expected / 64, rtol=1e-5, atol=1e-6)


def test_gain_and_widths_follow_the_layout():
    model = tiny(blocks_per_group=2)
    groups = model.encoder.groups
    assert [len(group) for group in groups] == [2] * 4
    assert {block.gain for group in groups for block in group} == {1 / 64}
    assert [group[1].convs[3].out_channels for group in groups] == [8, 16, 32, 64]
    assert [group[0].convs[3].out_channels for group in model.decoder.groups] == [64, 32, 16, 8]
    first = [hasattr(group[0].skip, "weight") for group in groups]
    assert first == [False, True, True, True]


def test_codes_are_row_by_row_and_of_any_size():
    model = tiny()
    pictures = blocks(2, 3, 2, 5)
    logits = model.encode(pictures)
    assert logits.shape == (2, 24, 2, 5)
    codes = model.get_codebook_indices(pictures)
    assert codes.shape == (2, 10) and codes.dtype == torch.int64 and len(codes.unique()) > 1
    for row in range(2):
        for column in range(5):
            assert torch.equal(codes[:, 5 * row + column], logits[:, :, row, column].argmax(1))
    assert model.get_codebook_indices(pictures[:, :, :, :16]).shape == (2, 4)


def test_codes_do_not_depend_on_autocast():
    model, pictures = tiny(), blocks(4, 3, 4, 4)
    expected = model.get_codebook_indices(pictures)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.get_codebook_indices(pictures), expected)


def test_pixels_are_mapped_and_back():
    model, pictures = tiny(), torch.rand(1, 3, 8, 8)
    mapped = model.map_pixels(pictures)
    torch.testing.assert_close(mapped, 0.8 * pictures + 0.1)
    torch.testing.assert_close(model.unmap_pixels(mapped), pictures)
    assert model.unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]


def test_decoding_ids_is_decoding_their_one_hot_planes():
    model, codes = tiny(), torch.randint(24, (2, 6))
    planes = F.one_hot(codes, 24).view(2, 2, 3, 24).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        drawn = model.decode(codes, (2, 3))
        means = model.decoder(model.decoder.input(planes))[:, :3]
    assert drawn.shape == (2, 3, 16, 24) and drawn.min() >= 0 and drawn.max() <= 1
    torch.testing.assert_close(drawn, ((means.sigmoid() - 0.1) / 0.8).clamp(0, 1), rtol=1e-5, atol=1e-6)
    assert model.decode(codes[:, :4]).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("reconstruction", ["logit_laplace", "squared"])
def test_losses_are_their_formulas(reconstruction):
    model, pictures = tiny(reconstruction=reconstruction, kl_weight=0.5), blocks(2, 3, 2, 2)
    with torch.no_grad():
        output = model(pictures)
        raw = model.decoder(model.decoder.input.embed(output.codes.view(2, 2, 2)))
    x, means, scales = 0.8 * pictures + 0.1, raw[:, :3], raw[:, 3:].exp()
    if reconstruction == "squared":
        expected = ((means.sigmoid() - 0.1) / 0.8 - pictures).square().mean()
    else:
        # the density of a logit whose distribution is Laplace's, with the slope of the logit
        laplace = torch.distributions.Laplace(means, scales)
        expected = -(laplace.log_prob(x.logit()) - (x * (1 - x)).log()).mean()
    torch.testing.assert_close(output.reconstruction_loss, expected, rtol=1e-5, atol=1e-6)
    chances = torch.distributions.Categorical(logits=output.logits.permute(0, 2, 3, 1))
    uniform = torch.distributions.Categorical(logits=torch.zeros(24))
    kl = torch.distributions.kl_divergence(chances, uniform).mean()
    torch.testing.assert_close(output.kl, kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss, expected + 0.5 * kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(pictures, kl_weight=0.0).loss.detach(), expected, rtol=1e-5, atol=1e-6)


def test_every_weight_gets_a_gradient_through_the_relaxation():
    model = tiny().train()
    model(blocks(2, 3, 2, 2), temperature=0.5).loss.backward()
    without = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.abs().sum() > 0]
    assert not without
    model.zero_grad()
    model(blocks(2, 3, 2, 2)).reconstruction_loss.backward()
    assert model.encoder.output.weight.grad is None  # argmax lets nothing through


def test_a_cold_hard_choice_decodes_one_code():
    model, pictures = tiny(), blocks(2, 3, 2, 2)
    with torch.no_grad():
        model.encoder.output.weight.mul_(1e4)  # noise of the choice is nothing beside it
        drawn = model(pictures, temperature=1.0, hard=True).reconstruction
        torch.testing.assert_close(drawn, model.decode(model.get_codebook_indices(pictures)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("pictures", "told"),
    [
        (torch.rand(1, 3, 12, 16), "multiples of the patch size 8"),
        (torch.rand(1, 1, 16, 16), r"expected \(pictures, 3"),
        (torch.rand(3, 16, 16), r"expected \(pictures, 3"),
        (torch.rand(1, 3, 16, 16) * 255, "neither normalised"),
        (torch.rand(1, 3, 16, 16) - 0.5, "neither normalised"),
        (torch.full((1, 3, 16, 16), math.nan), "NaN or infinity"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "expected floats"),
        (torch.rand(0, 3, 16, 16), "one picture at least"),
    ],
)
def test_bad_pictures_are_refused(pictures, told):
    for call in (tiny(), tiny().get_codebook_indices):
        with pytest.raises(ValueError, match=told):
            call(pictures)


def test_bad_codes_and_temperatures_are_refused():
    model = tiny()
    for codes, told in [
        (torch.zeros(1, 5, dtype=torch.long), "do not make a grid"),
        (torch.full((1, 4), 24), r"expected \[0, 23\]"),
        (torch.full((1, 4), -1), r"expected \[0, 23\]"),
        (torch.zeros(1, 4), "whole numbers"),
        (torch.zeros(2, 2, 2, dtype=torch.long), "whole numbers"),
    ]:
        with pytest.raises(ValueError, match=told):
            model.decode(codes)
    with pytest.raises(ValueError, match="above 0"):
        model(torch.rand(1, 3, 8, 8), temperature=0.0)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hidden_size": 6}, "multiple of 4"),
        ({"image_size": 20}, "multiple of 8"),
        ({"num_codes": 0}, "num_codes"),
        ({"pixel_margin": 0.5}, "pixel_margin"),
        ({"kl_weight": -1.0}, "kl_weight"),
    ],
)
def test_bad_configurations_are_refused(fields, told):
    with pytest.raises(StrictDataclassClassValidationError, match=told):
        DiscreteVAEConfig(**fields)
    with pytest.raises(ValueError, match="nano, base"):
        DiscreteVAEConfig.from_size("huge")


def test_it_is_saved_and_found_by_the_auto_classes(tmp_path):
    model, pictures = tiny(), blocks(2, 3, 2, 2)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DiscreteVAEConfig)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is oner.DiscreteVAE
    assert torch.equal(again.encode(pictures), model.encode(pictures))
    alone = AutoModel.from_pretrained(tmp_path, decoder=False)
    assert alone.decoder is None and torch.equal(alone.encode(pictures), model.encode(pictures))
    with pytest.raises(ValueError, match="no decoder"):
        alone.decode(torch.zeros(1, 4, dtype=torch.long))
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.float16)
    assert half.encoder.input.weight.dtype == torch.float16 and half.encoder.output.weight.dtype == torch.float32
    assert half(pictures, temperature=1.0).loss.isfinite()


def test_its_code_travels_with_it(tmp_path):
    """transformers alone loads it, in a process where oner cannot be imported."""
    model, pictures = tiny(), blocks(1, 3, 2, 2)
    model.save_pretrained(tmp_path / "tokenizer")
    torch.save(pictures, tmp_path / "pictures.pt")
    code = (
        "import sys, torch; sys.modules['oner'] = None\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained('tokenizer', trust_remote_code=True).eval()\n"
        "print(model.get_codebook_indices(torch.load('pictures.pt', weights_only=True)).tolist())"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == model.get_codebook_indices(pictures).tolist()


def objective_of(model: DiscreteVAE, **fields) -> DiscreteVAEObjective:
    return DiscreteVAEObjective(model, DiscreteVAEObjectiveArguments(**fields))


def test_a_few_steps_lower_the_loss():
    model = tiny(reconstruction="squared").train()
    objective = objective_of(model, usage_weight=0.01, temperature_share=1.0)
    pictures = blocks(16, 3, 2, 2)
    batch = {"pixel_values": pictures, "ids": torch.arange(16)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    errors = []
    for step in range(40):
        loss, parts, kept = objective(model, batch, step / 40)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(parts["reconstruction"].item())
        assert set(parts) == {"reconstruction", "kl", "usage"}
    assert sum(errors[-5:]) < 0.7 * sum(errors[:5]), errors


def test_the_temperature_falls_by_a_cosine():
    objective = objective_of(tiny(), temperatures=[1.0, 0.25], temperature_share=0.5)
    assert [objective.temperature(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == [1.0, 0.625, 0.25, 0.25]


def test_usage_is_least_where_all_codes_serve_alike():
    objective = objective_of(tiny(), usage_weight=1.0)
    one, all_alike = F.one_hot(torch.zeros(8, dtype=torch.long), 24).float(), torch.full((8, 24), 1 / 24)
    values = [objective.compare({"used": rows}, {}, {}, 0.0).parts["usage"].item() for rows in (one, all_alike)]
    assert values == pytest.approx([math.log(24), 0.0], abs=1e-5)


def test_a_batch_in_chunks_costs_what_it_costs_whole():
    """Shares of the chunks add up to the whole; a cold choice, for chunks draw other noise."""
    model = tiny(reconstruction="squared")
    with torch.no_grad():
        model.encoder.output.weight.mul_(1e4)
    objective = objective_of(model, usage_weight=0.1, straight_through=True)
    batch = {"pixel_values": blocks(5, 3, 2, 2), "ids": torch.arange(5)}
    whole = objective(model, batch, 0.0)[1]
    chunks = objective.split(batch, 2)
    assert [len(chunk["ids"]) for chunk in chunks] == [3, 2]
    counts = {"images": torch.tensor(5.0)}
    shares = [objective.represent(model, chunk, Targets(), 0.0, counts) for chunk in chunks]
    for name in ("reconstruction", "kl"):
        torch.testing.assert_close(sum(share.parts[name] for share in shares).detach(), whole[name])
    rows = torch.cat([share.rows["used"] for share in shares])
    torch.testing.assert_close(objective.compare({"used": rows}, {}, {}, 0.0).parts["usage"].detach(), whole["usage"])
    with pytest.raises(ValueError, match="6 chunks"):
        objective.split(batch, 6)


@pytest.mark.parametrize(
    "fields",
    [{"temperatures": [1.0]}, {"temperatures": [1.0, 0.0]}, {"temperature_share": 0.0}, {"usage_weight": -1.0}],
)
def test_bad_objectives_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        objective_of(tiny(), **fields)
    with pytest.raises(ValueError, match="no decoder"):
        objective_of(tiny(decoder=False))


def test_perplexity_counts_equally_used_codes():
    assert code_perplexity(torch.tensor([[0, 1], [2, 3]]), 24) == (4, pytest.approx(4.0))
    assert code_perplexity(torch.tensor([5, 5, 5]), 24) == (1, pytest.approx(1.0))


def test_the_evaluator_measures_what_it_says(emoji_folder):
    rows = open_rows(str(emoji_folder / "test_concept.parquet")).take(range(7))
    model = tiny(reconstruction="squared")
    found = dict(ReconstructionEvaluator(rows, "few", batch_size=3).run(model))
    pictures = read_pictures(rows, 16)
    drawn = model.decode(model.get_codebook_indices(pictures))
    assert found["few/squared_error"] == pytest.approx((drawn - pictures).square().mean().item(), rel=1e-5)
    constant = (pictures - pictures.mean((0, 2, 3), keepdim=True)).square().mean().item()
    assert found["few/error_of_constant"] == pytest.approx(constant, rel=1e-4)
    with pytest.raises(ValueError, match="no pictures"):
        ReconstructionEvaluator([], "none")


@pytest.mark.usefixtures("fresh_accelerator")
def test_the_example_trains_on_a_folder_of_bare_pictures(tmp_path, emoji_folder):
    """Files without captions, one of them no picture; the directory it leaves is whole."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for place, row in enumerate(open_rows(str(emoji_folder / "test_concept.parquet")).take(range(12))):
        (folder / ("more" if place % 2 else ".") / f"{place}.png").write_bytes(row["image"]["bytes"])
    (folder / "broken.png").write_bytes(b"no picture")
    config = tmp_path / "config.yaml"
    values = {
        "base": str(ROOT / "examples" / "configs" / "image_tokenizer_emoji.yaml"),
        "model_config": TINY,
        "train_data": [str(folder)],
        "text_column": None,
        "eval_data": [str(emoji_folder / "test_concept.parquet")],
        "output_dir": str(tmp_path / "run"),
        "attribution": None,
        "max_bad_rows": 0.5,
        "batch_size": 4,
        "max_steps": 4,
        "warmup_epochs": 0,
        "mixed_precision": "no",
        "log_every": 1,
    }
    config.write_text(yaml.safe_dump(values))
    with pytest.warns(UserWarning, match="cannot be used"):
        metrics = load_example("train_image_tokenizer").main(["--config", str(config)])

    # the doctor looks at its codes; those of bare pictures have no captions
    sample = read_sample(read_run(tmp_path / "run"))
    assert sample.codes.shape == (12, 4) and sample.num_codes == TINY["num_codes"] and sample.tokens == 0
    assert examine(tmp_path / "run")[1] == []

    lines = [line for line in read_log(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(math.isfinite(line[name]) for line in lines for name in ("reconstruction", "kl", "usage"))
    assert "broken.png" in (tmp_path / "run" / "quarantine.jsonl").read_text()
    made = tmp_path / "run" / "model"
    weights = load_file(made / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    model = load_model(AutoModel, made, dtype=torch.float32)
    assert model.config.num_codes == TINY["num_codes"] and model.config.reconstruction == "squared"
    told = json.loads((made / "results" / "metrics.json").read_text())["metrics"]
    assert told == pytest.approx(metrics) and "test_concept/perplexity" in told
    card = (made / "README.md").read_text()
    assert "of 24" in card and "{{" not in card
    (picture,) = (made / "pictures").iterdir()
    with Image.open(picture) as sheet:
        assert sheet.width > 12 * 16


@pytest.fixture(scope="module")
def shipped() -> DiscreteVAE:
    return load_model(AutoModel, SHIPPED, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", FLOORS)
def test_the_shipped_one_keeps_pictures(name, shipped, emoji_folder):
    """On pictures it never saw: far better than the best single colour, with hundreds of codes in use."""
    rows = open_rows(str(emoji_folder / f"{name}.parquet"))
    few = rows.take(range(0, len(rows), 4))
    found = dict(ReconstructionEvaluator(few, name).run(shipped))
    assert found[f"{name}/times_better"] > FLOORS[name][0], found
    assert found[f"{name}/perplexity"] > FLOORS[name][1], found
    said = json.loads((SHIPPED / "results" / "metrics.json").read_text())["metrics"]
    assert found[f"{name}/squared_error"] == pytest.approx(said[f"{name}/squared_error"], rel=0.15)


def test_the_shipped_one_is_small_and_made_by_the_example():
    weights = SHIPPED / "model.safetensors"
    assert weights.stat().st_size <= 3 * 2**20
    with safe_open(weights, framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}
    said = json.loads((SHIPPED / "results" / "training_config.json").read_text())
    config = yaml.safe_load((ROOT / "examples" / "configs" / "image_tokenizer_emoji.yaml").read_text())
    config["model_config"] = {**said["model_config"], **config["model_config"]}
    assert {name: said[name] for name in config if name != "output_dir"} == {
        name: value for name, value in config.items() if name != "output_dir"
    }
    assert (Path(SHIPPED) / "ATTRIBUTION.md").is_file()

"""DALL-E's public files as a DiscreteVAE: from a pickled module whose package is gone, without running its code.

The package `dall_e` is made here, in the layout and with the names of OpenAI's, and taken away before conversion.
"""

import math
import sys
import types
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from oner.training.conversion.dalle import convert_dalle
from oner.training.conversion.reading import CheckpointFileError
from oner.training.conversion.report import MissingWeightsError

HIDDEN, CODES, EMBEDDED, BLOCKS = 8, 12, 6, 2


class Conv2d(nn.Module):
    def __init__(self, n_in: int, n_out: int, kw: int):
        super().__init__()
        self.kw = kw
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / math.sqrt(n_in * kw**2))
        self.b = nn.Parameter(torch.randn(n_out) / 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.w, self.b, padding=(self.kw - 1) // 2)


class Block(nn.Module):
    kernels: tuple[int, ...]

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.post_gain = 1 / (4 * BLOCKS) ** 2
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, n_out // 4, n_out // 4, n_out // 4, n_out)
        steps = OrderedDict()
        for place, side in enumerate(self.kernels):
            steps[f"relu_{place + 1}"] = nn.ReLU()
            steps[f"conv_{place + 1}"] = Conv2d(widths[place], widths[place + 1], side)
        self.res_path = nn.Sequential(steps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.id_path(x) + self.post_gain * self.res_path(x)


class EncoderBlock(Block):
    kernels = (3, 3, 3, 1)


class DecoderBlock(Block):
    kernels = (1, 3, 3, 3)


class Network(nn.Module):
    def __init__(self, block: type[Block], first: nn.Module, widths: list[int], between: nn.Module, last: nn.Module):
        super().__init__()
        stages = OrderedDict(input=first)
        for group in range(4):
            steps = OrderedDict()
            for place in range(BLOCKS):
                steps[f"block_{place + 1}"] = block(widths[group + (place > 0)], widths[group + 1])
            if group < 3:
                steps["pool" if isinstance(between, nn.MaxPool2d) else "upsample"] = between
            stages[f"group_{group + 1}"] = nn.Sequential(steps)
        stages["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=last))
        self.blocks = nn.Sequential(stages)
        self.vocab_size = CODES

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class Encoder(Network):
    def __init__(self):
        widths = [HIDDEN, HIDDEN, 2 * HIDDEN, 4 * HIDDEN, 8 * HIDDEN]
        super().__init__(
            EncoderBlock, Conv2d(3, HIDDEN, 7), widths, nn.MaxPool2d(kernel_size=2), Conv2d(8 * HIDDEN, CODES, 1)
        )


class Decoder(Network):
    def __init__(self):
        widths = [EMBEDDED, 8 * HIDDEN, 4 * HIDDEN, 2 * HIDDEN, HIDDEN]
        upsample = nn.Upsample(scale_factor=2, mode="nearest")
        super().__init__(DecoderBlock, Conv2d(CODES, EMBEDDED, 1), widths, upsample, Conv2d(HIDDEN, 6, 1))


PLACES = {
    "dall_e.utils": (Conv2d,),
    "dall_e.encoder": (Encoder, EncoderBlock),
    "dall_e.decoder": (Decoder, DecoderBlock),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> tuple[Path, nn.Module, nn.Module]:
    """Folder of the files, pickled (the encoder also in torch's old format) and as tensors; the modules themselves."""
    torch.manual_seed(0)
    folder, encoder, decoder = tmp_path_factory.mktemp("dalle"), Encoder(), Decoder()
    with torch.no_grad():  # as random weights are, one code would win everywhere
        encoder.blocks.output.conv.b -= encoder(0.8 * torch.rand(8, 3, 16, 16) + 0.1).mean((0, 2, 3))
    homes = {one: one.__module__ for classes in PLACES.values() for one in classes}
    try:
        for name, classes in {"dall_e": (), **PLACES}.items():
            sys.modules[name] = types.ModuleType(name)
            for one in classes:
                one.__module__ = name
                setattr(sys.modules[name], one.__name__, one)
        for name, module in (("encoder", encoder), ("decoder", decoder)):
            torch.save(module, folder / f"{name}.pkl")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that format keeps the source too, and a class made here has no file
            torch.save(encoder, folder / "encoder-old.pkl", _use_new_zipfile_serialization=False)
    finally:
        for name in ("dall_e", *PLACES):
            sys.modules.pop(name, None)
        for one, home in homes.items():
            one.__module__ = home
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        state = dict(module.state_dict())
        torch.save({"state_dict": state}, folder / f"{name}.pth")
        save_file(state, folder / f"{name}.safetensors")
    return folder, encoder.eval(), decoder.eval()


def assert_draws_alike(model, encoder: nn.Module, decoder: nn.Module) -> None:
    pictures = torch.rand(2, 3, 2, 3).repeat_interleave(8, 2).repeat_interleave(8, 3)  # a colour for each place
    with torch.no_grad():
        logits = encoder(0.8 * pictures + 0.1)
        codes = logits.argmax(1)
        raw = decoder(F.one_hot(codes, CODES).permute(0, 3, 1, 2).float())
        drawn = ((raw[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
        torch.testing.assert_close(model.encode(pictures), logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(model.get_codebook_indices(pictures), codes.flatten(1))
        torch.testing.assert_close(model.decode(codes.flatten(1), (2, 3)), drawn, rtol=1e-5, atol=1e-5)
    assert len(codes.unique()) > 1


@pytest.mark.parametrize("ending", [".pkl", ".pth", ".safetensors"])
def test_codes_and_pictures_are_those_of_the_original(ending, originals):
    folder, encoder, decoder = originals
    assert "dall_e" not in sys.modules
    model, report = convert_dalle(folder / f"encoder{ending}", folder / f"decoder{ending}")

    assert "dall_e" not in sys.modules and not model.training
    config = model.config
    assert (config.hidden_size, config.num_codes, config.codebook_dim) == (HIDDEN, CODES, EMBEDDED)
    assert (config.blocks_per_group, config.num_channels, config.decoder) == (BLOCKS, 3, True)
    assert_draws_alike(model, encoder, decoder)
    expected = {f"encoder.{name}" for name in encoder.state_dict()} | {f"decoder.{n}" for n in decoder.state_dict()}
    assert report.used.keys() == expected and not report.left_over and not report.missing
    assert sorted(report.used.values()) == sorted(model.state_dict())


def test_it_can_be_saved_and_loaded(originals, tmp_path):
    from transformers import AutoModel

    import oner  # noqa: F401

    folder, encoder, decoder = originals
    convert_dalle(folder / "encoder.pkl", folder / "decoder.pkl")[0].save_pretrained(tmp_path)
    assert_draws_alike(AutoModel.from_pretrained(tmp_path).eval(), encoder, decoder)


def test_an_encoder_alone_gives_codes(originals):
    folder, encoder, _ = originals
    model, report = convert_dalle(folder / "encoder.pkl")
    pictures = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model.get_codebook_indices(pictures), encoder(0.8 * pictures + 0.1).argmax(1).flatten(1))
    assert model.decoder is None and "No decoder" in report.notes[0]
    with pytest.raises(ValueError, match="no decoder"):
        model.decode(torch.zeros(1, 4, dtype=torch.long))


def test_what_has_no_place_is_listed(originals, tmp_path):
    folder, encoder, _ = originals
    state = dict(encoder.state_dict()) | {"blocks.output.norm.w": torch.ones(3)}
    torch.save(state, tmp_path / "more.pth")
    _, report = convert_dalle(tmp_path / "more.pth")
    assert list(report.left_over) == ["encoder.blocks.output.norm.w"]
    assert "blocks.output.norm.w" in report.describe()


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_wrong_files_are_refused_in_words(originals, tmp_path, monkeypatch):
    folder, encoder, _ = originals
    monkeypatch.chdir(tmp_path)
    torch.save(Bomb(), "bomb.pkl")
    torch.save(nn.Sequential(nn.Linear(2, 2)), "linear.pkl")
    torch.save({"blocks.input.w": 3}, "number.pth")
    torch.save({"layer.weight": torch.ones(2, 2)}, "other.pth")
    Path("text.pkl").write_text("<html>not found</html>")
    Path("cut.pkl").write_bytes((folder / "encoder.pkl").read_bytes()[:2000])
    Path("cut.safetensors").write_bytes((folder / "encoder.safetensors").read_bytes()[:200])
    for file, told in {
        "absent.pkl": "no such file",
        "bomb.pkl": "it names getattr",
        "linear.pkl": "it names torch.nn.modules.linear.Linear",
        "number.pth": "expected DALL-E's encoder or decoder",
        "other.pth": "no kernel blocks.input.w",
        "text.pkl": "cannot be read",
        str(folder / "encoder-old.pkl"): "before 1.6",
        "cut.pkl": "cannot be read",
        "cut.safetensors": "cannot be read",
        str(folder / "decoder.pkl"): "is a decoder; expected the encoder",
    }.items():
        with pytest.raises(CheckpointFileError, match=told) as caught:
            convert_dalle(file)
        assert file in str(caught.value)
    assert not Path("exploded").exists()
    with pytest.raises(CheckpointFileError, match="is a encoder; expected the decoder"):
        convert_dalle(folder / "encoder.pkl", folder / "encoder.pkl")


def test_weights_that_are_missing_or_of_another_shape_are_named(originals, tmp_path):
    folder, encoder, _ = originals
    whole = encoder.state_dict()
    lost = "blocks.group_2.block_1.id_path.w"
    torch.save({name: value for name, value in whole.items() if name != lost}, tmp_path / "lost.pth")
    with pytest.raises(MissingWeightsError, match=r"encoder\.groups\.1\.0\.skip\.weight"):
        convert_dalle(tmp_path / "lost.pth")
    torch.save({**whole, "blocks.group_3.block_2.res_path.conv_2.b": torch.ones(5)}, tmp_path / "shape.pth")
    with pytest.raises(MissingWeightsError, match=r"groups\.2\.1\.convs\.1\.bias.*\(5,\), expected \(8,\)"):
        convert_dalle(tmp_path / "shape.pth")

"""examples/late_fusion.py: perceptrons over two frozen embeddings, beside one pass over image and text."""

import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_pretraining import ROOT
from torch.nn import functional as F

sys.path.insert(0, str(ROOT / "examples"))
WIDTH = 16
MODEL = ROOT / "examples" / "checkpoints" / "oner-emoji"


@pytest.fixture(scope="module")
def script():
    import late_fusion

    return late_fusion


def unit(generator: torch.Generator, count: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, WIDTH, generator=generator), dim=-1)


@pytest.mark.parametrize("product", [True, False])
def test_a_perceptron_learns_what_the_sum_does_not_find(script, product):
    generator = torch.Generator().manual_seed(0)
    reference, words = unit(generator, 2000), unit(generator, 2000)
    target = F.normalize(reference.roll(3, dims=1) + words.roll(5, dims=1), dim=-1)
    told = {"reference": reference[:1800], "words": words[:1800], "target": target[:1800]}
    perceptron = script.trained(told, product, seed=0, temperature=0.1, steps=300)

    reference, words, target = reference[1800:], words[1800:], target[1800:]
    own = torch.arange(200)
    with torch.no_grad():
        found = (perceptron(reference, words) @ target.T).argmax(1) == own
    by_sum = ((reference + words) @ target.T).argmax(1) == own
    assert found.float().mean() > by_sum.float().mean() + 0.3
    again = script.trained(told, product, seed=0, temperature=0.1, steps=300)
    torch.testing.assert_close(again.out.weight, perceptron.out.weight, rtol=0, atol=0)


def test_the_sum_is_what_an_idle_perceptron_gives(script):
    perceptron = script.Perceptron(WIDTH, product=True)
    torch.nn.init.zeros_(perceptron.out.weight)
    torch.nn.init.zeros_(perceptron.out.bias)
    generator = torch.Generator().manual_seed(0)
    image, text = unit(generator, 3), unit(generator, 3)
    torch.testing.assert_close(perceptron(image, text), F.normalize(image + text, dim=-1))


def picture(number: int) -> dict[str, bytes]:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), (40 * number, 255 - 40 * number, 90)).save(stream, "PNG")
    return {"bytes": stream.getvalue()}


def test_all_ways_on_a_model_and_files(script, tmp_path, capsys):
    queries = [
        {"image": picture(n), "text": "red", "target": n, "choices": [n, (n + 1) % 4], "names": ["target", "other"],
         "kind": "swap"} for n in range(4)
    ]  # fmt: skip
    triples = [{"image": picture(n), "text": "red", "target_image": picture((n + 1) % 4)} for n in range(4)]
    for name, rows in (
        ("unseen_pairs_queries", queries),
        ("unseen_pairs_gallery", [{"image": picture(n)} for n in range(4)]),
        ("train_triples", triples),
    ):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    report = tmp_path / "late.json"
    script.main([str(MODEL), "--scenes", str(tmp_path), "--splits", "unseen_pairs", "--seeds", "0", "1",
                 "--steps", "2", "--output", str(report)])  # fmt: skip
    found = json.loads(report.read_text())
    assert [len(found[way]["unseen_pairs"]) for way in found] == [1, 1, 1, 1, 2, 2]
    assert all(seed["r@10"] == 1 for by_split in found.values() for seed in by_split["unseen_pairs"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| query | unseen_pairs: R@10 | unseen_pairs: first of ten |"
    assert lines[-1].startswith("| perceptron with product | 100.0 ± 0.0 |")

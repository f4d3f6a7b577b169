"""What lies at the codes: counts by hand, a sheet of pictures and texts, a command, and the card's word of it."""

import pytest
import torch
from tiny_codis import CODES, tiny_config
from tiny_oner import randomised
from tiny_pretraining import evaluated, evaluation_of, load_example
from tiny_simla_pictures import EMOJI, assert_not_blank, make_processor, real_rows

from oner import CodisForImageTextRetrieval, CodisForPreTraining
from oner.training.evaluation.codes import CodeEvaluator, code_cosines, code_scores, code_sheet, usage
from oner.training.publishing.hub import export_model


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def make_codis(cls, processor, **overrides):
    """Random weights, pictures of 32 pixels, captions of the emoji."""
    tokenizer = processor.tokenizer
    fields = {"image_size": 32, "patch_size": 8, "max_text_length": 64, "max_position_embeddings": 80}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "cls_token_id", "mask_token_id")}
    fields |= {"vocab_size": len(tokenizer), "sep_token_id": None, "image_token_id": processor.image_token_id, **ids}
    return randomised(cls(tiny_config(**{**fields, **overrides}))).eval()


def test_scores_by_hand():
    """Pictures at the codes 0, 0, 2, texts at 0, 1, 2: pairs 0 and 2 meet."""
    image = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.5, 0.4, 0.0, 0.0], [0.0, 0.0, 0.1, 0.0]])
    text = torch.tensor([[0.2, 0.1, 0.0, 0.0], [0.1, 0.2, 0.0, 0.0], [0.0, 0.0, 0.3, 0.1]])
    assert usage(image).tolist() == [2, 0, 1, 0] and usage(text).tolist() == [1, 1, 1, 0]
    assert code_scores(image, text) == {
        "used_by_pictures": 0.5, "used_by_texts": 0.75, "used_by_both": 0.5,
        "agreement": pytest.approx(2 / 3), "agreement_chance": pytest.approx((2 * 1 + 1 * 1) / 9),
    }  # fmt: skip


def test_cosines_are_those_of_features_and_codes(processor):
    model = make_codis(CodisForPreTraining, processor)
    rows = real_rows(5)
    texts = [row["captions"][0] for row in rows]
    image, text = code_cosines(model, processor, [row["image"] for row in rows], texts, batch_size=2)
    assert image.shape == text.shape == (5, CODES)
    codes = torch.nn.functional.normalize(model.codebook.weight.detach(), dim=-1)
    with torch.no_grad():
        one = model.get_text_features(**processor(text=[texts[3]])).pooler_output
    expected = torch.nn.functional.normalize(one, dim=-1) @ codes.T
    torch.testing.assert_close(text[3:4], expected, rtol=1e-5, atol=1e-6)


def test_a_line_of_the_sheet_is_a_code(processor, monkeypatch):
    from oner.training.evaluation import codes as module

    model, rows = make_codis(CodisForPreTraining, processor), real_rows(6)
    # codes 3 and 1 are the most used; caption 0 stands twice
    rows[5] = {**rows[5], "captions": rows[0]["captions"]}
    image = torch.zeros(6, CODES)
    image[torch.arange(6), [3, 3, 3, 1, 1, 0]] = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    drawn = []
    monkeypatch.setattr(module, "heat_sheet", lambda panels, title: drawn.append(panels))
    code_sheet(model, processor, rows, image, image, codes=2, nearest=3)
    first, second = drawn[0]
    assert first[0].above == "code 3: 3 pictures, 3 texts" and second[0].above == "code 1: 2 pictures, 2 texts"
    assert [panel.below.rpartition("\n")[2] for panel in first[:3]] == ["0.90", "0.80", "0.70"]
    words = first[3].words.split("\n\n")
    assert first[3].picture is None and [one.rpartition("  ")[2] for one in words] == ["0.90", "0.80", "0.70"]
    assert len({one.rpartition("  ")[0] for one in words}) == 3


def test_the_evaluator_yields_numbers_and_a_sheet(processor):
    values = dict(CodeEvaluator(real_rows(12), shown=3, progress=False).run(make_codis(CodisForPreTraining, processor),
                                                                            processor))  # fmt: skip
    assert_not_blank(values.pop("codes/code_sheet"))
    assert len(values) == 5 and all(0 <= value <= 1 for value in values.values())
    with pytest.raises(TypeError, match="expected a model with a codebook.*got CodisForImageTextRetrieval"):
        next(CodeEvaluator(real_rows(2)).run(make_codis(CodisForImageTextRetrieval, processor), processor))
    with pytest.raises(TypeError, match="with a codebook"):
        next(CodeEvaluator(real_rows(2)).run(make_codis(CodisForPreTraining, processor, num_codes=0), processor))


def test_the_command_brings_the_sheet_onto_the_card(processor, tmp_path, capsys):
    directory = export_model(make_codis(CodisForPreTraining, processor), processor, tmp_path / "model")
    card = (directory / "README.md").read_text(encoding="utf-8")
    assert f"meet at {CODES} codes" in card
    example = load_example("evaluate")
    told = ["--model", str(directory), "--data", str(EMOJI), "--device", "cpu", "--limit", "8"]
    values = evaluated([*told, "--tasks", "codes"])
    assert "test_style/codes/code_agreement" in values
    card = (directory / "README.md").read_text(encoding="utf-8")
    assert "](pictures/test_style-codes-code_sheet.png)" in card
    # without a codebook nothing is said of one
    albef = make_codis(CodisForPreTraining, processor, num_codes=0)
    export_model(albef, processor, tmp_path / "albef")
    assert "## Codebook" not in (tmp_path / "albef" / "README.md").read_text(encoding="utf-8")
    assert "codes" not in example.chosen_tasks(evaluation_of(told), "set", real_rows(2), None, albef)
    assert "set: no codes, as they need the pretraining model" in capsys.readouterr().out

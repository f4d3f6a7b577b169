"""The four pipelines on pairs of a picture and a text: the models' own numbers, every form of asking, clear errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_simla_pictures import make_processor, make_simla, real_rows
from transformers import pipeline

import oner
from oner.modeling.modeling_simla_tasks import SimlaForVisualEntailment, SimlaForVisualQuestionAnswering
from oner.processing.image_processing_vl import ImageDecodeError, open_image
from oner.processing.pipeline_image_text_matching import ImageTextMatchingPipeline
from oner.processing.pipeline_pairs import gather_pairs
from oner.processing.pipeline_visual_entailment import VisualEntailmentPipeline
from oner.processing.pipeline_visual_grounding import VisualGroundingPipeline, read_boxes
from oner.processing.pipeline_visual_question_answering import VisualQuestionAnsweringPipeline
from oner.registration import BUILT_IN
from oner.training.publishing.hub import export_model, pipeline_classes

TEXTS = ["a red apple", "moon", "a face with tears of joy"]


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def pictures():
    return [open_image(row["image"]) for row in real_rows(3)]


@pytest.fixture(scope="module")
def matcher(processor):
    return make_simla(oner.SimlaForImageTextRetrieval, processor)


@pytest.fixture(scope="module")
def match(matcher, processor):
    return ImageTextMatchingPipeline(model=matcher, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def where(matcher, processor):
    return VisualGroundingPipeline(model=matcher, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def entail(processor):
    model = make_simla(SimlaForVisualEntailment, processor, num_labels=3)
    return VisualEntailmentPipeline(model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def answer(processor):
    model = make_simla(SimlaForVisualQuestionAnswering, processor)
    return VisualQuestionAnsweringPipeline(model=model, processor=processor, device="cpu")


def scores(answers):
    return pytest.approx([one["score"] for one in answers], abs=1e-6)


class TestAsking:
    def test_every_form_of_a_pair(self, match, pictures, tmp_path):
        path = tmp_path / "photo.png"
        pictures[0].save(path)
        one = match(str(path), text=TEXTS[0])
        assert one["text"] == TEXTS[0] and 0 < one["score"] < 1
        same = [match(image=path, text=TEXTS[0]), match({"image": path.read_bytes(), "text": TEXTS[0]}),
                match(pictures[0], text=TEXTS[0])]  # fmt: skip
        assert [other["score"] for other in same] == pytest.approx([one["score"]] * 3, abs=1e-6)
        several = match(pictures[0], text=TEXTS)
        assert [row["text"] for row in several] == TEXTS and several[0]["score"] == pytest.approx(
            one["score"], abs=1e-6
        )
        assert len({round(row["score"], 6) for row in several}) == 3
        pairs = match(pictures, text=TEXTS)
        for row, picture, text in zip(pairs, pictures, TEXTS, strict=True):
            assert row["score"] == pytest.approx(match(picture, text=text)["score"], abs=1e-6)
        rows = [{"image": picture, "text": text} for picture, text in zip(pictures, TEXTS, strict=True)]
        assert [row["score"] for row in match(rows)] == scores(pairs)
        assert [row["score"] for row in match(iter(rows), batch_size=2)] == scores(pairs)
        assert [row["text"] for row in match(pictures, text="moon")] == ["moon"] * 3
        assert match([], text="moon") == match(pictures[0], text=[]) == match([]) == []
        assert [row["score"] for row in match([pictures[0]], text=TEXTS[0])] == scores([one])

    def test_wrong_questions_are_refused(self, match, pictures):
        picture = pictures[0]
        cases = [
            ({}, ValueError, "nothing was asked"),
            ({"text": "moon"}, ValueError, "nothing was asked"),
            ({"inputs": picture}, ValueError, "pair 0: expected text= too"),
            ({"inputs": picture, "image": picture, "text": "moon"}, ValueError, "given twice"),
            ({"inputs": {"image": picture, "caption": "moon"}}, ValueError, r"got \['caption', 'image'\]"),
            ({"inputs": [picture, picture], "text": ["a", "b", "c"]}, ValueError, "2 pictures and 3 texts"),
            ({"inputs": picture, "text": ["moon", " "]}, ValueError, "pair 1: the text cannot be read: .*empty"),
            ({"inputs": picture, "text": 3}, ValueError, "must be a string"),
            ({"inputs": b"none", "text": "moon"}, ImageDecodeError, "not a picture"),
            ({"inputs": "https://example.org/a.png", "text": "moon"}, ImageDecodeError, "allow_urls=True"),
            (
                {"inputs": picture, "text": "moon", "batch_size": 0},
                ValueError,
                "batch_size must be a positive integer",
            ),
            ({"inputs": picture, "text": "moon", "topk": 3}, TypeError, r"image-text-matching takes .*got \['topk'\]"),
        ]
        for arguments, kind, words in cases:
            with pytest.raises(kind, match=words):
                match(**arguments)

    def test_texts_have_the_name_of_the_task(self):
        pairs, single = gather_pairs("a.png", None, "why", "question")
        assert list(pairs) == [{"image": "a.png", "question": "why"}] and single
        with pytest.raises(ValueError, match='keys "image" and "question"'):
            list(gather_pairs({"image": "a.png", "text": "why"}, None, None, "question")[0])


class TestMatching:
    def test_scores_are_the_models_probabilities(self, match, matcher, processor, pictures):
        batch = processor(images=pictures, text=TEXTS)
        with torch.no_grad():
            expected = matcher.match(**batch).softmax(-1)[:, 1]
        assert [row["score"] for row in match(pictures, text=TEXTS)] == pytest.approx(expected.tolist(), abs=1e-6)
        assert expected.std() > 1e-3

    def test_a_picture_is_read_once_for_all_its_texts(self, match, pictures, monkeypatch):
        seen = []
        encode = type(match.model).get_image_features

        def counted(self, pixel_values, **kwargs):
            seen.append(len(pixel_values))
            return encode(self, pixel_values, **kwargs)

        monkeypatch.setattr(type(match.model), "get_image_features", counted)
        match(pictures[0], text=TEXTS * 3)
        match([pictures[0], pictures[1], pictures[0]], text=TEXTS)
        assert seen == [1, 2]

    def test_half_precision_is_computed_in_full_on_a_cpu(self, processor, match, pictures):
        model = make_simla(oner.SimlaForImageTextRetrieval, processor).half()
        half = ImageTextMatchingPipeline(model=model, processor=processor, device="cpu")
        assert half.model.dtype == torch.float32
        expected = match(pictures, text=TEXTS)
        assert [row["score"] for row in half(pictures, text=TEXTS)] == pytest.approx(
            [row["score"] for row in expected], abs=2e-2
        )


class TestGrounding:
    def test_map_and_box(self, where, matcher, processor, pictures):
        picture = pictures[0].resize((120, 60))
        found = where(picture, text=TEXTS[0])
        expected = matcher.ground(**processor(images=[picture], text=[TEXTS[0]]))[0]
        torch.testing.assert_close(found["map"], expected, rtol=1e-4, atol=1e-9)
        box = found["box"]
        assert list(box) == ["xmin", "ymin", "xmax", "ymax"] and found["score"] > 0
        assert 0 <= box["xmin"] < box["xmax"] <= 120 and 0 <= box["ymin"] < box["ymax"] <= 60
        assert box["xmin"] % 30 == 0 and box["ymax"] % 15 == 0  # whole patches of 4 x 4
        assert found.keys() == {"box", "score", "map"}

    def test_given_boxes_are_chosen_from(self, where, pictures):
        picture = pictures[0].resize((120, 60))
        best = where(picture, text=TEXTS[0])["box"]
        boxes = [
            {"xmin": 0, "ymin": 0, "xmax": 2, "ymax": 2},
            {"label": "x", "score": 0.9, "box": best},
            (1, 1, 119, 59),
        ]
        found = where(picture, text=TEXTS[0], boxes=boxes)
        assert found["box"] in (best, {"xmin": 1.0, "ymin": 1.0, "xmax": 119.0, "ymax": 59.0})
        assert found["index"] in (1, 2) and found["score"] >= where(picture, text=TEXTS[0])["score"]
        several = where([picture, picture], text=TEXTS[:2], boxes=[boxes[:1], boxes])
        assert several[0]["index"] == 0 and several[0]["box"]["xmax"] == 2
        for wrong, words in (
            ([], "at least one box"),
            ([(1, 2, 3)], "box 0: expected xmin, ymin, xmax, ymax"),
            ([(5, 5, 5, 9)], "xmin < xmax"),
        ):
            with pytest.raises(ValueError, match=words):
                read_boxes(wrong)
        with pytest.raises(ValueError, match="3 lists of boxes for 2 pairs"):
            where([picture, picture], text=TEXTS[:2], boxes=boxes)

    def test_overlay_and_options(self, where, pictures):
        plain, drawn = where(pictures[:2], text=TEXTS[:2]), where(pictures[:2], text=TEXTS[:2], overlay=True)
        assert "overlay" not in plain[0] and isinstance(drawn[1]["overlay"], Image.Image)
        assert drawn[1]["overlay"].size == pictures[1].size
        by_contrast = where(pictures[0], text=TEXTS[0], mode="itc")["map"]
        assert not torch.allclose(by_contrast, plain[0]["map"], rtol=1e-2)
        assert not torch.allclose(where(pictures[0], text=TEXTS[0], layer=2)["map"], plain[0]["map"], rtol=1e-2)
        with pytest.raises(ValueError, match="layer is 9"):
            where(pictures[0], text=TEXTS[0], layer=9)

    def test_a_cropping_processor_sees_the_whole_picture(self, matcher, where, pictures):
        cropping = make_processor()
        cropping.image_processor.do_center_crop = True
        cropping.image_processor.size = {"height": 40, "width": 40}
        cropping.image_processor.crop_size = {"height": 32, "width": 32}
        pipe = VisualGroundingPipeline(model=matcher, processor=cropping, device="cpu")
        wide = pictures[0].resize((150, 60))
        torch.testing.assert_close(pipe(wide, text=TEXTS[0])["map"], where(wide, text=TEXTS[0])["map"])


class TestEntailment:
    def test_labels_best_first(self, entail, processor, pictures):
        with torch.no_grad():
            logits = entail.model(**processor(images=pictures, text=TEXTS)).logits
        answers = entail(pictures, text=TEXTS)
        for row, one in zip(logits.softmax(-1), answers, strict=True):
            assert [label["score"] for label in one] == pytest.approx(sorted(row.tolist(), reverse=True), abs=1e-6)
            assert one[0]["label"] == ("contradiction", "neutral", "entailment")[int(row.argmax())]
        assert [len(row) for row in entail(pictures[0], text=TEXTS, top_k=1)] == [1, 1, 1]
        with pytest.raises(ValueError, match="top_k must be a positive integer, got 0"):
            entail(pictures[0], text="moon", top_k=0)


class TestQuestions:
    CANDIDATES = ["red", "a green tree", "moon", "yes", "no", "apple", "two"]

    @pytest.mark.parametrize("twice", [None, True, False])
    def test_candidates_are_ranked_by_their_likelihood(self, answer, processor, pictures, twice):
        told = {} if twice is None else {"count_first_token_twice": twice}
        found = answer(pictures, question=TEXTS, candidates=self.CANDIDATES, top_k=7, **told)
        model, end = answer.model, processor.tokenizer.cls_token_id  # no [SEP] in our vocabulary: [CLS] ends an answer
        for picture, question, answers in zip(pictures, TEXTS, found, strict=True):
            batch, likelihoods = processor(images=[picture], text=[question]), []
            for candidate in self.CANDIDATES:
                words = processor(text=[candidate])["input_ids"][0].tolist()
                with torch.no_grad():
                    logits = model(**batch, answer_ids=torch.tensor([[*words, end]])).logits[0].log_softmax(-1)
                steps = [float(logits[at, token]) for at, token in enumerate([*words[1:], end])]
                # the first token counts twice (ALBEF's code)
                likelihoods.append(sum(steps) if twice is False else sum(steps) + steps[0])
            order = torch.tensor(likelihoods).softmax(0).sort(descending=True)
            assert [one["answer"] for one in answers] == [self.CANDIDATES[i] for i in order.indices]
            assert [one["score"] for one in answers] == pytest.approx(order.values.tolist(), abs=1e-5)
        assert len(answer(pictures[0], question="what", candidates=self.CANDIDATES)) == 5

    def test_answers_are_written_without_candidates(self, answer, processor, pictures):
        one = answer(pictures[0], question=TEXTS[0], max_new_tokens=4)
        batch = processor(images=[pictures[0]], text=[TEXTS[0]])
        ids, score = [processor.tokenizer.cls_token_id], 0.0
        for _ in range(4):  # greedy, written out
            with torch.no_grad():
                logits = answer.model(**batch, answer_ids=torch.tensor([[*ids, 0]])).logits[0, -1].log_softmax(-1)
            ids.append(int(logits.argmax()))
            score += float(logits.max())
            if ids[-1] == ids[0]:
                break
        words = processor.tokenizer.decode([i for i in ids[1:] if i != ids[0]], skip_special_tokens=True)
        assert one[0]["answer"] == words.strip()
        assert one[0]["score"] == pytest.approx(torch.tensor(score / (len(ids) - 1)).exp().item(), rel=1e-4)
        several = answer(pictures, question=TEXTS, num_beams=3)
        assert [len(row) for row in several] == [1, 1, 1] and all(0 < row[0]["score"] <= 1 for row in several)

    def test_wrong_candidates_are_named(self, answer, pictures):
        for wrong, words in (([], "at least one answer"), ("red", "got 'red'"), (["red", ""], "candidate 1 .*empty")):
            with pytest.raises(ValueError, match=words):
                answer(pictures[0], question="what", candidates=wrong)


class TestModels:
    def test_families_without_the_method_are_told(self, processor):
        tokenizer = processor.tokenizer
        config = oner.OneRConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
            patch_size=8, projection_hidden_size=16, projection_dim=8, pad_token_id=tokenizer.pad_token_id,
            image_token_id=processor.image_token_id, cls_token_id=tokenizer.cls_token_id,
            mask_token_id=tokenizer.mask_token_id,
        )  # fmt: skip
        model = oner.OneRForImageTextRetrieval(config)
        for cls, method in (
            (ImageTextMatchingPipeline, "match"),
            (VisualQuestionAnsweringPipeline, "generate_answers"),
            (VisualEntailmentPipeline, "classifier"),
        ):
            with pytest.raises(TypeError, match=f"{cls.task_name} needs a model with {method}, got OneRForImageText"):
                cls(model=model, processor=processor, device="cpu")
        with pytest.raises(ValueError, match="image-text-matching needs a processor"):
            simla = make_simla(oner.SimlaForImageTextRetrieval, processor)
            ImageTextMatchingPipeline(model=simla, device="cpu")
        assert set(pipeline_classes(model)) - set(BUILT_IN) == {"image-text-retrieval", "visual-grounding"}
        assert "zero-shot-image-classification" in pipeline_classes(model)

    def test_an_export_names_what_its_weights_serve(self, processor, tmp_path):
        expected = {
            oner.SimlaForPreTraining: {"image-text-retrieval", "image-text-matching", "visual-grounding"},
            oner.SimlaForImageTextRetrieval: {"image-text-retrieval", "image-text-matching", "visual-grounding"},
            oner.SimlaModel: {"image-text-retrieval"},
            SimlaForVisualQuestionAnswering: {"image-question-answering"},
            SimlaForVisualEntailment: {"visual-entailment"},
        }
        for cls, tasks in expected.items():
            directory = export_model(make_simla(cls, processor), processor, tmp_path / cls.__name__)
            named = json.loads((directory / "config.json").read_text())["custom_pipelines"]
            assert set(named) - set(BUILT_IN) == tasks, cls
            for entry in named.values():
                file, name = entry["impl"].split(".")
                assert f"class {name}(" in (directory / f"{file}.py").read_text()

    def test_two_lines_of_readme(self, processor, pictures, tmp_path, match, entail, answer):
        """`pipeline(task, model=directory)` finds class, model and processor, after `import oner` without trust."""
        pictures[0].save(tmp_path / "photo.png")
        photo = str(tmp_path / "photo.png")
        export_model(match.model, processor, tmp_path / "retrieval")
        p = pipeline("image-text-matching", model=str(tmp_path / "retrieval"))
        assert p(photo, text="a red apple")["score"] == pytest.approx(
            match(photo, text="a red apple")["score"], abs=1e-6
        )
        p = pipeline("visual-grounding", model=str(tmp_path / "retrieval"))
        assert p(photo, text="a red apple")["map"].shape == (4, 4)
        export_model(entail.model, processor, tmp_path / "entailment")
        p = pipeline("visual-entailment", model=str(tmp_path / "entailment"))
        assert [row["score"] for row in p(photo, text="moon")] == scores(entail(photo, text="moon"))
        export_model(answer.model, processor, tmp_path / "vqa")
        p = pipeline("image-question-answering", model=str(tmp_path / "vqa"))
        assert p(photo, question="what is it") == answer(photo, question="what is it")

    def test_without_oner_with_trust(self, processor, pictures, tmp_path, match, where, entail, answer):
        """The same answers from a process that has transformers only, by the code in the directories."""
        pictures[0].save(tmp_path / "photo.png")
        photo, asked = str(tmp_path / "photo.png"), TEXTS[0]
        for name, pipe in (("retrieval", match), ("entailment", entail), ("vqa", answer)):
            export_model(pipe.model, processor, tmp_path / name)
        environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        run = [sys.executable, "-c", REMOTE, str(Path(__file__).parents[1]), photo, asked]
        done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        got = json.loads(done.stdout.splitlines()[-1])
        assert got["image-text-matching"] == pytest.approx(match(photo, text=asked)["score"], abs=1e-5)
        assert got["visual-grounding"] == pytest.approx(where(photo, text=asked)["map"].sum().item(), rel=1e-4)
        assert got["visual-entailment"] == scores(entail(photo, text=asked))
        assert got["image-question-answering"] == scores(answer(photo, question=asked))


REMOTE = """
import json, sys
folder, photo, text = sys.argv[1:]
sys.path.insert(0, folder)
from hub_probe import NoOner
sys.meta_path.insert(0, NoOner())
from transformers import pipeline
load = lambda task, model: pipeline(task, model=f"./{model}", trust_remote_code=True)
got = {"image-text-matching": load("image-text-matching", "retrieval")(photo, text=text)["score"]}
got["visual-grounding"] = load("visual-grounding", "retrieval")(photo, text=text)["map"].sum().item()
got["visual-entailment"] = [row["score"] for row in load("visual-entailment", "entailment")(photo, text=text)]
answers = load("image-question-answering", "vqa")(photo, question=text)
got["image-question-answering"] = [row["score"] for row in answers]
print(json.dumps(got))
"""

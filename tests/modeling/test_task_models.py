"""Questions, entailment and two pictures: SIMLA's classes against layers by hand, and the same heads on OneR.

B rows, N = 16 patches, T = 1 + W places of a text, R answers, A tokens of an answer, D = 32, V = 50.
"""

import pytest
import tiny_oner
import torch
from naive_fusion import naive_embed, naive_layer
from safetensors.torch import load_file, save_file
from tiny_oner import joint_batch, randomised
from tiny_simla import CLS, SEP, VOCAB, tiny_config
from tiny_tasks import ANSWERS, MASK, TASKS, bold, inputs
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoModelForVisualQuestionAnswering

from oner import (
    SimlaForPreTraining,
    SimlaForVisualEntailment,
    SimlaForVisualQuestionAnswering,
    SimlaForVisualReasoning,
)
from oner.modeling.modeling_oner import OneRModel, OneRPreTrainedModel
from oner.modeling.vl_task_heads import (
    AnswerDecoder,
    AnswerGeneration,
    PairClassification,
    PairClassificationHead,
    TwoImageClassification,
    answer_end,
)


def naive_logs(decoder, ids, question):
    """Log-probabilities of what follows each of `ids` (L,), (L, V)."""
    x = naive_embed(decoder.embeddings, ids)
    for layer in decoder.layers:
        x = naive_layer(layer, x, question, causal=True)
    return decoder.lm_head(x).log_softmax(-1)


def naive_questions(model, batch):
    """The fused states of each question's real places, [(T_b, D)]."""
    text, states = model.simla.text, []
    for ids, mask, picture in zip(*batch.values(), strict=True):
        x, seen = naive_embed(text.embeddings, ids[mask == 1]), model.simla.vision(picture[None])[0]
        for layer in text.layers:
            x = naive_layer(layer, x, seen)
        states.append(x)
    return states


def naive_likelihood(model, question, answer):
    """Sum of the log-probabilities of an answer's tokens behind its start, and that of the first of them."""
    answer = answer[answer != 0]
    logs = naive_logs(model.decoder, answer[:-1], question)
    each = logs.gather(1, answer[1:, None])[:, 0]
    return each.sum(), each[0]


@pytest.fixture(scope="module")
def answering():
    torch.manual_seed(1)
    return bold(SimlaForVisualQuestionAnswering(tiny_config()))


# the decoder and its loss


@torch.no_grad()
def test_the_loss_is_each_answers_likelihood_by_its_weight(answering):
    batch, per_question = inputs(), torch.tensor([2, 1, 2])
    weights = torch.tensor([0.7, 0.3, 1.0, 0.5, 0.2])
    out = answering(
        **batch, answer_ids=ANSWERS, answer_mask=MASK, answer_weights=weights, answers_per_question=per_question
    )
    questions = naive_questions(answering, batch)
    owners = [0, 0, 1, 2, 2]
    costs = [
        -naive_likelihood(answering, questions[owner], ids)[0] for owner, ids in zip(owners, ANSWERS, strict=True)
    ]
    torch.testing.assert_close(out.loss, (torch.stack(costs) * weights).sum() / 3, rtol=1e-5, atol=1e-5)
    assert out.logits.shape == (5, 4, VOCAB)
    real = torch.cat([out.question_states[1], out.question_states[1]])[: len(questions[1])]
    torch.testing.assert_close(real, questions[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_soft_labels_by_alpha(answering):
    batch, few, mask = inputs(), ANSWERS[:3], MASK[:3]
    soft = torch.randn(3, 4, VOCAB).softmax(-1)
    hard, both, teacher = (
        answering(**batch, answer_ids=few, answer_mask=mask, soft_labels=soft, alpha=alpha).loss
        for alpha in (0.0, 0.4, 1.0)
    )
    torch.testing.assert_close(both, 0.6 * hard + 0.4 * teacher)
    logs = answering(**batch, answer_ids=few, answer_mask=mask).logits.log_softmax(-1)
    expected = -(soft * logs).sum(-1)[mask[:, 1:] == 1].sum() / 3  # over words, not over places as SIMLA's code
    torch.testing.assert_close(teacher, expected)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_decoder_never_looks_ahead(answering, attention):
    answering.set_attn_implementation(attention)
    batch = inputs()
    logits = answering(**batch, answer_ids=ANSWERS[:3]).logits
    changed = ANSWERS[:3].clone()
    changed[:, 3] = 40
    other = answering(**batch, answer_ids=changed).logits
    torch.testing.assert_close(other[:, :3], logits[:, :3], rtol=0, atol=1e-6)
    assert (other[:, 3] - logits[:, 3]).abs().max() > 1e-2
    naive = naive_logs(answering.decoder, ANSWERS[1, :-1], naive_questions(answering, batch)[1])
    torch.testing.assert_close(logits[1].log_softmax(-1), naive, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_stands_in_a_questions_padding_is_not_read(answering):
    tight, loose = inputs(), inputs(slots=9)
    loose["input_ids"][loose["attention_mask"] == 0] = 17
    one, other = (answering(**batch, answer_ids=ANSWERS[:3]).loss for batch in (tight, loose))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_answers_must_have_a_question(answering):
    with pytest.raises(ValueError, match="got 5 answers to 3 questions, and no answers_per_question"):
        answering(**inputs(), answer_ids=ANSWERS)
    with pytest.raises(ValueError, match="answers_per_question sum to 4; got 5"):
        answering(**inputs(), answer_ids=ANSWERS, answers_per_question=torch.tensor([2, 1, 1]))
    with pytest.raises(ValueError, match="answers about pictures"):
        answering(input_ids=inputs()["input_ids"])


# ranking and writing


@torch.no_grad()
@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("k", [2, 4, 99])
def test_ranking(answering, twice, k):
    batch = inputs((3, 5, 2, 4))
    ranking = answering.rank_answers(
        **batch, candidate_ids=ANSWERS, candidate_mask=MASK, k=k, count_first_token_twice=twice
    )
    for row, question in enumerate(naive_questions(answering, batch)):
        whole, first = map(
            torch.stack, zip(*(naive_likelihood(answering, question, one) for one in ANSWERS), strict=True)
        )
        # 7 begins two answers: a tie in which either may be left out
        kept = sorted(range(5), key=lambda place: -first[place].item())[: min(k, 5)]
        scores = whole + first if twice else whole
        if set(kept) & {0, 3} and not {0, 3} <= set(kept):
            continue
        expected = sorted(kept, key=lambda place: -scores[place].item())
        assert ranking.indices[row].tolist() == expected
        torch.testing.assert_close(ranking.scores[row], scores[expected], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_counting_the_first_token_twice_can_change_the_order(answering):
    words = torch.randint(5, VOCAB, (40, 3), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([torch.full((40, 1), CLS), words, torch.full((40, 1), SEP)], dim=1)
    orders = [
        answering.rank_answers(
            **inputs(), candidate_ids=ids, candidate_mask=torch.ones_like(ids), count_first_token_twice=twice
        ).indices
        for twice in (True, False)
    ]
    assert not torch.equal(*orders)


@torch.no_grad()
def test_ranking_in_blocks_is_the_same(answering, monkeypatch):
    batch = inputs()
    whole = answering.rank_answers(**batch, candidate_ids=ANSWERS, candidate_mask=MASK)
    monkeypatch.setattr("oner.modeling.vl_task_heads.ROWS_AT_ONCE", 4)
    blocks = answering.rank_answers(**batch, candidate_ids=ANSWERS, candidate_mask=MASK)
    assert torch.equal(whole.indices, blocks.indices)
    torch.testing.assert_close(whole.scores, blocks.scores, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_writing_greedily(answering):
    batch = inputs()
    written = answering.generate_answers(**batch, max_new_tokens=4)
    for row, question in enumerate(naive_questions(answering, batch)):
        ids, score = [CLS], 0.0
        while len(ids) < 5 and (len(ids) == 1 or ids[-1] != SEP):
            logs = naive_logs(answering.decoder, torch.tensor(ids), question)[-1]
            logs[0] = -torch.inf  # padding is no word
            ids.append(logs.argmax().item())
            score += logs.max()
        assert written.sequences[row].tolist()[: len(ids) - 1] == ids[1:]
        assert not written.sequences[row, len(ids) - 1 :].any()
        torch.testing.assert_close(written.scores[row], score / (len(ids) - 1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_as_many_beams_as_words_find_the_best_of_all(answering, penalty):
    batch = inputs((3,))
    (question,) = naive_questions(answering, batch)
    first = naive_logs(answering.decoder, torch.tensor([CLS]), question)[-1]
    scores = {(SEP,): first[SEP].item()}
    for word in range(1, VOCAB):
        if word != SEP:
            logs = naive_logs(answering.decoder, torch.tensor([CLS, word]), question)[-1]
            scores |= {(word, other): (first[word] + logs[other]).item() / 2**penalty for other in range(1, VOCAB)}
    best = max(scores, key=scores.get)
    written = answering.generate_answers(**batch, max_new_tokens=2, num_beams=VOCAB, length_penalty=penalty)
    assert tuple(word for word in written.sequences[0].tolist() if word) == best
    assert written.scores.item() == pytest.approx(scores[best], abs=1e-4)


def test_writing_refuses_no_beam(answering):
    for options in ({"num_beams": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match="expected 1 at least"):
            answering.generate_answers(**inputs(), **options)
    assert answer_end(tiny_config()) == SEP and answer_end(tiny_config(sep_token_id=None)) == CLS


# entailment and two pictures


@torch.no_grad()
def test_entailment_reads_the_fused_cls():
    torch.manual_seed(2)
    model, batch = bold(SimlaForVisualEntailment(tiny_config())), inputs()
    out = model(**batch, labels=torch.tensor([2, 0, 1]))
    states = torch.stack([question[0] for question in naive_questions(model, batch)])
    first, _, second = model.classifier
    logits = (states @ first.weight.T + first.bias).relu() @ second.weight.T + second.bias
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss, F.cross_entropy(logits, torch.tensor([2, 0, 1])), rtol=1e-4, atol=1e-4)
    assert model.config.id2label == {0: "contradiction", 1: "neutral", 2: "entailment"}
    with pytest.raises(ValueError, match="reads pairs"):
        model(input_ids=batch["input_ids"])


@torch.no_grad()
def test_two_pictures_alternate_through_eighteen_layers():
    torch.manual_seed(2)
    model, batch = bold(SimlaForVisualReasoning(tiny_config(num_text_layers=12))), inputs(pictures=2)
    text, second = model.simla.text.layers, model.second_layers
    order = [*text[:6]]
    for place in range(6):
        order += [text[6 + place], second[place]]
    assert len(order) == 18
    states = []
    for ids, mask, pictures in zip(*batch.values(), strict=True):
        x = naive_embed(model.simla.text.embeddings, ids[mask == 1])
        seen = model.simla.vision(pictures)  # (2, 1 + N, D)
        for number, layer in enumerate(order):
            x = naive_layer(layer, x, seen[number % 2])
        states.append(x[0])
    first, _, last = model.classifier
    logits = (torch.stack(states) @ first.weight.T + first.bias).relu() @ last.weight.T + last.bias
    out = model(**batch, labels=torch.tensor([1, 0, 1]))
    torch.testing.assert_close(out.logits, logits, rtol=1e-3, atol=1e-4)
    swapped = model(**{**batch, "pixel_values": batch["pixel_values"].flip(1)}).logits
    assert (swapped - out.logits).abs().max() > 1e-3
    for pair in range(6):
        for part in ("key", "value"):
            one, other = (getattr(layers[pair].cross_attention, part) for layers in (text[6:], second))
            assert one.weight is other.weight and one.bias is other.bias
        assert text[6 + pair].cross_attention.query.weight is not second[pair].cross_attention.query.weight


def test_two_pictures_are_asked_for():
    model = SimlaForVisualReasoning(tiny_config())
    with pytest.raises(ValueError, match=r"pixel_values have shape \(3, 3, 16, 16\); expected \(texts, 2,"):
        model(**inputs())
    batch = inputs(pictures=2)
    batch["pixel_values"][1, 1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        model(**batch)


# where a task begins, and what is kept of it


@pytest.fixture(scope="module")
def pretrained():
    torch.manual_seed(4)
    return randomised(SimlaForPreTraining(tiny_config(num_text_layers=4))).eval()


@pytest.mark.parametrize("kind", TASKS)
def test_a_task_begins_where_pretraining_ended(kind, pretrained):
    model = kind(tiny_config(num_text_layers=4))
    model.initialise_from(pretrained)
    theirs, mine = pretrained.state_dict(), model.state_dict()
    tower = [name for name in mine if name.startswith("simla.")]
    assert len(tower) > 50 and all(torch.equal(mine[name], theirs[name]) for name in tower)
    text = pretrained.simla.text
    if kind is SimlaForVisualQuestionAnswering:
        assert len(model.decoder.layers) == 2  # of four, the last two
        for layer, source in zip(model.decoder.layers, text.layers[2:], strict=True):
            assert all(torch.equal(value, source.state_dict()[name]) for name, value in layer.state_dict().items())
        head, own = pretrained.lm_head.state_dict(), model.decoder.lm_head.state_dict()
        assert all(torch.equal(own[name], value) for name, value in head.items())
        assert model.decoder.lm_head.decoder.weight is model.decoder.embeddings.word_embeddings.weight
        assert (
            model.decoder.embeddings.word_embeddings.weight is not model.simla.text.embeddings.word_embeddings.weight
        )
    if kind is SimlaForVisualReasoning:
        for layer, source in zip(model.second_layers, text.layers[2:], strict=True):
            assert all(torch.equal(value, source.state_dict()[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("kind", TASKS)
def test_saving_and_loading(kind, tmp_path):
    model = randomised(kind(tiny_config(num_text_layers=4))).eval()
    model.save_pretrained(tmp_path)
    auto = {
        SimlaForVisualQuestionAnswering: AutoModelForVisualQuestionAnswering,
        SimlaForVisualEntailment: AutoModelForSequenceClassification,
    }.get(kind, kind)
    again, told = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is kind and not told["missing_keys"] and not told["unexpected_keys"]
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_new_words_reach_the_decoder(tied, tmp_path):
    model = bold(SimlaForVisualQuestionAnswering(tiny_config(tie_word_embeddings=tied)))
    before = model(**inputs(), answer_ids=ANSWERS[:3]).logits
    model.resize_token_embeddings(VOCAB + 7, mean_resizing=False)
    sizes = [len(table.weight) for table in (model.get_input_embeddings(), model.decoder.embeddings.word_embeddings)]
    assert sizes == [VOCAB + 7] * 2 and model.config.vocab_size == VOCAB + 7
    ids = ANSWERS[:3].clone()
    after = model(**inputs(), answer_ids=ids).logits
    torch.testing.assert_close(after[..., :VOCAB], before, rtol=0, atol=1e-6)
    ids[:, 1] = VOCAB + 6
    model.save_pretrained(tmp_path)
    again = SimlaForVisualQuestionAnswering.from_pretrained(tmp_path).eval()
    told = [one(**inputs(), answer_ids=ids).loss for one in (model, again)]
    torch.testing.assert_close(*told, rtol=0, atol=0)


def test_two_pictures_share_keys_whatever_is_tied(tmp_path):
    model = SimlaForVisualReasoning(tiny_config(tie_word_embeddings=False))
    model.save_pretrained(tmp_path)
    for one in (model, SimlaForVisualReasoning.from_pretrained(tmp_path)):
        first, second = one.simla.text.layers[1].cross_attention, one.second_layers[0].cross_attention
        assert first.key.weight is second.key.weight and first.value.bias is second.value.bias


@pytest.mark.parametrize("tied", [True, False])
def test_shared_keys_that_a_checkpoint_lacks_are_told_and_initialised(tied, tmp_path):
    SimlaForVisualReasoning(tiny_config(tie_word_embeddings=tied)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "cross_attention.key" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    model, told = SimlaForVisualReasoning.from_pretrained(tmp_path, output_loading_info=True)
    assert weights.keys() - kept.keys() <= told["missing_keys"]
    first, second = model.simla.text.layers[1].cross_attention.key, model.second_layers[0].cross_attention.key
    assert first.weight is second.weight and not first.weight.is_meta
    assert 0.01 < first.weight.std() < 0.03 and not first.bias.any()


@pytest.mark.parametrize("kind", TASKS)
def test_a_pretraining_checkpoint_loads_and_lacks_only_heads(kind, pretrained, tmp_path):
    pretrained.save_pretrained(tmp_path)
    model, told = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.partition(".")[0] for name in told["missing_keys"]} <= {"decoder", "classifier", "second_layers"}
    assert not told["unexpected_keys"]
    mine, theirs = model.state_dict(), pretrained.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine if name.startswith("simla."))


@pytest.mark.parametrize("kind", TASKS)
def test_every_parameter_that_may_learn_gets_a_gradient(kind):
    model = randomised(kind(tiny_config(num_text_layers=4))).train()
    model.freeze_unused()
    if kind is SimlaForVisualQuestionAnswering:
        model(**inputs(), answer_ids=ANSWERS[:3], answer_mask=MASK[:3]).loss.backward()
    else:
        pictures = 2 if kind is SimlaForVisualReasoning else 1
        model(**inputs(pictures=pictures), labels=torch.tensor([0, 1, 1])).loss.backward()
    without = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not without and not model.simla.vision.embeddings.mask_token.requires_grad


# the same heads on a tower of one sequence


class OneREntailment(PairClassification, OneRPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.oner = OneRModel(config, add_pooling_layer=False)
        self.classifier = PairClassificationHead(config.hidden_size, config.hidden_size, 3)
        self.post_init()


class OneRReasoning(TwoImageClassification, OneRPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.oner = OneRModel(config, add_pooling_layer=False)
        self.classifier = PairClassificationHead(2 * config.hidden_size, config.hidden_size, 2)
        self.post_init()


class OneRAnswering(AnswerGeneration, OneRPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.oner = OneRModel(config, add_pooling_layer=False)
        self.decoder = AnswerDecoder(config, 2)
        self.post_init()


def one_sequence(batch: dict) -> dict:
    """Pairs in the joint layout, as OneR's tower reads them."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@torch.no_grad()
def test_oner_takes_the_same_heads():
    torch.manual_seed(0)
    config, batch = tiny_oner.tiny_config(), one_sequence(joint_batch([3, 5, 2]))
    entailment = randomised(OneREntailment(config)).eval()
    states = entailment.oner(**batch).last_hidden_state
    torch.testing.assert_close(entailment(**batch).logits, entailment.classifier(states[:, 0]))
    reasoning, two = (
        randomised(OneRReasoning(config)).eval(),
        {**batch, "pixel_values": inputs(pictures=2)["pixel_values"]},
    )
    sides = [
        reasoning.oner(**{**batch, "pixel_values": picture}).last_hidden_state[:, 0]
        for picture in two["pixel_values"].unbind(1)
    ]
    torch.testing.assert_close(reasoning(**two).logits, reasoning.classifier(torch.cat(sides, 1)))
    answering = bold(OneRAnswering(config))
    out = answering(**batch, answer_ids=ANSWERS[:3], answer_mask=MASK[:3])
    tower = answering.oner(**batch).last_hidden_state
    questions = [
        torch.cat([state[:1], state[17:][mask[17:] == 1]])
        for state, mask in zip(tower, batch["attention_mask"], strict=True)
    ]
    costs = [-naive_likelihood(answering, one, ids)[0] for one, ids in zip(questions, ANSWERS[:3], strict=True)]
    torch.testing.assert_close(out.loss, torch.stack(costs).mean(), rtol=1e-4, atol=1e-4)
    assert answering.rank_answers(**batch, candidate_ids=ANSWERS, candidate_mask=MASK, k=2).indices.shape == (3, 2)

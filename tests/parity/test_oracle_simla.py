"""The oracle itself against third parties with the same weights: timm's ViT, transformers' BERT, torch's losses.

All in fp64, where only rounding is left to differ and a tolerance of 1e-12 is hundreds of times wider than it.
"""

from collections.abc import Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from official_networks import Network, Sizes, random_weights
from official_simla import bce, contrast, enqueue, keywords, patches_loss, words_loss
from transformers import BertConfig, BertForMaskedLM

WIDTH, HEADS, VOCAB, IMAGE, PATCH = 32, 4, 50, 16, 4
SIZES = Sizes(vision_heads=HEADS, text_heads=2, patch_size=PATCH, cls_id=3)


@pytest.fixture(autouse=True)
def in_fp64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return random_weights(WIDTH, 3, 4, VOCAB, IMAGE, PATCH, dtype=torch.float64)


def under(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


@pytest.mark.parametrize("suffix", ["", "_m"])
def test_picture_is_timms(weights, suffix):
    model = timm.models.VisionTransformer(
        img_size=IMAGE, patch_size=PATCH, embed_dim=WIDTH, depth=3, num_heads=HEADS, num_classes=0, global_pool=""
    ).eval()
    state = under(weights, f"visual_encoder{suffix}.")
    state.pop("mask_token")
    model.load_state_dict(state, strict=True)
    pixels = torch.randn(2, 3, IMAGE, IMAGE)
    torch.testing.assert_close(Network(weights, SIZES, suffix).picture(pixels), model(pixels), atol=1e-12, rtol=1e-12)


def test_masked_picture_is_timms_with_the_patches_replaced(weights):
    """timm has no mask token: its patch embedding's output is overwritten by hand."""
    model = timm.models.VisionTransformer(
        img_size=IMAGE, patch_size=PATCH, embed_dim=WIDTH, depth=3, num_heads=HEADS, num_classes=0, global_pool=""
    ).eval()
    state = under(weights, "visual_encoder.")
    token = state.pop("mask_token")
    model.load_state_dict(state)
    pixels, masked = torch.randn(2, 3, IMAGE, IMAGE), torch.rand(2, 16) < 0.3
    model.patch_embed.register_forward_hook(lambda module, inputs, out: torch.where(masked[..., None], token, out))
    theirs = model(pixels)
    torch.testing.assert_close(Network(weights, SIZES).picture(pixels, masked), theirs, atol=1e-12, rtol=1e-12)


def bert(weights: dict[str, torch.Tensor], crossed: bool) -> BertForMaskedLM:
    """transformers' BERT with the official names as they are; only its token types, which SIMLA has not, are zero."""
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=SIZES.text_heads,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=32,
        layer_norm_eps=SIZES.text_eps,
        is_decoder=crossed,  # transformers gives cross-attention to decoders only; the mask makes it no decoder
        add_cross_attention=crossed,
        attn_implementation="eager",
    )
    model = BertForMaskedLM(config).eval()
    missing, unexpected = model.load_state_dict(under(weights, "text_encoder."), strict=False)
    assert missing == ["bert.embeddings.token_type_embeddings.weight"]
    assert crossed != any("crossattention" in name for name in unexpected)
    torch.nn.init.zeros_(model.bert.embeddings.token_type_embeddings.weight)
    return model


def caption() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.randint(5, VOCAB, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return ids * mask, mask


def additive(mask: torch.Tensor) -> torch.Tensor:
    return (1.0 - mask[:, None, None, :].double()) * torch.finfo(torch.float32).min


def test_text_alone_is_berts(weights):
    ids, mask = caption()
    network = Network(weights, SIZES)
    theirs = bert(weights, crossed=False).bert(ids, attention_mask=mask, output_attentions=True)
    states, attention = network.text(network.embed(ids), mask)
    torch.testing.assert_close(states, theirs.last_hidden_state, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(attention, theirs.attentions[-1], atol=1e-12, rtol=1e-12)


def test_text_over_a_picture_is_berts(weights):
    """Words of every place, padding too: SIMLA's soft term of masked words reads those."""
    ids, mask = caption()
    model, picture = bert(weights, crossed=True), torch.randn(3, 17, WIDTH)
    theirs = model(
        ids,
        attention_mask=additive(mask).expand(-1, -1, 7, -1),
        encoder_hidden_states=picture,
        use_cache=False,
        output_attentions=True,
    )
    network = Network(weights, SIZES)
    states, attention = network.fuse(ids, mask, picture)
    torch.testing.assert_close(network.words(states), theirs.logits, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(attention, theirs.attentions[-1], atol=1e-12, rtol=1e-12)


def test_picture_over_a_text_is_berts(weights):
    """A masked picture's states in the place of words, over the words' embeddings, some of which are padding."""
    ids, mask = caption()
    model, network = bert(weights, crossed=True), Network(weights, SIZES)
    picture = torch.randn(3, 17, WIDTH)
    theirs = model.bert(
        inputs_embeds=picture,
        attention_mask=torch.zeros(3, 1, 17, 17),
        encoder_hidden_states=model.bert.embeddings(ids),
        encoder_attention_mask=additive(mask).expand(-1, -1, 17, -1),
        use_cache=False,
    )
    everywhere = torch.ones(3, 17, dtype=torch.long)
    states, _ = network.text(network.embed(embeds=picture), everywhere, network.embed(ids), mask)
    torch.testing.assert_close(states, theirs.last_hidden_state, atol=1e-12, rtol=1e-12)


def test_gradient_of_padding_is_torchs(weights):
    """padding_idx: a lookup of [PAD] gives its row no gradient, the tied decoder does."""
    ids, mask = caption()
    name = "text_encoder.bert.embeddings.word_embeddings.weight"
    model, picture = bert(weights, crossed=True), torch.randn(3, 17, WIDTH)
    theirs = model(
        ids, attention_mask=additive(mask).expand(-1, -1, 7, -1), encoder_hidden_states=picture, use_cache=False
    )
    theirs.logits.square().mean().backward()
    table = weights[name].requires_grad_()
    network = Network(weights, SIZES)
    network.words(network.fuse(ids, mask, picture)[0]).square().mean().backward()
    torch.testing.assert_close(table.grad, model.bert.embeddings.word_embeddings.weight.grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_losses_are_torchs(alpha):
    own, own_m, other = (F.normalize(torch.randn(3, 8), dim=-1) for _ in range(3))
    queue, temp = F.normalize(torch.randn(8, 6), dim=0), torch.tensor(0.2)
    hard = torch.eye(3, 9)
    keys = torch.cat([other, queue.T])
    targets = alpha * F.softmax(own_m @ keys.T / temp, 1) + (1 - alpha) * hard
    theirs = F.cross_entropy(own @ keys.T / temp, targets)
    torch.testing.assert_close(contrast(own, own_m, other, queue, temp, alpha, hard), theirs)

    logits, teacher, labels = torch.randn(2, 5, 9), torch.randn(2, 5, 9), torch.full((2, 5), -100)
    labels[0, 2], labels[1, 4], labels[1, 1] = 3, 8, 0
    hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    soft = F.cross_entropy(logits[labels != -100], teacher[labels != -100].softmax(-1))
    ours = words_loss(logits, teacher, labels, alpha, "vocabulary")
    torch.testing.assert_close(ours, (1 - alpha) * hard + alpha * soft)
    wrong = -(teacher.softmax(2) * logits.log_softmax(1)).sum(2)[labels != -100].mean()
    ours = words_loss(logits, teacher, labels, alpha, "sequence")
    torch.testing.assert_close(ours, (1 - alpha) * hard + alpha * wrong)

    masked, codes = torch.rand(2, 5) < 0.5, torch.randint(9, (2, 5))
    hard = F.cross_entropy(logits[masked], codes[masked])
    soft = F.cross_entropy(logits[masked], teacher[masked].softmax(-1))
    ours = patches_loss(logits, teacher, masked, codes, alpha)
    torch.testing.assert_close(ours, (1 - alpha) * hard + alpha * soft)

    theirs = F.binary_cross_entropy_with_logits(logits, teacher.sigmoid())
    torch.testing.assert_close(bce(logits, teacher.sigmoid()), theirs)


def test_queue_by_hand():
    queue, keys = torch.zeros(1, 5), torch.tensor([[1.0], [2.0], [3.0]])
    queue, pointer = enqueue(queue, 0, keys)
    assert (queue.tolist(), pointer) == ([[1, 2, 3, 0, 0]], 3)
    queue, pointer = enqueue(queue, pointer, 10 * keys)
    assert (queue.tolist(), pointer) == ([[30, 2, 3, 10, 20]], 1)


def test_keywords_by_hand():
    """Two heads, six places: two votes for 0, 2, 3, 4 each; the fifth keyword is a place without a vote."""
    attention = torch.zeros(1, 2, 6, 6)
    attention[0, :, 0] = torch.tensor([[0.4, 0.01, 0.3, 0.2, 0.09, 0.0], [0.3, 0.02, 0.4, 0.09, 0.19, 0.0]])
    ids = torch.tensor([[3, 10, 11, 12, 13, 0]])
    (row,) = keywords(attention, ids, VOCAB, cls_id=3)
    chosen = set(row.nonzero().flatten().tolist())
    assert chosen - {0, 10} == {11, 12, 13} and len(chosen) == 4

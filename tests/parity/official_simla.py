"""SIMLA's official training steps, derived anew and naively over `official_networks`.

Order and readings are those of SIMLA's code, its faults included: the keys are written before anything else is lost,
the soft term of masked words runs over the sequence, [PAD] may become a keyword, ids are never enqueued.

B pairs, N patches, T = 1 + words of the longest text, D width, P projection, V words, K codes, Q queue.
"""

from dataclasses import dataclass, field

import torch
from official_networks import Network, Sizes, Weights, log_softmax, twin


@dataclass
class Step:
    """Losses by name, 0-dim with graph; the state after the step; and by what odds it draws negatives."""

    losses: Weights
    after: Weights
    keyword_targets: torch.Tensor | None = None
    extras: Weights = field(default_factory=dict)

    @property
    def total(self) -> torch.Tensor:
        return sum(self.losses.values())


def average_teacher(weights: Weights, momentum: float) -> Weights:
    """The teacher after its step towards the student as it is now."""
    return {
        twin(name): (momentum * weights[twin(name)] + (1 - momentum) * weights[name]).detach()
        for name in weights
        if twin(name) in weights
    }


def enqueue(queue: torch.Tensor, pointer: int, keys: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Columns from `pointer` on, one after another and over the end; the official code refuses to wrap."""
    queue, size = queue.clone(), queue.shape[1]
    for row in range(len(keys)):
        queue[:, (pointer + row) % size] = keys[row]
    return queue, (pointer + len(keys)) % size


def contrast(
    own: torch.Tensor,
    own_keys: torch.Tensor,
    other_keys: torch.Tensor,
    queue: torch.Tensor,
    temp: torch.Tensor,
    alpha: float,
    hard: torch.Tensor,
) -> torch.Tensor:
    """One direction of equation 1: soft cross-entropy of (B, B + Q) cosines over the temperature."""
    everything = torch.cat([other_keys.detach(), queue.T])
    soft = log_softmax(own_keys.detach() @ everything.T / temp.detach(), 1).exp()
    targets = alpha * soft + (1 - alpha) * hard
    return -(targets * log_softmax(own @ everything.T / temp, 1)).sum(1).mean()


def odds_of_negatives(own: torch.Tensor, keys: torch.Tensor, temp: torch.Tensor) -> torch.Tensor:
    """By which a row's negative is drawn from its batch, (B, B), the pair itself never."""
    odds = log_softmax(own @ keys.T / temp, 1).exp().detach()
    odds[range(len(odds)), range(len(odds))] = 0
    return odds


def matching_loss(
    network: Network,
    ids: torch.Tensor,
    mask: torch.Tensor,
    picture: torch.Tensor,
    negative_images: torch.Tensor,
    negative_texts: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of 3B pairs: own pairs, texts with a wrong picture, pictures with a wrong text."""
    rows = range(len(ids))
    pairs = [(row, row, 1) for row in rows]
    pairs += [(row, int(negative_images[row]), 0) for row in rows]
    pairs += [(int(negative_texts[row]), row, 0) for row in rows]
    texts, images, labels = zip(*pairs, strict=True)
    fused, _ = network.fuse(ids[list(texts)], mask[list(texts)], picture[list(images)])
    logs = log_softmax(network.linear("itm_head", fused[:, 0]), 1)
    return -sum(logs[pair, label] for pair, label in enumerate(labels)) / len(pairs)


def words_loss(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, alpha: float, axis: str):
    """
    Logits (B, T, V) of both networks, labels (B, T) with -100 where nothing is asked. The soft term's log-softmax
    runs over the words, or, as SIMLA's code has it, over the places of a text, padding included.
    """
    rows, places = (labels != -100).nonzero(as_tuple=True)
    hard = -log_softmax(student, -1)[rows, places, labels[rows, places]].mean()
    logs = log_softmax(student, {"vocabulary": 2, "sequence": 1}[axis])
    targets = log_softmax(teacher.detach(), -1).exp()
    soft = -(targets * logs).sum(-1)[rows, places].mean()
    return (1 - alpha) * hard + alpha * soft


def patches_loss(
    student: torch.Tensor, teacher: torch.Tensor, masked: torch.Tensor, codes: torch.Tensor, alpha: float
):
    """Logits (B, N, K) of both, masked patches (B, N), codes (B, N)."""
    logs, targets = log_softmax(student[masked], -1), log_softmax(teacher.detach()[masked], -1).exp()
    hard = -logs[torch.arange(len(logs)), codes[masked]].mean()
    return (1 - alpha) * hard - alpha * (targets * logs).sum(-1).mean()


def keywords(
    attention: torch.Tensor, ids: torch.Tensor, vocab: int, cls_id: int, per_head: int = 4, count: int = 5
) -> torch.Tensor:
    """
    Each head votes for the `per_head` places that [CLS] attends most; the `count` places of most votes name the
    words, [CLS] taken out afterwards. Ties as torch.topk breaks them here. (B, heads, T, T), (B, T) -> (B, V).
    """
    batch, heads, length, _ = attention.shape
    chosen = attention[:, :, 0].reshape(batch * heads, length).topk(per_head, dim=-1).indices
    votes = torch.zeros(batch, length, dtype=torch.long)
    for row in range(batch):
        for place in chosen[row * heads : (row + 1) * heads].flatten().tolist():
            votes[row, place] += 1
    targets = torch.zeros(batch, vocab, dtype=attention.dtype)
    for row, places in enumerate(votes.topk(count, dim=-1).indices.tolist()):
        for place in places:
            targets[row, ids[row, place]] = 1
    targets[:, cls_id] = 0
    return targets


def bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-[y log s(x) + (1 - y) log(1 - s(x))], mean over all of (B, V)."""
    return (torch.nn.functional.softplus(logits) - targets * logits).mean()


def pretraining_step(weights: Weights, batch: Weights, sizes: Sizes, alpha: float, mlm_axis: str = "sequence") -> Step:
    """
    The step of models/simla/pretrain.py. `batch`: pixels (B, 3, H, W), ids, mask, masked_ids, labels (B, T),
    masked_patches, codes (B, N), negative_images, negative_texts (B,), and keyword_targets (B, V) or none.
    """
    with torch.no_grad():
        weights["temp"].clamp_(0.001, 0.5)
    temp, ids, mask = weights["temp"], batch["ids"], batch["mask"]
    student = Network(weights, sizes)
    picture, image, text = student.unimodal(batch["pixels"], ids, mask)
    after = average_teacher(weights, sizes.momentum)
    teacher = Network(after, sizes, "_m")
    with torch.no_grad():
        picture_m, image_m, text_m = teacher.unimodal(batch["pixels"], ids, mask)
    own = torch.zeros(len(ids), len(ids) + weights["image_queue"].shape[1], dtype=picture.dtype)
    own[range(len(ids)), range(len(ids))] = 1
    losses = {
        "itc": 0.5 * contrast(image, image_m, text_m, weights["text_queue"], temp, alpha, own)
        + 0.5 * contrast(text, text_m, image_m, weights["image_queue"], temp, alpha, own),
        "itm": matching_loss(student, ids, mask, picture, batch["negative_images"], batch["negative_texts"]),
    }
    pointer = int(weights["queue_ptr"])
    after["image_queue"], _ = enqueue(weights["image_queue"], pointer, image_m)
    after["text_queue"], pointer = enqueue(weights["text_queue"], pointer, text_m)
    after["queue_ptr"], after["temp"] = torch.tensor([pointer]), temp.detach().clone()

    with torch.no_grad():
        words_m = teacher.words(teacher.fuse(batch["masked_ids"], mask, picture_m)[0])
    words = student.words(student.fuse(batch["masked_ids"], mask, picture)[0])
    losses["mlm"] = words_loss(words, words_m, batch["labels"], alpha, mlm_axis)

    masked = batch["masked_patches"]
    everywhere = torch.ones(picture.shape[:2], dtype=torch.long)
    context = student.embed(ids)  # the student's for both networks, and of the clean text
    with torch.no_grad():
        completed_m, _ = teacher.text(
            teacher.embed(embeds=teacher.picture(batch["pixels"], masked)), everywhere, context, mask
        )
    completed, _ = student.text(
        student.embed(embeds=student.picture(batch["pixels"], masked)), everywhere, context, mask
    )
    codes, codes_m = student.linear("mim_head", completed[:, 1:]), teacher.linear("mim_head", completed_m[:, 1:])
    losses["mim"] = patches_loss(codes, codes_m, masked, batch["codes"], alpha)

    with torch.no_grad():  # the teacher reads the student's picture
        attention = teacher.fuse(ids, mask, picture)[1]
        targets = batch.get("keyword_targets")
        if targets is None:
            targets = keywords(attention, ids, weights["concept_head.weight"].shape[0], sizes.cls_id)
        soft = torch.sigmoid(teacher.linear("concept_head", image_m))
    concepts = student.linear("concept_head", image)
    losses["psl"] = (1 - alpha) * bce(concepts, targets.to(concepts.dtype)) + alpha * bce(concepts, soft)
    odds = {
        "odds_of_images": odds_of_negatives(text, image_m, temp),
        "odds_of_texts": odds_of_negatives(image, text_m, temp),
    }
    return Step(losses, after, targets, odds)


def retrieval_step(
    weights: Weights, batch: Weights, sizes: Sizes, alpha: float, id_queue: torch.Tensor, keep_ids: bool = False
) -> Step:
    """
    The step of models/simla/retrieval.py: every key of the same id is a positive, of equal weight. SIMLA's code never
    writes its queue of ids (all -100), ALBEF's does (`keep_ids`).
    """
    with torch.no_grad():
        weights["temp"].clamp_(0.001, 0.5)
    temp, ids, mask, names = weights["temp"], batch["ids"], batch["mask"], batch["image_ids"]
    student = Network(weights, sizes)
    picture, image, text = student.unimodal(batch["pixels"], ids, mask)
    after = average_teacher(weights, sizes.momentum)
    with torch.no_grad():
        _, image_m, text_m = Network(after, sizes, "_m").unimodal(batch["pixels"], ids, mask)
    same = (names[:, None] == torch.cat([names, id_queue])[None, :]).to(picture.dtype)
    same = same / same.sum(1, keepdim=True)
    losses = {
        "itc": 0.5 * contrast(image, image_m, text_m, weights["text_queue"], temp, alpha, same)
        + 0.5 * contrast(text, text_m, image_m, weights["image_queue"], temp, alpha, same),
        "itm": matching_loss(student, ids, mask, picture, batch["negative_images"], batch["negative_texts"]),
    }
    pointer = int(weights["queue_ptr"])
    after["image_queue"], _ = enqueue(weights["image_queue"], pointer, image_m)
    after["text_queue"], following = enqueue(weights["text_queue"], pointer, text_m)
    if keep_ids:
        id_queue = enqueue(id_queue[None], pointer, names[:, None])[0][0]
    after |= {"queue_ptr": torch.tensor([following]), "temp": temp.detach().clone(), "idx_queue": id_queue}
    return Step(losses, after)

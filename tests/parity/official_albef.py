"""ALBEF's network and pretraining step, derived anew and naively: SIMLA's, which came of it, less what SIMLA added.

Layers of text without cross-attention read a text alone; those above them go on from there, and read the picture too.
Token types are added to every word. The soft term of masked words runs over the vocabulary.

B pairs, T = 1 + words of the longest text, D width, P projection, V words, Q queue.
"""

import torch
from official_networks import Network, Sizes, Weights, random_weights, twin
from official_simla import Step, average_teacher, contrast, enqueue, matching_loss, words_loss

TYPES = "text_encoder.bert.embeddings.token_type_embeddings.weight"
ADDED = ("mim_head.", "concept_head.", "visual_encoder.mask_token")


class Albef(Network):
    """The student ("") or the teacher ("_m")."""

    def text(
        self,
        embedded: torch.Tensor,
        mask: torch.Tensor,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The lower layers alone, or all of them where there is a picture."""
        states, probabilities = embedded, None
        for layer in self.text_layers():
            reads_pictures = self.has(f"{layer}.crossattention.self.query.weight")
            if reads_pictures and context is None:
                break
            read = context if reads_pictures else None
            states, probabilities = self._text_layer(layer, states, mask, read, context_mask)
        return states, probabilities


def albef_weights(first_fusion: int, width: int, *sizes: int, seed: int = 0, dtype=torch.float32, **how) -> Weights:
    """As `random_weights` of the same arguments, with token types and cross-attention from a layer on."""
    weights = random_weights(width, *sizes, seed=seed, dtype=dtype, **how)
    lower = [f".layer.{layer}.crossattention." for layer in range(first_fusion)]
    for name in [*weights]:
        own = name.replace("_m.", ".", 1) if twin(name.replace("_m.", ".", 1)) == name else name
        if own.startswith(ADDED) or any(part in name for part in lower):
            del weights[name]
    generator = torch.Generator().manual_seed(seed + 1)
    for name in (TYPES, twin(TYPES)):
        weights[name] = (0.5 * torch.randn(2, width, generator=generator, dtype=torch.float64)).to(dtype)
    return weights


def pretraining_step(weights: Weights, batch: Weights, sizes: Sizes, alpha: float) -> Step:
    """
    The step of ALBEF's models/model_pretrain.py. `batch`: pixels (B, 3, H, W), ids, mask, masked_ids, labels (B, T),
    negative_images, negative_texts (B,).
    """
    with torch.no_grad():
        weights["temp"].clamp_(0.001, 0.5)
    temp, ids, mask = weights["temp"], batch["ids"], batch["mask"]
    student = Albef(weights, sizes)
    picture, image, text = student.unimodal(batch["pixels"], ids, mask)
    after = average_teacher(weights, sizes.momentum)
    teacher = Albef(after, sizes, "_m")
    with torch.no_grad():
        picture_m, image_m, text_m = teacher.unimodal(batch["pixels"], ids, mask)
        words_m = teacher.words(teacher.fuse(batch["masked_ids"], mask, picture_m)[0])
    own = torch.zeros(len(ids), len(ids) + weights["image_queue"].shape[1], dtype=picture.dtype)
    own[range(len(ids)), range(len(ids))] = 1
    words = student.words(student.fuse(batch["masked_ids"], mask, picture)[0])
    losses = {
        "itc": 0.5 * contrast(image, image_m, text_m, weights["text_queue"], temp, alpha, own)
        + 0.5 * contrast(text, text_m, image_m, weights["image_queue"], temp, alpha, own),
        "itm": matching_loss(student, ids, mask, picture, batch["negative_images"], batch["negative_texts"]),
        "mlm": words_loss(words, words_m, batch["labels"], alpha, "vocabulary"),
    }
    pointer = int(weights["queue_ptr"])
    after["image_queue"], _ = enqueue(weights["image_queue"], pointer, image_m)
    after["text_queue"], pointer = enqueue(weights["text_queue"], pointer, text_m)
    after["queue_ptr"], after["temp"] = torch.tensor([pointer]), temp.detach().clone()
    return Step(losses, after)


__all__ = ["TYPES", "Albef", "albef_weights", "pretraining_step"]

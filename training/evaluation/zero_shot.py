"""Zero-shot classification by prompts, and OneR's bootstrapped language guidance (Table 3).

Shapes: n images, C classes, K candidates per image, P width of the projection. Scores are cosines.

Zero-shot (SLIP): the embedding of a class is the mean of its normalised prompt embeddings, normalised again.
Guidance: the K = 10 classes nearest to f(I) are each concatenated with the image, and the ten are ordered by
s'_c = cos(f(I, t_c), f(t_c)); the other classes follow in their old order. No label is used.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .embedding import (
    Column,
    PictureRows,
    Row,
    embed_images,
    embed_pairs,
    embed_texts,
    middle_square,
    row_ids,
    spaced,
)
from .guidance import guidance_sheet, guided_examples
from .metric_zero_shot_accuracy import ZeroShotAccuracy
from .metrics import class_standing, hits, mcnemar
from .prompts import ClassName, check_templates, fill, load_templates
from .sheets import describe


def class_embeddings(
    model: Any,
    processor: Any,
    class_names: Sequence[ClassName],
    templates: Sequence[str],
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """(C, P), L2-normalised: per class the mean over templates and synonyms of normalised prompt embeddings."""
    # all prompts in one list, split by class again afterwards
    prompts = [fill(templates, name) for name in class_names]
    flat = [prompt for group in prompts for prompt in group]
    embeddings = embed_texts(model, processor, flat, batch_size, progress).split([len(group) for group in prompts])
    return F.normalize(torch.stack([group.mean(0) for group in embeddings]), dim=-1)  # (C, P)


def rerank(scores: Tensor, candidates: Tensor, guided: Tensor) -> Tensor:
    """Puts each row's candidates before all other classes, in the order of their guided scores.

    Args:
        scores: (n, C) cosines.
        candidates: (n, K) columns.
        guided: (n, K) new scores of the candidates.

    Returns:
        (n, C): guided scores shifted to lie above every other class; the others keep their scores.
    """
    # the lowest guided score becomes 1 higher than the highest of all others
    shift = scores.max() - guided.min() + 1
    return scores.scatter(1, candidates, guided.to(scores.dtype) + shift)


class ZeroShotClassificationEvaluator:
    """Top-k accuracy of images against prompts of class names; with `bootstrap`, of guided scores as well.

    Args:
        images: (n) images, or rows with an "image".
        labels: (n) class indices into `class_names`.
        class_names: a name or a list of synonyms per class (`prompts.load_class_names`).
        templates: strings with one "{}", or the name of a shipped set (`prompts.load_templates`); SLIP's seven.
        bootstrap: also re-rank the first `candidates` classes with f(I, t_c), with `candidates` more passes per image.
        guided_score: order the candidates by s' ("guided") or by s + s' ("sum").
        guided_text: t_c is the class in `guided_template` ("prompt") or its bare name ("name"); the first of synonyms.
        guided_target: s' compares with f(t_c) ("text") or with the class's ensemble embedding ("ensemble").
        bootstrap_rows: guide only this many evenly spaced images; None guides all.
        keep_aspect: centre-crop images to a square, as SLIP does, instead of squeezing them.
        shown: images on the contact sheet of guidance, 0 for none.

    Yields name/zero_shot_top<k>, name/zero_shot_chance<k>; with `bootstrap` also name/bootstrap_top<k>,
    name/bootstrap_without_top<k> (plain scores of the same images), name/bootstrap_gained and bootstrap_lost
    (images that are right at rank 1 only after, and only before guidance), name/bootstrap_mcnemar_p (the probability
    that chance alone gives such a difference), and the contact sheet name/bootstrap_sheet.
    """

    def __init__(
        self,
        images: Sequence[Any],
        labels: Sequence[int],
        class_names: Sequence[ClassName],
        templates: Sequence[str] | str = "slip",
        top_k: Sequence[int] = (1, 5),
        batch_size: int = 64,
        name: str = "eval",
        bootstrap: bool = False,
        candidates: int = 10,
        guided_score: Literal["guided", "sum"] = "guided",
        guided_text: Literal["prompt", "name"] = "prompt",
        guided_target: Literal["text", "ensemble"] = "text",
        guided_template: str = "a photo of a {}",
        bootstrap_rows: int | None = None,
        keep_aspect: bool = False,
        shown: int = 0,
        progress: bool = True,
    ):
        for option, value, known in (
            ("guided_score", guided_score, ("guided", "sum")),
            ("guided_text", guided_text, ("prompt", "name")),
            ("guided_target", guided_target, ("text", "ensemble")),
        ):
            if value not in known:
                raise ValueError(f"{option} must be one of {known}, got {value!r}")
        if len(images) != len(labels):
            raise ValueError(f"one label a picture: got {len(images)} pictures and {len(labels)} labels")
        outside = [label for label in labels if not 0 <= int(label) < len(class_names)]
        if outside:
            raise ValueError(f"labels must be in 0..{len(class_names) - 1}, got {outside[0]}")
        if not 1 <= candidates:
            raise ValueError(f"candidates must be at least 1, got {candidates}")

        # images and classes; images of rows are read when they are embedded
        self.guided_rows = spaced(range(len(images)), bootstrap_rows)
        rows = len(images) > 0 and isinstance(images[0], Mapping) and "image" in images[0]
        self.images = Column(images, "image") if rows else images
        self.labels = torch.as_tensor([int(label) for label in labels])
        self.class_names = list(class_names)
        self.templates = load_templates(templates) if isinstance(templates, str) else check_templates(templates)
        self.top_k = tuple(top_k)
        self.batch_size = batch_size
        self.name = name
        self.progress = progress
        self.bootstrap = bootstrap
        self.candidates = min(candidates, len(class_names))
        self.keep_aspect = keep_aspect
        self.shown = shown
        self.guided_score = guided_score
        self.guided_text = guided_text
        self.guided_target = guided_target
        (self.guided_template,) = check_templates([guided_template])

    @classmethod
    def from_rows(
        cls, rows: Sequence[Row], names: Mapping[Hashable, ClassName] | None = None, **options: Any
    ) -> "ZeroShotClassificationEvaluator":
        """
        Makes each concept id of `rows` a class, named by `names[id]` or by the first caption of its first row. Rows
        that show the same image of a concept are one.
        """
        rows = PictureRows(rows)

        # classes are numbered in order of appearance
        numbers: dict[Hashable, int] = {}
        class_names: list[ClassName] = []
        labels = []
        for row, concept in zip(rows, row_ids(rows), strict=True):
            if concept not in numbers:
                numbers[concept] = len(numbers)
                class_names.append(row["captions"][0] if names is None else names[concept])
            labels.append(numbers[concept])
        return cls(rows, labels, class_names, **options)

    @property
    def protocol(self) -> dict[str, Any]:
        """The evaluation protocol, for the results file."""
        facts = {
            "task": "zero-shot classification, class embedding = normalised mean of normalised prompt embeddings",
            "pictures": len(self.labels),
            "classes": len(self.class_names),
            "templates": self.templates,
            "picture": "its middle square" if self.keep_aspect else "as the processor takes it",
        }
        if self.bootstrap:
            facts["guidance"] = {
                "pictures": len(self.guided_rows),
                "candidates": self.candidates,
                "score": self.guided_score,
                "text": self.guided_template if self.guided_text == "prompt" else "{}",
                "target": self.guided_target,
            }
        return facts

    def run(self, model: Any, processor: Any) -> Iterator[tuple[str, Any]]:
        """Embed images and prompts and yield (name, value), and the contact sheet last."""
        # all images against all classes
        crop = middle_square(model) if self.keep_aspect else {}
        images = embed_images(model, processor, self.images, self.batch_size, self.progress, **crop)  # (n, P)
        classes = class_embeddings(
            model, processor, self.class_names, self.templates, 4 * self.batch_size, self.progress
        )
        scores = images @ classes.T  # (n, C)
        plain = self._accuracy(scores, self.labels)
        for k in self.top_k:
            yield f"{self.name}/zero_shot_top{k}", plain[f"top{k}"]
            yield f"{self.name}/zero_shot_chance{k}", plain[f"chance{k}"]
        if not self.bootstrap:
            return

        # guidance of some images, with the plain scores of the same ones
        rows = self.guided_rows
        scores, labels = scores[rows], self.labels[rows]
        pictures = [self.images[row] for row in rows]  # as they lie, not decoded
        candidates, guided = self.guide(model, processor, pictures, scores, classes)
        reranked = rerank(scores, candidates, guided)
        without = self._accuracy(scores, labels)
        after = self._accuracy(reranked, labels)
        for k in self.top_k:
            yield f"{self.name}/bootstrap_top{k}", after[f"top{k}"]
            yield f"{self.name}/bootstrap_without_top{k}", without[f"top{k}"]

        # is the difference more than chance? right means alone at rank 1
        first = [hits(class_standing(table, labels), (1,))[:, 0] == 1 for table in (scores, reranked)]  # (n,) each
        changed = mcnemar(*first)
        yield f"{self.name}/bootstrap_gained", float(changed.gained)
        yield f"{self.name}/bootstrap_lost", float(changed.lost)
        yield f"{self.name}/bootstrap_mcnemar_p", changed.p
        if self.shown:
            examples = guided_examples(pictures, labels, scores, reranked, guided, self.shown)
            title = (
                f"{describe(model)}: the first five of {len(classes)} classes before and after bootstrapped guidance "
                f"of {self.candidates} candidates, cosines in brackets; right class green. Shown first: pictures "
                f"whose right class is a candidate. Top-1 of {len(rows)} pictures: "
                f"{without['top1']:.1%} → {after['top1']:.1%} (McNemar p = {changed.p:.2g})"
            )
            names = [name if isinstance(name, str) else name[0] for name in self.class_names]
            yield f"{self.name}/bootstrap_sheet", guidance_sheet(examples, names, title)

    def guide(
        self, model: Any, processor: Any, pictures: Sequence[Any], scores: Tensor, classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Images (n), scores (n, C), class embeddings (C, P) -> the first K classes of each row and the scores that
        re-rank them, (n, K) each."""
        # t_c, and what f(I, t_c) is compared with
        template = self.guided_template if self.guided_text == "prompt" else "{}"
        texts = [fill([template], name)[0] for name in self.class_names]
        targets = classes
        if self.guided_target == "text":
            targets = embed_texts(model, processor, texts, 4 * self.batch_size)

        # each image with the texts of its K best classes
        old, candidates = scores.topk(self.candidates, dim=1)  # both (n, K)
        asked = [texts[column] for column in candidates.flatten().tolist()]
        crop = middle_square(model) if self.keep_aspect else {}
        mixed = embed_pairs(  # (n * K, P)
            model, processor, pictures, asked, self.batch_size, self.progress, times=self.candidates, **crop
        )

        # s' = cos(f(I, t_c), f(t_c)); both are normalised
        guided = (mixed * targets[candidates.flatten()]).sum(-1).view_as(old)
        return candidates, guided + old if self.guided_score == "sum" else guided

    def _accuracy(self, scores: Tensor, labels: Tensor) -> dict[str, float]:
        metric = ZeroShotAccuracy(keep_in_memory=True)
        metric.add_batch(predictions=scores, references=labels.to(scores.device))
        return metric.compute(ks=list(self.top_k))

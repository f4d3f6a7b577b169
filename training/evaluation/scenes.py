"""Evaluates a model's abilities on composed scenes, whose content is fully known (examples/data/scenes.md).

A row is one of a split's scenes: `image`, `captions`, `id`, the `names` of its groups of things, `objects` with their
group and box, and false captions `hard_captions`, each made of the true one `hard_of`.

Shapes: n scenes, Q queries, G pictures of a gallery, P projection, h x w patches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from oner.processing.image_processing_vl import open_image

from .composed import composed_queries
from .embedding import Row, embed_images, embed_texts, numbered
from .grounding import OTHER, grounding_maps
from .localization import similarity_maps
from .metrics import area_under_curve, recall_at_k
from .reranking import RerankingEvaluator, RerankScore
from .retrieval import RetrievalEvaluator, ask
from .zero_shot import ZeroShotClassificationEvaluator

Numbers = Iterator[tuple[str, float]]
CANDIDATES = 16  # re-ranked by matching
THINGS = 4  # groups of a scene in which names are looked for
KS = (1, 10)


def called(name: str) -> str:
    """A thing's name as captions write one of it."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def inside(boxes: Sequence[Sequence[float]], grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Which patches of a grid (h, w) have their centre in one of the boxes (x, y, width, height), bool (h, w); the
    picture's `size` is (width, height)."""
    down = (torch.arange(grid[0]) + 0.5) * size[1] / grid[0]  # (h,)
    across = (torch.arange(grid[1]) + 0.5) * size[0] / grid[1]  # (w,)
    found = torch.zeros(grid, dtype=torch.bool)
    for x, y, width, height in boxes:
        rows = (down >= y) & (down < y + height)
        columns = (across >= x) & (across < x + width)
        found |= rows[:, None] & columns[None, :]
    return found


def quarters(boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> set[int]:
    """The quarters (0 1 / 2 3) of a picture of `size` (width, height) that contain the centre of a box."""
    return {2 * (y + height / 2 >= size[1] / 2) + (x + width / 2 >= size[0] / 2) for x, y, width, height in boxes}


@dataclass(frozen=True)
class Asked:
    """A scene and the name of one of its groups, which is somewhere in `boxes`."""

    image: Any
    text: str
    boxes: list[list[float]]


def asked_of(rows: Sequence[Row], groups: int = THINGS) -> list[Asked]:
    """Each group of each scene that has `groups` of them."""
    return [
        Asked(row["image"], called(name), [one["box"] for one in row["objects"] if one["group"] == group])
        for row in rows
        if len(row["names"]) == groups
        for group, name in enumerate(row["names"])
    ]


def pointed(maps: Tensor, asked: Sequence[Asked]) -> dict[str, float]:
    """How often the highest patch of a map (n, h, w) is in a box of the requested object, or in its quarter."""
    grid = (maps.shape[1], maps.shape[2])
    totals = dict.fromkeys(("box", "box_chance", "quarter", "quarter_chance"), 0.0)
    for cells, one in zip(maps, asked, strict=True):
        size = open_image(one.image).size
        right = inside(one.boxes, grid, size)  # (h, w)
        peak = int(cells.argmax())
        row, column = divmod(peak, grid[1])
        there = 2 * (row + 0.5 >= grid[0] / 2) + (column + 0.5 >= grid[1] / 2)
        wanted = quarters(one.boxes, size)
        totals["box"] += bool(right.flatten()[peak])
        totals["box_chance"] += float(right.double().mean())
        totals["quarter"] += there in wanted
        totals["quarter_chance"] += len(wanted) / 4
    return {name: total / len(asked) for name, total in totals.items()}


@dataclass
class SceneEvaluator:
    """
    Measures all abilities on one split that model and data allow; each is a method that yields (name, number).

    Args:
        rows: scenes of the split.
        singles: scenes of one group, whose pictures stand for their things in composed queries.
        queries, gallery: composed queries and what they are asked of, if there are any.
        name: of the split.
        batch_size: pictures a batch.
    """

    rows: Sequence[Row]
    singles: Sequence[Row] = ()
    queries: Sequence[Mapping[str, Any]] = ()
    gallery: Sequence[Mapping[str, Any]] = ()
    name: str = "scenes"
    batch_size: int = 64
    progress: bool = False

    @property
    def protocol(self) -> dict[str, Any]:
        """What the numbers mean, for the file of results."""
        return {
            "task": "composed scenes",
            "scenes": len(self.rows),
            "retrieval": "pictures and first captions; right is the picture's own",
            "localization": f"scenes of {THINGS} groups, each asked for by its name; the highest patch",
            "hard": "AUC of true against false captions of the same pictures, by the difference of the matching "
            "logits and by cosine",
            "rerank_k": CANDIDATES,
            "pairs": "a picture of A alone and the name of B ask for a scene of A and B among all scenes",
            "same": "a picture and its caption ask for the same things redrawn in the gallery, compared at R@1",
            "queries": len(self.queries),
            "gallery": len(self.gallery),
        }

    def run(self, model: Any, processor: Any) -> Numbers:
        """Every ability in turn."""
        abilities: list[Callable[[Any, Any], Numbers]] = [
            self.retrieval, self.languages, self.localization, self.hard_captions, self.pairs, self.composed,
            self.guidance,
        ]  # fmt: skip
        for ability in abilities:
            for name, value in ability(model, processor):
                yield f"{self.name}/{name}", float(value)

    def retrieval(self, model: Any, processor: Any) -> Numbers:
        """Both ways by cosine, and with the first candidates in the order of the matching head."""
        how = {"batch_size": self.batch_size, "ks": KS, "captions": "first", "progress": self.progress}
        evaluator = RerankingEvaluator(self.rows, **how, name="retrieval", rerank_k=CANDIDATES)
        images, texts = (side.cpu() for side in evaluator.embed(model, processor))
        values = dict(evaluator.numbers(images, texts))
        yield from values.items()
        if not hasattr(model, "match"):
            return

        # one pass through the head, three orders of its candidates
        matched = evaluator.matched(model, processor, images, texts)
        cosine = values["retrieval/tr_r@1"] + values["retrieval/ir_r@1"]
        for score in get_args(RerankScore):
            ordered = dict(evaluator.reranked(images, texts, matched, score))
            second = ordered["retrieval/rerank_tr_r@1"] + ordered["retrieval/rerank_ir_r@1"]
            yield f"rerank/{score}_r@1", second / 2
            if cosine:
                yield f"rerank/{score}_over_cosine", second / cosine

    def languages(self, model: Any, processor: Any) -> Numbers:
        """Mean R@10 of both ways in each language that the scenes have captions of, and its share of English's."""
        columns = [name for name in self.rows[0] if name.startswith("captions_") and name != "captions_all"]
        shares = []
        how = {"batch_size": self.batch_size, "ks": (10,), "captions": "first", "progress": self.progress}
        english = None
        for column in ["captions", *columns] if columns else ():
            rows = [{**row, "captions": row[column]} for row in self.rows]
            value = dict(RetrievalEvaluator(rows, **how, name="r").run(model, processor))["r/r_mean"]
            english = value if english is None else english
            shares.append(value)
            yield f"language/{column.removeprefix('captions').strip('_') or 'en'}_r@10", value
        if shares and english:
            yield "language/mean_over_english", sum(shares[1:]) / len(columns) / english

    def localization(self, model: Any, processor: Any) -> Numbers:
        """Where a name is: by cosine of patches and words, and by Grad-CAM of matching and of contrast."""
        asked = asked_of(self.rows)
        if not asked:
            return
        images = [one.image for one in asked]
        texts = [one.text for one in asked]
        yield "localization/asked", len(asked)

        # the whole picture, whatever the processor would crop
        side = model.config.image_size
        maps = {"localization": similarity_maps(model, processor, images, texts, self.batch_size, side)}
        modes = getattr(model, "grounding_modes", ())
        for mode in [one for one in OTHER if one in modes]:
            maps[f"grounding_{mode}"] = grounding_maps(model, processor, images, texts, self.batch_size, mode=mode)
        for kind, cells in maps.items():
            for name, value in pointed(cells, asked).items():
                yield f"{kind}/{name}", value

    def hard_captions(self, model: Any, processor: Any) -> Numbers:
        """How well true captions are told from false ones of the same picture, of all kinds and of each."""
        rows = [row for row in self.rows if row.get("hard_captions")]
        if not rows:
            return

        # each false caption beside the true one that it was made of, by number of the picture
        numbers = [number for number, row in enumerate(rows) for _ in row["hard_captions"]]
        false = [text for row in rows for text in row["hard_captions"]]
        true = [row["captions"][of] for row in rows for of in row["hard_of"]]
        kinds = [kind for row in rows for kind in row["hard_kinds"]]

        images = embed_images(model, processor, [row["image"] for row in rows], self.batch_size).cpu()[numbers]
        pairs = (embed_texts(model, processor, texts, 4 * self.batch_size).cpu() for texts in (true, false))
        scores = {"cosine": tuple((images * texts).sum(-1) for texts in pairs)}
        if hasattr(model, "match"):
            scores["itm"] = self._matched(model, processor, rows, numbers, true, false)
        for by, (right, wrong) in scores.items():
            yield f"hard/{by}_auc", area_under_curve(right, wrong)
            yield f"hard/{by}_told", float((right > wrong).double().mean() + (right == wrong).double().mean() / 2)
            for kind in sorted(set(kinds)):
                of_kind = torch.tensor([one == kind for one in kinds])
                yield f"hard/{by}_auc_{kind}", area_under_curve(right[of_kind], wrong[of_kind])

    def _matched(
        self, model: Any, processor: Any, rows: Sequence[Row], numbers: Sequence[int], *texts: Sequence[str]
    ) -> tuple[Tensor, ...]:
        """The difference of the matching logits of pictures with each of `texts`, all in the order of the pictures."""
        whole = [{**row, "captions": [*row["captions"], *row["hard_captions"]]} for row in rows]
        evaluator = RerankingEvaluator(whole, progress=self.progress)
        places = {text: place for place, text in enumerate(evaluator.unique)}
        pictures = torch.tensor(numbers)
        asked = [torch.tensor([places[text] for text in side]) for side in texts]  # (R,) each
        logits = [evaluator.match(model, processor, pictures, side) for side in asked]  # (R, 2) each
        return tuple(both[:, 1] - both[:, 0] for both in logits)

    def pairs(self, model: Any, processor: Any) -> Numbers:
        """A picture of A and the name of B ask for a scene of A and B, among all scenes of the split."""
        pictures = {row["names"][0]: row["image"] for row in reversed(self.singles)}
        found = [
            (number, pictures[one], called(other))
            for number, row in enumerate(self.rows)
            if len(row["names"]) == 2
            for one, other in (row["names"], row["names"][::-1])
            if one in pictures
        ]
        if not found:
            return
        places, images, texts = zip(*found, strict=True)
        gallery = embed_images(model, processor, [row["image"] for row in self.rows], self.batch_size).cpu()
        ways = self._ways(model, processor, images, texts)

        # scenes of the same two things are all right
        (ids,) = numbered([row["concepts"] for row in self.rows])
        yield from self._recalls("pairs", ways, gallery, ids[list(places)], ids)

    def composed(self, model: Any, processor: Any) -> Numbers:
        """Composed queries against the whole gallery and against their own ten choices; and a query's picture with its
        own caption against the same things redrawn."""
        if not self.queries:
            return
        gallery = embed_images(model, processor, [row["image"] for row in self.gallery], self.batch_size).cpu()
        images = [row["image"] for row in self.queries]
        everything = torch.arange(len(gallery))

        # the target among all pictures, and among its own choices, of which it is the first
        ways = self._ways(model, processor, images, [row["text"] for row in self.queries])
        targets = torch.tensor([row["target"] for row in self.queries])
        yield from self._recalls("composed", ways, gallery, targets, everything)
        choices = torch.tensor([row["choices"] for row in self.queries])  # (Q, 10)
        first = torch.zeros(choices.shape, dtype=torch.bool)
        first[:, 0] = True
        for way, vectors in ways.items():
            scores = torch.einsum("qp,qcp->qc", vectors, gallery[choices])
            yield f"composed/{way}_choice_r@1", recall_at_k(scores, first, (1,))[1]

        # the reference as it is, redrawn
        ways = self._ways(model, processor, images, [row["reference_text"] for row in self.queries])
        same = torch.tensor([row["choices"][row["names"].index("reference")] for row in self.queries])
        yield from self._recalls("same", ways, gallery, same, everything, compared_at=1)

    def guidance(self, model: Any, processor: Any) -> Numbers:
        """Names of single things as classes: right at first place without and with bootstrapped guidance."""
        rows = [row for row in self.rows if len(row["names"]) == 1]
        classes = sorted({row["names"][0] for row in rows})
        if len(classes) < 2:
            return
        labels = [classes.index(row["names"][0]) for row in rows]
        names = [called(name) for name in classes]
        for score in ("guided", "sum"):
            evaluator = ZeroShotClassificationEvaluator(
                rows, labels, names, "name", (1,), self.batch_size, score, bootstrap=True, guided_score=score,
                guided_text="name", progress=self.progress,
            )  # fmt: skip
            for name, value in evaluator.run(model, processor):
                yield f"guidance/{name.replace('/bootstrap', '')}", value

    def _ways(self, model: Any, processor: Any, images: Sequence[Any], texts: Sequence[str]) -> dict[str, Tensor]:
        """Queries (Q, P) by picture, words, both in one sequence, and the sum of the two embeddings."""
        ways = composed_queries(model, processor, images, texts, self.batch_size)
        return {**ways, "sum": F.normalize(ways["picture"] + ways["words"], dim=-1)}

    def _recalls(
        self,
        task: str,
        ways: Mapping[str, Tensor],
        gallery: Tensor,
        query_ids: Tensor,
        gallery_ids: Tensor,
        compared_at: int = 10,
    ) -> Numbers:
        """R@1 and R@10 of every way, and at one of them what asking by both gives over the better of one, words alone
        and the sum. A recall near 1 leaves nothing to gain."""
        values = {way: ask(vectors, gallery, query_ids, gallery_ids, KS) for way, vectors in ways.items()}
        for way, one in values.items():
            for k in KS:
                yield f"{task}/{way}_r@{k}", one[f"recall@{k}"]
        for k in KS:
            yield f"{task}/chance@{k}", values["both"][f"chance@{k}"]
        recalls = {way: one[f"recall@{compared_at}"] for way, one in values.items()}
        recalls["better"] = max(recalls["picture"], recalls["words"])
        for other in ("better", "words", "sum"):
            if recalls[other]:
                yield f"{task}/both_over_{other}", recalls["both"] / recalls[other]

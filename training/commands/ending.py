"""The end of a run: prints metrics, the model's directory and the doctor's findings, and draws pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from PIL import Image

from oner.training.doctor.command import word
from oner.training.doctor.reading import LOG
from oner.training.evaluation.contact_sheet import retrieval_sheet, save_sheet
from oner.training.evaluation.curves import draw_log
from oner.training.evaluation.embedding import spaced
from oner.training.evaluation.retrieval import RetrievalEvaluator
from oner.training.publishing.model_card import slug
from oner.training.run.loading import Rows

from .folder import pictures_of

SHOWN = 6  # captions on a sheet
MOST = 1000  # maximum number of pictures searched for a sheet


def tell(
    output_dir: str | Path,
    directory: Path,
    metrics: Mapping[str, float],
    rows: Mapping[str, Rows],
    model: Any,
    processor: Any,
    evaluators: Sequence[Any] = (),
) -> None:
    """Prints the results of a run, and draws log.png and a sheet for each evaluation set in its directory."""
    if metrics:
        print(json.dumps({name: round(value, 4) for name, value in metrics.items()}, indent=1))
    else:
        print("nothing was measured, for the run has no eval_data")
    of_folder = pictures_of(output_dir) is not None
    if of_folder:
        print(how_good(metrics, evaluators[0]))

    # an error in drawing must not fail the run
    drawn = []
    for path, draw in pictures(Path(output_dir), model, processor, evaluators).items():
        try:
            save_sheet(draw(), path)
            drawn.append(str(path))
        except (OSError, ValueError) as error:
            print(f"{path} could not be drawn: {error}")
    print(f"model directory: {directory}")
    print(f"drawn: {', '.join(drawn)}")
    if of_folder:
        print(f'search it: oner search {quote(str(output_dir))} "{example_of(evaluators[0])}"')
    print(word(output_dir, rows))


def how_good(metrics: Mapping[str, float], evaluator: RetrievalEvaluator) -> str:
    """Recall on the held-out pictures, compared with guessing."""
    name = evaluator.name
    shares = {key: f"{100 * metrics[f'{name}/{key}@10']:.0f} %" for key in ("tr_r", "ir_r", "tr_chance", "ir_chance")}
    return (
        f"on {len(evaluator.rows)} pictures that it has not seen: words find their picture among the first ten in "
        f"{shares['ir_r']} (guessing: {shares['ir_chance']}), a picture its words among the first ten of "
        f"{len(evaluator.texts)} in {shares['tr_r']} (guessing: {shares['tr_chance']})"
    )


def example_of(evaluator: RetrievalEvaluator) -> str:
    """An example query: a caption without characters that are special in a shell."""
    return evaluator.texts[0].replace('"', "").replace("$", "").replace("`", "")


def pictures(output_dir: Path, model: Any, processor: Any, evaluators: Sequence[Any]) -> dict[Path, Any]:
    """File -> function that draws its image."""
    drawings = {output_dir / "log.png": lambda: draw_log(output_dir / LOG)}
    for one in evaluators:
        if isinstance(one, RetrievalEvaluator):
            drawings[output_dir / f"{slug(one.name)}.png"] = lambda one=one: _sheet(one, model, processor)
    return drawings


def _sheet(evaluator: RetrievalEvaluator, model: Any, processor: Any) -> Image.Image:
    rows = spaced(evaluator.rows, MOST)
    one = RetrievalEvaluator(
        rows, name=evaluator.name, captions=evaluator.captions, progress=False, clean_caption=evaluator.clean_caption
    )
    images, texts = one.embed(model, processor)  # (n, P), (m, P)
    asked = spaced(range(len(texts)), SHOWN)
    found = (texts[asked] @ images.T).topk(min(5, len(rows)), dim=1).indices.tolist()
    lines = [
        (one.texts[text], [(rows[i]["image"], bool(one.image_ids[i] == one.text_ids[text])) for i in nearest])
        for text, nearest in zip(asked, found, strict=True)
    ]
    return retrieval_sheet(
        lines, f"{one.name}: words, and the nearest of {len(rows)} pictures; framed: the right ones"
    )

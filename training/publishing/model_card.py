"""Writes the model card of a published model: metadata for the Hub, and a page for readers.

The page is rendered from `model_card_template.md` beside this file. It states only what it is given: a card without
metrics says that there are none.
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoModel, PreTrainedModel

from oner.training.private_names import registered_models

from .digests import sha256_of
from .origins import Origins, base_models, hub_datasets, note_change
from .public import plain

TEMPLATE = Path(__file__).with_name("model_card_template.md")
EVALUATION = re.compile(r"<!-- evaluation -->.*?<!-- /evaluation -->", re.DOTALL)
# metrics of guessing, which tables show beside the model's
CHANCE = re.compile(r"(?:^|_)chance(?:$|_|@)")
PIPELINE_TAG = "zero-shot-image-classification"
# our pipeline -> the Hub's pipeline tag
PIPELINE_TAGS = {"image-text-retrieval": PIPELINE_TAG, "image-question-answering": "visual-question-answering"}


def slug(text: str) -> str:
    """
    A lower-case file or tag name of letters, digits, `.`, `-` and `_`. For a text with other letters a digest is
    added,
    so that different Chinese names stay different. Raises ValueError for a text without a letter or digit.
    """
    if not re.search(r"\w", text):
        raise ValueError(f"a name needs at least one letter or digit, got {text!r}")
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.")
    if text.isascii():
        return name
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".strip("-")


def split_metric(name: str) -> tuple[str, str]:
    """`test_style/recall@10` → (`test_style`, `recall@10`); a name without `/` belongs to the set `evaluation`."""
    dataset, _, metric = name.rpartition("/")
    return dataset or "evaluation", metric


def inline(text: Any) -> str:
    """Text escaped for Markdown, on one line: it cannot start mark-up, a table, a link or a heading."""
    line = " ".join(str(text).split())
    line = re.sub(r"[\\`|]", r"\\\g<0>", line).replace("<", "&lt;").replace(">", "&gt;")
    # brackets are harmless unless they form a link, or close the one around them
    if "](" in line or line.count("[") != line.count("]"):
        line = re.sub(r"[\[\]]", r"\\\g<0>", line)
    return f"\\{line}" if line.startswith("#") else line


def fence_for(text: str) -> str:
    """A fence of more backticks than any in `text`."""
    return "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, each cell on one line."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(map(inline, cells)) + " |"

    rule = "| " + " | ".join(["---"] * len(header)) + " |"
    return "\n".join([line(header), rule, *map(line, rows)])


def metrics_table(metrics: Mapping[str, float]) -> str:
    """One row per metric, in the given order; a value of None is shown as not measurable."""
    rows = []
    for name, value in plain(metrics).items():
        shown = "not measurable" if value is None else f"{value:.4g}" if isinstance(value, float) else value
        rows.append([*split_metric(name), shown])
    return markdown_table(["set", "metric", "value"], rows)


def data_table(data: Sequence[Mapping[str, Any] | str]) -> str:
    """One row per data set; the columns are the union of the keys that the entries have."""
    entries = [{"name": entry} if isinstance(entry, str) else dict(entry) for entry in plain(list(data))]
    # in the order in which keys first appear
    columns = list(dict.fromkeys(key for entry in entries for key in entry))
    return markdown_table(columns, [[entry.get(column, "") for column in columns] for entry in entries])


def eval_results(metrics: Mapping[str, float]) -> list[EvalResult]:
    """The Hub's `model-index` entries of the finite metrics, without those of guessing."""
    results = []
    for name, value in plain(metrics).items():
        # the index holds only numbers
        dataset, metric = split_metric(name)
        if value is None or isinstance(value, (bool, str)) or CHANCE.search(metric):
            continue

        # the Hub groups results by task, which follows from the metric's name
        task = PIPELINE_TAG if re.search(r"top[-_]?\d|accuracy", metric) else "image-text-retrieval"
        results.append(
            EvalResult(
                task_type=task,
                dataset_type=slug(dataset),
                dataset_name=dataset,
                metric_type=slug(metric),
                metric_name=metric,
                metric_value=value,
            )
        )
    return results


def method_of(model: PreTrainedModel) -> str:
    """The family and its paper: the first docstring line of its tower's module."""
    tower = registered_models(AutoModel)[type(model.config)]
    return (sys.modules[tower.__module__].__doc__ or "").strip().partition("\n")[0]


def codes_of(model: PreTrainedModel) -> int:
    """Number of codes in the model's codebook; 0 without a codebook."""
    codebook = getattr(model, "codebook", None)
    return 0 if codebook is None else len(codebook.weight)


def widths_of(training_config: Mapping[str, Any]) -> list[int]:
    """The widths to which embeddings may be truncated (Matryoshka); empty without such training."""
    return [width for width in training_config.get("matryoshka_dims") or () if isinstance(width, int)]


def model_card(
    model: PreTrainedModel,
    model_id: str,
    *,
    metrics: Mapping[str, float] | None = None,
    protocol: Mapping[str, Any] | str | None = None,
    training_config: Mapping[str, Any] | None = None,
    origins: Origins | None = None,
    pictures: Mapping[str, str] | None = None,
    tasks: Sequence[str] = (),
    license: str | None = None,
    languages: Sequence[str] = (),
    stored_dtype: str = "float32",
    compute_dtype: str = "float32",
) -> ModelCard:
    """The card of `model`; `pictures` maps captions to paths in the repository, `tasks` are its pipelines."""
    # metadata for the Hub
    config, origins = model.config, origins or Origins()
    name = model_id.rsplit("/", 1)[-1]
    libraries = ["sentence-transformers"] if "image-text-retrieval" in tasks else []
    metadata = ModelCardData(
        license=license,
        language=list(languages) or None,
        datasets=hub_datasets(origins) or None,
        base_model=base_models(origins) or None,
        library_name="transformers",
        pipeline_tag=next((tag for task, tag in PIPELINE_TAGS.items() if task in tasks), None),
        tags=["oner", config.model_type, "custom_code", *libraries, *tasks],
        model_name=name,
        eval_results=eval_results(metrics or {}) or None,
    )

    # the page
    if isinstance(protocol, Mapping):
        protocol = markdown_table(["", ""], [[key, json_cell(value)] for key, value in plain(protocol).items()])
    elif protocol is not None:
        protocol = inline(plain(protocol))
    settings = yaml.safe_dump(plain(training_config or {}), sort_keys=False, width=110).strip()
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        model_name=inline(name),
        model_line=model_line(model_id),
        class_name=type(model).__name__,
        method=method_of(model),
        parameters=f"{model.num_parameters():,}",
        image_size=config.image_size,
        patch_size=config.patch_size,
        max_text_length=config.max_text_length,
        tasks=list(tasks),
        codes=codes_of(model),
        widths=widths_of(training_config or {}),
        metrics_table=metrics_table(metrics) if metrics else None,
        protocol=protocol,
        pictures=picture_lines(pictures or {}),
        models=[inline(one) for one in origins.models],
        data_table=data_table(origins.data) if origins.data else None,
        makers=sorted(map(inline, origins.makers)),
        licence=inline(license) if license else None,
        training_config=settings if training_config else None,
        fence=fence_for(settings),
        stored_dtype=stored_dtype,
        compute_dtype=compute_dtype,
    )


def model_line(model_id: str) -> str:
    """The line that defines `MODEL` for the card's code snippets."""
    return f"`MODEL = {json.dumps(model_id.replace('`', ''), ensure_ascii=False)}`"


def picture_lines(pictures: Mapping[str, str]) -> str:
    """Each picture with its caption below; `pictures` maps captions to paths in the repository."""
    shown = {inline(plain(caption)): path for caption, path in pictures.items()}
    return "\n\n".join(f"![{caption}]({path})\n*{caption}*" for caption, path in shown.items())


def rename_card(directory: str | Path, repo_id: str) -> None:
    """Renames the card of an exported model to its repository, in title, metadata and snippets."""
    path = Path(directory) / "README.md"
    card = ModelCard.load(path, ignore_metadata_errors=True)
    name = repo_id.rsplit("/", 1)[-1]
    if card.data.get("model_name") or card.data.eval_results:
        card.data.model_name = name
    card.text = re.sub(r"^# .*$", lambda _: f"# {inline(name)}", card.text, count=1, flags=re.MULTILINE)
    card.text = re.sub(r"`MODEL = \"[^`\n]*\"`", lambda _: model_line(repo_id), card.text, count=1)
    card.save(path)
    note_change(Path(directory), "README.md")


def keep_evaluation(earlier: Path, new: Path) -> None:
    """Copies the section of `add_evaluation` from an earlier card to the new one, if the weights are identical."""
    weights = [{one.name: sha256_of(one) for one in path.glob("*.safetensors")} for path in (earlier, new)]
    cards = [path / "README.md" for path in (earlier, new)]
    if weights[0] != weights[1] or not all(card.is_file() for card in cards):
        return
    old, card = (ModelCard.load(path, ignore_metadata_errors=True) for path in cards)
    if (measured := EVALUATION.search(old.text)) is None or not EVALUATION.search(card.text):
        return
    card.text = EVALUATION.sub(lambda _: measured[0], card.text)

    # this export's results replace earlier ones of the same name
    known = {(result.dataset_name, result.metric_name) for result in card.data.eval_results or []}
    others = [r for r in old.data.eval_results or [] if (r.dataset_name, r.metric_name) not in known]
    card.data.eval_results = [*(card.data.eval_results or []), *others] or None
    card.save(cards[1])


def add_evaluation(
    directory: str | Path, results: Mapping[str, Mapping[str, Any]], pictures: Mapping[str, str] | None = None
) -> None:
    """Adds results and pictures made after the export to the card of an exported model.

    - results: name -> content of a `results/<name>.json` that `write_results` wrote.
    - pictures: caption -> path in the repository.

    Raises ValueError if README.md was not made from this package's template.
    """
    card = ModelCard.load(Path(directory) / "README.md")
    if not EVALUATION.search(card.text):
        raise ValueError(f"{directory}/README.md has no evaluation section; expected a card that export_model wrote")

    # rewrite the section between the two marks: a table for each results file, then the pictures
    parts = ["### Evaluation"]
    for name, content in results.items():
        stated = {key: value for key, value in plain(content["protocol"]).items() if value is not None}
        protocol = ", ".join(f"{key}: {json_cell(value)}" for key, value in stated.items())
        parts += [f"`results/{name}.json` ({inline(protocol)})", metrics_table(content["values"])]
    parts += [picture_lines(pictures)] if pictures else []
    text = "\n\n".join(["<!-- evaluation -->", *parts, "<!-- /evaluation -->"])
    card.text = EVALUATION.sub(lambda _: text, card.text)

    # in the metadata, new values replace old ones of the same set and metric
    measured = eval_results({key: value for content in results.values() for key, value in content["values"].items()})
    known = {(result.dataset_name, result.metric_name) for result in measured}
    others = [r for r in card.data.eval_results or [] if (r.dataset_name, r.metric_name) not in known]
    card.data.eval_results = others + measured
    card.save(Path(directory) / "README.md")
    note_change(Path(directory), "README.md")


def json_cell(value: Any) -> str:
    """A string unchanged, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)

"""The model card of a published model: metadata that the Hub indexes, and a page that a reader can check.

The page is rendered from `model_card_template.md` beside this file. It says only what it is given: a card without
metrics says that there are none.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoModel, PreTrainedModel

from oner.training.private_names import registered_models

TEMPLATE = Path(__file__).with_name("model_card_template.md")
EVALUATION = re.compile(r"<!-- evaluation -->.*?<!-- /evaluation -->", re.DOTALL)
PIPELINE_TAG = "zero-shot-image-classification"
# a pipeline of ours -> the Hub's name for what such a model does
PIPELINE_TAGS = {"image-text-retrieval": PIPELINE_TAG, "image-question-answering": "visual-question-answering"}


def slug(text: str) -> str:
    """A lower-case file or tag name: letters, digits, `.`, `-` and `_`."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.")
    if not name:
        raise ValueError(f"a name needs at least one letter or digit, got {text!r}")
    return name


def plain(value: Any) -> Any:
    """`value` as JSON and YAML can hold it: tensors and arrays of one number become numbers, NaN becomes None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]

    # scalars of numpy and torch; an array of several numbers raises here
    if hasattr(value, "item") and getattr(value, "size", None) is not None and not isinstance(value, (int, float)):
        value = value.item()

    # JSON has no NaN
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def split_metric(name: str) -> tuple[str, str]:
    """`test_style/recall@10` → (`test_style`, `recall@10`); a name without `/` belongs to the set `evaluation`."""
    dataset, _, metric = name.rpartition("/")
    return dataset or "evaluation", metric


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; `|` and line breaks inside a cell are escaped."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def metrics_table(metrics: Mapping[str, float]) -> str:
    """One row per metric, in the order given; what could not be measured says so."""
    rows = []
    for name, value in plain(metrics).items():
        shown = "not measurable" if value is None else f"{value:.4g}" if isinstance(value, float) else value
        rows.append([*split_metric(name), shown])
    return markdown_table(["set", "metric", "value"], rows)


def data_table(data: Sequence[Mapping[str, Any] | str]) -> str:
    """One row per data set; the columns are the union of the keys that the entries have."""
    entries = [{"name": entry} if isinstance(entry, str) else dict(entry) for entry in data]
    # in the order in which keys first appear
    columns = list(dict.fromkeys(key for entry in entries for key in entry))
    return markdown_table(columns, [[entry.get(column, "") for column in columns] for entry in entries])


def eval_results(metrics: Mapping[str, float]) -> list[EvalResult]:
    """The Hub's `model-index` entries of the finite metrics."""
    results = []
    for name, value in plain(metrics).items():
        # the index holds numbers; what could not be measured stays in the table alone
        dataset, metric = split_metric(name)
        if value is None or isinstance(value, (bool, str)):
            continue

        # the Hub sorts results by task; the names of metrics tell which
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
    """What the family is, with its paper: the first line of the file that holds its tower."""
    tower = registered_models(AutoModel)[type(model.config)]
    return (sys.modules[tower.__module__].__doc__ or "").strip().partition("\n")[0]


def model_card(
    model: PreTrainedModel,
    model_id: str,
    *,
    metrics: Mapping[str, float] | None = None,
    protocol: Mapping[str, Any] | str | None = None,
    training_config: Mapping[str, Any] | None = None,
    data: Sequence[Mapping[str, Any] | str] | None = None,
    pictures: Mapping[str, str] | None = None,
    tasks: Sequence[str] = (),
    license: str = "apache-2.0",
    stored_dtype: str = "float32",
    compute_dtype: str = "float32",
) -> ModelCard:
    """The card of `model`; `pictures` maps captions to paths inside the repository, `tasks` are its own pipelines."""
    # what the Hub indexes
    config = model.config
    name = model_id.rsplit("/", 1)[-1]
    metadata = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=next((tag for task, tag in PIPELINE_TAGS.items() if task in tasks), None),
        tags=["oner", config.model_type, "custom_code", *tasks],
        model_name=name,
        eval_results=eval_results(metrics or {}) or None,
    )

    # what a reader sees
    if isinstance(protocol, Mapping):
        protocol = markdown_table(["", ""], [[key, json_cell(value)] for key, value in plain(protocol).items()])
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        model_name=name,
        model_id=model_id,
        class_name=type(model).__name__,
        method=method_of(model),
        parameters=f"{model.num_parameters():,}",
        image_size=config.image_size,
        patch_size=config.patch_size,
        max_text_length=config.max_text_length,
        tasks=list(tasks),
        metrics_table=metrics_table(metrics) if metrics else None,
        protocol=protocol,
        pictures=[{"caption": caption, "path": path} for caption, path in (pictures or {}).items()],
        data_table=data_table(data) if data else None,
        training_config=yaml.safe_dump(plain(training_config), sort_keys=False, width=110).strip()
        if training_config
        else None,
        stored_dtype=stored_dtype,
        compute_dtype=compute_dtype,
    )


def add_evaluation(
    directory: str | Path, results: Mapping[str, Mapping[str, Any]], pictures: Mapping[str, str] | None = None
) -> None:
    """Brings the card of an exported model up to date with what was measured and drawn after the export.

    - results: name -> content of a `results/<name>.json` that `write_results` wrote.
    - pictures: caption -> path inside the repository.

    Raises ValueError if the directory's README.md is not a card of this package's template.
    """
    card = ModelCard.load(Path(directory) / "README.md")
    if not EVALUATION.search(card.text):
        raise ValueError(f"{directory}/README.md has no evaluation section; expected a card that export_model wrote")

    # the section between the two marks is written anew: a table for each file of results, then the pictures
    parts = ["### Evaluation"]
    for name, content in results.items():
        stated = {key: value for key, value in plain(content["protocol"]).items() if value is not None}
        protocol = ", ".join(f"{key}: {json_cell(value)}" for key, value in stated.items())
        parts += [f"`results/{name}.json` ({protocol})", metrics_table(content["values"])]
    parts += [f"![{caption}]({path})\n*{caption}*" for caption, path in (pictures or {}).items()]
    text = "\n\n".join(["<!-- evaluation -->", *parts, "<!-- /evaluation -->"])
    card.text = EVALUATION.sub(lambda _: text, card.text)

    # in the metadata a new value replaces the old one of the same set and metric; others stay
    measured = eval_results({key: value for content in results.values() for key, value in content["values"].items()})
    known = {(result.dataset_name, result.metric_name) for result in measured}
    others = [r for r in card.data.eval_results or [] if (r.dataset_name, r.metric_name) not in known]
    card.data.eval_results = others + measured
    card.save(Path(directory) / "README.md")


def json_cell(value: Any) -> str:
    """A string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)

"""A trained image tokenizer as a directory that is a Hub repository: weights, code, card, figures, pictures."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, StrictUndefined
from PIL import Image

from oner.modeling.modeling_dvae import DiscreteVAE

from .hub import check_replaceable, move_into_place, stored_weights, write_json, write_pictures
from .model_card import plain
from .model_loading import write_digests

TEMPLATE = Path(__file__).with_name("tokenizer_card.md")


def export_tokenizer(
    model: DiscreteVAE,
    directory: str | Path,
    *,
    metrics: Mapping[str, float],
    protocol: Mapping[str, Any],
    training_config: Mapping[str, Any],
    data: Sequence[str],
    pictures: Mapping[str, Image.Image],
    licence: str | None = None,
    attribution: str | Path | None = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
) -> Path:
    """
    Writes `directory`, beside it first and then renamed into place, and returns its path.

    Args:
        metrics: SET/measure -> value, as `ReconstructionEvaluator` yields them.
        protocol: SET -> its evaluator's protocol.
        data: Names of what it was trained on.
        licence: The terms of these data.
        attribution: A file that names their makers, which is copied.
        pictures: Caption -> picture.
        dtype: Precision in the file. The configuration keeps the model's own, in which it will be loaded.
        name: What the card calls it; the directory's name if none.

    Raises:
        FileExistsError: `directory` holds something that is no export.
        OverflowError: a weight does not fit into `dtype`.
    """
    directory = Path(directory).absolute()
    check_replaceable(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # beside the target, so that renaming stays on one file system
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        scratch.chmod(0o755)
        model.save_pretrained(scratch, state_dict=stored_weights(model, dtype))
        paths = write_pictures(pictures, scratch)

        # what was measured, and by what training
        (scratch / "results").mkdir()
        write_json(scratch / "results" / "metrics.json", {"metrics": plain(metrics), "protocol": plain(protocol)})
        write_json(scratch / "results" / "training_config.json", plain(training_config))

        # the page, with the data's terms and makers
        sources = [f"`{name}`" for name in data] + ([licence] if licence else [])
        if attribution is not None:
            shutil.copy(attribution, scratch)
            sources.append(f"makers named in `{Path(attribution).name}`")
        name = name or directory.name
        card = tokenizer_card(model, name, metrics, protocol, training_config, "; ".join(sources), paths)
        (scratch / "README.md").write_text(card, encoding="utf-8")

        # digests last, of files that no longer change
        write_digests(scratch)
        for file in scratch.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors writes for the owner's eyes only
        move_into_place(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def tokenizer_card(
    model: DiscreteVAE,
    name: str,
    metrics: Mapping[str, float],
    protocol: Mapping[str, Any],
    training_config: Mapping[str, Any],
    data: str,
    pictures: Mapping[str, str],
) -> str:
    """The text of README.md; `pictures` maps captions to paths in the repository."""
    # a line of the table for each set that was measured
    config = model.config
    rows = []
    for set_name, settings in protocol.items():
        measures = {key.rpartition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{set_name}/")}
        rows.append({"name": set_name, "pictures": settings["pictures"], **measures})

    # what the Hub indexes
    metadata = {
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["oner", "dvae", "image-tokenizer"],
    }

    # a name that the template needs and does not get is an error
    template = Environment(undefined=StrictUndefined, trim_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        metadata=yaml.safe_dump(metadata, sort_keys=False).strip(),
        name=name,
        path=name,
        places=(config.image_size // config.factor) ** 2,
        num_codes=config.num_codes,
        image_size=config.image_size,
        parameters=f"{sum(one.numel() for one in model.parameters()) / 1e6:.2f} M",
        rows=rows,
        pictures=pictures,
        data=data,
        training_config=yaml.safe_dump(plain(training_config), sort_keys=False, width=110).strip(),
    )

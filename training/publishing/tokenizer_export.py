"""Exports a trained image tokenizer as a Hub repository: weights, code, card, metrics, pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, StrictUndefined
from PIL import Image

from oner.modeling.modeling_dvae import DiscreteVAE

from .hub import check_stored_dtype, finish_export, stored_weights, write_facts, write_pictures
from .model_card import data_table, fence_for, inline
from .origins import Origins, base_models, repository_name
from .placing import check_replaceable, scratch_beside
from .public import plain

TEMPLATE = Path(__file__).with_name("tokenizer_card.md")


def export_tokenizer(
    model: DiscreteVAE,
    directory: str | Path,
    *,
    metrics: Mapping[str, float],
    protocol: Mapping[str, Any],
    training_config: Mapping[str, Any],
    pictures: Mapping[str, Image.Image],
    origins: Origins | None = None,
    license: str | None = None,
    dtype: torch.dtype | None = None,
    repo_id: str | None = None,
) -> Path:
    """
    Writes the repository to `directory`, replacing an earlier export in one step, and returns its path.

    Args:
        metrics: SET/measure -> value, as `ReconstructionEvaluator` yields them.
        protocol: SET -> protocol of its evaluation.
        pictures: Caption -> picture.
        origins: Data, attributions and starting models, from `read_origins`.
        license: Of the weights, as the Hub names it.
        dtype: dtype of the weights in the file. The configuration keeps the model's own, in which it is loaded.
        repo_id: Name of the repository and the card; by default the directory's, or its parent's if that is `model`.

    Raises:
        FileExistsError: `directory` contains something other than an export.
        ValueError: `dtype` is not a float.
        OverflowError: a weight overflows in `dtype`.
    """
    check_stored_dtype(dtype)
    directory = Path(directory).resolve()
    check_replaceable(directory)
    name, origins = plain(repo_id or repository_name(directory)), origins or Origins()
    with scratch_beside(directory) as scratch:
        model.save_pretrained(scratch, state_dict=stored_weights(model, dtype))
        paths = write_pictures(pictures, scratch)
        write_facts(scratch, metrics, protocol, training_config)

        # the card, with licences and attribution of the data
        card = tokenizer_card(model, name, metrics, protocol, training_config, origins, license, paths)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        finish_export(scratch, directory, name, license, origins)
    return directory


def tokenizer_card(
    model: DiscreteVAE,
    name: str,
    metrics: Mapping[str, float],
    protocol: Mapping[str, Any],
    training_config: Mapping[str, Any],
    origins: Origins,
    license: str | None,
    pictures: Mapping[str, str],
) -> str:
    """The text of README.md; `pictures` maps captions to paths in the repository."""
    # one table row per evaluated set
    config = model.config
    rows = []
    for set_name, settings in protocol.items():
        measures = {key.rpartition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{set_name}/")}
        rows.append({"name": inline(plain(set_name)), "pictures": settings["pictures"], **measures})

    # metadata for the Hub
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["oner", "dvae", "image-tokenizer"],
    }
    metadata |= {"license": license} if license else {}
    metadata |= {"base_model": begun} if (begun := base_models(origins)) else {}
    config_text = yaml.safe_dump(plain(training_config), sort_keys=False, width=110).strip()

    # a variable that the template needs and does not get is an error
    template = Environment(undefined=StrictUndefined, trim_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        metadata=yaml.safe_dump(metadata, sort_keys=False).strip(),
        name=inline(name),
        path=name.replace('"', ""),
        places=(config.image_size // config.factor) ** 2,
        num_codes=config.num_codes,
        image_size=config.image_size,
        parameters=f"{sum(one.numel() for one in model.parameters()) / 1e6:.2f} M",
        rows=rows,
        pictures={inline(caption): path for caption, path in pictures.items()},
        data_table=data_table(origins.data) if origins.data else None,
        licence=inline(license) if license else None,
        models=[inline(one) for one in origins.models],
        training_config=config_text,
        fence=fence_for(config_text),
    )

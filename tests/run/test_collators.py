"""What a run's arguments make of a collator: its parts, for each kind of rows and for a family's own layout."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_pretraining import tiny_arguments
from transformers import HfArgumentParser

from oner.processing.data.augmentation import Crop
from oner.processing.data.layouts import ImageLayout, JointLayout, SeparateLayout
from oner.processing.data.masking import UNMASKED, Dropping, Masking, Replacement
from oner.processing.data.sampling import RowKey
from oner.training.objectives.oner import OneRObjectiveArguments
from oner.training.run.building import build_processor_and_config
from oner.training.run.collators import (
    COLLATORS,
    image_collator,
    pair_collator,
    task_collator,
    text_collator,
    text_task_collator,
    tokenizer_collator,
)
from oner.training.run.loading import open_portions
from oner.training.run.parsing import parse_arguments

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def made(pairs, tmp_path_factory):
    """Arguments, processor, configuration and a few rows."""
    folder = tmp_path_factory.mktemp("run")
    arguments = parse_arguments(tiny_arguments(pairs, folder, mim_ratio=[0.25, 0.75], crop_scale=[0.3, 0.9]))
    rows = open_portions(arguments)
    processor, config = build_processor_and_config(arguments, rows)
    return arguments, processor, config, [(RowKey(number, 0, 0.5), rows["pairs"][number]) for number in range(5)]


def test_options_are_filled_from_a_flat_command_line():
    parser = HfArgumentParser([Crop, Masking])
    line = ["--crop_scale", "0.2", "1", "--corruption", "drop", "--mim_ratio", "0.75", "0.75"]
    crop, masking = parser.parse_args_into_dataclasses(line)
    assert (crop, masking) == (Crop([0.2, 1.0]), Masking(0.15, [0.75, 0.75], corruption="drop"))
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--mim_masking", "rows"])
    for kind in (Crop, Masking):
        assert all(one.metadata["help"] for one in dataclasses.fields(kind))


def test_the_objective_says_which_patches_are_kept(made):
    arguments, processor, config, items = made
    n_patches = (config.image_size // config.patch_size) ** 2
    for keep, until, count in ((0.5, 1.0, n_patches // 2), (0.5, 0.4, n_patches), (1.0, 1.0, None)):
        told = OneRObjectiveArguments(losses=["itc"], image_keep=keep, image_keep_until=until)
        batch = pair_collator(dataclasses.replace(arguments, objective=told), processor, config)(items)
        assert ("kept_patches" in batch) == (count is not None)
        assert count is None or batch["kept_patches"].shape == (5, count)


def test_each_kind_of_rows_has_its_layout_and_corruption(made):
    arguments, processor, config, items = made
    layouts = {"pairs": JointLayout, "images": ImageLayout, "texts": SeparateLayout}
    batches = {}
    for kind, make in COLLATORS.items():
        collator = make(arguments, processor, config)
        assert type(collator.layout) is layouts[kind] and type(collator.corruption) is Replacement
        batches[kind] = collator(items)
    n_patches = (config.image_size // config.patch_size) ** 2
    assert batches["pairs"]["bool_masked_pos"].sum(1).tolist() == [n_patches // 2] * 5  # half of the run is done
    assert torch.equal(batches["images"]["pixel_values"], batches["pairs"]["pixel_values"])
    joint, alone = batches["pairs"]["input_ids"], batches["texts"]["input_ids"]
    assert torch.equal(torch.cat([joint[:, :1], joint[:, 1 + n_patches :]], dim=1), alone)
    assert "pixel_values" not in batches["texts"] and "input_ids" not in batches["images"]


def test_a_masking_of_its_own(made):
    arguments, processor, config, items = made
    dropping = Masking(0.5, [0.75, 0.75], corruption="drop")
    for make in (pair_collator, text_collator, image_collator):
        collator = make(arguments, processor, config, dropping)
        assert type(collator.corruption) is Dropping and "masked_input_ids" not in collator(items)
    nothing = pair_collator(arguments, processor, config, UNMASKED)(items)
    assert torch.equal(nothing["masked_input_ids"], nothing["input_ids"])
    assert not nothing["bool_masked_pos"].any() and not len(nothing["mlm_index"])
    told = dataclasses.replace(arguments, data=dataclasses.replace(arguments.data, max_text_length=2))
    short = text_collator(told, processor, config)
    assert short.reader.windows and short(items)["input_ids"].shape == (5, 3)


@pytest.mark.parametrize("make", [pair_collator, text_collator, task_collator, text_task_collator])
def test_a_length_that_is_told_cuts_every_text(make, made):
    arguments, processor, config, items = made
    told = dataclasses.replace(arguments, data=dataclasses.replace(arguments.data, max_text_length=2))
    rows = [(key, {**row, "text": "a text of more words", "label": 0}) for key, row in items]
    collator = make(told, processor, config)
    assert (
        max(
            len(one.tokens)
            for one in collator.reader.tokenize([collator.reader.read(*one, np.random.default_rng(0)) for one in rows])
        )
        == 2
    )


def test_a_family_names_its_layout(made):
    arguments, processor, config, items = made

    class Separate(type(config)):
        pair_layout = "separate"

    apart = Separate(**config.to_dict())
    batch = pair_collator(arguments, processor, apart)(items)
    joint = pair_collator(arguments, processor, config)(items)
    n_patches = (config.image_size // config.patch_size) ** 2
    assert batch["input_ids"].shape[1] == joint["input_ids"].shape[1] - n_patches
    assert not (batch["input_ids"] == config.image_token_id).any()


def test_an_image_tokenizer_reads_pixels_in_0_to_1(made):
    arguments, _, _, items = made
    batch = tokenizer_collator(arguments, 24)(items)
    assert set(batch) == {"pixel_values", "ids", "rows"} and batch["pixel_values"].shape == (5, 3, 24, 24)
    assert 0 <= batch["pixel_values"].min() < 0.5 < batch["pixel_values"].max() <= 1

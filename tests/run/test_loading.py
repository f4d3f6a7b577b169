"""What the data arguments of a run become in its processor and its batches."""

import pytest
import torch
from tiny_pretraining import tiny_arguments

from oner.processing.data.augmentation import NORMALIZATIONS
from oner.processing.vl_captions import pre_caption
from oner.training.run.arguments import Arguments
from oner.training.run.building import build_model, build_processor_and_config
from oner.training.run.collators import build_collators
from oner.training.run.loading import RunLoader, open_portions
from oner.training.run.parsing import parse_arguments

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def first_batch(pairs, directory, **options):
    """Arguments, processor and the first batch of a run."""
    arguments: Arguments = parse_arguments(tiny_arguments(pairs, directory, **options))
    rows = open_portions(arguments)
    processor, config = build_processor_and_config(arguments, rows)
    loader = RunLoader(arguments, rows, build_collators(arguments, processor, config))
    return arguments, processor, config, next(iter(loader(0)))["pairs"]


def test_simlas_data_on_a_run_of_any_family(pairs, tmp_path):
    told = {
        "code_crop": "common",
        "mim_masking": "blocks",
        "mim_min_block": 2,
        "mim_ratio": [0.5, 0.5],
        "random_specials": True,
        "image_normalization": "clip",
        "caption_rules": "albef",
        "rand_augment": "albef-n2-m7",
        "horizontal_flip": 0.5,
    }
    _, processor, config, plain = first_batch(pairs, tmp_path)
    arguments, processor, config, batch = first_batch(pairs, tmp_path, **told)
    side = config.image_size // config.patch_size
    assert batch["code_pixel_values"].shape == (8, 3, 8 * side, 8 * side)
    assert 0 <= batch["code_pixel_values"].min() < batch["code_pixel_values"].max() <= 1
    assert set(batch) - set(plain) == {"code_pixel_values"}
    mean, std = NORMALIZATIONS["clip"]
    kept = processor.image_processor
    assert (tuple(kept.image_mean), tuple(kept.image_std)) == (mean, std)
    shown = batch["pixel_values"] * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert -1e-6 < shown.min() < shown.max() < 1 + 1e-6
    collator = build_collators(arguments, processor, config)["pairs"]
    masking = collator.corruption.masking
    assert (masking.mim_masking, masking.mim_min_block, masking.random_specials) == ("blocks", 2, True)
    assert collator.reader.clean_caption is pre_caption


def test_an_initial_models_colours_stay_unless_told(pairs, tmp_path):
    arguments, processor, config, _ = first_batch(pairs, tmp_path, image_normalization="clip")
    build_model(arguments, config).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for told, expected in ((None, "clip"), ("imagenet", "imagenet")):
        options = {"initial_model": tmp_path / "model", "image_normalization": told}
        _, later, _, batch = first_batch(pairs, tmp_path, **options)
        mean, std = NORMALIZATIONS[expected]
        assert (tuple(later.image_processor.image_mean), tuple(later.image_processor.image_std)) == (mean, std)
        # the white round a picture tells which
        white = (1 - torch.tensor(mean)) / torch.tensor(std)
        assert batch["pixel_values"].amax((0, 2, 3)) == pytest.approx(white, abs=1e-5)


def test_albefs_schedule_refuses_a_stream(pairs, tmp_path):
    arguments = parse_arguments(
        [*tiny_arguments(pairs, tmp_path, schedule="albef", max_steps=4), "--streaming", "--warmup_steps", "0"]
    )
    with pytest.warns(UserWarning, match="is read as a sequential stream"):
        rows = open_portions(arguments)
    with pytest.raises(ValueError, match="schedule albef depends on epochs, which streamed data do not have"):
        RunLoader(arguments, rows, {"pairs": None})

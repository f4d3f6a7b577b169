"""From rows to a batch: the layout, the masks, and that a row's draw depends on nothing but (seed, epoch, row)."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_loading import collator_of
from torch.utils.data import DataLoader

from oner.processing.data.augmentation import CodeView, TrainingImageTransform
from oner.processing.data.chunks import split_pairs
from oner.processing.data.masking import Keeping
from oner.processing.data.sampling import PairBatchSampler, RowKey, concept_id
from oner.processing.data.sources import PairTrainingSet, open_rows
from oner.processing.image_processing_vl import open_image
from oner.processing.vl_captions import pre_caption
from oner.processing.vl_tokenizer import train_tokenizer

N, SIZE = 16, 32  # patches of 8 x 8
MASKINGS = ("blocks", "random")


@pytest.fixture(scope="module")
def rows(emoji_folder, tmp_path_factory):
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        return open_rows(emoji_folder / "test_concept.parquet", id_column="hexcode")


@pytest.fixture(scope="module")
def tokenizer(rows):
    return train_tokenizer(rows.captions(), vocab_size=600)


def collator(tokenizer, **options):
    return collator_of(
        tokenizer, **{"image_transform": TrainingImageTransform(SIZE), "seed": 0, "vocab_size": 600, **options}
    )


def items_of(rows, numbers, epoch=0, progress=0.0):
    return [(RowKey(i, epoch, progress), rows[i]) for i in numbers]


def picture(size=(40, 30), mode="RGB", seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def made(captions, number=0, **row):
    return RowKey(number, 0, 0.0), {"image": picture(), "captions": captions, **row}


def test_shapes_types_and_layout(rows, tokenizer):
    batch = collator(tokenizer)(items_of(rows, range(20)))
    length = batch["input_ids"].shape[1]
    expected = {
        "input_ids": ((20, length), torch.int64),
        "attention_mask": ((20, length), torch.int64),
        "masked_input_ids": ((20, length), torch.int64),
        "pixel_values": ((20, 3, SIZE, SIZE), torch.float32),
        "bool_masked_pos": ((20, N), torch.bool),
        "ids": ((20,), torch.int64),
        "rows": ((20,), torch.int64),
    }
    for name, (shape, kind) in expected.items():
        assert tuple(batch[name].shape) == shape and batch[name].dtype == kind, name
    assert set(batch) == {*expected, "text_index", "mlm_index", "mlm_labels", "mim_index"}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert (ids[:, 0] == 3).all() and (ids[:, 1 : 1 + N] == 1).all() and (mask[:, : 1 + N] == 1).all()
    text, real = ids[:, 1 + N :], mask[:, 1 + N :].bool()
    assert ((text == 0) == ~real).all() and (mask.sum(1).max() == length)
    assert batch["ids"].tolist() == [concept_id(rows[i]["id"]) for i in range(20)]
    assert batch["rows"].tolist() == list(range(20))
    for i in range(20):
        words = text[i][real[i]].tolist()
        assert words in [tokenizer(caption, add_special_tokens=False)["input_ids"] for caption in rows[i]["captions"]]


def test_indices_pack_words_and_targets(rows, tokenizer):
    batch = collator(tokenizer, mlm_probability=0.5)(items_of(rows, range(30)))
    clean = batch["input_ids"][:, 1 + N :]
    twin = batch["masked_input_ids"][:, 1 + N :]
    real = batch["attention_mask"][:, 1 + N :].bool()
    packed = clean.reshape(-1)[batch["text_index"]]
    assert torch.equal(packed, clean[real]) and len(packed) == int(real.sum())
    assert torch.equal(packed[batch["mlm_index"]], batch["mlm_labels"])
    assert (batch["mlm_index"].diff() > 0).all() and 0.3 < len(batch["mlm_index"]) / len(packed) < 0.7
    changed = (clean.reshape(-1) != twin.reshape(-1)).nonzero().flatten()
    targets = batch["text_index"][batch["mlm_index"]]
    assert set(changed.tolist()) <= set(targets.tolist())
    assert len(changed) > 0.8 * len(targets)
    assert torch.equal(batch["input_ids"][:, : 1 + N], batch["masked_input_ids"][:, : 1 + N])
    for special in (0, 1, 2, 3):
        assert not (twin[clean != twin] == special).any()


def test_the_ratio_of_patches_follows_progress(rows, tokenizer):
    for progress, share in ((0.0, 0.1), (0.5, 0.3), (1.0, 0.5)):
        masked = collator(tokenizer)(items_of(rows, range(4), progress=progress))["bool_masked_pos"]
        assert masked.sum(1).tolist() == [int(N * share)] * 4


def test_masked_patches_are_listed_by_place_whole_and_in_chunks(rows, tokenizer):
    for masking in ("random", "blocks"):
        batch = collator(tokenizer, mim_masking=masking)(items_of(rows, range(7), progress=0.5))
        assert batch["mim_index"].dtype == torch.int64
        assert batch["mim_index"].tolist() == batch["bool_masked_pos"].flatten().nonzero().flatten().tolist()
        chunks = split_pairs(batch, 3)
        assert sum(len(chunk["mim_index"]) for chunk in chunks) == len(batch["mim_index"]) > 20
        for chunk in chunks:
            assert torch.equal(chunk["mim_index"], chunk["bool_masked_pos"].flatten().nonzero().flatten())
            assert torch.equal(
                chunk["mlm_labels"], chunk["input_ids"][:, 1 + N :].flatten()[chunk["text_index"][chunk["mlm_index"]]]
            )


def test_kept_patches_are_an_exact_share_and_change_nothing_else(rows, tokenizer):
    items = items_of(rows, range(24), progress=0.5)
    whole = collator(tokenizer)(items)
    for keep, count in ((0.5, 8), (0.25, 4), (0.99, 15), (0.01, 1)):
        batch = collator(tokenizer, keeping=Keeping(keep))(items)
        kept = batch.pop("kept_patches")
        assert kept.shape == (24, count) and kept.dtype == torch.int64
        assert (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < N
        assert len({tuple(row) for row in kept.tolist()}) > min(count, N - count)  # each picture its own
        assert batch.keys() == whole.keys() and all(torch.equal(batch[name], whole[name]) for name in whole)

    # by seed, epoch and row, whatever the batch and its chunks
    make = collator(tokenizer, keeping=Keeping(0.5, until=0.8))
    kept = make(items)["kept_patches"]
    assert torch.equal(make(items[5:9])["kept_patches"], kept[5:9])
    chunks = split_pairs(make(items), 3)
    assert torch.equal(torch.cat([chunk["kept_patches"] for chunk in chunks]), kept)
    later = make(items_of(rows, range(24), epoch=1, progress=0.5))["kept_patches"]
    assert not torch.equal(later, kept)

    # at the end of the run all of them
    last = make(items_of(rows, range(24), progress=0.8))["kept_patches"]
    assert torch.equal(last, torch.arange(N).expand(24, N))


def test_patches_are_masked_in_blocks_when_asked(rows, tokenizer):
    """A picture of 16 x 16 patches with BEiT's numbers, and nothing else drawn otherwise."""
    options = {"image_transform": TrainingImageTransform(128), "mim_ratio": (75 / 256, 75 / 256)}
    blocks, alone = (collator(tokenizer, mim_masking=name, **options)(items_of(rows, range(24))) for name in MASKINGS)
    assert alone["bool_masked_pos"].sum(1).tolist() == [75] * 24
    counts = blocks["bool_masked_pos"].sum(1)
    assert counts.max() == 75 and counts.min() >= 64 and counts.float().mean() > 73.5
    grid = blocks["bool_masked_pos"].view(24, 16, 16)
    assert (grid[:, :, :-1] & grid[:, :, 1:]).sum() > 0.7 * grid.sum()
    for name in ("pixel_values", "masked_input_ids", "mlm_index"):
        assert torch.equal(blocks[name], alone[name])
    whole = collator(tokenizer, mim_masking="blocks", mim_min_block=1, mim_ratio=(1.0, 1.0))(items_of(rows, range(4)))
    assert (whole["bool_masked_pos"].sum(1) > N / 2).all()


def test_every_view_of_a_picture_is_stacked(rows, tokenizer):
    plain = collator(tokenizer)(items_of(rows, range(6)))
    both = TrainingImageTransform(SIZE, code_view=CodeView(16))
    batch = collator(tokenizer, image_transform=both)(items_of(rows, range(6)))
    assert batch["code_pixel_values"].shape == (6, 3, 16, 16)
    assert all(torch.equal(batch[name], value) for name, value in plain.items())
    key = RowKey(4, 0, 0.0)
    rng = key.generator(0)
    rng.random()  # the choice of a caption
    assert torch.equal(batch["code_pixel_values"][4], both(open_image(rows[4]["image"]), rng)["code_pixel_values"])


def test_captions_are_rewritten_before_they_are_tokenised(tokenizer):
    make = collator(tokenizer, clean_caption=pre_caption, mlm_probability=0)
    told = make([made(["A red-haired <person>, apple!"]), made(["red " * 40], 1)])
    plain = collator(tokenizer, mlm_probability=0)([made(["a red haired person apple"]), made(["red " * 30], 1)])
    assert words_of(told, 0) == words_of(plain, 0) and words_of(told, 1) == words_of(plain, 1)
    with pytest.raises(ValueError, match=r"row 3 of the data set: no token is left of the caption '\?!'"):
        make([made(["?!"], 3)])


def test_a_random_word_may_be_special_when_asked(tokenizer):
    items = [made(["red apple " * 30], number) for number in range(200)]
    options = {"mlm_probability": 1.0, "image_transform": TrainingImageTransform(8), "vocab_size": 600}
    found = {}
    for special in (False, True):
        batch = collator(tokenizer, random_specials=special, **options)(items)
        drawn = batch["masked_input_ids"][:, 2:][batch["attention_mask"][:, 2:].bool()]
        found[special] = sum(int((drawn == i).sum()) for i in (0, 1, 2, 3))
    assert found[False] == 0 and found[True] >= 3


def test_masks_can_be_switched_off(rows, tokenizer):
    plain = collator(tokenizer, mlm_probability=0, mim_ratio=(0, 0))(items_of(rows, range(8)))
    assert torch.equal(plain["input_ids"], plain["masked_input_ids"]) and not plain["bool_masked_pos"].any()
    assert len(plain["mim_index"]) == 0 and plain["mim_index"].dtype == torch.int64
    assert len(plain["mlm_index"]) == len(plain["mlm_labels"]) == 0 and plain["mlm_index"].dtype == torch.int64
    # The crop and the caption are drawn before the masks, so that they are those of a masked run.
    masked = collator(tokenizer)(items_of(rows, range(8)))
    assert torch.equal(plain["pixel_values"], masked["pixel_values"])
    assert torch.equal(plain["input_ids"], masked["input_ids"])


def words_of(batch, i):
    return batch["input_ids"][i, 1 + N :][batch["attention_mask"][i, 1 + N :].bool()].tolist()


def twin_of(batch, i):
    return batch["masked_input_ids"][i, 1 + N :][batch["attention_mask"][i, 1 + N :].bool()].tolist()


def test_a_draw_depends_on_seed_epoch_and_row_alone(rows, tokenizer):
    make = collator(tokenizer, mlm_probability=0.5)
    wide, narrow = make(items_of(rows, range(12))), make(items_of(rows, [7, 2]))
    for place, row in ((0, 7), (1, 2)):
        assert torch.equal(wide["pixel_values"][row], narrow["pixel_values"][place])
        assert torch.equal(wide["bool_masked_pos"][row], narrow["bool_masked_pos"][place])
        assert words_of(wide, row) == words_of(narrow, place) and twin_of(wide, row) == twin_of(narrow, place)
    for other in (
        make(items_of(rows, range(12), epoch=1)),
        collator(tokenizer, mlm_probability=0.5, seed=1)(items_of(rows, range(12))),
    ):
        assert not torch.equal(wide["pixel_values"], other["pixel_values"])
        assert not torch.equal(wide["bool_masked_pos"], other["bool_masked_pos"])
        assert [words_of(wide, i) for i in range(12)] != [words_of(other, i) for i in range(12)]


def test_every_caption_has_its_turn(rows, tokenizer):
    make = collator(tokenizer, mlm_probability=0)
    captions = rows[0]["captions"]
    known = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in captions}
    counts = {}
    for epoch in range(200):
        words = tuple(words_of(make(items_of(rows, [0], epoch=epoch)), 0))
        counts[words] = counts.get(words, 0) + 1
    assert set(counts) == known and min(counts.values()) > 25  # 50 expected of each of the 4


def batches(rows, tokenizer, workers=0, rank=0, world_size=1, start_step=0):
    sampler = PairBatchSampler(
        len(rows),
        32,
        seed=5,
        total_steps=6,
        groups=rows.ids(),
        rank=rank,
        world_size=world_size,
        start_step=start_step,
    )
    loader = DataLoader(
        PairTrainingSet(rows), batch_sampler=sampler, num_workers=workers, collate_fn=collator(tokenizer, seed=5)
    )
    return list(loader)


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one) and set(one) == set(two)


def test_workers_processes_and_resume_change_nothing(rows, tokenizer):
    whole = batches(rows, tokenizer)
    assert len(whole) == 6 and all(len(set(batch["ids"].tolist())) == 32 for batch in whole)
    assert all(map(same, batches(rows, tokenizer, workers=2), whole))
    assert all(map(same, batches(rows, tokenizer, start_step=4), whole[4:]))
    for world_size in (2, 4):
        share = 32 // world_size
        for rank in range(world_size):
            workers = 2 if (rank, world_size) == (1, 2) else 0
            for part, full in zip(batches(rows, tokenizer, workers, rank, world_size), whole, strict=True):
                mine = slice(rank * share, (rank + 1) * share)
                for name in ("rows", "ids", "pixel_values", "bool_masked_pos"):
                    assert torch.equal(part[name], full[name][mine])
                for i in range(share):
                    assert words_of(part, i) == words_of(full, rank * share + i)
                    assert twin_of(part, i) == twin_of(full, rank * share + i)


def test_a_caption_without_words_is_refused(tokenizer):
    make = collator(tokenizer)
    for text in ("\x07", "\u200b\ufeff"):  # a control character and marks of no width leave no word
        with pytest.raises(ValueError, match="row 0 of the data set: no token is left of the caption '"):
            make([made([text]), made(["apple"], 1)])
    with pytest.raises(ValueError, match="row 0 of the data set: the caption is empty"):
        make([made([" \n"])])


def test_special_tokens_in_a_caption_are_plain_text(tokenizer):
    text = "[MASK] [CLS] an apple [PAD] [IMG] [UNK]"
    batch = collator(tokenizer, mlm_probability=0)([made([text])])
    words = words_of(batch, 0)
    assert not {0, 1, 3, 4} & set(words) and len(words) > 7
    # The tokenizer that was handed in still knows them afterwards.
    assert tokenizer("[MASK]", add_special_tokens=False)["input_ids"] == [4]


def test_long_captions_are_cut_and_ids_default_to_the_row(tokenizer):
    batch = collator(tokenizer, max_text_length=5)([made(["red apple " * 40], 9), made(["red"], 11, id=4)])
    assert batch["input_ids"].shape == (2, 1 + N + 5) and len(words_of(batch, 0)) == 5
    assert batch["ids"].tolist() == [9, 4] and batch["rows"].tolist() == [9, 11]


def test_a_broken_picture_names_row_and_source(tokenizer, tmp_path):
    make = collator(tokenizer, source="train.parquet")
    with pytest.raises(ValueError, match=r"row 17 of train.parquet: cannot read the picture 'a.png'"):
        make([(RowKey(17, 0, 0.0), {"image": {"bytes": b"<html>", "path": "a.png"}, "captions": ["x"]})])
    with pytest.raises(ValueError, match=r"row 3 of train.parquet: cannot read the picture .*none.png"):
        make([(RowKey(3, 0, 0.0), {"image": str(tmp_path / "none.png"), "captions": ["x"]})])
    with pytest.raises(ValueError, match="row 0 of train.parquet"):
        collator(tokenizer, source="train.parquet", max_pixels=100)([made(["x"])])
    buffer = io.BytesIO()
    picture().save(buffer, "png")
    with pytest.raises(ValueError, match=r"row 1 of train.parquet: cannot read the picture \(bytes\)"):
        make([(RowKey(1, 0, 0.0), {"image": buffer.getvalue()[:200], "captions": ["x"]})])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask": 3}, "special ids must be different ids"),
        ({"vocab_size": 4}, r"different ids in \[0, 4\)"),
        ({"max_text_length": 0}, "max_text_length must be positive, got 0"),
        ({"image": None}, "needs the id of an image token, got none"),
        ({"mim_masking": "block"}, "mim_masking is 'block'; expected 'random' or 'blocks'"),
        ({"mim_min_block": 0}, "mim_min_block is 0; expected at least 1"),
        ({"mim_ratio": [0.1, 1.1]}, r"mim_ratio is \[0.1, 1.1\]; expected a number in \[0, 1\]"),
        ({"mlm_probability": -0.1}, r"mlm_probability is -0.1; expected a number in \[0, 1\]"),
        ({"corruption": "cut"}, "corruption is 'cut'; expected 'replace' or 'drop'"),
        ({"corruption": "drop", "mim_masking": "blocks"}, "exact numbers of patches, got mim_masking 'blocks'"),
    ],
)
def test_wrong_settings_are_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        collator(tokenizer, **options)


def test_wrong_rows_are_refused(tokenizer):
    with pytest.raises(ValueError, match="pictures of 32x32 cannot be cut into patches of 7"):
        collator(tokenizer, patch_size=7)([made(["x"])])
    with pytest.raises(ValueError, match="row 2 .*at least one caption"):
        collator(tokenizer)([made([], 2)])
    with pytest.raises(ValueError, match="an empty batch"):
        collator(tokenizer)([])

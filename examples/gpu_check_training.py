"""Trains a small OneR on composed scenes held in the accelerator's memory: the part `training` of gpu_check.py.

`prepare` needs no accelerator: it draws the scenes in parallel, trains the tokenizer, and writes arrays to a folder.
`training` reads them, trains for a given number of seconds with the usual engine, evaluates, and writes a model.

S scenes, B pairs, N patches, W token slots, C captions per scene.
"""

import json
import sys
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oner import OneRConfig, OneRForPreTraining, VisionLanguageImageProcessor, VisionLanguageProcessor
from oner.processing.vl_tokenizer import train_tokenizer
from oner.training.evaluation.localization import mean_of_words, patch_word_cosine
from oner.training.objectives.objective import build_objective
from oner.training.run.arguments import Arguments
from oner.training.run.building import build_model
from oner.training.run.engine import Engine
from oner.training.run.launch import make_accelerator
from oner.training.run.parsing import parse_arguments

SIDE, CAPTIONS, SEED = 64, 4, 1
# as in the small runs of examples/configs, but deeper; 5.9 million weights, 12 MB as fp16
MODEL = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 8}
MODEL |= {"projection_dim": 256, "projector_layers": 1, "predictor_layers": 0, "scale_word_embeddings": True}
MODEL |= {"temperature": 0.07, "max_text_length": 32}
RUN = {"losses": ["itc", "cmc"], "ema_momentum": 0.99, "weight_decay": 0.1, "mixed_precision": "bf16"}
RUN |= {"batch_size": 1024, "base_learning_rate": 5e-4, "compile": True, "log_every": 50}
CROP = 0.8  # minimum share of an image's area
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RETRIEVAL = ("seen", "unseen_pairs", "unseen_style", "unseen_concepts")
SPLITS_OF_FOUR = ("seen", "unseen_style")
Figures = dict[str, Any]


def import_scenes(folder: Path) -> Any:
    """Imports examples/data/scenes.py, with its folder on the path for the modules beside it."""
    sys.path.insert(0, str(folder))
    import scenes

    return scenes


def _render(bounds: tuple[int, int], folder: Path, path: Path) -> list[list[str]]:
    """Draws train scenes [first, last) into the array at `path`; returns C captions of each."""
    scenes, images, texts = import_scenes(folder), np.load(path, mmap_mode="r+"), []
    for index in range(*bounds):
        made = scenes.scene(SEED, "train", index, size=SIDE, captions=CAPTIONS)
        images[index] = np.asarray(made.image)
        texts.append([made.texts[k % len(made.texts)] for k in range(CAPTIONS)])
    return texts


def _describe(made: Any) -> Figures:
    names = list(dict.fromkeys((thing.group, thing.name) for thing in made.objects))
    boxes = [[list(thing.box) for thing in made.objects if thing.group == group] for group, _ in names]
    return {"text": made.texts[0], "names": [name for _, name in names], "boxes": boxes}


def _evaluation_scene(job: tuple[str, int, int | None], folder: Path) -> tuple[np.ndarray, Figures]:
    split, index, groups = job
    made = import_scenes(folder).scene(SEED + 1, split, index, size=SIDE, groups=groups)
    return np.asarray(made.image), _describe(made)


def prepare(output: Path, folder: Path, count: int, evaluated: int, workers: int) -> Iterator[tuple[str, float]]:
    """Writes scenes for training and evaluation, the tokenizer, and all captions' tokens; `done.json` comes last."""
    start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    path = output / "images.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, SIDE, SIDE, 3)).flush()
    step = max(1, min(2048, count // workers))
    bounds = [(first, min(first + step, count)) for first in range(0, count, step)]
    jobs = evaluation_jobs(evaluated)
    import_scenes(folder).scene(SEED, "train", 0)  # fills its caches once, before the fork
    with get_context("fork").Pool(workers) as pool:
        told = pool.map(partial(_evaluation_scene, folder=folder), [job for _, job in jobs], chunksize=16)
        texts = [scene for part in pool.map(partial(_render, folder=folder, path=path), bounds, 1) for scene in part]
    drawn = time.perf_counter() - start
    yield "drawn", drawn
    sets: dict[str, list] = {}
    for (name, _), one in zip(jobs, told, strict=True):
        sets.setdefault(name, []).append(one)
    np.savez(
        output / "evaluation.npz", **{name: np.stack([image for image, _ in rows]) for name, rows in sets.items()}
    )
    facts = {name: [fact for _, fact in rows] for name, rows in sets.items()}
    (output / "evaluation.json").write_text(json.dumps(facts), encoding="utf-8")
    flat = [text for scene in texts for text in scene]
    tokenizer = train_tokenizer(flat[:100_000], vocab_size=2000, max_text_length=MODEL["max_text_length"])
    tokenizer.save_pretrained(output / "tokenizer")
    ids = tokenizer(flat, add_special_tokens=False)["input_ids"]
    tokens = np.full((len(flat), MODEL["max_text_length"]), tokenizer.pad_token_id, dtype=np.int16)
    for row, one in enumerate(ids):
        tokens[row, : len(one)] = one[: tokens.shape[1]]
    np.save(output / "tokens.npy", tokens.reshape(count, CAPTIONS, -1))
    facts = {"scenes": count, "seconds_to_draw": drawn, "seconds": time.perf_counter() - start, "workers": workers}
    (output / "done.json").write_text(json.dumps(facts), encoding="utf-8")


def evaluation_jobs(evaluated: int) -> list[tuple[str, tuple[str, int, int | None]]]:
    """(set, (split, index, groups)): scenes for retrieval, scenes of four groups, pairs and singles to compose."""
    jobs = [(f"retrieval {split}", (split, index, None)) for split in RETRIEVAL for index in range(evaluated)]
    jobs += [(f"four {split}", (split, index, 4)) for split in SPLITS_OF_FOUR for index in range(evaluated // 4)]
    targets = ("seen", "unseen_pairs", "unseen_style")
    jobs += [(f"target {split}", (split, 10**6 + index, 2)) for split in targets for index in range(evaluated)]
    return jobs + [("single", ("seen", 2 * 10**6 + index, 1)) for index in range(5 * evaluated)]


class SceneBatches:
    """`batches(start)` yields batches for the engine: images cropped on the device, captions drawn by (seed, step)."""

    def __init__(self, folder: Path, config: OneRConfig, device: torch.device, batch_size: int):
        self.images = torch.from_numpy(np.load(folder / "images.npy")).to(device)  # (S, H, W, 3) uint8
        self.tokens = np.load(folder / "tokens.npy")  # (S, C, W)
        self.config, self.device, self.batch_size = config, device, batch_size
        self.total_steps, self.order = 0, None
        colours = [torch.tensor(one, device=device).view(1, 3, 1, 1) for one in (MEAN, STD)]
        self.mean, self.std = colours

    def __len__(self) -> int:
        return len(self.images)

    def __call__(self, start: int) -> Iterator[dict[str, dict[str, Tensor]]]:
        """Yields batches; a thread prepares the texts of the next steps meanwhile."""
        with ThreadPoolExecutor(1) as thread:
            waiting = deque(thread.submit(self.texts, step) for step in range(start, min(start + 4, self.total_steps)))
            for step in range(start, self.total_steps):
                batch = waiting.popleft().result()
                if step + 4 < self.total_steps:
                    waiting.append(thread.submit(self.texts, step + 4))
                pixels = self.pictures(batch["rows"], np.random.default_rng((SEED, step, 2)))
                yield {"pairs": {**batch, "pixel_values": pixels}}

    def rows(self, step: int) -> np.ndarray:
        """The scenes of a step, each at most once per epoch. -> (B,)."""
        epoch, place = divmod(step, len(self) // self.batch_size)
        if self.order is None or self.order[0] != epoch:
            self.order = epoch, np.random.default_rng((SEED, epoch)).permutation(len(self))
        return self.order[1][place * self.batch_size :][: self.batch_size]

    def texts(self, step: int) -> dict[str, Tensor]:
        """A batch without its images, on the host."""
        rows, rng = self.rows(step), np.random.default_rng((SEED, step, 1))
        words = self.tokens[rows, rng.integers(CAPTIONS, size=len(rows))].astype(np.int64)  # (B, W)
        real = words != self.config.pad_token_id
        words, real = words[:, : real.sum(1).max()], real[:, : real.sum(1).max()]
        head = 1 + (self.config.image_size // self.config.patch_size) ** 2
        ids = np.full((len(rows), head + words.shape[1]), self.config.image_token_id)  # (B, 1 + N + W)
        ids[:, 0], ids[:, head:] = self.config.cls_token_id, words
        arrays = {
            "input_ids": ids,
            "attention_mask": np.concatenate([np.ones((len(rows), head), bool), real], axis=1).astype(np.int64),
            "text_index": np.flatnonzero(real),
            "bool_masked_pos": np.zeros((len(rows), head - 1), bool),
            "mlm_labels": np.zeros(0, np.int64),
            "ids": rows,
            "rows": rows,
        }
        batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return {name: value.pin_memory() for name, value in batch.items()} if self.device.type == "cuda" else batch

    def pictures(self, rows: Tensor, rng: np.random.Generator) -> Tensor:
        """A random crop of each image, with `CROP` to all of its area, resized back. (B,) -> (B, 3, H, W)."""
        sides = np.sqrt(rng.uniform(CROP, 1, len(rows)))
        shifts = rng.uniform(-1, 1, (len(rows), 2)) * (1 - sides)[:, None]
        theta = np.zeros((len(rows), 2, 3), np.float32)
        theta[:, 0, 0] = theta[:, 1, 1] = sides
        theta[:, :, 2] = shifts
        theta = torch.from_numpy(theta)
        if self.device.type == "cuda":
            theta = theta.pin_memory()
        chosen = self.images[rows.to(self.device, non_blocking=True)].permute(0, 3, 1, 2).float() / 255
        grid = F.affine_grid(theta.to(self.device, non_blocking=True), list(chosen.shape), align_corners=False)
        crops = F.grid_sample(chosen, grid, padding_mode="border", align_corners=False)
        return (crops - self.mean) / self.std


def build(folder: Path, tiny: bool, steps: int, output: Path) -> tuple[Arguments, OneRConfig, VisionLanguageProcessor]:
    """The run's arguments, the model's configuration, and the processor."""
    from oner.processing.vl_tokenizer import tokenizer_from_vocab

    fields = {**RUN, **({"batch_size": 16, "compile": False} if tiny else {})}
    fields |= {"max_steps": steps, "epochs": 1, "warmup_epochs": 0.05, "eval_every_epochs": 0, "save_every_epochs": 0}
    line = ["--family", "oner", "--train_data", "scenes", "--output_dir", str(output)]
    for name, value in fields.items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    tokenizer = tokenizer_from_vocab(folder / "tokenizer", max_text_length=MODEL["max_text_length"])
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "cls_token_id", "mask_token_id")}
    small = {"hidden_size": 32, "num_hidden_layers": 1} if tiny else {}
    config = OneRConfig(
        vocab_size=len(tokenizer), image_token_id=tokenizer.image_token_id, **ids, **{**MODEL, **small}
    )
    size = {"height": SIDE, "width": SIDE}
    images = VisionLanguageImageProcessor(
        size=size, patch_size=config.patch_size, image_mean=list(MEAN), image_std=list(STD)
    )
    return (
        parse_arguments(line),
        config,
        VisionLanguageProcessor(images, tokenizer, max_text_length=config.max_text_length),
    )


def train(
    arguments: Arguments, config: OneRConfig, batches: SceneBatches, steps: int
) -> tuple[OneRForPreTraining, float]:
    """Trains a model from scratch with the engine. -> the model, and seconds."""
    batches.total_steps = steps
    accelerator = make_accelerator(arguments.run)
    model = build_model(arguments, config)
    objective = build_objective("oner", model, arguments.objective)
    engine = Engine(accelerator, model, objective, arguments, batches, total_steps=steps, epoch_steps=steps)
    start = time.perf_counter()
    engine.fit()
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return engine.model, time.perf_counter() - start


class Reader:
    """Normalised embeddings of arrays of images and of texts, in batches, on the model's device."""

    def __init__(self, model: OneRForPreTraining, processor: VisionLanguageProcessor):
        self.model, self.processor = model.eval(), processor
        self.device = next(model.parameters()).device

    def _in_batches(self, count: int, read: Callable[[slice], Tensor], size: int = 250) -> Tensor:
        with torch.no_grad():
            parts = [read(slice(first, first + size)) for first in range(0, count, size)]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def _inputs(self, **what: Any) -> dict[str, Tensor]:
        return self.processor(**what, return_tensors="pt", padding=True).to(self.device)

    def pictures(self, images: np.ndarray) -> Tensor:
        return self._in_batches(
            len(images), lambda s: self.model.get_image_features(**self._inputs(images=list(images[s]))).pooler_output
        )

    def texts(self, texts: list[str]) -> Tensor:
        return self._in_batches(
            len(texts), lambda s: self.model.get_text_features(**self._inputs(text=texts[s])).pooler_output
        )

    def both(self, images: np.ndarray, texts: list[str]) -> Tensor:
        def read(s: slice) -> Tensor:
            inputs = self._inputs(images=list(images[s]), text=texts[s])
            return self.model.get_multimodal_features(**inputs).pooler_output

        return self._in_batches(len(texts), read)

    def maps(self, images: np.ndarray, texts: list[str]) -> Tensor:
        """Cosine of each patch with the mean of the text's tokens. -> (B, N)."""
        with torch.no_grad():
            patches = self.model.get_image_features(**self._inputs(images=list(images))).last_hidden_state[:, 1:]
            words = self._inputs(text=texts)
            states = self.model.get_text_features(**words).last_hidden_state
        return patch_word_cosine(patches, mean_of_words(states, words["attention_mask"])).cpu()


def recall(queries: Tensor, gallery: Tensor) -> Figures:
    """Per cent of queries whose own row of the gallery is among the first 1 and 10."""
    scores = queries @ gallery.T
    rank = (scores > scores.diagonal()[:, None]).sum(1)
    return {f"R@{k}": 100 * float((rank < k).float().mean()) for k in (1, 10)}


def pointing(reader: Reader, images: np.ndarray, facts: list[Figures]) -> Figures:
    """Per cent of groups whose name is most similar to a patch with its centre in one of their boxes."""
    patch = MODEL["patch_size"]
    side, hits, chance, asked = SIDE // patch, 0, 0.0, 0
    for image, fact in zip(images, facts, strict=True):
        names, middles = fact["names"], (np.arange(side) + 0.5) * patch
        maps = reader.maps(np.stack([image] * len(names)), [f"a {name}" for name in names])
        for heat, boxes in zip(maps, fact["boxes"], strict=True):
            inside = np.zeros((side, side), bool)
            for x, y, width, height in boxes:
                across, down = ((middles >= low) & (middles < low + long) for low, long in ((x, width), (y, height)))
                inside |= down[:, None] & across[None, :]
            hits, chance, asked = hits + inside.flat[int(heat.argmax())], chance + inside.mean(), asked + 1
    return {"right_box": 100 * hits / asked, "chance": 100 * chance / asked, "asked": asked}


def composed(reader: Reader, targets: tuple[np.ndarray, list], singles: tuple[np.ndarray, list]) -> Figures:
    """An image of A with "a B" retrieves a scene of A and B: by image, by text, by their sum, by both in one pass."""
    pictures = {fact["names"][0]: image for image, fact in zip(*singles, strict=True) if len(fact["boxes"][0]) == 1}
    kept = [i for i, fact in enumerate(targets[1]) if fact["names"][0] in pictures and len(fact["names"]) == 2]
    images = np.stack([pictures[targets[1][i]["names"][0]] for i in kept])
    texts = [f"a {targets[1][i]['names'][1]}" for i in kept]
    gallery = reader.pictures(targets[0][kept])
    by_picture, by_words = reader.pictures(images), reader.texts(texts)
    ways = {"picture": by_picture, "words": by_words, "sum": F.normalize(by_picture + by_words, dim=-1)}
    ways["joint"] = reader.both(images, texts)
    return {"queries": len(kept), **{name: recall(query, gallery) for name, query in ways.items()}}


def evaluate(reader: Reader, folder: Path) -> Figures:
    """All metrics on all splits."""
    images = np.load(folder / "evaluation.npz")
    facts = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    figures: Figures = {}
    for split in RETRIEVAL:
        name = f"retrieval {split}"
        words, pictures = reader.texts([fact["text"] for fact in facts[name]]), reader.pictures(images[name])
        gap = float((words.mean(0) - pictures.mean(0)).norm())
        figures[name] = {"IR": recall(words, pictures), "TR": recall(pictures, words), "gap": gap}
    for name in [f"four {split}" for split in SPLITS_OF_FOUR]:
        figures[name] = pointing(reader, images[name], facts[name])
    singles = images["single"], facts["single"]
    for name in [one for one in facts if one.startswith("target ")]:
        figures[name.replace("target", "composed")] = composed(reader, (images[name], facts[name]), singles)
    return figures


def save(model: OneRForPreTraining, processor: VisionLanguageProcessor, output: Path, archive: Path) -> int:
    """Writes the model and its processor to one archive, with fp16 weights. -> bytes of the weights."""
    model.half().save_pretrained(output)
    processor.save_pretrained(output)
    with tarfile.open(archive, "w") as tar:
        tar.add(output, arcname="model")
    return (output / "model.safetensors").stat().st_size


def wait_for_scenes(folder: Path, limit: float) -> Figures:
    end = time.perf_counter() + limit
    while not (folder / "done.json").is_file():
        if time.perf_counter() > end:
            raise TimeoutError(f"{folder}: the scenes were not drawn within {limit:.0f} s")
        time.sleep(0.2)
    return json.loads((folder / "done.json").read_text(encoding="utf-8"))


def training(device: torch.device, tiny: bool, folder: Path, seconds: float, archive: Path) -> Iterator[tuple]:
    """Calibrates, trains, evaluates and saves; yields after each."""
    yield "prepared", wait_for_scenes(folder, 240)
    output = folder / "runs"
    trial = 2 if tiny else 40
    arguments, config, processor = build(folder, tiny, trial, output / "trial")
    batches = SceneBatches(folder, config, device, arguments.run.batch_size)
    train(arguments, config, batches, trial)  # warm-up
    _, took = train(build(folder, tiny, trial, output / "again")[0], config, batches, trial)
    steps = max(2, int(seconds / took * trial))
    yield "calibrated", {"steps_per_second": trial / took, "steps": steps}
    arguments, _, _ = build(folder, tiny, steps, output / "run")
    model, took = train(arguments, config, batches, steps)
    pairs = steps * arguments.run.batch_size
    log = [json.loads(line) for line in (output / "run" / "log.jsonl").read_text().splitlines()]
    trained = {"seconds": took, "pairs": pairs, "pairs_per_second": pairs / took, "scenes": len(batches)}
    trained |= {"parameters": model.num_parameters(), "model": config.to_diff_dict(), "run": RUN}
    yield "trained", {**trained, "log": log[:: max(1, len(log) // 20)]}
    # its layers are compiled for training, so an uncompiled copy of the weights is published and evaluated
    published = OneRForPreTraining(config).to(device)
    published.load_state_dict(model.state_dict())
    reader = Reader(published, processor)
    yield "measured", evaluate(reader, folder)
    yield "saved", {"bytes": save(published, processor, output / "model", archive)}

"""Mutations of good and bad inputs, thousands of them: each is read or refused in words, and nothing crashes or hangs.

    python tests/reliability/fuzz_inputs.py [--pictures 20000] [--tables 5000] ... [--seed 0] [--out DIR]

Mutant i is a function of (seed, kind, i). Children do the reading, so that a crash in a decoder's C code, or a hang,
is seen from outside, named by its number, and its mutant written to DIR. Exit status 1 if there was any.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
TESTS, ROOT = HERE.parents[1], HERE.parents[2]
# kind of input -> mutants; the last five are in fuzz_files.py
KINDS = {"pictures": 20_000, "captions": 20_000, "tables": 5_000}
KINDS |= {"nesting": 1_000, "task_files": 10_000, "archives": 3_000, "addresses": 3_000, "indexing": 200}
LONGEST = 120.0  # seconds for one mutant; a hang is longer
MEMORY = 8 * 2**30  # bytes of address space of a child
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)


def mutated(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to four small changes, or a piece of another input."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not data:
            return bytes(data)
        place, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 16, 64, 400))
        # headers decide most, so half of all changes fall there
        place = rng.randrange(min(64, len(data))) if rng.random() < 0.5 else place
        change = rng.randrange(8)
        if change == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[place : place + length] = rng.randbytes(length)
        elif change == 2:
            data[place : place + length] = bytes([rng.choice(INTERESTING)]) * length
        elif change == 3:
            del data[place : place + length]
        elif change == 4:
            data[place:place] = rng.randbytes(length)
        elif change == 5:
            data[place:place] = data[place : place + length] * rng.choice((1, 3))
        elif change == 6:
            del data[place:]
        else:
            other = rng.choice(others)
            start = rng.randrange(max(1, len(other)))
            data[place : place + length] = other[start : start + length]
    return bytes(data)


class Pictures:
    """A mutated picture through the decoder and every augmentation."""

    def __init__(self, folder: Path):
        from bad_inputs.pictures import READ, REFUSED
        from tiny_loading import real_pairs

        from oner.processing.data.augmentation import Crop, TrainingImageTransform
        from oner.processing.image_processing_vl import open_image

        picture = open_image(real_pairs(ROOT / "examples" / "data" / "emoji")[0][5])
        makers = [*READ.values(), *(make for make, _ in REFUSED.values())]
        self.seeds = [content for content in (make(picture) for make in makers) if 0 < len(content) < 50_000]
        crop = Crop(
            crop_margin=0.3, horizontal_flip=0.5, color_jitter=0.4, grayscale=0.2, rand_augment="rand-m9-n3-mstd0.5"
        )
        self.transform = TrainingImageTransform(32, crop)

    def make(self, rng: random.Random) -> bytes:
        return mutated(rng.choice(self.seeds), self.seeds, rng)

    def read(self, content: bytes, rng: random.Random) -> str:
        import numpy as np
        import torch

        from oner.processing.image_processing_vl import MAX_PIXELS, ImageDecodeError, open_image

        try:
            image = open_image(content)
        except ImageDecodeError as error:
            assert str(error)
            return "refused"
        assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_PIXELS
        pixels = self.transform(image, np.random.default_rng(rng.randrange(2**32)))
        assert pixels.shape == (3, 32, 32) and torch.isfinite(pixels).all()
        return "read"


class Captions:
    """A mutated caption, any code points, through the collator; a good row stands in where it is refused."""

    def __init__(self, folder: Path):
        from bad_inputs.cells import CAPTIONS_BEYOND_ARROW, CAPTIONS_READ, CAPTIONS_REFUSED
        from tiny_loading import collator_of, real_pairs

        from oner.processing.vl_tokenizer import train_tokenizer

        pictures, texts = real_pairs(ROOT / "examples" / "data" / "emoji")
        self.good = {"image": pictures[0], "captions": [texts[0]], "id": 1}
        self.collator = collator_of(train_tokenizer(texts, vocab_size=300))
        cells = [*CAPTIONS_READ.values(), *(cell for cell, _ in CAPTIONS_REFUSED.values())]
        cells += [cell for cell, _ in CAPTIONS_BEYOND_ARROW.values()]
        self.seeds = [*texts, *(cell for cell in cells if isinstance(cell, str) and len(cell) < 70_000)]

    def make(self, rng: random.Random) -> bytes:
        text = rng.choice(self.seeds)
        for _ in range(rng.choice((1, 2, 8))):
            place = rng.randrange(len(text) + 1)
            most = rng.choice((0x7F, 0x2FF, 0xFFFF, 0x10FFFF))
            piece = "".join(chr(rng.randrange(most + 1)) for _ in range(rng.choice((1, 3, 50))))
            text = text[:place] + piece + text[place + rng.choice((0, 1, 20)) :]
        raw = text.encode("utf-8", "surrogatepass")
        return mutated(raw, [raw], rng) if rng.random() < 0.3 else raw

    def read(self, content: bytes, rng: random.Random) -> str:
        from oner.processing.data.sampling import RowKey

        caption = content.decode("utf-8", "surrogateescape")
        spare = [(RowKey(1, 0, 0.0, 5), self.good)]
        item = (RowKey(0, 0, 0.0), {**self.good, "captions": [caption]}, spare)
        batch = self.collator([item, (RowKey(2, 0, 0.0), self.good)])
        assert batch["input_ids"].shape[0] == 2 and len(batch["text_index"])
        if "quarantine" in batch:
            assert batch["rows"].tolist() == [1, 2] and json.dumps(batch["quarantine"]).encode()
            return "refused"
        return "read"


class Tables:
    """A mutated file of rows: opened with `bad_rows="skip"`, all its good rows collated, or refused in words."""

    def __init__(self, folder: Path):
        import datasets
        from bad_inputs import tables
        from tiny_loading import collator_of, real_pairs

        from oner.processing.vl_tokenizer import train_tokenizer

        datasets.disable_progress_bars()
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        pictures, texts = real_pairs(ROOT / "examples" / "data" / "emoji")
        self.folder, self.collator = folder, collator_of(train_tokenizer(texts, vocab_size=300))
        for (name, _), content in zip(tables.ROWS, pictures, strict=False):
            (folder / name).write_bytes(content)
        makers = [make for make, _ in tables.PARTLY.values()]
        self.seeds = []
        for make in makers:
            source = make(folder)
            content = source.read_bytes()
            if len(content) < 200_000:
                self.seeds.append((source.suffix, content))

    def make(self, rng: random.Random) -> bytes:
        suffix, content = rng.choice(self.seeds)
        others = [other for kind, other in self.seeds if kind == suffix]
        return suffix.encode() + b"\n" + mutated(content, others, rng)

    def read(self, content: bytes, rng: random.Random) -> str:
        from oner.processing.data.quarantine import BadRow, read_rows
        from oner.processing.data.sampling import RowKey
        from oner.processing.data.sources import PairDataError, open_rows

        suffix, _, content = content.partition(b"\n")
        for old in self.folder.glob("fuzzed*"):
            old.unlink()
        source = self.folder / f"fuzzed{rng.randrange(10**9)}{suffix.decode()}"
        source.write_bytes(content)
        try:
            rows = open_rows(source, bad_rows="skip")
        except PairDataError as error:
            assert source.name in str(error)
            return "refused"
        good = [number for number in range(len(rows)) if rows.reason(number) is None]
        list(rows.captions())
        assert len(rows.ids()) == len(rows)
        spare = {"image": (self.folder / "0.png").read_bytes(), "captions": ["apple"], "id": -1}
        items = [
            (RowKey(number, 0, 0.0), row, [(RowKey(len(rows), 0, 0.0), spare)])
            for number, row in zip(good, read_rows(rows, good), strict=True)
        ]
        replaced = sum(isinstance(row, BadRow) for _, row, _ in items)
        if items:
            batch = self.collator(items)
            assert len(batch["rows"]) == len(items)
            replaced += len(batch.get("quarantine", ()))
        return "read" if not replaced and len(good) == len(rows) else "read in part"


def task_of(kind: str, folder: Path) -> Any:
    from fuzz_files import TASKS

    return {"pictures": Pictures, "captions": Captions, "tables": Tables, **TASKS}[kind](folder)


def child(kind: str, seed: int, start: int, stop: int, folder: Path) -> None:
    """Reads the mutants one after the other; says before each that it begins, and at the end what came of them."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    sys.path[:0] = [str(ROOT), str(TESTS)]
    import torch

    torch.set_num_threads(1)
    task = task_of(kind, folder)
    for number in range(start, stop):
        rng = random.Random(f"{seed} {kind} {number}")
        content = task.make(rng)
        print(json.dumps({"begin": number}), flush=True)
        began = time.perf_counter()
        try:
            outcome = task.read(content, rng)
        except Exception as error:
            outcome = f"crash: {type(error).__name__}: {error}"[:300]
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps({"end": number, "outcome": outcome, "seconds": seconds, "peak_mib": peak}), flush=True)


def run(kind: str, count: int, seed: int, out: Path) -> tuple[dict, list[dict]]:
    """All mutants of a kind; a child that dies or hangs is followed by one that goes on behind the mutant at fault."""
    outcomes, faults, slowest, peak, start, began = Counter(), [], 0.0, 0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        while start < count:
            command = [sys.executable, str(HERE), "--child", kind, str(seed), str(start), str(count), folder]
            fault, current = "the child died", start - 1
            with open(Path(folder) / "errors.txt", "w") as errors:
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            alarm = Watch(process, LONGEST)
            for line in process.stdout:
                event = json.loads(line)
                alarm.reset()
                if "begin" in event:
                    current = event["begin"]
                    continue
                slowest, peak = max(slowest, event["seconds"]), max(peak, event["peak_mib"])
                if event["outcome"].startswith("crash"):
                    outcomes["crash"] += 1
                    faults.append({"kind": kind, "number": current, "fault": event["outcome"]})
                else:
                    outcomes[event["outcome"]] += 1
                start = current + 1
            alarm.stop()
            process.wait()
            if start >= count:
                break
            fault = f"hung for {LONGEST} s" if alarm.fired else f"{fault} with status {process.returncode}"
            if current < start:
                raise RuntimeError(f"{fault} before it began: " + (Path(folder) / "errors.txt").read_text()[-2000:])
            outcomes["hang" if alarm.fired else "death"] += 1
            faults.append({"kind": kind, "number": current, "fault": fault})
            start = current + 1
        keep(kind, seed, faults, out, Path(folder))
    minutes = (time.perf_counter() - began) / 60
    figures = {"mutants": count, **outcomes, "slowest_s": round(slowest, 2), "peak_mib": peak}
    return {**figures, "minutes": round(minutes, 1)}, faults


class Watch:
    """Kills a process that has not spoken for too long; its first words, after all imports, may take minutes more."""

    def __init__(self, process: subprocess.Popen, seconds: float):
        self.process, self.seconds, self.fired = process, seconds, False
        self.deadline, self.over = time.monotonic() + seconds + 900, threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def reset(self) -> None:
        self.deadline = time.monotonic() + self.seconds

    def stop(self) -> None:
        self.over.set()

    def _look(self) -> None:
        while not self.over.wait(0.5):
            if time.monotonic() > self.deadline:
                self.fired = True
                self.process.kill()
                return


def keep(kind: str, seed: int, faults: list[dict], out: Path, folder: Path) -> None:
    """Writes the mutants at fault."""
    if not faults:
        return
    sys.path[:0] = [str(ROOT), str(TESTS)]
    task = task_of(kind, folder)
    out.mkdir(parents=True, exist_ok=True)
    for fault in faults:
        content = task.make(random.Random(f"{seed} {kind} {fault['number']}"))
        fault["file"] = str(out / f"{kind}-{seed}-{fault['number']}")
        Path(fault["file"]).write_bytes(content)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for kind, count in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    arguments = parser.parse_args()
    figures, faults = {}, []
    for kind in KINDS:
        if getattr(arguments, kind):
            figures[kind], found = run(kind, getattr(arguments, kind), arguments.seed, arguments.out)
            faults += found
            print(kind, json.dumps(figures[kind]), flush=True)
    for fault in faults:
        print(json.dumps(fault))
    print(f"{sum(one['mutants'] for one in figures.values())} mutants, {len(faults)} crashes, deaths or hangs")
    return 1 if faults else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        kind, *numbers, folder = sys.argv[2:]
        child(kind, *map(int, numbers), Path(folder))
    else:
        sys.exit(main())

"""SIGKILL on what writes files beside training: exports, indexes of retrieval, `oner convert`. For kill.py.

A forked process does the writing; half of the kills come at random moments, half as soon as something new lies beside
its place. After each, what is there is the old or the new, whole; after the last, an undisturbed writing clears away
what all of them left.
"""

import contextlib
import io
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, PRETRAINING
from PIL import Image
from tiny_official import filled, pretraining_shapes
from transformers import AutoModelForPreTraining, pipeline

from oner import VisionLanguageImageProcessor, VisionLanguageProcessor, train_tokenizer
from oner.processing.retrieval_index import RetrievalIndex
from oner.training.publishing.hub import export_model
from oner.training.publishing.model_loading import check_directory, load_model
from oner_command_line import main as command_line

PATIENCE = 300  # seconds


@dataclass(frozen=True)
class Writer:
    """
    Attributes:
        place: What is written.
        write: Does it; the argument counts the writings, so that each may write something else.
        state: What lies at `place`, None for nothing. Raises where it is neither the old nor the new.
        leftovers: Whether nothing may lie beside `place` at the end.
    """

    place: Path
    write: Callable[[int], Any]
    state: Callable[[], Any]
    leftovers: bool = True


def forked(action: Callable[[], Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            action()
        code = 0
    finally:
        os._exit(code)


def is_over(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def names_in(folder: Path) -> set[str]:
    # os.walk passes over what goes while it looks
    return {name for _, folders, files in os.walk(folder) for name in (*folders, *files)}


def kill_at_some_moment(child: int, folder: Path, seconds: float, aimed: bool, chance: random.Random) -> bool:
    """Whether it was killed before its end."""
    before, end = names_in(folder), time.monotonic() + (PATIENCE if aimed else chance.uniform(0, seconds))
    while time.monotonic() < end and not is_over(child) and not (aimed and names_in(folder) - before):
        time.sleep(0.0005)
    if aimed:
        time.sleep(chance.uniform(0, seconds) * chance.choice((0.01, 0.1, 1)))
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def attack(writer: Writer, count: int, seed: int) -> dict[str, int]:
    """`count` kills; raises AssertionError for a place that lost what it had or holds something half."""
    chance, told, writings = random.Random(seed), Counter(), 0
    start = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(forked(lambda: writer.write(0)), 0)[1]) == 0, "undisturbed, it failed"
    seconds = time.monotonic() - start
    before = writer.state()
    assert before is not None, "nothing was written"
    while told["kills"] < count:
        writings += 1
        child = forked(partial(writer.write, writings))
        killed = kill_at_some_moment(child, writer.place.parent, seconds, chance.random() < 0.5, chance)
        told["kills"] += killed
        now = writer.state()
        told["found the new"] += killed and now != before
        before = now

    # an undisturbed one clears away what all of them left
    assert os.waitstatus_to_exitcode(os.waitpid(forked(lambda: writer.write(-1)), 0)[1]) == 0
    assert writer.state() is not None
    if writer.leftovers:
        left = sorted(path.name for path in writer.place.parent.iterdir() if path != writer.place)
        assert not left, f"{left} left beside {writer.place}"
    return dict(told)


def export_writer(scratch: Path) -> Writer:
    """One of two models over the other, with a user's file and index among the export's."""
    torch.manual_seed(0)
    processor = _processor()
    models = [FAMILIES["oner"].build(PRETRAINING) for _ in range(2)]
    with torch.no_grad():
        models[1].get_input_embeddings().weight.add_(1)
    sums = [float(model.get_input_embeddings().weight.double().sum()) for model in models]
    place = scratch / "export" / "model"
    export_model(models[0], processor, place)
    (place / "notes.txt").write_text("mine")

    def state() -> int:
        check_directory(place)
        assert (place / "notes.txt").read_text() == "mine" and (place / "README.md").is_file()
        found = float(load_model(AutoModelForPreTraining, place).get_input_embeddings().weight.double().sum())
        return min(range(2), key=lambda one: abs(sums[one] - found))

    return Writer(place, lambda number: export_model(models[number % 2], processor, place), state)


def index_writer(scratch: Path) -> Writer:
    """A folder of pictures that the pipeline indexes and saves, a larger one each other time."""
    model_directory = export_model(FAMILIES["oner"].build(PRETRAINING), _processor(), scratch / "searched")
    folders = []
    for pictures in (6, 9):
        folders.append(scratch / f"pictures-{pictures}")
        folders[-1].mkdir()
        for number in range(pictures):
            Image.new("RGB", (16, 16), (number * 20, 0, 0)).save(folders[-1] / f"{number}.png")
    place = scratch / "index" / "saved"
    search = pipeline("image-text-retrieval", model=str(model_directory))

    def write(number: int) -> None:
        search.index(str(folders[number % 2]), batch_size=2)
        search.save_index(place)

    def state() -> int:
        count = len(RetrievalIndex.load(place))
        assert count in (6, 9), count
        return count

    return Writer(place, write, state, leftovers=False)


def convert_writer(scratch: Path, back: bool) -> Writer:
    """`oner convert` of an official file, or `back` to one; it never writes over something, so it is taken away."""
    file, directory = scratch / "official.pth", scratch / "converted" / "simla"
    torch.save({"model": filled(pretraining_shapes())}, file)
    there = ["convert", "--from", "simla", str(file), str(directory), "--heads", "4"]
    if back:
        source = scratch / "source"
        with contextlib.redirect_stdout(io.StringIO()):
            assert command_line([*there[:-3], str(source), *there[-2:]]) == 0
        directory = scratch / "back" / "simla.pth"
        there = ["convert", "--to", "simla", str(source), str(directory)]

    def write(number: int) -> None:
        if directory.is_dir():
            directory.rename(scratch / f"earlier-{number}-{os.getpid()}")
        directory.unlink(missing_ok=True)
        assert command_line(there) == 0

    def state() -> bool | None:
        if not directory.exists():
            return None
        if back:
            assert len(torch.load(directory, weights_only=True)["model"]) > 100
        else:
            check_directory(directory)
            assert (directory / "objective.safetensors").is_file() and (directory / "conversion.json").is_file()
            load_model(AutoModelForPreTraining, directory)
        return True

    return Writer(directory, write, state)


def _processor() -> VisionLanguageProcessor:
    tokenizer = train_tokenizer(["one word or two"] * 2, vocab_size=60, min_frequency=1)
    pictures = VisionLanguageImageProcessor(size={"height": 16, "width": 16}, patch_size=4)
    return VisionLanguageProcessor(pictures, tokenizer)


WRITERS: dict[str, Callable[[Path], Writer]] = {
    "export": export_writer,
    "index": index_writer,
    "convert": lambda scratch: convert_writer(scratch, back=False),
    "convert-back": lambda scratch: convert_writer(scratch, back=True),
}


def kill_writer(name: str, scratch: Path, count: int, seed: int) -> str:
    """What was counted, in words."""
    scratch = scratch / f"writer-{name}"
    scratch.mkdir()
    told = attack(WRITERS[name](scratch), count, seed)
    return f"{told['kills']} kills, {told.get('found the new', 0)} after the new was in place; never lost, never half"

"""Which files a reader opens to follow a picture and its caption from the disk to the loss, counted: `make walk`.

    python tests/reliability/walk.py [--family oner simla]

A family's tiny run (`tests/families.py`) goes through examples/pretrain.py in this process, with every loss of the
paper, until its first loss has been sent backward. A file of this project counts once when one of its functions runs,
in the order in which the files are first entered. What runs while a module is imported does not count. Neither do the
functions named in `ASIDE` and the files named in `ASIDE_FILES`, with all that they call: what is built once before the
batch is there, what checks rows and inputs, and what joins processes. They are other walks, and a file that is only
met there need not be opened on this one: on good rows, in one process, it changes nothing.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from families import FAMILIES
from tiny_pretraining import forget_accelerator, load_example, tiny_arguments, write_pairs

ROOT = Path(__file__).resolve().parents[2]
COUNTED = ("examples", "modeling", "processing", "training", "oner")
# family -> files, at most, as the house should be
GOALS = {"oner": 18, "simla": 20, "codis": 20}
# what is built once
BUILDING = {
    "parse_arguments",
    "keep_freed_memory",
    "make_accelerator",
    "build_processor_and_config",
    "build_model",
    "build_collators",
    "RunLoader.__init__",
    "synchronise_batch_norm",
    "build_objective",
    "build_evaluators",
    "describe",
    "Engine.__init__",
    "prepare_publication",
    "begin_objective",
    "Inputs.__init__",
    "tracker_options",
}
# what watches: arguments, the checkpoint to go on from and the one being written, steps that are not finite
WATCHING = {
    "quarantine_of",
    "Arguments.portions",
    "Engine._resume",
    "NonFiniteGuard.before",
    "CheckpointWriter.__enter__",
    "CheckpointWriter.__exit__",
    "exchanging_gradients",
}
ASIDE = BUILDING | WATCHING
# what only checks or bounds (places, rows, captions, memory, what a model is given), and what only joins processes or
# keeps them apart
ASIDE_FILES = {
    "modeling/vl_inputs.py",
    "processing/data/parquet_batches.py",
    "processing/data/places.py",
    "processing/data/quarantine.py",
    "processing/data/row_checks.py",
    "processing/data/same_pictures.py",
    "processing/data/waiting_lock.py",
    "processing/image_fetching.py",
    "processing/vl_captions.py",
    "training/parallel/distributed.py",
    "training/parallel/sharding.py",
    "training/run/output_lock.py",
}


class Arrived(Exception):
    """The first loss has been sent backward."""


class Walk:
    """A profile function (`sys.setprofile`); `files` are those entered, in order, `left_out` the functions skipped."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.left_out: set[str] = set()
        self._names: dict[CodeType, str | None] = {}
        self._skipped: FrameType | None = None  # the outermost call that is left out, with all inside it

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "return" and frame is self._skipped:
            self._skipped = None
        if event != "call" or self._skipped is not None:
            return
        name = self._name(frame.f_code)
        if frame.f_code.co_name == "<module>":
            self._skipped = frame
        elif name is not None:
            function = function_of(frame)
            if function in ASIDE or name in ASIDE_FILES:
                self._skipped = frame
                self.left_out.add(function if function in ASIDE else name)
            elif name not in self.files:
                self.files.append(name)

    def _name(self, code: CodeType) -> str | None:
        """Its file as seen from the repository's top, if it is one that counts."""
        if code not in self._names:
            path = Path(code.co_filename)
            inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in COUNTED
            self._names[code] = path.relative_to(ROOT).as_posix() if inside else None
        return self._names[code]


def function_of(frame: FrameType) -> str:
    """`function`, or `Class.method` with the class of `self`."""
    owner = frame.f_locals.get("self")
    return frame.f_code.co_name if owner is None else f"{type(owner).__name__}.{frame.f_code.co_name}"


def walk(family: str, folder: Path) -> Walk:
    """The walk of a family, from opening its pairs to the first backward."""
    pairs = write_pairs(folder / "pairs.parquet")
    example, arguments = load_example("pretrain"), tiny_arguments(pairs, folder / "run", family, max_steps=1)
    seen, backward = Walk(), torch.Tensor.backward

    def arrive(loss: torch.Tensor, *rest: Any, **options: Any) -> None:
        backward(loss, *rest, **options)
        raise Arrived

    torch.Tensor.backward = arrive
    sys.setprofile(seen)
    try:
        example.main(arguments)
    except Arrived:
        return seen
    finally:
        sys.setprofile(None)
        torch.Tensor.backward = backward
        forget_accelerator()
    raise RuntimeError(f"{family}: the run ended without a backward")


def main(argv: Sequence[str] | None = None) -> dict[str, Walk]:
    """Walks each family and prints its list; returns family -> walk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    walked = {}
    for family in parser.parse_args(argv).family:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            walked[family] = walk(family, Path(folder))
        files = walked[family].files
        print(f"{family}: {len(files)} files from disk to loss; the goal is {GOALS.get(family, 'not set')}")
        print("\n".join(f"{number:4d}  {name}" for number, name in enumerate(files, 1)))
    return walked


if __name__ == "__main__":
    main()

"""What the user of a wheel types, in order, and what must come back; see installed.py."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from oner_command_line import COMMANDS

PYTHON = "python"
# the program of docs/getting_started.md, with the checkpoint that ships and with the model of a run
LIBRARY = """
import oner, torch
from transformers import AutoModel, AutoProcessor, pipeline
from oner.training.publishing.shipped import shipped_checkpoint
for name in (shipped_checkpoint(), "runs/photos/model"):
    search = pipeline("image-text-retrieval", model=str(name))
    search.index("few")
    assert len(search("red fruit", image="photo.png", top_k=3)) == 3
    processor, model = AutoProcessor.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    with torch.no_grad():
        both = model.get_multimodal_features(**processor(images="photo.png", text="made of glass")).pooler_output
    assert both.isfinite().all()
"""
# a run's model holds its code, and loads where there is no oner
WITHOUT_ONER = """
import sys
sys.modules["oner"] = None
from transformers import AutoModel, AutoProcessor
processor = AutoProcessor.from_pretrained("runs/photos/model", trust_remote_code=True)
model = AutoModel.from_pretrained("runs/photos/model", trust_remote_code=True)
assert type(processor).__name__ == "VisionLanguageProcessor"
assert model.get_text_features(**processor(text=["a red apple"])).pooler_output.ndim == 2
"""


@dataclass(frozen=True)
class Step:
    """
    Attributes:
        words: Program and arguments; `oner` and `python` are those of the environment.
        says: Patterns that must be found in what is printed, of both streams.
        status: The exit statuses that are right.
        without: Packages of which one must be missing for this to be tried; `needs`: all must be there.
        kind: Of the table: help, mistake, or work.
    """

    words: tuple[str, ...]
    says: tuple[str, ...] = ()
    status: tuple[int, ...] = (0,)
    without: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    kind: str = "work"

    @property
    def title(self) -> str:
        """As one types it."""
        return " ".join(f'"{word}"' if " " in word else word for word in self.words if "\n" not in word)


def oner(line: str, *says: str, **more: object) -> Step:
    """`oner LINE`, where "red_fruit" is one word with a space."""
    return Step(("oner", *(word.replace("red_fruit", "red fruit") for word in line.split())), says, **more)


def helps() -> Iterator[Step]:
    """`--help` of everything."""
    yield oner("--help", *COMMANDS, kind="help")
    yield oner("--version", r"^oner \d+\.\d+", kind="help")
    for name in COMMANDS:
        yield oner(f"{name} --help", f"oner {name}", kind="help")
    yield oner("train --help-all", "--base_learning_rate", kind="help")


def mistakes() -> Iterator[Step]:
    """One line each, which says what was got and what may have been meant."""
    for line, says in (
        ("serch photos", "did you mean search?"),
        ("search photso red_fruit", "photso: no such folder or file; did you mean photos?"),
        ("search photos", "give words, --image, or both"),
        ("search photos red_fruit --topk 3", "did you mean --top_k?"),
        ("search photos red fruit", 'expected all words as one: "red fruit"'),
        ("search photos red_fruit --top_k 0", "--top_k is 0; expected at least 1"),
        ("search photos red_fruit --out nowhere/sheet.png", "there is no folder nowhere"),
        ("search photos red_fruit --model oner-emojy", "did you mean oner-emoji?"),
        ("search photos red_fruit --model few", "few: there is no config.json in it"),
        ("index photos photos-index --recall 0.9", "--recall is of faiss, got --backend exact"),
        ("train photo.png", "photo.png is a file; expected a FOLDER"),
        ("train phtos", "phtos: no such folder; did you mean photos?"),
        ("train photos --epoch 3", "did you mean --epochs?"),
        ("train photos --batch_size many", "expected int"),
        ("train --config oner_emogi", "did you mean oner_emoji?"),
        ("train --config oner_emoji", "what only a checkout of the repository holds"),
        ("finetune --task vqq --config finetune_vqa", "did you mean vqa?"),
        ("index photos photos-index --backend fais", "invalid choice: 'fais'"),
        ("serve nowhere", "nowhere is no run"),
        ("publish", "the following arguments are required: model, repository"),
        ("export oner-emoji onnx", "the following arguments are required: --onnx"),
        ("doctor nowhere", "nowhere: no such folder or file"),
        ("index nowhere photos-index", "nowhere: no such folder or file"),
    ):
        yield oner(line, re.escape(says), status=(2,), kind="mistake")


def first_answer() -> Step:
    """With nothing but the checkpoint that ships."""
    return oner("search few red_fruit", r"\n   1  \+0\.\d+  \w+", "contact sheet: results.png")


def three_commands(pictures: int) -> Iterator[Step]:
    """The second and third command of the README; the first installs."""
    yield oner("train photos", "this will take about", "search it: oner search runs/photos", "doctor: ")
    yield oner("search runs/photos red_fruit --image photo.png", f"of {pictures} in photos", "results.png")


def afterwards() -> Iterator[Step]:
    """What else the pages tell a user to do with a run, and with the checkpoint that ships."""
    held_out = "runs/photos/held_out.parquet"
    yield oner("search runs/photos red_fruit --json", '"rank": 1')
    yield oner("train photos", "model directory: ")  # done already: it only ends again
    yield oner("doctor runs/photos", "nothing found|expected", status=(0, 1))
    yield oner(f"evaluate --model runs/photos --data {held_out} --tasks retrieval", r"ir_r@10 +\d")
    yield oner(f"evaluate --model oner-emoji --data {held_out} --tasks retrieval", r"ir_r@10 +\d")
    yield oner(f"compare oner-emoji runs/photos --data {held_out}", r"\| oner-emoji \|", r"\| photos \|", "guessing")
    yield oner("index photos photos-index --model runs/photos", "search them: oner search photos-index")
    yield oner("search photos-index red_fruit --model runs/photos", r"\n   1  \+0\.\d+  \w+")
    yield oner("serve runs/photos --write-space space", "try it: python space/app.py")
    yield oner("serve runs/photos", r"oner\[serve\]", status=(2,), without=("gradio",))
    yield oner("export runs/photos onnx --onnx", r"oner\[onnx\]", status=(2,), without=("onnxruntime", "onnxscript"))
    yield oner("export runs/photos onnx --onnx", "image_text.onnx: ", needs=("onnxruntime", "onnxscript"))
    yield oner("estimate --config oner_base_224 --device h100 --count 8 --pairs 5100000", "hours|days")
    yield oner("suite oner-emoji", "examples/data", status=(2,))  # its data are those of a checkout
    yield oner(f"suite oner-emoji --pairs mine {held_out}", "R@1")
    yield oner("publish runs/photos owner/photos --private", "oner publish: ", status=(2,))  # nobody is logged in
    yield Step((PYTHON, "-c", LIBRARY))
    yield Step((PYTHON, "-c", WITHOUT_ONER))

"""A folder that searches pictures by words in the browser: any web server shows it, GitHub Pages too, none computes.

    python examples/browser/build.py oner-emoji examples/data/emoji/test_concept.parquet site --limit 1000
    python -m http.server --directory site

Pictures are a folder, a table of pairs, or what `oner index` saved. The folder that is written:

    index.html, search.js       the page
    site.json                   caption and file of each picture, and how ids are made to a sequence
    vectors.f16                 (n, P) unit rows of the pictures, in half precision, little-endian
    text_int8.onnx              ids to a unit vector (P,); tokenizer.json and tokenizer_config.json make the ids
    pictures/00000.jpg          each picture, small
    onnxruntime-web, tokenizers the libraries, as npm has them

Needs npm, which comes with Node.js, and the extra `onnx`. n pictures, P embedding width.
"""

import argparse
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from oner.processing.retrieval_index import RetrievalIndex
from oner.processing.retrieval_page import caption_of
from oner.training.commands.search import load_pipeline
from oner.training.commands.serve import index_directory
from oner.training.evaluation.contact_sheet import picture_of
from oner.training.publishing.onnx_export import export_onnx
from oner.training.publishing.placing import put_in_place, scratch_beside, set_modes
from oner.training.publishing.public import public_text

PAGE = ("index.html", "search.js")
MODEL = ("text_int8.onnx", "tokenizer.json", "tokenizer_config.json")
ONNXRUNTIME = ("dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm", "README.md", "package.json")
# package -> release, and the files of it that go along; under MIT and Apache-2.0
LIBRARIES = {
    "onnxruntime-web": ("1.30.0", ONNXRUNTIME),
    "@huggingface/tokenizers": ("0.2.0", ("dist/tokenizers.min.mjs", "LICENSE", "package.json")),
}
SIDE = 160  # pixels of a small picture's longer side
QUALITY = 90  # of its JPEG


def write_pictures(index: RetrievalIndex, limit: int, site: Path) -> list[dict[str, str]]:
    """
    Vectors and small pictures of an index; of more than `limit` items evenly spaced ones.

    Returns:
        The caption of each row, and the file of its picture, "" of an item that is words.
    """
    count = min(limit, len(index))
    kept = [number * len(index) // count for number in range(count)]
    rows = index.embeddings[kept].numpy()  # (n, P)
    (site / "vectors.f16").write_bytes(rows.astype("<f2").tobytes())

    # no caption names a place of this machine
    (site / "pictures").mkdir()
    items = []
    for number, place in enumerate(kept):
        item = index.items[place]
        picture = picture_of(item)
        file = "" if picture is None else f"pictures/{number:05d}.jpg"
        items.append({"caption": public_text(caption_of(item)), "file": file})
        if picture is not None:
            picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            picture.save(site / file, quality=QUALITY)
    return items


def fetch_libraries(site: Path) -> None:
    """The files of `LIBRARIES`, each package in a folder of its own."""
    for name, (release, files) in LIBRARIES.items():
        folder = site / name.rpartition("/")[2]
        folder.mkdir()
        with TemporaryDirectory() as scratch:
            # a package as it is, whose scripts are not run
            pack = ["npm", "pack", f"{name}@{release}", "--prefer-offline", "--pack-destination", scratch]
            subprocess.run(pack, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            (archive,) = Path(scratch).iterdir()
            with tarfile.open(archive) as packed:
                for file in files:
                    (folder / Path(file).name).write_bytes(packed.extractfile(f"package/{file}").read())


def build(model: str, source: str, directory: str, limit: int = 1000, graphs: str | None = None) -> int:
    """
    Writes the folder.

    Args:
        source: A folder of pictures, a table of pairs, or a saved index.
        limit: Items that go along, evenly spaced ones of more.
        graphs: What `oner export MODEL --onnx --int8` left; made here if None.

    Returns:
        n, how many items it holds.

    Raises:
        FileExistsError: `directory` holds something.
        FileNotFoundError: there is no npm, no such source, or no such graph.
    """
    place = Path(directory).resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise FileExistsError(f"{place} is there already; expected a new or empty directory")
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm, which fetches the libraries of the page, is not there; it comes with Node.js")
    pipe = load_pipeline(model, torch.device("cpu"))
    index = RetrievalIndex.load(index_directory(pipe, Path(source).resolve()))
    with scratch_beside(place) as site, TemporaryDirectory() as scratch:
        # the page, its libraries, and what is searched
        for name in PAGE:
            shutil.copyfile(Path(__file__).with_name(name), site / name)
        fetch_libraries(site)
        items = write_pictures(index, limit, site)
        tokenizer = pipe.processor.tokenizer
        ids = {"first": tokenizer.cls_token_id, "unknown": tokenizer.unk_token_id}
        told = {"width": index.projection_dim, "longest": pipe.processor.max_text_length, **ids, "items": items}
        (site / "site.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")

        # what reads the words
        if graphs is None:
            for name, distance in export_onnx(pipe.model.eval(), pipe.processor, scratch, int8=True, kinds=("text",)):
                print(f"{name} differs by {distance:.1e} from torch")
        for name in MODEL:
            shutil.copyfile(Path(graphs or scratch) / name, site / name)
        set_modes(site)
        put_in_place(site, place)
    return len(items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's directory, a run, or a checkpoint that ships by its name")
    parser.add_argument("source", help="a folder of pictures, a table of pairs, or a saved index")
    parser.add_argument("directory", help="where the folder is written")
    parser.add_argument("--limit", type=int, default=1000, help="pictures that go along, evenly spaced ones of more")
    parser.add_argument("--graphs", help="what `oner export MODEL DIR --onnx --int8` left; made anew without")
    options = parser.parse_args()
    count = build(**vars(options))
    print(f"{count} items; look at them: python -m http.server --directory {options.directory}")


if __name__ == "__main__":
    main()

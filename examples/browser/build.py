"""Build a static folder that searches images by text in the browser; any web server or GitHub Pages can serve it.

    python examples/browser/build.py oner-emoji examples/data/emoji/train.parquet site --limit 1000
    python -m http.server --directory site

The source is a folder of images, a table of pairs, or an index saved by `oner index`. The result contains:

    index.html, search.js       the page
    site.json                   caption and file of each image, and how token ids form a sequence
    vectors.f16                 (n, P) unit rows of the images, fp16, little-endian
    text_int8.onnx              token ids to a unit vector (P,); tokenizer.json, tokenizer_config.json: text to ids
    pictures/00000.jpg          thumbnails
    onnxruntime-web, tokenizers the libraries, downloaded with npm

Needs npm (it comes with Node.js) and the extra `onnx`. n images, P embedding width.
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
SIDE = 160  # pixels, longer side of a thumbnail
QUALITY = 90  # of its JPEG


def write_pictures(index: RetrievalIndex, limit: int, site: Path) -> list[dict[str, str]]:
    """
    Writes vectors and thumbnails of an index; if it has more than `limit` items, of evenly spaced ones.

    Returns:
        For each row its caption and the file of its thumbnail, "" if the item is a text.
    """
    count = min(limit, len(index))
    kept = [number * len(index) // count for number in range(count)]
    rows = index.embeddings[kept].numpy()  # (n, P)
    (site / "vectors.f16").write_bytes(rows.astype("<f2").tobytes())

    # captions without paths of this machine
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
    """Downloads the files of `LIBRARIES`, each package into its own folder."""
    for name, (release, files) in LIBRARIES.items():
        folder = site / name.rpartition("/")[2]
        folder.mkdir()
        with TemporaryDirectory() as scratch:
            # the archive alone: install scripts do not run
            pack = ["npm", "pack", f"{name}@{release}", "--pack-destination", scratch]
            subprocess.run([*pack, "--prefer-offline", "--loglevel=error"], check=True, stdout=subprocess.DEVNULL)
            (archive,) = Path(scratch).iterdir()
            with tarfile.open(archive) as packed:
                for file in files:
                    (folder / Path(file).name).write_bytes(packed.extractfile(f"package/{file}").read())


def build(model: str, source: str, directory: str, limit: int = 1000, graphs: str | None = None) -> int:
    """
    Writes the folder.

    Args:
        source: A folder of images, a table of pairs, or a saved index.
        limit: Largest number of items; evenly spaced if there are more.
        graphs: A directory written by `oner export MODEL --onnx --int8`; exported here if None.

    Returns:
        n, the number of items.

    Raises:
        FileExistsError: `directory` is not empty.
        FileNotFoundError: npm, the source or the graph is missing.
    """
    place = Path(directory).resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise FileExistsError(f"{place} is there already; expected a new or empty directory")
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm is missing; it downloads the page's libraries, and comes with Node.js")
    pipe = load_pipeline(model, torch.device("cpu"))
    index = RetrievalIndex.load(index_directory(pipe, Path(source).resolve()))
    with scratch_beside(place) as site, TemporaryDirectory() as scratch:
        # the page, its libraries, and the images
        for name in PAGE:
            shutil.copyfile(Path(__file__).with_name(name), site / name)
        fetch_libraries(site)
        items = write_pictures(index, limit, site)
        tokenizer = pipe.processor.tokenizer
        ids = {"first": tokenizer.cls_token_id, "unknown": tokenizer.unk_token_id}
        told = {"width": index.projection_dim, "longest": pipe.processor.max_text_length, **ids, "items": items}
        (site / "site.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")

        # what embeds the text
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
    parser.add_argument("model", help="a model directory, a run, or a shipped checkpoint by name")
    parser.add_argument("source", help="a folder of images, a table of pairs, or a saved index")
    parser.add_argument("directory", help="a new folder")
    parser.add_argument("--limit", type=int, default=1000, help="largest number of images, evenly spaced")
    parser.add_argument("--graphs", help="a directory of `oner export --onnx --int8`")
    options = parser.parse_args()
    count = build(**vars(options))
    print(f"{count} items; to view them: python -m http.server --directory {options.directory}")


if __name__ == "__main__":
    main()

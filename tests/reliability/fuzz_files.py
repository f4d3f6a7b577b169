"""What `fuzz_inputs.py` also mutates: nested JSON, annotation files, headers of archives, addresses, and indexing.

A task makes mutant bytes from a generator and says what came of reading them: "read", "read in part" or "refused".
"""

import http.server
import io
import json
import os
import random
import socketserver
import tarfile
import threading
import warnings
from pathlib import Path
from typing import Any

OPENING, CLOSING = ("[", '{"k":'), ("]", "}")
HOSTILE = (
    None,
    True,
    -1,
    2**70,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "\0",
    "\ud800",
    "../x",
    [],
    {},
    [[]],
    {"raw": 3},
    [None],
)


def nested(rng: random.Random) -> str:
    """Brackets within each other, closed or not."""
    depth = rng.choice((1, 30, 199, 200, 201, 1000, 10_000, 100_000))
    kinds = [rng.randrange(2) for _ in range(min(depth, 50))]
    kinds = (kinds * (depth // len(kinds) + 1))[:depth]
    inner = rng.choice(("1", "", '"]"', '"\\"[', "nul", "[], []"))
    closing = "".join(CLOSING[kind] for kind in reversed(kinds)) if rng.random() < 0.8 else ""
    return "".join(OPENING[kind] for kind in kinds) + inner + closing


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one of its parts replaced, left out or doubled."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(HOSTILE)
    place = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy = value.copy()
    if rng.random() < 0.6:
        copy[place] = changed(value[place], rng)
    elif isinstance(copy, list) and rng.random() < 0.5:
        copy.insert(place, rng.choice((value[place], *HOSTILE)))
    else:
        del copy[place]
    return copy


class Nesting:
    """Deep JSON in a field of rows, of lines and of samples of an archive: one bad row, and the others are read."""

    def __init__(self, folder: Path):
        import datasets
        from PIL import Image

        datasets.disable_progress_bars()
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        self.folder = folder
        for number in range(3):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")

    def make(self, rng: random.Random) -> bytes:
        lines = [f'{{"file_name": "{number}.png", "text": "text {number}"}}' for number in range(3)]
        place = rng.randrange(3)
        field = rng.choice(("z", "text", "file_name"))
        lines[place] = lines[place][:-1] + f', "{field}": {nested(rng)}}}'
        return rng.choice((".jsonl", ".json", ".tar")).encode() + b"\n" + "\n".join(lines).encode()

    def read(self, content: bytes, rng: random.Random) -> str:
        from oner.processing.data.sources import PairDataError, open_rows

        suffix, _, content = content.partition(b"\n")
        path = self.folder / f"nested{suffix.decode()}"
        if suffix == b".tar":
            with tarfile.open(path, "w") as archive:
                for number, line in enumerate(content.splitlines()):
                    for ending, data in (("png", (self.folder / f"{number}.png").read_bytes()), ("json", line)):
                        info = tarfile.TarInfo(f"{number}.{ending}")
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))
        else:
            path.write_bytes(content)
        try:
            rows = open_rows(path, bad_rows="skip")
        except PairDataError as error:
            # of a `.json` whose first line is none, the whole is a document
            assert path.name in str(error) and suffix == b".json"
            return "refused"
        assert len(rows) == 3 and len(rows.bad) <= 1
        return "read in part" if rows.bad else "read"


class TaskFiles:
    """Annotation files of all tasks with parts changed, nested or cut."""

    def __init__(self, folder: Path):
        import tiny_task_data as tiny

        from oner.processing.data.grounding_files import open_grounding, read_boxes
        from oner.processing.data.karpathy import open_karpathy
        from oner.processing.data.task_rows import open_entailment, open_questions, open_reasoning, read_answer_list

        self.folder = folder
        questions, answers = tiny.write_vqa(folder, count=4)
        boxes = [
            tiny.dump(folder / "refs.json", [{"ref_id": 1, "ann_id": 2, "image_id": 3, "split": "val"}]),
            tiny.dump(
                folder / "instances.json",
                {"images": [{"id": 3, "height": 9, "width": 9}], "annotations": [{"id": 2, "bbox": [0, 0, 5, 5]}]},
            ),
            tiny.dump(folder / "dets.json", {"3": [[0, 0, 4, 4]]}),
        ]
        spoken = tiny.dump(folder / "spoken.json", [{"image": "1.png", "text": "it", "ref_id": 1}])
        image = {
            "filepath": "train2014",
            "filename": questions.parent.name,
            "split": "test",
            "sentences": [{"raw": "a"}],
        }
        # the file that is changed, and who reads it
        self.seeds = [
            (questions, lambda path: open_questions([path, str(answers)], bad_rows="skip")),
            (answers, lambda path: open_questions([str(questions), path], bad_rows="skip")),
            (tiny.write_genome(folder), lambda path: open_questions([path], bad_rows="skip")),
            (tiny.write_merged_vqa(folder, 4), lambda path: open_questions([path], bad_rows="skip")),
            *(
                (one, lambda path: open_entailment([path], bad_rows="skip"))
                for one in tiny.write_entailment(folder, 4)
            ),
            *((one, lambda path: open_reasoning([path], bad_rows="skip")) for one in tiny.write_reasoning(folder, 4)),
            (tiny.write_answer_list(folder), read_answer_list),
            (tiny.dump(folder / "k.json", {"images": [image]}), lambda path: open_karpathy(path, bad_rows="skip")),
            (spoken, lambda path: open_grounding(path, bad_rows="skip")),
            (spoken, lambda path: open_grounding(path, boxes=read_boxes(*boxes), bad_rows="skip")),
            *((boxes[place], self._boxes(boxes, place)) for place in range(3)),
        ]

    @staticmethod
    def _boxes(boxes: list[Path], place: int):
        from oner.processing.data.grounding_files import read_boxes

        return lambda path: read_boxes(*(path if number == place else one for number, one in enumerate(boxes)))

    def make(self, rng: random.Random) -> bytes:
        number = rng.randrange(len(self.seeds))
        path = self.seeds[number][0]
        text = path.read_text()
        documents = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]
        for _ in range(rng.choice((1, 1, 2, 4))):
            place = rng.randrange(len(documents))
            documents[place] = changed(documents[place], rng)
        content = "\n".join(map(json.dumps, documents)).encode()
        if rng.random() < 0.2:
            place = rng.randrange(len(content) + 1)
            content = content[:place] + nested(rng).encode() + content[place:]
        if rng.random() < 0.1:
            content = content[: rng.randrange(len(content) + 1)]
        return b"%d\n" % number + content

    def read(self, content: bytes, rng: random.Random) -> str:
        from oner.processing.data.sources import PairDataError

        number, _, content = content.partition(b"\n")
        seed, read = self.seeds[int(number)]
        path = seed.with_name(f"changed{seed.suffix}")
        path.write_bytes(content)
        try:
            rows = read(str(path))
        except PairDataError as error:
            assert str(error)
            return "refused"
        if getattr(rows, "bad", None) is None:
            return "read"
        good = [row for row in range(len(rows)) if row not in rows.bad]
        list(rows.captions())
        assert len(rows.ids()) == len(rows) and len(rows.take(good)) == len(good)
        return "read in part" if rows.bad else "read"


class Archives:
    """Archives of three formats whose headers are changed, many with a sum that fits again."""

    def __init__(self, folder: Path):
        self.folder = folder

    def make(self, rng: random.Random) -> bytes:
        buffer = io.BytesIO()
        form = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for number in range(4):
                name = "n" * rng.choice((1, 90 if form == tarfile.USTAR_FORMAT else 300)) + str(number)
                for ending in ("png", "txt"):
                    info = tarfile.TarInfo(f"{name}.{ending}")
                    info.size = 7
                    archive.addfile(info, io.BytesIO(b"content"))
        data = bytearray(buffer.getvalue())
        heads = [place for place in range(0, len(data) - 512, 512) if data[place + 257 : place + 262] == b"ustar"]
        for _ in range(rng.choice((1, 1, 3))):
            head = rng.choice(heads)
            place = head + rng.choice((rng.randrange(512), 124 + rng.randrange(12), 156, rng.randrange(100)))
            data[place] = rng.choice((*b"01234567LKxgSX\0\x80\xff", rng.randrange(256)))
            if rng.random() < 0.7:
                data[head + 148 : head + 156] = b"        "
                data[head + 148 : head + 156] = b"%06o\0 " % sum(data[head : head + 512])
            if rng.random() < 0.1:
                data[head:head] = bytes(data[head : head + 1024]) * rng.choice((1, 20, 3000))
        return bytes(data)

    def read(self, content: bytes, rng: random.Random) -> str:
        from oner.processing.data.sources import PairDataError, open_rows

        path = self.folder / "a.tar"
        path.write_bytes(content)
        try:
            rows = open_rows(path, bad_rows="skip", id_column="__row__")
        except PairDataError as error:
            assert "a.tar" in str(error)
            return "refused"
        rows.take([row for row in range(len(rows)) if row not in rows.bad])
        return "read in part" if rows.bad else "read"


class Addresses:
    """Addresses that are none, and a server that answers with anything."""

    def __init__(self, folder: Path):
        from PIL import Image

        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        self.picture = buffer.getvalue()
        task = self

        class Answer(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.rfile.readline(65536)
                self.wfile.write(task.answer)

        self.answer = b""
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.home = f"http://127.0.0.1:{self.server.server_address[1]}"
        for name in ("http_proxy", "HTTP_PROXY", "no_proxy"):
            os.environ.pop(name, None)

    def make(self, rng: random.Random) -> bytes:
        good = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(self.picture) + self.picture
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(self.picture) + self.picture
        moved = (
            b"HTTP/1.1 302 Found\r\nLocation: "
            + rng.choice((b"/", b"file:///etc/passwd", b"//", b"http://[::1"))
            + b"\r\n\r\n"
        )
        answer = bytearray(
            rng.choice((good, chunked + b"\r\n0\r\n\r\n", chunked, moved, b"", b"HTTP/1.1 200\r\n\r\n", b"\xff" * 99))
        )
        for _ in range(rng.choice((0, 1, 3))):
            if answer:
                answer[rng.randrange(min(len(answer), 90))] = rng.choice(b"\0\r\n :;-9\xff")
        address = self.home + rng.choice(
            ("/a.png", "/ a", "/é", "/%", "/\n", "/\0", "?x", "#", ":x/", "@/", "/\ud800", "")
        )
        if rng.random() < 0.3:
            address = rng.choice(
                (
                    "http://",
                    "http://[",
                    "http://:80",
                    "http://a b",
                    "https://é.invalid",
                    "http://%",
                    "http://" + "a" * 300,
                )
            )
        return json.dumps([address, bytes(answer).decode("latin-1")]).encode()

    def read(self, content: bytes, rng: random.Random) -> str:
        from oner.processing.image_processing_vl import ImageDecodeError, open_image

        address, answer = json.loads(content)
        self.answer = answer.encode("latin-1")
        try:
            open_image(address, allow_urls=True)
        except ImageDecodeError as error:
            assert str(error)
            return "refused"
        return "read"


class Indexing:
    """A folder of good and bad pictures, pipes and links is indexed, searched and saved; its files are damaged."""

    def __init__(self, folder: Path):
        from fuzz_inputs import ROOT, Pictures, mutated
        from transformers import pipeline

        import oner  # noqa: F401

        warnings.simplefilter("ignore")
        self.folder, self.mutated = folder, mutated
        self.pictures = Pictures(folder)
        self.search = pipeline("image-text-retrieval", model=str(ROOT / "examples" / "checkpoints" / "oner-emoji"))

    def make(self, rng: random.Random) -> bytes:
        return bytes(rng.randrange(256) for _ in range(8))

    def read(self, content: bytes, rng: random.Random) -> str:
        import shutil

        from oner.processing.retrieval_index import IndexFileError

        rng = random.Random(content)
        shutil.rmtree(self.folder / "pictures", ignore_errors=True)
        shutil.rmtree(self.folder / "index", ignore_errors=True)
        (self.folder / "pictures").mkdir()
        for number in range(4):
            path = self.folder / "pictures" / (rng.choice(("a", "é", "a b", "[x]", "\udcff")) + f"{number}.png")
            kind = rng.randrange(8)
            if kind == 0:
                os.mkfifo(path)
            elif kind == 1:
                path.symlink_to(rng.choice(("/dev/zero", "nowhere", path.name)))
            else:
                path.write_bytes(rng.choice((self.pictures.make(rng), rng.choice(self.pictures.seeds))))

        # what cannot be read is left out and named; nothing at all is an error
        try:
            index = self.search.index(str(self.folder / "pictures"))
        except ValueError as error:
            assert str(error)
            return "refused"
        for answer in self.search("red fruit", top_k=9):
            assert -1.01 < answer["score"] < 1.01 and isinstance(answer["item"], str)

        # kept, damaged, and read back
        self.search.save_index(self.folder / "index")
        file = rng.choice(sorted((self.folder / "index").iterdir()))
        good = file.read_bytes()
        file.write_bytes(self.mutated(good, [good], rng))
        try:
            again = self.search.load_index(self.folder / "index")
        except (IndexFileError, ValueError) as error:
            assert str(error)
            return "read"
        assert len(again) == len(index)
        return "read"


TASKS = {
    "nesting": Nesting,
    "task_files": TaskFiles,
    "archives": Archives,
    "addresses": Addresses,
    "indexing": Indexing,
}

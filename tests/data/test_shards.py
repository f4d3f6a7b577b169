"""Tar shards: read at random places by an index that is made once, and no fault of an archive passes unnamed."""

import io
import json
import multiprocessing
import os
import pickle
import tarfile
import tempfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from oner.processing.data import shard_index as vl_shard_index
from oner.processing.data import waiting_lock
from oner.processing.data.mixture import PairMixture, open_mixture
from oner.processing.data.sampling import PairBatchSampler, concept_id
from oner.processing.data.shards import find_shards
from oner.processing.data.sources import PairDataError, PairRows, PairTrainingSet, open_rows

PIXELS = b"\x89PNG not decoded here"
# every sample here shows the same bytes, which an opening warns of
pytestmark = pytest.mark.filterwarnings("ignore:.*different pictures")


def write_tar(path, members, **options):
    """members: (name, bytes) or TarInfo of something without content."""
    with tarfile.open(path, "w", **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def sample(key, caption="a caption", image=PIXELS, ending="png"):
    return [(f"{key}.{ending}", image), (f"{key}.txt", caption.encode())]


def message(*args, **options):
    with pytest.raises(PairDataError) as caught:
        open_rows(*args, **options)
    return str(caught.value)


def index_files(folder):
    return sorted(path.name for path in folder.iterdir() if ".tar." in path.name)


@pytest.fixture(scope="module")
def emoji(request, tmp_path_factory):
    """The first 90 rows of the embedded pairs, and the same rows in three shards."""
    root = os.path.join(os.path.dirname(__file__), "..", "..", "examples", "data", "emoji", "test_style.parquet")
    rows = open_rows(root, id_column="hexcode")
    home = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        members = []
        for number in range(shard * 30, shard * 30 + 30):
            row = rows[number]
            about = {"captions": row["captions"], "hexcode": row["id"], "width": 72}
            members += [
                (f"{number:06d}.png", row["image"]["bytes"]),
                (f"{number:06d}.json", json.dumps(about).encode()),
            ]
        write_tar(home / f"emoji-{shard:03d}.tar", members)
    return [rows[number] for number in range(90)], home


def contents(rows):
    return [(row["image"]["bytes"], row["captions"], row["id"]) for row in rows]


@pytest.mark.parametrize("how", ["folder", "star", "range", "list"])
def test_shards_give_the_rows_that_a_table_gives(emoji, how):
    wanted, home = emoji
    source = {
        "folder": home,
        "star": str(home / "emoji-*.tar"),
        "range": str(home / "emoji-{000..002}.tar"),
        "list": [home / f"emoji-{shard:03d}.tar" for shard in range(3)],
    }[how]
    rows = open_rows(source, id_column="hexcode")
    assert isinstance(rows, PairRows) and rows.exact_resume and len(rows) == 90
    assert contents(rows.take(range(90))) == contents(wanted)
    picked = [77, 3, 77, 30, 59]
    assert contents(rows.take(picked)) == contents([wanted[i] for i in picked])
    assert rows.ids().tolist() == [concept_id(row["id"]) for row in wanted]
    assert list(rows.captions()) == [caption for row in wanted for caption in row["captions"]]
    assert rows.where(31) == (str(home / "emoji-001.tar"), 1) and "emoji-001.tar/000031" in rows[31]["image"]["path"]
    assert contents([rows[-1]]) == contents([wanted[89]])
    assert pickle.loads(pickle.dumps(rows)).take([8]) == rows.take([8])  # as a spawned data worker gets it


def test_an_index_is_made_once_and_anew_when_the_shard_changes(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "a.tar", sample("0") + sample("1"))
    first = open_rows(shard).take([0, 1])
    (index,) = index_files(tmp_path)
    monkeypatch.setattr(vl_shard_index, "_samples", lambda *_: pytest.fail("the shard was read anew"))
    assert open_rows(shard).take([0, 1]) == first
    monkeypatch.undo()
    write_tar(shard, sample("0") + sample("1") + sample("2"))  # another size
    assert len(open_rows(shard)) == 3
    content = shard.read_bytes().replace(b"a caption", b"new words")
    shard.write_bytes(content)  # the size stays
    os.utime(shard, ns=(1, 1))
    assert open_rows(shard)[2]["captions"] == ["new words"]
    assert index_files(tmp_path) == [index]


def test_other_columns_have_an_index_of_their_own(tmp_path):
    fields = {"text": "one", "long": "many words", "id": 7}
    shard = write_tar(tmp_path / "a.tar", [("0.jpg", PIXELS), ("0.json", json.dumps(fields).encode())])
    assert open_rows(shard)[0]["captions"] == ["one"] and open_rows(shard).ids().tolist() == [0]
    assert open_rows(shard, text_column="long", id_column="id")[0]["captions"] == ["many words"]
    assert open_rows(shard, id_column="id").ids().tolist() == [7]
    assert len(index_files(tmp_path)) == 3


def test_a_damaged_index_is_made_anew(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [member for key in range(40) for member in sample(key, f"caption {key}")])
    wanted = open_rows(shard).take(range(40))
    (name,) = index_files(tmp_path)
    whole = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:cut] for cut in range(0, len(whole), 211)]
    for place in rng.integers(0, len(whole), 60):
        damaged.append(whole[:place] + bytes([whole[place] ^ (1 << int(rng.integers(8)))]) + whole[place + 1 :])
    for content in damaged:
        (tmp_path / name).write_bytes(content)
        assert open_rows(shard).take(range(40)) == wanted
    assert pq.read_table(tmp_path / name).num_rows == 40


def test_where_no_index_can_be_kept_it_says_so(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "a.tar", sample("0"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vl_shard_index.os, "replace", full)
    with pytest.warns(UserWarning, match="the index cannot be kept \\(No space left on device\\)"):
        assert len(open_rows(shard)) == 1
    assert index_files(tmp_path) == []


def _open(shard, answers):
    answers.put([row["captions"] for row in open_rows(shard).take(range(500))])


def test_processes_that_open_a_shard_together(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [member for key in range(500) for member in sample(key, f"caption {key}")])
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_open, args=(shard, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == [[[f"caption {key}"] for key in range(500)]] * 3 and len(index_files(tmp_path)) == 1


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_names_and_layouts(tmp_path, format):
    long = "a.folder/" + "x" * 60 + "/" + "y" * (35 if format == tarfile.USTAR_FORMAT else 180)
    folder = tarfile.TarInfo("a.folder")
    folder.type = tarfile.DIRTYPE
    members = [folder, *sample(long, "long"), ("readme", b"x"), ("a.folder/.hidden", b"x"), ("a.folder/._0.jpg", b"x")]
    members += [("k.seg.png", b"mask"), ("k.JPG", PIXELS), ("k.cls", b"3"), ("k.txt", "\ufeffcäption\n".encode())]
    # all pictures first, and two endings of which the first named counts
    members += [("p.png", b"second"), ("p.webp", b"first"), ("q.webp", b"alone"), ("p.txt", b"p"), ("q.txt", b"q")]
    shard = write_tar(tmp_path / "a.tar", members, format=format)
    rows = open_rows(shard, image_column="webp;png;jpg", id_column="__key__").take(range(4))
    assert [(row["id"], row["captions"]) for row in rows] == [
        (long, ["long"]), ("k", ["cäption"]), ("p", ["p"]), ("q", ["q"])
    ]  # fmt: skip
    assert [row["image"]["bytes"] for row in rows] == [PIXELS, PIXELS, b"first", b"alone"]


FAULTS = {
    "missing caption": ([("b.png", PIXELS)], "key 'b': missing pair: a sample without a caption (it has .png)"),
    "missing picture": ([("b.txt", b"x")], "key 'b': missing pair: a sample without a picture (it has .txt)"),
    "empty picture": (sample("b", image=b""), "key 'b': the picture has 0 bytes"),
    "empty caption": (sample("b", " \n"), "key 'b': the caption is empty"),
    "no UTF-8": ([("b.png", PIXELS), ("b.txt", b"caf\xe9")], "key 'b': its .txt is not UTF-8"),
    "no JSON": ([("b.png", PIXELS), ("b.json", b"{")], "key 'b': its .json is not JSON (Expecting property name"),
    "deep JSON": (
        [("b.png", PIXELS), ("b.json", b"[" * 100_000)],
        "key 'b': its .json is not JSON that can be read: its brackets",
    ),
    "JSON list": ([("b.png", PIXELS), ("b.json", b"[]")], "key 'b': its .json is a list; expected an object"),
    "no field": ([("b.png", PIXELS), ("b.json", b'{"a": 1}')], "key 'b': the caption is null"),
    "number": ([("b.png", PIXELS), ("b.json", b'{"text": 1}')], "key 'b': the caption must be a string or a list"),
    "surrogate": (
        [("b.png", PIXELS), ("b.json", b'{"text": "\\ud83d"}')],
        "key 'b': the caption holds a lone surrogate",
    ),
    "long text": (sample("b", "x" * ((4 << 20) + 1)), "key 'b': its .txt has 4194305 bytes; at most 4194304 are read"),
    "bad name": ([("b\udcff.png", PIXELS)], "key 'b\\\\udcff': missing pair"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_sample_is_a_bad_row_with_its_reason(tmp_path, kind):
    members, reason = FAULTS[kind]
    shard = write_tar(tmp_path / "s.tar", sample("a", "first") + members + sample("c", "last"))
    text = message(shard)
    assert "1 of 3 rows cannot be used" in text and f"row 1: s.tar, {reason}" in text
    for _ in range(2):  # read from the archive, then from the index
        rows = open_rows(shard, bad_rows="skip")
        assert list(rows.bad) == [1] and reason in rows.reason(1) and rows.reason(0) is None
        assert [rows[i]["captions"] for i in (0, 2)] == [["first"], ["last"]]
        assert list(rows.captions()) == ["first", "last"] and len(rows.take([0, 1, 2])) == 3


def test_a_duplicate_key_leaves_the_first_sample(tmp_path):
    members = sample("a", "one") + sample("b", "two") + sample("a", "three", b"other")
    rows = open_rows(write_tar(tmp_path / "s.tar", members), bad_rows="skip")
    assert len(rows) == 3 and rows[0]["captions"] == ["one"] and rows[0]["image"]["bytes"] == PIXELS
    assert rows.bad == {2: "s.tar, key 'a': duplicate key: the shard has a sample of this key already"}


def test_links_in_archives_are_named(tmp_path):
    links = []
    for key, kind in (("b", tarfile.SYMTYPE), ("c", tarfile.LNKTYPE)):
        link = tarfile.TarInfo(f"{key}.png")
        link.type, link.linkname = kind, "nowhere.png"
        links += [link, (f"{key}.txt", b"words")]
    rows = open_rows(write_tar(tmp_path / "s.tar", sample("a") + links), bad_rows="skip")
    assert set(rows.bad) == {1, 2} and "key 'c': member .png is a link or a hole, not a file" in rows.bad[2]


def test_ids_of_samples(tmp_path):
    members = []
    for key, identity in enumerate((7, "seven", None, 1.5, True, 2**70)):
        members += [(f"{key}.png", PIXELS), (f"{key}.json", json.dumps({"text": "x", "id": identity}).encode())]
    rows = open_rows(write_tar(tmp_path / "s.tar", members), id_column="id", bad_rows="skip")
    assert set(rows.bad) == {2, 3, 4, 5} and "does not fit into 64 bits" in rows.bad[5]
    assert rows[0]["id"] == 7 and rows.ids()[:2].tolist() == [7, concept_id("seven")]
    assert len(set(rows.ids().tolist())) == 6
    with_text = write_tar(tmp_path / "t.tar", [("0.png", PIXELS), ("0.txt", b"x")])
    assert "the id must be an int or a string, got null" in message(with_text, id_column="id")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The bytes of an archive of twelve samples, and its rows."""
    samples = [sample(f"{key:03d}", f"caption {key}", bytes([key + 1]) * 700) for key in range(12)]
    members = [member for one in samples for member in one]
    shard = write_tar(tmp_path_factory.mktemp("whole") / "s.tar", members)
    return shard.read_bytes(), contents(open_rows(shard).take(range(12)))


def good_rows(rows):
    return contents(rows.take([row for row in range(len(rows)) if rows.reason(row) is None]))


def test_an_archive_cut_short_anywhere_keeps_its_whole_samples_and_says_so(tmp_path, archive):
    whole, wanted = archive
    end = 12 * (512 + 1024 + 512 + 512)  # behind the last member; what follows is the end mark and padding
    for cut in range(0, end + 512, 128):
        shard = tmp_path / f"{cut}.tar"
        shard.write_bytes(whole[:cut])
        if cut < 512:
            assert "not a tar archive" in message(shard, bad_rows="skip")
            continue
        rows = open_rows(shard, bad_rows="skip")
        kept = good_rows(rows)
        # a sample is whole when both of its members are: the caption's last block may lack its padding
        complete = sum(cut >= key * 2560 + 2048 + len(f"caption {key}") for key in range(12))
        assert kept == wanted[: len(kept)] and len(kept) == complete, cut
        assert rows.bad and any("cut short" in reason or "missing pair" in reason for reason in rows.bad.values()), cut
        assert "cannot be used" in message(shard)
    shard.write_bytes(whole[: end + 512])  # one block of zeros is an end
    assert len(open_rows(shard)) == 12


def test_a_damaged_header_anywhere_is_told(tmp_path, archive):
    whole, wanted = archive
    rng = np.random.default_rng(0)
    for number in range(300):
        header = int(rng.integers(24))
        place = int(rng.choice([*range(148), *range(156, 512)]))  # all that the header's checksum covers
        content = bytearray(whole)
        content[(header // 2) * 2560 + (header % 2) * 1536 + place] ^= 1 << int(rng.integers(8))
        shard = tmp_path / f"{number}.tar"
        shard.write_bytes(content)
        try:
            rows = open_rows(shard, bad_rows="skip")
        except PairDataError as error:
            assert header == 0 and "not a tar archive" in str(error)
            continue
        kept = good_rows(rows)
        assert kept == wanted[: len(kept)] and len(kept) == header // 2
        assert any("damaged" in reason for reason in rows.bad.values())


def test_random_damage_never_crashes_and_never_hides_a_row(tmp_path, archive):
    whole, wanted = archive
    rng = np.random.default_rng(1)
    for number in range(300):
        content = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            first = int(rng.integers(len(content)))
            match int(rng.integers(4)):
                case 0:
                    del content[first : first + int(rng.integers(1, 3000))]
                case 1:
                    content[first:first] = rng.bytes(int(rng.integers(1, 3000)))
                case 2:
                    content[first : first + 20] = rng.bytes(20)
                case 3:
                    content[first:first] = content[int(rng.integers(len(content))) :][:2560]
        shard = tmp_path / f"{number}.tar"
        shard.write_bytes(content)
        try:
            rows = open_rows(shard, bad_rows="skip")
        except PairDataError as error:
            assert str(shard) in str(error)
            continue
        good = len(rows) - len(rows.bad)
        assert good >= 12 or rows.bad
        assert all(captions and pixels for pixels, captions, _ in good_rows(rows))


def test_what_follows_an_archive_is_told(tmp_path, archive):
    whole, _ = archive
    shard = tmp_path / "two.tar"
    shard.write_bytes(whole + whole)
    rows = open_rows(shard, bad_rows="skip")
    assert len(rows) == 13 and "but other data follow" in rows.bad[12]


def test_a_member_that_points_backwards_ends(tmp_path, archive):
    """A size of -2560 in base 256 would lead the reader round in a circle."""
    header = bytearray(archive[0][2560:3072])
    header[124:136] = b"\xff" * 4 + (-2560 % (1 << 64)).to_bytes(8, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    shard = tmp_path / "circle.tar"
    shard.write_bytes(archive[0][:2560] + header + archive[0][3072:])
    rows = open_rows(shard, bad_rows="skip")
    assert good_rows(rows) == archive[1][:1] and len(rows.bad) == 1


def test_sources_that_are_no_shards(tmp_path):
    assert "no such file" in message(tmp_path / "none.tar") or "cannot be read" in message(tmp_path / "none.tar")
    assert "no file fits this pattern" in message(str(tmp_path / "none-*.tar"))
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    assert "no place in a compressed archive can be read directly" in message(tmp_path / "a.tar.gz")
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar.gz").read_bytes())
    assert "not a tar archive, or a compressed one" in message(tmp_path / "b.tar")
    assert "no samples" in message(write_tar(tmp_path / "c.tar", [("readme", b"x")]))
    assert "got other files too" in message([tmp_path / "c.tar", tmp_path / "d.csv"])
    assert "open them without streaming" in message(tmp_path / "c.tar", streaming=True)
    shards = find_shards("x/{08..10}/{0..1}.tar")
    assert [str(shard) for shard in shards] == [f"x/{a}/{b}.tar" for a in ("08", "09", "10") for b in "01"]


def test_a_shard_that_vanishes_during_a_run_is_named(tmp_path):
    shard = write_tar(tmp_path / "a.tar", sample("0"))
    rows = open_rows(shard)
    shard.unlink()
    with pytest.raises(PairDataError, match="a.tar: was there when the run began, cannot be read now"):
        rows[0]


def test_data_workers_read_shards_in_the_sampler_s_order(emoji):
    wanted, home = emoji
    rows = open_rows(home, id_column="hexcode")
    sampler = PairBatchSampler(90, 9, total_steps=14, groups=rows.ids(), start_step=3)
    batches = list(DataLoader(PairTrainingSet(rows), batch_sampler=sampler, collate_fn=list, num_workers=2))
    assert [[key for key, _ in batch] for batch in batches] == list(sampler) and len(batches) == 11
    for batch in batches:
        assert contents([row for _, row in batch]) == contents([wanted[key.row] for key, _ in batch])


def test_a_mixture_of_shards_and_a_table(emoji, emoji_folder):
    wanted, home = emoji
    table = str(emoji_folder / "test_style.parquet")
    entries = [str(home / "emoji-000.tar"), str(home / "emoji-{001..002}.tar"), table]
    rows = open_mixture(entries, id_column="hexcode")
    assert isinstance(rows, PairMixture) and rows.sizes == (30, 60, 1259)
    assert contents(rows.take([31, 91, 5])) == contents([wanted[31], wanted[1], wanted[5]])
    assert (rows.ids()[:90] == rows.ids()[90:180]).all()  # the same concepts, in shards and in the table
    as_one = open_mixture(entries[:2], id_column="hexcode")
    assert not isinstance(as_one, PairMixture) and len(as_one) == 90


def test_dots_in_base_names(tmp_path):
    names = ["one", "photo.v1", "photo.v2", "in/a.b/c.D.e"]
    rows = open_rows(write_tar(tmp_path / "a.tar", [part for name in names for part in sample(name, name)]))
    assert [rows[number]["captions"] for number in range(4)] == [[name] for name in names]
    # a whole pair beside the sample of the shorter key, in the order of first members
    rows = open_rows(write_tar(tmp_path / "b.tar", sample("photo.v1", "new") + sample("photo", "old")))
    assert [rows[number]["captions"] for number in range(2)] == [["new"], ["old"]]
    # webdataset's further members of a sample: a mask, a caption in another language
    further = [*sample("a"), ("a.mask.png", PIXELS), *sample("b"), ("b.de.txt", b"ein b")]
    assert len(open_rows(write_tar(tmp_path / "c.tar", further))) == 2
    # half a pair is named
    rows = open_rows(write_tar(tmp_path / "d.tar", [*sample("a"), ("b.v1.png", PIXELS)]), bad_rows="skip")
    assert len(rows) == 2 and "key 'b.v1': missing pair" in rows.bad[1]
    assert len(open_rows(write_tar(tmp_path / "e.tar", [("p.v1.png", PIXELS), ("p.v2.png", PIXELS)]), "images")) == 2


def header(kind, size, name=b"././@LongLink"):
    info = tarfile.TarInfo(name.decode())
    info.type = kind
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
@pytest.mark.parametrize("place", ["first", "second"])
def test_headers_before_a_member_are_bounded(tmp_path, kind, place):
    whole = write_tar(tmp_path / "s.tar", sample("a")).read_bytes().rstrip(b"\0")
    whole += b"\0" * (-len(whole) % 512)
    content = b"b.png" if kind in (b"L", b"K") else b"13 path=b.png\n"
    chained = (header(kind, len(content)) + content.ljust(512, b"\0")) * 5000
    long = header(kind, 5 << 30) + content
    for extra, words in ((chained, "more than 16 headers"), (long, f"has {5 << 30} bytes; at most")):
        path = tmp_path / "bad.tar"
        path.write_bytes((whole if place == "second" else b"") + extra)
        with open(path, "ab") as file:
            file.truncate(len(whole) + (6 << 30))  # a hole, which takes no room
        if place == "second":
            rows = open_rows(path, bad_rows="skip")
            assert len(rows) == 2 and words in rows.bad[1] and rows[0]["captions"] == ["a caption"]
        else:
            assert words in message(path)


def test_a_replaced_shard_is_read_anew(tmp_path):
    path = write_tar(tmp_path / "s.tar", sample("a", "one"))
    assert open_rows(path)[0]["captions"] == ["one"]
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    write_tar(path, sample("a", "two"))
    os.utime(path, ns=times)
    assert open_rows(path)[0]["captions"] == ["two"]


@pytest.mark.parametrize("state", ["absent", "readable by others", "a link", "a file", "of another user"])
def test_locks_lie_where_nobody_else_can_reach(tmp_path, monkeypatch, state):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"oner-{os.geteuid()}"
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o777)
    if state == "a link":
        folder.symlink_to(victim)
    elif state == "a file":
        folder.write_text("precious")
    elif state != "absent":
        folder.mkdir(mode=0o700)
        folder.chmod(0o777 if state == "readable by others" else 0o700)
    if state == "of another user":
        monkeypatch.setattr(waiting_lock.os, "geteuid", lambda: 12345)
        folder.rename(tmp_path / "oner-12345")
    assert (waiting_lock.private_folder() is None) == (state != "absent")
    assert len(open_rows(write_tar(tmp_path / "s.tar", sample("a")))) == 1
    assert not list(victim.iterdir()) and (state != "a file" or folder.read_text() == "precious")
    if state == "absent":
        assert folder.stat().st_mode & 0o777 == 0o700 and not list(folder.iterdir())

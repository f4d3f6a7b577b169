"""The index of a tar shard: byte offsets of its samples, built once and stored in a file beside the shard.

Layout (webdataset's): members `key.jpg` and `key.txt` or `key.json` with the same key form a sample. The key is the
member's name up to the first dot after the last slash, or up to the last dot (`photo.v1.jpg`) if no member that is
read has the shorter key, or both an image and a text have the longer one. Samples are numbered by their first member.
The ending may be jpg, jpeg, png, webp, gif, bmp, tif or tiff for the image, txt or json for the text. Other members
are ignored, as are images in rows of texts and texts in rows of images.
"""

import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from .places import regular
from .row_checks import ROLES, Kind, PairDataError, id_reason, rule_of, text_reason
from .same_pictures import PICTURE, content_digest
from .text_tables import parsed
from .waiting_lock import waiting_lock

FORMAT = 3  # version of the index; changing it rebuilds every index
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
CAPTIONS = ("captions", "caption", "text")  # fields of a .json that hold the text if none is named
KEY = "__key__"  # webdataset's name of a sample's key, as an id column
LONGEST_TEXT = 4 << 20  # bytes of a .txt or .json
BLOCK = tarfile.BLOCKSIZE
LONGEST_HEADER = 1 << 20  # bytes of an extended header before a member's own header
MOST_HEADERS = 16  # extended headers before one member; `tarfile` recurses for each
EXTENDED = (b"L", b"K", b"x", b"X", b"g", b"S")  # types: long names and links, pax fields, sparse files
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
SCHEMA = pa.schema(
    {
        "key": pa.large_string(),
        "image_offset": pa.int64(),
        "image_size": pa.int64(),
        PICTURE: pa.int64(),
        "captions": pa.large_list(pa.large_string()),
        "id": pa.large_string(),  # as JSON, which tells 7 from "7"
        "reason": pa.large_string(),  # why the sample is bad; null if it is good
    }
)


class ShardColumns(NamedTuple):
    """Which parts of a sample are read; None means the defaults in the module docstring and, for the id, row numbers.

    image: ending of the image ("png", or several, "jpg;png"). text: ending of the member with the caption, or a field
    of the .json with one caption or a list. id: a field of the .json, or "__key__". kind: kind of the rows.
    """

    image: str | None = None
    text: str | None = None
    id: str | None = None
    kind: Kind = "pairs"

    @property
    def images(self) -> tuple[str, ...]:
        """Endings of images, in order of preference; empty for rows of texts."""
        if "image" not in ROLES[self.kind]:
            return ()
        return tuple(self.image.lower().split(";")) if self.image else IMAGES

    @property
    def reads_text(self) -> bool:
        return "text" in ROLES[self.kind]

    @property
    def reads_fields(self) -> bool:
        """Whether the id is a field of the .json."""
        return self.id not in (None, KEY)

    @property
    def wanted(self) -> set[str]:
        """Endings of the members that are read."""
        texts = {"txt", "json", (self.text or "txt").lower()} if self.reads_text else set()
        return {*self.images, *texts, *(("json",) if self.reads_fields else ())}


def shard_index(shard: Path, columns: ShardColumns) -> pa.Table:
    """The index of a shard (`SCHEMA`, one row per sample), read from the file beside it if up to date, else built.

    The file is named `<shard>.<digest of the columns>.index.parquet` and stores the shard's size and times of change.
    One of the times cannot be set, so a shard replaced by one of the same size and date is indexed again. The file is
    written atomically, by one of the processes on a machine. If it cannot be written, there is a warning and every
    process builds its own index.

    Raises:
        PairDataError: the shard is missing or is not an uncompressed tar archive.
    """
    # the file beside the shard: its name depends on the columns, its metadata on the state of the shard
    status = os.stat(regular(shard))
    digest = blake2b(json.dumps([FORMAT, *columns]).encode(), digest_size=4).hexdigest()
    place = Path(f"{shard}.{digest}.index.parquet")
    # mtime can be set, ctime cannot
    state = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
    made_of = {name.encode(): str(value).encode() for name, value in state.items()}
    table = _read(place, made_of)
    if table is not None:
        return table

    # or a new one, built by one process while the others wait
    with waiting_lock(place):
        table = _read(place, made_of)  # another process may have built it meanwhile
        if table is None:
            table = pa.Table.from_pylist(list(_samples(shard, columns)), SCHEMA).replace_schema_metadata(made_of)
            _write(table, place)
    return table


def _read(place: Path, made_of: dict[bytes, bytes]) -> pa.Table | None:
    """Reads an index; None if it is missing, damaged or was built from another state of the shard."""
    try:
        table = pq.read_table(place, page_checksum_verification=True)
    except (OSError, ValueError, pa.ArrowException):
        return None
    fits = table.schema.remove_metadata() == SCHEMA and made_of.items() <= (table.schema.metadata or {}).items()
    return table if fits else None


def _write(table: pa.Table, place: Path) -> None:
    beside = place.with_name(f"{place.name}.{uuid4().hex}.part")  # unlike a process id, unique across nodes
    try:
        pq.write_table(table, beside, write_page_checksum=True)
        os.replace(beside, place)
    except OSError as error:
        warnings.warn(
            f"{place}: the index cannot be kept ({error.strerror}), so that every process and every start reads the "
            "whole shard anew; make the folder writable once",
            stacklevel=2,
        )
        beside.unlink(missing_ok=True)


@dataclass
class _Sample:
    key: str
    place: int  # offset of its first member
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # ending: (offset, size)
    reasons: list[str] = field(default_factory=list)


class _DamageError(Exception):
    """The reason why the members of an archive cannot be read to its end."""


def _samples(shard: Path, columns: ShardColumns) -> Iterator[dict[str, Any]]:
    """Yields the rows of the index. Damage outside of samples becomes an additional last row."""
    wanted = columns.wanted

    # samples by the shorter key, in order of their first members, and samples by the longer, dotted key
    samples: list[_Sample] = []
    latest: dict[str, _Sample] = {}
    dotted: list[_Sample] = []
    latest_dotted: dict[str, _Sample] = {}
    damage = None

    # all members in order
    with open(shard, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        try:
            for member in _members(file, shard, length):
                match = NAME.fullmatch(member.name)
                if match is None or member.isdir():
                    continue
                key, ending = match[1], match[2].lower()
                version, _, last = ending.rpartition(".")
                if ending in wanted:
                    _add(member, key, ending, samples, latest, length)
                elif version and last in wanted:
                    _add(member, f"{key}.{match[2][: len(version)]}", last, dotted, latest_dotted, length)
        except _DamageError as error:
            damage = str(error)

        # their rows, and one for damage after the last of them
        own = [one for one in dotted if _shorter(one.key) not in latest or _is_pair(one, columns)]
        for sample in sorted([*samples, *own], key=lambda one: one.place):
            yield _row_of(sample, columns, file)
    if damage is not None:
        yield _index_row("", reason=damage)


def _add(
    member: tarfile.TarInfo,
    key: str,
    ending: str,
    samples: list[_Sample],
    latest: dict[str, _Sample],
    length: int,
) -> None:
    """Adds a member to the sample of its key. A duplicate key becomes another sample, which is marked bad."""
    sample = latest.get(key)
    if sample is None or ending in sample.members:
        latest[key] = _Sample(key, member.offset)
        if sample is not None:
            latest[key].reasons.append("duplicate key: the shard has a sample of this key already")
        sample = latest[key]
        samples.append(sample)
    sample.members[ending] = (member.offset_data, member.size)
    if not member.isreg() or member.issparse():
        sample.reasons.append(f"member .{ending} is a link or a hole, not a file")
    elif member.offset_data + member.size > length:
        sample.reasons.append(f"the archive is cut short at byte {length}, within member .{ending}")


def _shorter(key: str) -> str:
    folder, slash, base = key.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _is_pair(sample: _Sample, columns: ShardColumns) -> bool:
    texts = columns.wanted.difference(columns.images)
    return any(map(sample.members.__contains__, columns.images)) and any(map(sample.members.__contains__, texts))


def _check_headers(file: BinaryIO, place: int) -> None:
    """
    Checks the extended headers before a member's own header, which `tarfile` reads into memory and recursively.

    Raises:
        _DamageError: there are too many, or one is too long.
    """
    for _ in range(MOST_HEADERS):
        try:
            file.seek(place)
        except (ValueError, OverflowError, OSError) as error:
            raise _DamageError(f"the archive is damaged: its next header would be at byte {place}") from error
        header = file.read(BLOCK)
        if header[156:157] not in EXTENDED:
            return
        try:
            size = tarfile.nti(header[124:136])
        except tarfile.HeaderError:
            return  # `tarfile` reports the error
        # a sparse member whose map does not fit into its header
        if header[156:157] == b"S":
            if header[482]:
                raise _DamageError(f"the member at byte {place} has more holes than are read")
            return
        if not 0 <= size <= LONGEST_HEADER:
            raise _DamageError(f"the header at byte {place} has {size} bytes; at most {LONGEST_HEADER} are read")
        place += BLOCK + -(-size // BLOCK) * BLOCK
    raise _DamageError(f"more than {MOST_HEADERS} headers stand before the member at byte {place}")


def _members(file: BinaryIO, shard: Path, length: int) -> Iterator[tarfile.TarInfo]:
    """Yields members in order. tarfile takes damage for the end of an archive, so the end is checked here.

    Raises:
        PairDataError: the file is not a tar archive.
        _DamageError: the archive is damaged after the last member yielded.
    """
    _check_headers(file, 0)
    file.seek(0)
    try:
        # opened without decompression, because offsets in a compressed archive are useless
        archive = tarfile.open(fileobj=file, mode="r:")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise PairDataError(
            f"{shard}: not a tar archive, or a compressed one, of which no place can be read directly; expected an "
            f"uncompressed .tar ({error})"
        ) from error

    # member after member, with increasing offsets
    place = -1
    while True:
        _check_headers(file, archive.offset)
        try:
            member = archive.next()
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise _DamageError(f"the archive is cut short or damaged behind byte {max(place, 0)}: {error}") from error
        if member is None:
            break
        if member.size < 0 or member.offset_data <= place:
            raise _DamageError(f"the archive is damaged: its member at byte {member.offset} points backwards")
        place = member.offset_data
        yield member
        archive.members.clear()  # otherwise the archive keeps all members in memory

    _check_end(file, archive.offset, length)


def _check_end(file: BinaryIO, end: int, length: int) -> None:
    file.seek(end)
    # an archive ends with blocks of zeros; tarfile takes any damage for its end
    mark = file.read(BLOCK)
    if len(mark) < BLOCK:
        raise _DamageError(f"the archive is cut short: it ends at byte {length} without its end mark")
    if any(mark):
        raise _DamageError(f"the archive is damaged at byte {end}: no member begins there, {length - end} bytes left")
    while padding := file.read(1 << 20):
        if any(padding):
            raise _DamageError(f"the archive ends at byte {end}, but other data follow up to byte {length}")


def _row_of(sample: _Sample, columns: ShardColumns, file: BinaryIO) -> dict[str, Any]:
    """A sample as a row of the index, with all reasons why it is bad in one line."""
    reasons = list(sample.reasons)
    has = ", ".join(f".{ending}" for ending in sample.members)

    # the location of its image
    offset, size = next((sample.members[ending] for ending in columns.images if ending in sample.members), (0, 0))
    if columns.images and not any(ending in sample.members for ending in columns.images):
        reasons.append(f"missing pair: a sample without a picture (it has {has})")
    elif columns.images and not size:
        reasons.append("the picture has 0 bytes")

    # its text and its id
    captions = None
    identity = "null"
    if not sample.reasons:  # damaged samples are not read
        try:
            captions, identity = _text_of(sample, columns, file, has)
        except ValueError as error:
            reasons.append(str(error))
    picture = content_digest(file, offset, size) if columns.kind == "pairs" and not reasons else None
    offset, size = (0, 0) if reasons else (offset, size)  # damaged headers may hold any number
    return _index_row(sample.key, offset, size, captions, identity, "; ".join(reasons) or None, picture)


def _index_row(
    key: str,
    offset: int = 0,
    size: int = 0,
    captions: list[str] | None = None,
    identity: str = "null",
    reason: str | None = None,
    picture: int | None = None,
) -> dict[str, Any]:
    # names in archives, and reasons that quote them, need not be UTF-8, but the index must be
    key, reason = (text and text.encode("utf-8", "backslashreplace").decode() for text in (key, reason))
    return {
        "key": key,
        "image_offset": offset,
        "image_size": size,
        PICTURE: picture,
        "captions": captions,
        "id": identity,
        "reason": reason,
    }


def _text_of(sample: _Sample, columns: ShardColumns, file: BinaryIO, has: str) -> tuple[list[str], str]:
    """Captions, and the id as JSON. Raises `ValueError` with the reason why they are bad."""
    # the text is a member of its own, or a field of a .json
    ending = (columns.text or "txt").lower()
    in_fields = columns.reads_text and ending not in sample.members
    fields = _fields(sample, file) if columns.reads_fields or in_fields else None

    # a member of its own, or a field
    text: Any = []
    rule = rule_of(ROLES[columns.kind])
    if columns.reads_text and not in_fields:
        text = _decoded(sample, ending, file).rstrip("\r\n")
    elif in_fields and fields is None:
        raise ValueError(f"missing pair: a sample without a caption (it has {has})")
    elif in_fields:
        names = CAPTIONS if columns.text is None else (columns.text,)
        text = next((fields[name] for name in names if name in fields), None)
    if columns.reads_text and (reason := text_reason(text, rule)):
        raise ValueError(reason)

    # the key, or a field
    identity = None
    if columns.id is not None:
        identity = sample.key if columns.id == KEY else (fields or {}).get(columns.id)
        if reason := id_reason(identity):
            raise ValueError(reason)
    return [text] if isinstance(text, str) else list(text), json.dumps(identity)


def _fields(sample: _Sample, file: BinaryIO) -> dict[str, Any] | None:
    if "json" not in sample.members:
        return None
    fields = parsed(_decoded(sample, "json", file).encode())
    if isinstance(fields, str):
        raise ValueError(f"its .json {fields}")
    if not isinstance(fields[0], dict):
        raise ValueError(f"its .json is a {type(fields[0]).__name__}; expected an object with fields")
    return fields[0]


def _decoded(sample: _Sample, ending: str, file: BinaryIO) -> str:
    offset, size = sample.members[ending]
    if size > LONGEST_TEXT:
        raise ValueError(f"its .{ending} has {size} bytes; at most {LONGEST_TEXT} are read")
    file.seek(offset)
    try:
        return file.read(size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its .{ending} is not UTF-8") from error

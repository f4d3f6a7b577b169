"""A directory is put in its place at once, and nothing of what lies there is lost."""

import ctypes
import os
import signal
import stat
from pathlib import Path

import pytest
from safetensors import SafetensorError

from oner.training.publishing import placing
from oner.training.publishing.digests import sha256_of
from oner.training.publishing.placing import (
    carry_over,
    check_replaceable,
    clear_leftovers,
    put_in_place,
    scratch_beside,
    set_modes,
)


def tree(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def write(directory: Path, **files: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(content)
    return directory


def test_what_a_killed_process_left_is_cleared_and_what_a_living_one_holds_is_not(tmp_path):
    place = tmp_path / "model"
    kept = {".model-settings", ".model-zoo", ".models-abcdefgh.partial", ".model-abcdefgh.txt"}
    for name in (*kept, ".model-ab_defgh.partial", ".model-abcdefgh.aside"):
        write(tmp_path / name, half="x")
    with scratch_beside(place) as scratch:
        assert {path.name for path in tmp_path.iterdir()} == {scratch.name, *kept}
        # another export into the same place meanwhile
        with scratch_beside(place) as other:
            assert scratch.is_dir() and other.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="full"), scratch_beside(tmp_path / "deep" / "model") as scratch:
        write(scratch, a="1")
        raise OSError("full")
    assert not any((tmp_path / "deep").iterdir())


def test_weights_that_find_no_room_are_said_with_their_place(tmp_path):
    with pytest.raises(OSError, match="model: cannot be written.* No space left"), scratch_beside(tmp_path / "model"):
        raise SafetensorError("I/O error: No space left on device")
    assert not any(tmp_path.iterdir())


def test_sigterm_leaves_nothing_and_the_handler_as_it_was(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit, match="143"), scratch_beside(tmp_path / "model") as scratch:
            write(scratch, a="1")
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two-renames"])
@pytest.mark.parametrize("there", [None, {}, {"old": "1"}], ids=["new", "empty", "old"])
def test_the_new_takes_the_place_of_the_old(exchanges, there, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(placing, "_exchange", lambda one, other: False)
    place = tmp_path / "model"
    if there is not None:
        write(place, **there)
    with scratch_beside(place) as scratch:
        write(scratch, new="2")
        put_in_place(scratch, place)
    assert tree(place) == {"new": "2"} and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_there_is_a_directory_at_any_moment(tmp_path, monkeypatch):
    """Between any two calls of the kernel: where it can exchange names, no call takes the directory away."""
    place, seen = write(tmp_path / "model", old="1"), []

    def watched(call):
        def watching(*arguments, **options):
            seen.append(tree(place) if place.is_dir() else None)
            done = call(*arguments, **options)
            seen.append(tree(place) if place.is_dir() else None)
            return done

        return watching

    for name in ("replace", "rename", "rmdir", "unlink", "fsync"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    with scratch_beside(place) as scratch:
        write(scratch, new="2", other="3")
        put_in_place(scratch, place)
    if not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("this C library knows no exchange of names")
    assert seen and all(one in ({"old": "1"}, {"new": "2", "other": "3"}) for one in seen)


def test_a_kill_between_two_renames_is_mended(tmp_path, monkeypatch):
    """Where names cannot be exchanged: what was moved aside comes back."""
    place, real = write(tmp_path / "model", old="1"), os.replace

    def killed(source, target, **options):
        if Path(target) == place:
            raise KeyboardInterrupt
        return real(source, target, **options)

    monkeypatch.setattr(placing, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), scratch_beside(place) as scratch:
        write(scratch, new="2")
        put_in_place(scratch, place)
    monkeypatch.undo()
    clear_leftovers(place)
    assert tree(place) == {"old": "1"} and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_users_laid_there_stays(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    write(old, config="1", card="edited", weights="a", same="s", notes="mine")
    write(old / "index" / "deep", file="i")
    (old / "empty").mkdir()
    (old / "link").symlink_to("/nowhere")
    os.mkfifo(old / "pipe")
    write(old / "results", metrics="exported", own="measured")
    written = {name: sha256_of(old / name) for name in ("config", "weights", "same", "results/metrics")} | {
        "card": "0"
    }
    write(new, config="2", card="new", same="s")
    carry_over(old, new, written)
    edited = f"previous/card-{sha256_of(old / 'card')[:8]}"
    assert (new / "link").is_symlink() and stat.S_ISFIFO((new / "pipe").stat().st_mode) and (new / "empty").is_dir()
    assert tree(new) == {
        "config": "2", "card": "new", "same": "s", "notes": "mine", "index/deep/file": "i", "results/own": "measured",
        edited: "edited",
    }  # fmt: skip


def test_files_are_copied_where_they_cannot_be_linked(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    old, new = write(tmp_path / "old", notes="mine"), write(tmp_path / "new")
    carry_over(old, new, {})
    assert tree(new) == {"notes": "mine"}


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0, 0o644, 0o755), (0o027, 0o640, 0o750), (0o077, 0o600, 0o700)]
)
def test_modes_follow_the_umask_and_let_nobody_else_write(umask, file, folder, tmp_path):
    before = os.umask(umask)
    try:
        directory = write(tmp_path / "a" / "b", open="1", owner="2").parent
        (directory / "b" / "owner").chmod(0o600)
        set_modes(directory)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*") if path.is_file()}
    assert modes == {file}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (directory, directory / "b")} == {folder}
    assert {path.name for path in (directory / "b").iterdir()} == {"open", "owner"}


def test_only_an_export_is_replaced(tmp_path):
    check_replaceable(tmp_path / "new")
    check_replaceable(tmp_path)
    check_replaceable(write(tmp_path / "export", **{"config.json": "{}", "README.md": "", "mine.txt": ""}))
    with pytest.raises(FileExistsError, match="holds something else than an exported model .*thesis"):
        check_replaceable(write(tmp_path / "precious", thesis="years"))
    with pytest.raises(FileExistsError, match="is a file"):
        check_replaceable(tmp_path / "precious" / "thesis")
    with pytest.raises(FileExistsError, match="mount point"):
        check_replaceable(Path("/"))

"""The page store: what is written is read again, also by others and later; nothing damaged is served."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest

from engine.config import StartupError
from engine.tiers import disk
from engine.tiers.disk import PageStore

SIZE = 1000
FILE = SIZE + disk._HEADER.size


def name_of(number: int) -> bytes:
    return (number % 256).to_bytes(1, "big") + number.to_bytes(31, "big")


def page_of(number: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(number).integers(0, 256, SIZE, np.uint8)


def stored(store: PageStore, number: int) -> bool:
    into = np.empty(SIZE, np.uint8)
    return store.read(name_of(number), into) and bool((into == page_of(number)).all())


def file_of(store: PageStore, number: int) -> Path:
    return store.directory / disk._path(name_of(number))


def test_what_is_written_is_there_after_a_restart(tmp_path: Path) -> None:
    store = PageStore(tmp_path / "new" / "kv", 10 * FILE)
    assert not stored(store, 1) and name_of(1) not in store
    assert store.write(name_of(1), page_of(1)) and store.write(name_of(300), page_of(300))
    assert name_of(1) in store and len(store) == 2 and store.bytes == 2 * FILE
    for each in (store, PageStore(store.directory, 10 * FILE)):
        assert stored(each, 1) and stored(each, 300) and not stored(each, 2)
        assert each.bytes == 2 * FILE
    assert not list(tmp_path.rglob("*.part"))


def test_the_longest_unused_go_first_across_restarts(tmp_path: Path) -> None:
    store = PageStore(tmp_path, 4 * FILE)
    for number in range(4):
        store.write(name_of(number), page_of(number))
        os.utime(file_of(store, number), (number, number))
    assert stored(store, 0)
    store = PageStore(tmp_path, 4 * FILE)
    assert store.write(name_of(9), page_of(9))
    assert name_of(1) not in store and not file_of(store, 1).exists()
    assert store.bytes <= 4 * FILE and stored(store, 0) and stored(store, 9)
    # A smaller bound than what is there: the next write sees to it.
    store = PageStore(tmp_path, 2 * FILE)
    assert store.write(name_of(10), page_of(10)) and store.bytes <= 2 * FILE
    assert not store.write(name_of(11), np.zeros(3 * FILE, np.uint8))


def damage_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def damage_zeros(path: Path) -> None:
    path.write_bytes(bytes(FILE))


def damage_other(path: Path) -> None:
    store = PageStore(path.parents[1], 10 * FILE)
    store.write(name_of(2), page_of(2))
    path.write_bytes(file_of(store, 2).read_bytes())


DAMAGES = [damage_end, damage_byte, damage_empty, damage_longer, damage_zeros, damage_other]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_nothing_damaged_is_served(tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture) -> None:
    store = PageStore(tmp_path, 10 * FILE)
    store.write(name_of(1), page_of(1))
    damage(file_of(store, 1))  # type: ignore[operator]
    assert not store.read(name_of(1), np.empty(SIZE, np.uint8))
    assert store.num_corrupt == 1 and "is damaged and removed" in caplog.text
    assert not file_of(store, 1).exists() and name_of(1) not in store
    # It can be written anew.
    assert store.write(name_of(1), page_of(1)) and stored(store, 1)


def test_two_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = PageStore(tmp_path, 4 * FILE), PageStore(tmp_path, 4 * FILE)
    theirs.write(name_of(1), page_of(1))
    assert stored(ours, 1), "a file is found though it is in no list"
    ours.write(name_of(2), page_of(2))
    theirs._remove(disk._path(name_of(2)))
    assert name_of(2) in ours and not stored(ours, 2) and name_of(2) not in ours and not ours.num_corrupt
    # What the other has written counts, too, once it is looked for.
    for number in range(3, 6):
        theirs.write(name_of(number), page_of(number))
    monkeypatch.setattr(disk, "_LOOK_S", -1.0)
    ours.write(name_of(9), page_of(9))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.page")) <= 4 * FILE


def test_a_full_disk_stops_writing_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = PageStore(tmp_path, 10 * FILE)
    store.write(name_of(1), page_of(1))
    real, left = disk._write_all, [disk._HEADER.size]

    def write(fd: int, data: bytes | memoryview) -> None:
        if len(data) > left[0]:
            real(fd, data[: left[0]])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, data)

    monkeypatch.setattr(disk, "_write_all", write)
    assert not store.write(name_of(2), page_of(2)) and not store.write(name_of(3), page_of(3))
    assert store.num_failed == 2 and caplog.text.count("the disk is full") == 1
    assert not list(tmp_path.rglob("*.part")) and stored(store, 1)
    monkeypatch.setattr(disk, "_write_all", real)
    store._paused_until = time.monotonic()
    assert store.write(name_of(2), page_of(2))


def test_what_a_killed_writer_left_behind_goes_after_an_hour(tmp_path: Path) -> None:
    store = PageStore(tmp_path, 10 * FILE)
    store.write(name_of(1), page_of(1))
    old, young = (file_of(store, 1).with_name(f"{name}.part") for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    assert len(PageStore(tmp_path, 10 * FILE)) == 1
    assert young.exists() and not old.exists()


def test_what_is_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    """It is neither counted nor removed, and whoever is told of what goes is told of pages."""
    others = [tmp_path / "ab" / name for name in ("notes.page", f"{'z' * 62}.page", f"{'a' * 60}.page")]
    others[0].parent.mkdir()
    for path in others:
        path.write_bytes(b"x" * FILE)
        os.utime(path, (1, 1))
    store, gone = PageStore(tmp_path, 2 * FILE), list[bytes]()
    store.on_removed = gone.append
    assert not len(store) and not store.bytes
    for number in range(4):
        assert store.write(name_of(number), page_of(number))
    assert gone and set(gone) <= set(map(name_of, range(4))) and all(path.exists() for path in others)


def test_a_directory_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StartupError, match=r"^--kv-disk \S+/file: (File exists|Not a directory)$"):
        PageStore(tmp_path / "file", FILE)

"""The store of adapters alone, with a reader that reads nothing: names, versions, residency, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.config import LoraOptions, StartupError
from engine.flags import config_from, make_parser
from engine.lora.store import AdapterInUseError, AdapterNotFoundError, AdapterStore, ForbiddenPathError
from engine.lora.words import AdapterError
from engine.request import RequestError


@dataclass(frozen=True)
class Weights:
    rank: int
    num_bytes: int = 100
    base_model_name: str = ""
    digest: str = "d"


class Scene:
    """A store over a directory, what it told the places, and who is in use."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.root = directory
        self.used: set[int] = set()
        self.released = asyncio.Event()
        self.kept: list[int] = []
        self.unloaded: list[int] = []
        given = {"enable": True, "max_loras": 2, "root": str(directory)} | options
        self.store = AdapterStore(
            LoraOptions(**given), self.read, self, in_use=lambda version: version in self.used, unused=self.unused
        )

    def keep(self, version: int) -> None:
        self.kept.append(version)

    def unload(self, version: int) -> None:
        self.unloaded.append(version)

    async def unused(self, version: int) -> None:
        if version in self.used:
            await self.released.wait()

    def read(self, path: Path) -> Weights:
        try:
            config = json.loads((path / "adapter_config.json").read_text())
        except OSError:
            raise AdapterError(f"{path}: no adapter_config.json") from None
        return Weights(config["r"])

    def write(self, name: str, rank: int = 8, **config: object) -> Path:
        directory = self.root / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps({"r": rank, **config}))
        return directory


async def test_replacing_in_place_makes_a_new_version(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.write("one")
    scene.write("two")
    before = await scene.store.load("a", "one")
    old = await scene.store.get("a")
    with pytest.raises(RequestError, match="already been loaded"):
        await scene.store.load("a", "two")
    after = await scene.store.load("a", "two", in_place=True)
    new = await scene.store.get("a")
    assert old.version == before.version != after.version == new.version
    assert scene.unloaded == [before.version] and [entry.name for entry in scene.store.entries] == ["a"]
    # One that cannot be read changes nothing.
    with pytest.raises(AdapterError):
        await scene.store.load("a", "nothing", in_place=True)
    assert await scene.store.get("a") is new


async def test_read_again_with_the_same_version_while_files_are_unchanged(tmp_path: Path) -> None:
    scene = Scene(tmp_path, max_loras=1, max_cpu_loras=2)
    for name in "abc":
        scene.write(name)
    versions = {name: (await scene.store.get(name)).version for name in "abc"}
    assert scene.store.num_reads == 3 and len(set(versions.values())) == 3
    assert (await scene.store.get("b")).version == versions["b"] and scene.store.num_reads == 3
    assert (await scene.store.get("a")).version == versions["a"] and scene.store.num_reads == 4  # and c goes
    assert (await scene.store.get("b")).version == versions["b"] and scene.store.num_reads == 4
    assert not scene.unloaded
    scene.write("c", changed=True)
    assert (await scene.store.get("c")).version not in versions.values()
    assert scene.unloaded == [versions["c"]]
    # Many who ask at once: one read.
    reads = scene.store.num_reads
    found = await asyncio.gather(*(scene.store.get("a") for _ in range(5)))
    assert len({one.version for one in found}) == 1 and scene.store.num_reads == reads + 1


async def test_a_model_with_other_weights_has_other_versions(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.write("a")
    before = await scene.store.get("a")
    scene.store.base_changed()
    assert (await scene.store.get("a")).version != before.version


@pytest.mark.parametrize("how", ["wait", "refuse"])
async def test_unloading(tmp_path: Path, how: str) -> None:
    scene = Scene(tmp_path, unload=how)
    scene.write("one")
    entry = await scene.store.load("a", "one")
    scene.used.add(entry.version)
    if how == "refuse":
        with pytest.raises(AdapterInUseError):
            await scene.store.unload("a")
        assert (await scene.store.get("a")).version == entry.version
        scene.used.clear()
        await scene.store.unload("a")
    else:
        unloading = asyncio.create_task(scene.store.unload("a"))
        await asyncio.sleep(0.01)
        assert not unloading.done()
        with pytest.raises(AdapterNotFoundError):
            await scene.store.get("a")
        scene.released.set()
        assert await unloading is entry
    assert scene.unloaded == [entry.version] and not scene.store.entries
    with pytest.raises(AdapterNotFoundError):
        await scene.store.unload("a")


@pytest.mark.parametrize("path", ["..", "../out", "link", "link/inner", "/etc", "sub/../../out"])
async def test_nothing_out_of_the_root(tmp_path: Path, path: str) -> None:
    out, root = tmp_path / "out", tmp_path / "root"
    scene = Scene(root)
    scene.write("../out")
    scene.write("../out/inner")
    (root / "link").symlink_to(out)
    with pytest.raises(ForbiddenPathError):
        await scene.store.load("a", path)
    assert not scene.store.knows(path) and scene.store.num_reads == 0
    with pytest.raises(AdapterNotFoundError):
        await scene.store.get(path)


async def test_no_root(tmp_path: Path) -> None:
    scene = Scene(tmp_path, root=None)
    scene.write("one")
    with pytest.raises(ForbiddenPathError, match="--lora-root"):
        await scene.store.load("a", str(tmp_path / "one"))
    assert not scene.store.knows("one")
    # A script on this machine names what it likes.
    await scene.store.add("a", str(tmp_path / "one"))
    await scene.store.add("a", str(tmp_path / "x" / ".." / "one"))
    assert scene.store.num_reads == 1
    with pytest.raises(RequestError, match="another path"):
        await scene.store.add("a", str(tmp_path / "two"))


async def test_bounds(tmp_path: Path) -> None:
    scene = Scene(tmp_path, max_loaded=3, max_lora_rank=16)
    for name in ("a", "b", "c", "d"):
        scene.write(name)
    scene.write("wide", rank=17)
    with pytest.raises(AdapterError, match="--max-lora-rank"):
        await scene.store.load("wide", "wide")
    for name in "abc":
        await scene.store.load(name, name, pinned=name == "a")
    assert scene.kept == [scene.store.entries[0].version]
    with pytest.raises(RequestError, match="At most 1 adapters can be pinned"):
        await scene.store.load("b", "b", in_place=True, pinned=True)
    with pytest.raises(RequestError, match="At most 3"):
        await scene.store.load("d", "d")
    assert scene.store.names(16) == "`c`, `b`, `a`" and scene.store.names(2) == "`c`, `b` and 1 more"


async def test_names_that_were_found_make_room(tmp_path: Path) -> None:
    scene = Scene(tmp_path, max_loaded=2)
    for name in ("a", "b", "c"):
        scene.write(name)
    first = await scene.store.get("a")
    for name in ("b", "c"):
        await scene.store.get(name)
    assert [entry.name for entry in scene.store.entries] == ["b", "c"] and scene.unloaded == [first.version]
    assert scene.store.knows("a") and (await scene.store.get("a")).version != first.version


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-loras", "2", "--max-loras-per-batch", "3"], "two words for one number"),
        (["--no-enable-lora", "--lora-modules", "a=b"], "exclude each other"),
        (["--lora-root", "/nothing/there"], "no such directory"),
        (["--max-lora-mib", "100"], "none are served"),
        (["--enable-lora", "--max-loras", "9", "--max-cpu-loras", "8"], "less than the 9"),
        (["--max-loras", "1", "--lora-modules", '{"name": "a", "path": "b", "pinned": true}'], "at most 0"),
    ],
)
def test_flags_that_contradict_each_other(argv: list[str], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        config_from(make_parser().parse_args(argv))


@pytest.mark.parametrize("by", ["load", "get"])
async def test_what_is_read_while_the_base_changes_is_read_again(by: str, tmp_path: Path) -> None:
    """What was computed from the old weights, as magnitudes are, is of no use with the new ones."""
    scene = Scene(tmp_path)
    scene.write("one")
    started, go, bases = threading.Event(), threading.Event(), ["old", "new"]

    def read(path: Path) -> Weights:
        base = bases[0]
        started.set()
        go.wait()
        return Weights(8, digest=base)

    scene.store._read = read
    reading: asyncio.Task[Any] = asyncio.create_task(
        scene.store.load("one", "one") if by == "load" else scene.store.get("one")
    )
    await asyncio.to_thread(started.wait)
    bases.pop(0)
    scene.store.base_changed()
    go.set()
    await reading
    assert (await scene.store.get("one")).digest == "new"

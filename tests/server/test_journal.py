"""Background responses through a crash: what a killed process had begun is taken up, no token lost and none doubled."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import json
import os
import random
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from engine.config import StartupError
from engine.request import UnavailableError
from server.background import Jobs
from server.journal import Begun, Ended, Journal, _told
from tests.server.support import BOUND_S, live, until
from tests.server.test_background import ended, follow, get
from tests.server.test_errors import check_shape

BODY = {"input": "Tell me.", "background": True, "max_output_tokens": 60}


def without_times(events: list[Any]) -> list[Any]:
    """What may differ: when it was done, and what the cache had."""
    text = json.loads(json.dumps(events))
    for event in text:
        if "response" in event:
            event["response"]["completed_at"] = None
            if event["response"]["usage"]:
                event["response"]["usage"]["input_tokens_details"] = None
    return text


@pytest.mark.parametrize("temperature", [0, 1])
async def test_a_follower_goes_on_where_it_was(tmp_path: Path, temperature: int) -> None:
    journal, snapshot = tmp_path / "journal", tmp_path / "snapshot"
    async with live(resume_journal=str(journal), api_keys=("k1", "k2")) as server:
        headers = {"Authorization": "Bearer k2"}
        server.http.headers.update(headers)
        body = BODY | {"temperature": temperature}
        finished = (await server.post("/v1/responses", body))[1]["id"]
        whole = await ended(server, finished)
        # A few tokens, and the process is killed: all that is left of it is the file as it is then.
        waits = server.device.num_waited
        name = (await server.post("/v1/responses", body))[1]["id"]
        await until(lambda: server.device.num_waited > waits + 10)
        shutil.copy(journal, snapshot)
        events = await follow(server, name)
        follow_up = await follow(server, name, "&starting_after=7")
        assert follow_up == events[8:]
    async with live(resume_journal=str(snapshot), api_keys=("k1", "k2")) as server:
        server.http.headers.update(headers)
        again = await follow(server, name, "&starting_after=7")
        assert without_times(again) == without_times(events[8:])
        assert (await get(server, f"/v1/responses/{finished}"))[1] == whole
        assert (await get(server, f"/v1/responses/{name}", headers={"Authorization": "Bearer k1"}))[0] == 404
        async with server.http.delete(f"{server.url}/v1/responses/{finished}") as response:
            assert response.status == 200
        await ended(server, name)
        # What it used here is its key's, though no HTTP request of this process asked for it.
        async with server.http.get(f"{server.url}/metrics") as response:
            assert 'oneloop_tokens_total{key="1",kind="output"} 60.0' in await response.text()
    # Now both have ended, and one is forgotten.
    kept = Journal(snapshot, 10)
    kept.close()
    assert not kept.begun and [one.response["id"] for one in kept.ended] == [name]


def test_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, 2)
    for number in range(4):
        journal.begin(Begun(f"r{number}", "", {"input": "x"}, 5))
    for number in range(3):
        journal.end("", f"r{number}", {"id": f"r{number}"}, [])
    journal.end("", "r0")
    journal.close()
    with path.open("ab") as file:
        file.write(b'[]\n5\n{"begun": "cut o')
    again = Journal(path, 2)
    again.close()
    assert [one.id for one in again.begun] == ["r3"] and [one.response["id"] for one in again.ended] == ["r1", "r2"]
    assert path.stat().st_mode & 0o777 == 0o600 and b"cut o" not in path.read_bytes()
    with pytest.raises(StartupError, match="--resume-journal"):
        Journal(tmp_path / "none" / "journal", 2)
    with pytest.raises(StartupError, match="--resume-journal"):
        Journal(tmp_path, 2)


def test_a_line_that_a_full_disk_cuts_off_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, write = Journal(tmp_path / "journal", 10), os.write
    journal.begin(Begun("r1", "", {"input": "x"}, 1))
    for room in (0, 1, 30, -1):
        # The last one is all but the end of the line: what was refused has not begun.
        with monkeypatch.context() as context:
            context.setattr(os, "write", lambda file, data, room=room: write(file, data[:room]))
            with pytest.raises(UnavailableError):
                journal.begin(Begun("r2", "", {"input": "y" * 50}, 1))
    journal.begin(Begun("r3", "", {"input": "z"}, 1))
    journal.close()
    again = Journal(tmp_path / "journal", 10)
    again.close()
    assert [one.id for one in again.begun] == ["r1", "r3"]


def test_what_cannot_be_claimed_in_writing_is_begun_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk it is computed all the same, and not again at each look."""
    first = Journal(tmp_path / "journal", 10)
    first.begin(Begun("r1", "", {"input": "x"}, 1))
    second = Journal(tmp_path / "journal", 10)
    first.leave("r1")
    second.look()
    [one] = second.begun
    with monkeypatch.context() as context:
        context.setattr(os, "write", lambda file, data: 0)
        assert second.claim(one) and not second.begun and not second.claim(one)
    first.close()
    # With the other gone, all of the file is looked through.
    second.look()
    assert not second.has_company and not second.begun
    second.end("", "r1", {"id": "r1"}, [])
    second.close()
    assert [one.response["id"] for one in contents(tmp_path / "journal")[1]] == ["r1"]


# ---- a file that grows


def used(journal: Journal, rng: random.Random, rounds: int) -> None:
    """What a server does with its journal."""
    for number in range(rounds):
        journal.begin(Begun(f"r{number}", "k", {"input": "x" * rng.randrange(200), "seed": number}, number))
        name = f"r{rng.randrange(number + 1)}"
        match rng.randrange(6):
            case 0 | 1 | 2:
                journal.end("k", name, {"id": name, "text": "y" * rng.randrange(300)}, [number])
            case 3:
                journal.end("k", name)
            case 4:
                journal.leave(name)


def contents(path: Path, most_ended: int = 10) -> tuple[list[Begun], list[Ended]]:
    """As the next process finds it."""
    journal = Journal(path, most_ended)
    journal.close()
    return (
        [dataclasses.replace(one, by=str(bool(one.by))) for one in journal.begun],
        [dataclasses.replace(one, begun=None) for one in journal.ended],
    )


@pytest.mark.parametrize("seed", range(8))
def test_a_file_that_grows_is_made_short_and_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    sizes = []
    for least in (1 << 30, 3000):
        monkeypatch.setattr("server.journal._LEAST_BYTES", least)
        journal = Journal(tmp_path / str(least), 10)
        used(journal, random.Random(seed), 200)
        sizes.append((tmp_path / str(least)).stat().st_size)
        journal.close()
    assert sizes[1] < sizes[0] * 0.8
    assert contents(tmp_path / "3000") == contents(tmp_path / str(1 << 30))
    assert sorted(os.listdir(tmp_path)) == sorted(["3000", str(1 << 30)])


def test_what_has_ended_does_not_stay_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.journal._LEAST_BYTES", 10_000)
    path = tmp_path / "journal"
    journal, sizes = Journal(path, 3), []
    for number in range(1000):
        journal.begin(Begun(f"r{number}", "", {"input": "x" * 100}, number))
        journal.end("", f"r{number}", {"id": f"r{number}", "text": "y" * 300}, [])
        sizes.append(path.stat().st_size)
    journal.close()
    assert max(sizes) < 12_000
    assert [one.response["id"] for one in contents(path, 3)[1]] == ["r997", "r998", "r999"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_process_that_dies_as_it_makes_the_file_short_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    class KilledError(Exception):
        pass

    def kill(*_: object) -> None:
        raise KilledError

    monkeypatch.setattr("server.journal._LEAST_BYTES", 3000)
    journal = Journal(tmp_path / "journal", 10)
    monkeypatch.setattr(os, where, kill)
    with pytest.raises(KilledError):
        used(journal, random.Random(1), 200)
    monkeypatch.undo()
    # Nothing that was written before is gone; the lock is, as those of the dead are.
    lines = [json.loads(line) for line in (tmp_path / "journal").read_bytes().splitlines()]
    assert sum(len(json.dumps(line)) for line in lines) > 2900 and (tmp_path / "journal.partial").exists()
    os.close(journal._alive)
    os.close(journal._file)
    begun, ended = contents(tmp_path / "journal")
    owed = {line["begun"] for line in lines if "begun" in line} - {line["ended"] for line in lines if "ended" in line}
    assert {one.id for one in begun} == owed and ended
    assert os.listdir(tmp_path) == ["journal"]


def test_a_disk_without_room_for_a_short_file_keeps_the_long_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.journal._LEAST_BYTES", 3000)
    for name, broken in (("good", False), ("full", True)):
        journal = Journal(tmp_path / name, 10)
        with monkeypatch.context() as context:
            if broken:
                context.setattr(os, "fsync", full)
            used(journal, random.Random(2), 200)
        journal.close()
        assert not list(tmp_path.glob("*.partial"))
    assert contents(tmp_path / "full") == contents(tmp_path / "good")
    assert sorted(os.listdir(tmp_path)) == ["full", "good"]


def test_what_has_ended_is_bounded_in_bytes_as_in_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file is made short, and where it is read."""
    monkeypatch.setattr("server.journal._LEAST_BYTES", 20_000)
    path = tmp_path / "journal"
    journal, sizes = Journal(path, 1000, 10_000), []
    for number in range(200):
        journal.end("", f"r{number}", {"id": f"r{number}", "text": "y" * 900}, [])
        # One that is too big by itself pushes out no other.
        journal.end("", "big", {"id": "big", "text": "y" * 15_000}, [])
        sizes.append(path.stat().st_size)
    journal.close()
    assert max(sizes) < 40_000
    for most, names in ((10_000, range(191, 200)), (2_500, range(198, 200)), (500, range(0))):
        again = Journal(path, 1000, most)
        again.close()
        assert [one.response["id"] for one in again.ended] == [f"r{number}" for number in names]
        assert path.stat().st_size <= most


def test_making_it_short_holds_a_line_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.journal._LEAST_BYTES", 10_000_000)
    path = tmp_path / "journal"
    journal, text = Journal(path, 80), "y" * 100_000
    number = 0
    while path.stat().st_size < 9_800_000:
        journal.end("", f"r{number}", {"id": f"r{number}", "text": text}, [])
        number += 1
    tracemalloc.start()
    while path.stat().st_size > 9_000_000:
        journal.end("", f"r{number}", {"id": f"r{number}", "text": text}, [])
        number += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    journal.close()
    assert peak < 1_500_000 and len(contents(path, 1000)[1]) == 80


def test_lines_are_told_by_their_ends_as_by_all_of_them(tmp_path: Path) -> None:
    names = ["resp_1", "", 'a"b', "a\\", "\\", "é", "\x00\n", '","owner":"x","response":null,']
    for owner in names:
        for name in names:
            path = tmp_path / "journal"
            journal = Journal(path, 10)
            journal.begin(Begun(name, owner, {"input": ',"by":"5"}', "response": None}, 1))
            journal.begin(Begun("left", owner, {"by": "0"}, 2))
            journal.leave("left")
            journal.end(owner, "kept", {"id": "kept", "text": name}, [{"by": owner}])
            journal.end(owner, "gone", {"id": "gone"}, [None])
            journal.end(owner, "gone")
            journal.close()
            for line in path.read_bytes().splitlines(keepends=True):
                entry = json.loads(line)
                kind = next(iter(entry))
                told = kind, entry[kind], entry["by"], kind == "ended" and entry["response"] is None
                assert _told(line) == _told(line.rstrip()) == _told(b" " + line) == told
            begun, ended = contents(path)
            assert [(one.id, one.owner, one.created) for one in begun] == [(name, owner, 1), ("left", owner, 2)]
            assert [(one.owner, one.response, one.items) for one in ended] == [
                (owner, {"id": "kept", "text": name}, [{"by": owner}])
            ]
            path.unlink()


def test_a_last_line_without_its_end_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, 10)
    journal.end("", "r1", {"id": "r1"}, [])
    journal.begin(Begun("r2", "", {"input": "x"}, 1))
    journal.close()
    path.write_bytes(path.read_bytes().rstrip())
    for _ in range(2):
        begun, ended = contents(path)
        assert [one.id for one in begun] == ["r2"] and [one.response["id"] for one in ended] == ["r1"]


def test_with_company_the_file_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has read a part of it."""
    monkeypatch.setattr("server.journal._LEAST_BYTES", 3000)
    path = tmp_path / "journal"
    first = Journal(path, 10)
    first.begin(Begun("r", "", {}, 1))
    number = path.stat().st_ino
    second = Journal(path, 10)
    used(first, random.Random(3), 100)
    assert path.stat().st_ino == number and path.stat().st_size > 6000
    assert second.look().ended
    second.close()
    first.begin(Begun("last", "", {}, 1))
    assert path.stat().st_ino != number and "last" in {one.id for one in contents(path)[0]}
    first.close()


async def test_a_lock_that_another_process_holds_stops_no_other_request(tmp_path: Path) -> None:
    async with live(resume_journal=str(tmp_path / "journal")) as server:
        with (tmp_path / "journal").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            waiting = asyncio.create_task(server.post("/v1/responses", BODY))
            for _ in range(5):
                assert (await server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}))[0] == 200
            # It is not promised before it is written down.
            assert not waiting.done()
            fcntl.flock(file, fcntl.LOCK_UN)
        status, told = await waiting
        assert status == 200 and (await ended(server, told["id"]))["status"] == "incomplete"


# ---- two processes at once


def text_of(events: list[Any]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


async def test_a_hand_over_takes_the_journal_along(tmp_path: Path) -> None:
    """What somebody follows as the next process comes ends where it is, the rest is gone on with, and whoever comes to
    the new process finds all of it."""
    options: Any = {"handover": f"unix:{tmp_path}/s", "resume_journal": str(tmp_path / "journal")}
    options |= {"api_keys": ("k1", "k2"), "step_seconds": 0.004, "drain_timeout_s": 20.0}
    body = BODY | {"temperature": 1, "seed": 5, "max_output_tokens": 200}
    keys = [{"Authorization": f"Bearer k{number}"} for number in (1, 2)]
    async with live(**options) as first:
        first.http.headers.update(keys[1])
        done = (await first.post("/v1/responses", BODY))[1]["id"]
        whole = await ended(first, done)
        left, followed, shared = [(await first.post("/v1/responses", body))[1]["id"] for _ in range(3)]
        following = [asyncio.create_task(follow(first, name)) for name in (followed, shared)]
        some: list[Any] = []
        async with first.http.get(f"{first.url}/v1/responses/{left}?stream=true") as response:
            # As far as it has come when its client loses the connection.
            async for line in response.content:
                if line.startswith(b"data: "):
                    some.append(json.loads(line[6:]))
                if len(some) == 30:
                    break
        # What runs on in the first process takes long.
        first.device.gate.clear()
        async with live(**options) as second:
            second.http.headers.update(keys[1])
            await until(lambda: first.stop.is_set())
            assert (await get(second, f"/v1/responses/{left}", headers=keys[0]))[0] == 404
            rest = await follow(second, left, "&starting_after=29")
            assert not first.serving.done() and not following[0].done() and not following[1].done()
            first.device.gate.set()
            at_first = await asyncio.gather(*following)
            again = await follow(second, shared, "&starting_after=7")
            found = {name: await ended(second, name) for name in (left, followed, shared)}
            assert (await get(second, f"/v1/responses/{done}"))[1] == whole
            new = (await second.post("/v1/responses", body))[1]["id"]
            await asyncio.wait_for(asyncio.shield(first.serving), BOUND_S)
            assert await ended(second, new)
        events = [*some, *rest]
        assert [event["sequence_number"] for event in events] == [*range(len(events))]
        assert events[-1]["type"] == "response.completed" or events[-1]["type"] == "response.incomplete"
        # One text, whoever computed it: no token is lost or stands twice.
        text = text_of(at_first[0])
        assert len(text) > 300 and text_of(at_first[1]) == text_of(events) == text
        assert without_times(again) == without_times(at_first[1][8:])
        assert {one["output"][0]["content"][0]["text"] for one in found.values()} == {text}
    last = Journal(tmp_path / "journal", 10)
    last.close()
    assert not last.begun and {one.response["id"] for one in last.ended} == {done, left, followed, shared, new}
    assert [name for name in os.listdir(tmp_path) if name.startswith("journal")] == ["journal"]


def test_what_another_call_has_read_is_told_by_the_next_look(tmp_path: Path) -> None:
    """Whoever wants to go on with one response reads that another has ended meanwhile."""
    path = tmp_path / "journal"
    first = Journal(path, 10)
    for name in ("r1", "r2"):
        first.begin(Begun(name, "", {"input": "x"}, 1))
    second = Journal(path, 10)
    second.look()
    first.end("", "r2", {"id": "r2"}, [])
    assert not any(map(second.claim, second.begun))
    assert list(second.look().ended) == ["r2"] and not second.look().ended
    first.close()
    second.close()


def test_who_lives_keeps_what_it_has_begun(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    first = Journal(path, 10)
    for name in ("r1", "r2", "r3"):
        first.begin(Begun(name, "", {"input": "x"}, 1))
    first.end("", "r3", {"id": "r3"}, [])
    second, third = Journal(path, 10), Journal(path, 10)
    assert not first.has_company and second.has_company and first.has_heirs()
    assert [one.id for one in second.begun] == ["r1", "r2"] and second.elsewhere("", "r1")
    assert [one.response["id"] for one in second.ended] == ["r3"]
    assert not second.elsewhere("another", "r1") and not any(map(second.claim, second.begun))
    first.leave("r1")
    first.end("", "r2", {"id": "r2"}, [1])
    second.begin(Begun("r4", "", {"input": "y"}, 1))
    news = second.look()
    [r2] = news.ended.values()
    assert (r2.response["id"], r2.items, r2.begun and r2.begun.body) == ("r2", [1], {"input": "x"})
    assert not second.elsewhere("", "r1")
    # Of two that see it, one gets it.
    third.look()
    [one] = second.begun
    assert third.claim(one) and not second.claim(one) and second.look() and second.elsewhere("", "r1")
    # Killed: nobody says so, but the lock is gone.
    os.close(third._alive)
    os.close(third._file)
    assert not second.elsewhere("", "r1") and second.claim(one)
    first.end("", "r3")
    assert second.look().forgotten == [("", "r3")] and second.has_company
    first.close()
    size = path.stat().st_size
    second.look()
    # With the last of the others gone, the file is short again, and goes on.
    assert not second.has_company and path.stat().st_size < size
    second.end("", "r4", {"id": "r4"}, [])
    second.close()
    again = Journal(path, 10)
    again.close()
    assert [one.id for one in again.begun] == ["r1"] and [one.response["id"] for one in again.ended] == ["r2", "r4"]


async def test_what_cannot_be_written_down_is_not_promised(tmp_path: Path) -> None:
    async with live(resume_journal=str(tmp_path / "journal")) as server:
        from server.app import _JOURNAL

        def full(line: object) -> None:
            raise OSError(28, "No space left on device")

        server.app[_JOURNAL]._append = full  # type: ignore[method-assign]
        check_shape(*await server.post("/v1/responses", BODY), expected=503)
        assert server.num_requests() == 0
        assert (await server.post("/v1/responses", BODY | {"background": False}))[0] == 200


async def test_what_ends_while_the_journal_is_closed_is_written_down(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, 10)
    for number in range(5):
        journal.begin(Begun(f"r{number}", "", {"input": "x"}, 1))
    jobs = Jobs(10, 1 << 20, journal)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        jobs.forget("", "r0")
        closing = asyncio.create_task(jobs.close())
        for number in (1, 2):
            await asyncio.sleep(0.05)
            jobs.forget("", f"r{number}")
        assert not closing.done()
        fcntl.flock(file, fcntl.LOCK_UN)
    await asyncio.wait_for(closing, BOUND_S)
    jobs.forget("", "r3")
    journal.close()
    assert [one.id for one in contents(path)[0]] == ["r4"]


def test_what_ends_behind_a_closed_journal_is_written_nowhere(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", 10)
    journal.begin(Begun("resp_1", "", {"input": "x"}, 1))
    journal.close()
    # It most likely gets the number that the journal's file had.
    with (tmp_path / "other").open("wb"):
        journal.end("", "resp_1")
    assert not (tmp_path / "other").read_bytes()
    again = Journal(tmp_path / "journal", 10)
    again.close()
    assert [one.id for one in again.begun] == ["resp_1"]

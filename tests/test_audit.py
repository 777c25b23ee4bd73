"""The check of what is installed for known holes: found by OSV or without it."""

from __future__ import annotations

import contextlib
import http.server
import importlib.metadata
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import audit

Answer = Callable[[list[Any]], Any]


@pytest.fixture
def osv() -> Iterator[tuple[str, list[Answer]]]:
    """A mirror's address, and what it answers: the queries' results."""
    answers: list[Answer] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answers[0](queries)).encode())

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    thread.join()
    server.server_close()


def test_holes_that_osv_knows(
    osv: tuple[str, list[Answer]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, answers = osv
    asked: list[Any] = []

    def answer(queries: list[Any]) -> Any:
        asked[:] = queries
        return {"results": [{"vulns": [{"id": "X-1"}]} if q["package"]["name"] == "orjson" else {} for q in queries]}

    answers.append(answer)
    assert audit.main(["--url", url]) == 1
    assert "audit: orjson " in (told := capsys.readouterr()).err and "X-1" in told.err and "1 holes" in told.out
    # What ours requires, and what that does.
    assert {"aiohttp", "yarl", "multidict", "torch", "markupsafe"} <= {query["package"]["name"] for query in asked}
    assert not {"pytest", "ruff"} & {query["package"]["name"] for query in asked}
    assert all(query["version"] and "+" not in query["version"] for query in asked)
    monkeypatch.setattr(audit, "ACCEPTED", {"X-1": "a test"})
    assert audit.main(["--url", url]) == 0
    strange: list[Any] = [[], {"results": [{}]}, {"results": 5}, {"no": 1}]
    answers[0] = lambda queries: strange.pop()
    while strange:
        assert audit.main(["--url", url]) == 0 and "could not be asked" in capsys.readouterr().err


def test_without_a_network(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(["--url", "http://127.0.0.1:9/"]) == 0
    assert "could not be asked" in capsys.readouterr().err
    monkeypatch.setattr(audit, "KNOWN", {"jinja2": ("99", "CVE-0: all of it"), "none": ("1", "CVE-1: nowhere")})
    assert audit.main(["--offline"]) == 1
    assert "jinja2" in (told := capsys.readouterr().err) and "CVE-0: all of it" in told and "CVE-1" not in told


@pytest.mark.parametrize(
    "answer", [b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", b"HTTP/1.1 200 OK\r\n" * 500, b""]
)
def test_an_answer_that_is_not_http_is_none(capsys: pytest.CaptureFixture[str], answer: bytes) -> None:
    def proxy() -> None:
        connection, _ = listener.accept()
        with connection:
            data = b""
            while b'"queries"' not in data:
                data += connection.recv(65536)
            # It may have seen enough, and be gone.
            with contextlib.suppress(OSError):
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=proxy)
        thread.start()
        assert audit.main(["--url", f"http://127.0.0.1:{listener.getsockname()[1]}/"]) == 0
        thread.join()
    assert "OSV could not be asked" in capsys.readouterr().err


def test_extras_bring_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = {
        "a": ['b; extra == "Fast"', 'c; python_version < "3"', "d[more]"],
        "b": [],
        "c": [],
        "d": ['e; extra == "more"', 'f; extra == "most"', "a"],
        "e": ['d[most]; python_version > "3"'],
        "f": ["gone"],
    }

    class Distribution:
        version = "1.0+cpu"

        def __init__(self, name: str) -> None:
            if name not in requires:
                raise importlib.metadata.PackageNotFoundError(name)
            self.requires = requires[name]

    monkeypatch.setattr(importlib.metadata, "distribution", Distribution)
    assert audit.installed(["d"]) == dict.fromkeys("dae" + "f", "1.0")
    assert set(audit.installed(["a[fast]"])) == set("abdef")
    assert not audit.installed(['a; extra == "fast"', 'b; python_version < "3"'])

"""The check of what is installed for known holes: found by OSV or without it."""

from __future__ import annotations

import http.server
import json
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

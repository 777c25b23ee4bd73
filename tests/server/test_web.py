"""The pages: what is served, with which headers, and to whom."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from typing import Any

import pytest

from engine.flags import config_from, make_parser
from server.endpoints.web import DIRECTORY, FILES
from tests.server.support import Live, live
from tests.server.test_errors import check_shape
from tests.server.test_gate import raw_exchange

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "Accept-Encoding": "gzip"}
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


async def fetch(server: Live, path: str, headers: dict[str, str]) -> tuple[int, Any, bytes]:
    """Status, headers, and the bytes as they went over the wire."""
    async with server.http.get(server.url + path, headers=headers, allow_redirects=False) as response:
        return response.status, response.headers, await response.read()


@pytest.mark.parametrize("keys", [(), ("secret",)])
async def test_every_file_is_served_by_its_kind_under_a_strict_policy(keys: tuple[str, ...]) -> None:
    paths = {"/": "chat.html", "/live": "live.html"} | {f"/web/{name}": name for name in FILES}
    async with live(api_keys=keys, root_path="/llm") as server:
        for prefix in ("", "/llm"):
            for path, name in paths.items():
                status, headers, body = await fetch(server, prefix + path, BROWSER)
                assert status == 200 and body == FILES[name].body, path
                assert headers["Content-Type"] == f"{KINDS[name.rpartition('.')[2]]}; charset=utf-8"
                policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
                assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
                assert policy["connect-src"] == "'self'"
                for kind, element in (("script-src", b"script"), ("style-src", b"style")):
                    # Beside files of this server's, what the page has in itself and nothing else.
                    inside = re.findall(b"<%b>(.*?)</%b>" % (element, element), body, re.DOTALL)
                    hashes = [base64.b64encode(hashlib.sha256(one).digest()).decode() for one in inside]
                    assert policy[kind].split() == ["'self'", *(f"'sha256-{one}'" for one in hashes)], path
                if name.endswith(".html"):
                    # Nothing is waited for before it is painted.
                    assert b'rel="stylesheet"' not in body and not re.search(b'<script src="[^>]*></script>', body)
                assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-cache"
                # Asked again, it is not sent again.
                status, _, body = await fetch(server, path, BROWSER | {"If-None-Match": headers["ETag"]})
                assert status == 304 and body == b""
        # A page with a slash at its end would miss its parts.
        status, headers, _ = await fetch(server, "/llm/live/", BROWSER)
        assert status == 308 and headers["Location"] == "../live"
        async with server.http.head(server.url + "/", headers=BROWSER) as response:
            assert response.status == 200 and response.content_type == "text/html"


async def test_root_stays_json_for_programs() -> None:
    async with live(api_keys=("secret",)) as server:
        status, headers, _ = await fetch(server, "/", {})
        assert status == 401 and headers["Content-Type"].startswith("application/json")
        status, headers, body = await fetch(server, "/", {"Authorization": "Bearer secret"})
        assert status == 200 and b'"oneloop"' in body
        # The page is open, and nothing else is.
        for path in ("/v1", "/v1/models", "/server_info", "/webx", "/web"):
            assert (await fetch(server, path, BROWSER))[0] == 401, path


@pytest.mark.parametrize(
    ("accepts", "packed"), [("gzip", True), ("br, *;q=0.5", True), ("gzip;q=0", False), ("", False)]
)
async def test_files_are_packed_for_who_can_unpack(server: Live, accepts: str, packed: bool) -> None:
    head = f"GET /web/base.css HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAccept-Encoding: {accepts}\r\n\r\n"
    answer, _, body = (await raw_exchange(server, head.encode())).partition(b"\r\n\r\n")
    assert (b"Content-Encoding: gzip" in answer) is packed
    assert (gzip.decompress(body) if packed else body) == FILES["base.css"].body


@pytest.mark.parametrize(
    "name",
    ["..", "../app.py", "..%2fapp.py", "%2e%2e%2fstate.py", "nothing.js", ".", "", "%00", "base.css%00", "base.css/x",
     "BASE.CSS", "%2fetc%2fpasswd", "..%5capp.py", "__init__.py"],
)  # fmt: skip
async def test_no_path_leads_out_of_the_table(server: Live, name: str) -> None:
    answer = await raw_exchange(server, f"GET /web/{name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")) and b'"error"' in answer, answer


async def test_no_web_leaves_the_pages_out() -> None:
    assert config_from(make_parser().parse_args([])).server.web
    assert not config_from(make_parser().parse_args(["--no-web"])).server.web
    async with live(web=False, api_keys=("secret",)) as server:
        assert (await fetch(server, "/", BROWSER))[0] == 401
        keyed = BROWSER | {"Authorization": "Bearer secret"}
        status, headers, _ = await fetch(server, "/", keyed)
        assert status == 200 and headers["Content-Type"].startswith("application/json")
        for path in ("/live", "/web/base.css"):
            async with server.http.get(server.url + path, headers=keyed) as response:
                check_shape(response.status, await response.json(), expected=404)


def test_pages_name_only_files_that_are_there() -> None:
    """As they are on the disk (what is sent inside of a page has a hash, see above): no script or style inside, nothing
    of other servers, and links that a proxy's prefix does not break."""
    for name in FILES:
        text = (DIRECTORY / name).read_text()
        if name.endswith(".html"):
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text), name
            for link in re.findall(r'(?:src|href)="([^"]*)"', text):
                assert link in {f"web/{one}" for one in FILES} | {"./", "live", "#main"} or link.startswith("#"), link
        if name.endswith(".js"):
            for link in re.findall(r'from "([^"]*)"|import\("([^"]*)"\)', text):
                assert "".join(link).removeprefix("./") in FILES, (name, link)
        assert not re.search(r"https?://(?!www\.w3\.org/)", text), name

"""GET / (for browsers), /live and /web/{name}: the pages of server/web/, as they are on disk.

They hold no secret and need no key: what they show they ask for, with the key that the reader has typed in. `--no-web`
leaves these routes out. A page loads nothing but files of this table (its Content-Security-Policy says so to the
browser), and links to them relative to itself, so that a proxy may put any path before them. What a page must have
before it is painted, its sheets and first.js, is sent inside of it; the modules are asked for after that.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from server.state import STATE

# Left out by --no-web (server/app.py).
IS_WEB = True

DIRECTORY = Path(__file__).parent.parent / "web"
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# scripts, styles: the hashes of what a page has in itself. One policy makes HTML of a string: web/rendered.js, for
# what /web/api/render gives.
_POLICY = (
    "default-src 'none'; script-src 'self'{scripts}; style-src 'self'{styles}; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types rendered"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Kept, and asked about each time: an upgraded server's page is seen at once.
    "Cache-Control": "no-cache",
}


_SCRIPT = re.compile(r'<script src="web/([\w.]+)"></script>')
_SHEET = re.compile(r'<link rel="stylesheet" href="web/([\w.]+)">')


@dataclass(frozen=True, slots=True)
class _File:
    """One file. body: its bytes. packed: the same by gzip, where that is smaller. tag: names these bytes."""

    kind: str
    body: bytes
    packed: bytes | None
    tag: str
    policy: str

    @classmethod
    def read(cls, path: Path) -> _File:
        text = path.read_text()
        scripts: list[str] = []
        styles: list[str] = []
        if path.suffix == ".html":
            text = _SCRIPT.sub(lambda found: _inside("script", found[1], scripts), text)
            text = _SHEET.sub(lambda found: _inside("style", found[1], styles), text)
        body = text.encode()
        packed = gzip.compress(body, 9, mtime=0)
        tag = hashlib.sha256(body).hexdigest()[:20]
        policy = _POLICY.format(scripts="".join(scripts), styles="".join(styles))
        return cls(_KINDS[path.suffix], body, packed if len(packed) < len(body) else None, tag, policy)


def _inside(element: str, name: str, hashes: list[str]) -> str:
    """A file as an element of a page, which its policy lets through by its hash."""
    # What a sheet names lies beside it.
    text = (DIRECTORY / name).read_text().replace('url("', 'url("web/')
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    hashes.append(f" 'sha256-{digest}'")
    return f"<{element}>{text}</{element}>"


# By name, so that no path of a client's is ever looked up on the disk.
FILES = {path.name: _File.read(path) for path in sorted(DIRECTORY.iterdir()) if path.suffix in _KINDS}
PAGES = {"/": "chat.html", "/live": "live.html"}


def is_page(request: web.Request) -> bool:
    """Whether this asks for a page or a part of one, and not for anything of the model's."""
    if not request.app[STATE].options.web:
        return False
    return request.match_info.handler in _OPEN or (_asks_root(request) and wants_page(request))


def wants_page(request: web.Request) -> bool:
    """Whether a browser goes to `/`, which is JSON for programs."""
    return request.app[STATE].options.web and "text/html" in request.headers.get("Accept", "")


def _asks_root(request: web.Request) -> bool:
    resource = request.match_info.route.resource
    root = request.app[STATE].options.root_path.rstrip("/")
    return resource is not None and resource.canonical in ("/", f"{root}/")


def send(request: web.Request, name: str) -> web.Response:
    """A file of the table, or 304 where the browser has it."""
    if (file := FILES.get(name)) is None:
        raise web.HTTPNotFound
    headers = _HEADERS | {"ETag": f'W/"{file.tag}"', "Vary": "Accept, Accept-Encoding"}
    headers["Content-Security-Policy"] = file.policy
    if any(tag.value in (file.tag, "*") for tag in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    headers["Content-Type"] = f"{file.kind}; charset=utf-8"
    if file.packed is not None and _takes_gzip(request):
        return web.Response(body=file.packed, headers=headers | {"Content-Encoding": "gzip"})
    return web.Response(body=file.body, headers=headers)


def _takes_gzip(request: web.Request) -> bool:
    for part in request.headers.get("Accept-Encoding", "").lower().split(","):
        name, _, quality = part.partition(";")
        if name.strip() in ("gzip", "*"):
            return quality.replace(" ", "").rstrip("0.") != "q="
    return False


async def live(request: web.Request) -> web.Response:
    if request.path.endswith("/"):
        # The page's links are relative to a path without it.
        return web.Response(status=308, headers={"Location": "../live"})
    return send(request, PAGES["/live"])


async def file(request: web.Request) -> web.Response:
    return send(request, request.match_info["name"])


_OPEN = frozenset((live, file))
ROUTES = (("GET", "/live", live), ("GET", "/web/{name}", file))

"""Slow readers, slow senders, too many connections, TLS, and paths: what keeps a client from doing harm."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.config import ServerOptions, StartupError
from engine.flags import shows_keys
from server.serving import make_tls
from tests.server.support import BOUND_S, live, until
from tests.server.test_errors import check_shape

# Of localhost and of nobody else, good for a hundred years.
PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgDKx4GIE9s94VicPD
DFNLs41BsjQKivXjHONlYtCV4FOhRANCAATK1KKI9XrXNvfAFRXXtIKxfB6cqLn4
kUSlLYbFR4s7lfQJThlL+DuCuuOp7knvLNfKaWoeKROMMF0VmSvP4fxD
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUECzTb6BzspluL1Lgin3nIt8IeVwwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyODE1MjAyNFoYDzIxMjYxMTA0
MTUyMDI0WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATK1KKI9XrXNvfAFRXXtIKxfB6cqLn4kUSlLYbFR4s7lfQJThlL+DuC
uuOp7knvLNfKaWoeKROMMF0VmSvP4fxDo28wbTAdBgNVHQ4EFgQU5xph8xznA9nC
bcQ47UDfMwpIT5UwHwYDVR0jBBgwFoAU5xph8xznA9nCbcQ47UDfMwpIT5UwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgRRVIONTfx3KJ29e41N+S7cgaanKdbHnnPVGE6O/JN+sCIC6z
Kn0M4iEOnaeVnqRqyJCq4yhVdpuoATiLufta13Ac
-----END CERTIFICATE-----
"""


async def ended(reader: asyncio.StreamReader) -> bool:
    """Wait until the server cuts a connection that it has sent nothing on."""
    async with asyncio.timeout(BOUND_S):
        (read,) = await asyncio.gather(reader.read(), return_exceptions=True)
    return read == b"" or isinstance(read, ConnectionError)


async def test_a_head_that_never_ends_is_cut_off() -> None:
    async with live(header_timeout_s=0.1) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /health HTTP/1.1\r\nX-Slow: ")
        assert await ended(reader)
        writer.close()
        # One that has sent a whole head may be as slow as it likes afterwards.
        async with server.http.get(server.url + "/health") as response:
            assert response.status == 200
        await until(lambda: "slow_sender" in server.engine.metrics.connections_cut)
        assert b'oneloop_connections_cut_total{reason="slow_sender"} 1.0' in server.engine.metrics.render()


async def test_a_client_that_reads_nothing_is_cut_off_and_its_request_aborted() -> None:
    async with live(write_timeout_s=0.1) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
        writer.transport.pause_reading()
        body = b'{"prompt": "x", "max_tokens": 400, "n": 100, "stream": true, "ignore_eos": true, "logprobs": 5}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d"
        writer.write(head % len(body) + b"\r\n\r\n" + body)
        await until(lambda: server.num_requests() > 0)
        await until(lambda: "slow_reader" in server.engine.metrics.connections_cut)
        await server.all_free()
        writer.close()
        assert reader is not None
        await server.complete("x", max_tokens=1)


async def test_an_address_has_so_many_connections() -> None:
    async with live(max_connections_per_address=2) as server:
        opened = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
        assert await ended(opened[2][0])
        for _, writer in opened:
            writer.close()
        await until(lambda: server.engine.metrics.connections_cut["address"] == 1)

        async def serves() -> bool:
            try:
                async with server.http.get(server.url + "/health") as response:
                    return response.status == 200
            except aiohttp.ClientError:
                return False

        async with asyncio.timeout(BOUND_S):
            while not await serves():  # noqa: ASYNC110  (closing has no event here)
                await asyncio.sleep(0.001)


async def test_tls(tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_text(PEM)
    async with live(ssl_certfile=str(both)) as server:
        trusted = ssl.create_default_context(cadata=PEM[PEM.index("-----BEGIN CERT") :])
        async with server.http.get(f"https://localhost:{server.port}/v1/models", ssl=trusted) as response:
            assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            async with server.http.get(server.url + "/health"):
                pass
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            async with server.http.get(f"https://localhost:{server.port}/health"):
                pass


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"ssl_certfile": "/no/such/file"}, "No such file"),
        ({"ssl_certfile": "text"}, "no certificate and key"),
        ({"ssl_certfile": "cert"}, "no certificate and key"),
        ({"ssl_certfile": "cert", "ssl_keyfile": "text"}, "no certificate and key"),
    ],
)
def test_certificates_that_are_none(tmp_path: Path, files: dict[str, str], told: str) -> None:
    (tmp_path / "text").write_text("no certificate")
    (tmp_path / "cert").write_text(PEM[PEM.index("-----BEGIN CERT") :])
    with pytest.raises(StartupError, match="--ssl-certfile") as caught:
        make_tls(ServerOptions(**{name: str(tmp_path / path) for name, path in files.items()}))
    assert told in str(caught.value)


async def test_weights_come_from_below_their_root_alone(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "new").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "circle").symlink_to(root / "circle")
    async with live(weights_root=str(root)) as server:

        async def take(path: Any) -> tuple[int, Any]:
            return await server.post("/update_weights_from_disk", {"model_path": path})

        for path in ("new", "./new/", str(root / "new"), "new/../new"):
            assert (await take(path))[0] == 200 and server.device.weights == root / "new"
        for path in ("..", "/", "/etc", "link", "link/..", "../root2", str(tmp_path / "secret"), "new/../../secret"):
            check_shape(*await take(path), expected=403)
        for path in ("missing", "circle", "x" * 4000, "a\0b"):
            check_shape(*await take(path), expected=400)
        assert server.device.weights == root / "new"
    async with live(weights_root=None) as server:
        answer = await server.post("/update_weights_from_disk", {"model_path": str(root)})
        assert "--weights-root" in check_shape(*answer, expected=403)["message"]


@pytest.mark.parametrize(
    ("argv", "shown"),
    [(["--api-key", "k"], True), (["--admin-api-key=k"], True), (["--key-file", "f"], False), ([], False)],
)
def test_keys_on_the_command_line_are_seen(argv: list[str], shown: bool) -> None:
    assert shows_keys(argv) is shown

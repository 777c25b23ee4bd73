"""Memory that runs short: what is given up, and what new requests get."""

from __future__ import annotations

from server.app import _MEMORY
from tests.server.support import live
from tests.server.test_errors import check_shape


async def test_stages() -> None:
    async with live(max_host_memory=10**15) as server:
        watch = server.app[_MEMORY]
        used = [0]
        watch._resident = lambda: used[0]

        def look(share: float) -> None:
            used[0] = int(10**15 * share)
            watch.look()

        kept = (await server.post("/v1/responses", {"input": "x", "max_output_tokens": 1}))[1]["id"]
        look(0.5)
        assert watch.stage == 0 and len(server.state.responses) == 1
        look(0.86)
        assert watch.stage == 1 and len(server.state.responses) == 0
        async with server.http.get(f"{server.url}/v1/responses/{kept}") as response:
            assert response.status == 404
        await server.complete("x", max_tokens=1)
        look(0.93)
        error = check_shape(*await server.post("/v1/completions", {"prompt": "x"}), expected=429)
        assert "memory" in error["message"]
        look(0.99)
        check_shape(*await server.post("/v1/completions", {"prompt": "x"}), expected=503)
        async with server.http.get(server.url + "/health") as response:
            assert response.status == 200
        assert (await server.post("/abort_request", {"abort_all": True}))[0] == 200
        text = server.engine.metrics.render()
        assert b"oneloop_memory_stage 3.0" in text and b"oneloop_memory_sheds_total 3.0" in text
        look(0.1)
        await server.complete("x", max_tokens=1)
        assert server.engine.metrics.rejected["memory"] == 2

"""bench/perplexity.py: the same figure through the Engine, over HTTP and by transformers, on the demo model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import perplexity
from tests.server.support import DEMO, live
from tests.server.test_logprobs import device

TEXT = "The little fox ran over the hill, and the sun was warm. “Where are you going?” asked the owl. " * 4


@pytest.mark.parametrize(
    ("count", "window", "stride"), [(100, 30, 10), (100, 99, 50), (31, 30, 29), (2, 50, 1), (5, 2, 1)]
)
def test_windows_score_every_token_once(count: int, window: int, stride: int) -> None:
    scored: list[int] = []
    for start, end, first in perplexity.windows(count, window, stride):
        assert 0 <= start < first < end <= count and end - start <= window
        # The first window has no more context than there is.
        assert start == 0 or first - start >= min(window - stride, 1)
        scored += range(first, end)
    assert scored == list(range(1, count))


def test_a_stride_as_long_as_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="stride"):
        perplexity.windows(100, 30, 30)


def run(tmp_path: Path, *flags: str) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    out = tmp_path / "out.json"
    assert perplexity.main(["--text", str(text), "--threads", "1", "--json", str(out), *flags]) == 0
    report: dict[str, Any] = json.loads(out.read_text())
    return report


@pytest.mark.parametrize("flags", [[], ["--window", "48", "--stride", "16"]], ids=["whole", "strided"])
def test_offline_agrees_with_transformers(tmp_path: Path, flags: list[str]) -> None:
    report = run(tmp_path, "--compare", "--model", str(DEMO), *flags)
    assert report["offline"] == pytest.approx(report["transformers"], rel=5e-5)
    assert report["offline"] > 1


async def test_http_agrees_with_transformers() -> None:
    score = perplexity.transformers_scorer(DEMO, "float32")
    async with live(make_device=device, num_pages=256) as server:
        async with perplexity.over_http(server.url, "demo", None) as (over_http, session):
            ids, context = await perplexity.tokenize(session, TEXT, "demo")
            assert context == 512
            ours, count = await perplexity.perplexity(over_http, ids, 60, 30)
            with pytest.raises(RuntimeError, match="404"):
                await perplexity.tokenize(session, TEXT, "other")
        theirs, same = await perplexity.perplexity(score, ids, 60, 30)
    assert count == same == len(ids) - 1
    assert ours == pytest.approx(theirs, rel=5e-5)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (
        ["--text", str(tmp_path / "none.txt")],
        ["--model", str(tmp_path)],
        ["--window", "10", "--stride", "0"],
        ["--url", "http://127.0.0.1:9"],
    ):
        assert perplexity.main(flags) == 1
        error = capsys.readouterr().err
        assert [line for line in error.splitlines() if line.startswith("error: ")] and "Traceback" not in error

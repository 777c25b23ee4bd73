"""The flags of log-probabilities."""

from __future__ import annotations

import pytest

from engine.config import LogprobOptions, StartupError
from engine.flags import parse


def options(*argv: str) -> LogprobOptions:
    return parse(argv)[0].logprobs


def test_what_they_say() -> None:
    assert options() == LogprobOptions("raw_logprobs", 20) and not options().processed
    given = options("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1")
    assert given.processed and given.most_of(300) == 300
    assert options("--max-logprobs", "0").most_of(300) == 0 and options("--max-logprobs", "999").most_of(300) == 300


@pytest.mark.parametrize(
    "argv", [("--logprobs-mode", "raw_logits"), ("--max-logprobs", "-2"), ("--max-logprobs", "x")], ids=str
)
def test_what_is_not_known_ends_the_start(argv: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(*argv)
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"mode": "raw_logits"}, {"most": -2}], ids=str)
def test_nor_in_python(given: dict[str, object]) -> None:
    with pytest.raises(StartupError):
        LogprobOptions(**given)  # type: ignore[arg-type]

"""Lines about --kv-host-gb on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.serve import main
from tests.models.support import make_checkpoint
from tests.text import kinds


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_checkpoint(directory, "Llama", vocab_size=512)
    kinds.write("byte_level", directory)
    return directory


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--kv-host-gb", "1"], "--kv-host-gb: the KV cache is in host memory already; --kv-cache-gb makes it larger"),
        (["--kv-host-gb", "-1"], "--kv-host-gb must be 0 or at least 0.001, not -1"),
        (["--kv-host-gb", "0.0001"], "--kv-host-gb must be 0 or at least 0.001, not 0.0001"),
        (["--kv-host-gb", "nan"], "--kv-host-gb must be 0 or at least 0.001, not nan"),
        (["--kv-host-gb", "1", "--kv-disk-gb", "1"], "--kv-disk-gb is of --kv-disk DIR"),
        (["--kv-disk-timeout", "1"], "--kv-disk-timeout is of --kv-disk DIR"),
    ],
)
def test_a_start_that_cannot_work_is_one_line(
    model: Path, flags: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(model), "--device", "cpu", "--threads", "1", "--port", "0", *flags]) == 1
    out, error = capsys.readouterr()
    assert not out and error == f"error: {line}\n"

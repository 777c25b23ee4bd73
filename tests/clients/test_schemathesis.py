"""schemathesis over the OpenAPI document: no 5xx, documented shapes only, and what breaks the document is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.clients.common import MODEL, SUM, SUM_ANSWER, user
from tests.clients.conftest import serving

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)
# Behind these nothing is answered until another route is called.
STOPPING = ("/pause", "/pause_generation", "/sleep", "/release_memory_occupation")
# These wait for a trainer at an address that a fuzzer makes up.
JOINING = ("/init_weights_update_group", "/init_weight_transfer_engine")
# Their answers take as long as the client says, or for ever.
LASTING = ("/live/events", "/trace")
METHODS = {"get", "post", "put", "patch", "delete", "head", "options"}
# A fuzzer asks for an answer within 5e-324 seconds, too.
CONFIG = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 504]
"""
SEED = 7
# Of each operation; make test-clients HEAVY=1 has time for more.
EXAMPLES = 25 if os.environ.get("HEAVY") else 10


def paths_of(url: str) -> dict[str, int]:
    """What is tried, and how many methods each path has. Of paths that are there with a /v1 before them as well one
    alone: the same handlers, see tests/server/test_openapi.py."""
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=10) as response:
        paths = json.load(response)["paths"]
    left_out = (*STOPPING, *LASTING, *JOINING)
    return {
        path: len(methods.keys() & METHODS)
        for path, methods in paths.items()
        if f"/v1{path}" not in paths and path not in left_out
    }


def fuzzed(url: str, paths: list[str], folder: Path) -> str:
    """What schemathesis says of these paths."""
    folder.mkdir()
    (folder / "schemathesis.toml").write_text(CONFIG)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--continue-on-failure"),
            *("--phases", "examples,coverage,fuzzing", "--seed", str(SEED), "-n", str(EXAMPLES)),
            *(word for path in paths for word in ("--include-path", path)),
            *("--checks", ",".join(CHECKS), "--no-color", "--request-timeout", "60"),
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    print(done.stdout)
    assert done.returncode == 0
    return done.stdout


def test_every_route(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In servers with a short context: a fuzzer asks for 128 texts that go on to its end.

    Two of them with half of the paths each: a fuzzer takes a core, and waits for its server half of the time. A server
    each, for what one asks for may abort whatever runs.
    """
    flags = "--max-model-len", "128", "--pooling", "last", "--score-tokens", "a", "no"
    with serving(*flags) as first, serving(*flags) as second, ThreadPoolExecutor(2) as pool:
        paths, urls = paths_of(first), (first, second)
        said = [pool.submit(fuzzed, url, [*paths][at::2], tmp_path / str(at)) for at, url in enumerate(urls)]
        for each in said:
            assert "failures" not in each.result().splitlines()[-1]
        selected = [int(count) for each in said for count in re.findall(r"Selected: (\d+)/", each.result())]
        assert len(selected) == 2 and sum(selected) == sum(paths.values()) > 50
        for url in urls:
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                answer = client.chat.completions.create(model=MODEL, messages=user(SUM), temperature=0)
            assert answer.choices[0].message.content == SUM_ANSWER
    # What a handler or a kernel did not expect would stand here.
    assert "Traceback" not in capfd.readouterr().err

"""The `openai` package of npm; what it does is in openai.mjs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.common import (
    COLUMNS,
    MIA,
    MODEL,
    PERSON_PROMPT,
    SUM,
    SUM_ANSWER,
    WEATHER,
    WEATHER_PARAMETERS,
    WEATHER_PROMPT,
    cell,
)
from tests.clients.conftest import NODE

CLIENT = "openai (npm)"
WORDS = {
    "model": MODEL,
    "sum": SUM,
    "sumAnswer": SUM_ANSWER,
    "person": PERSON_PROMPT,
    "personAnswer": MIA.model_dump(),
    "weather": WEATHER_PROMPT,
    "weatherAnswer": WEATHER,
    "weatherParameters": WEATHER_PARAMETERS,
}


@pytest.mark.skipif(shutil.which("node") is None or shutil.which("npm") is None, reason="node and npm are not here")
@pytest.mark.parametrize("feature", [pytest.param(column, marks=cell(CLIENT, column)) for column in COLUMNS])
def test_feature(url: str, feature: str) -> None:
    done = subprocess.run(
        ["node", str(Path(__file__).with_name("openai.mjs")), feature, f"{url}/v1"],
        input=json.dumps(WORDS),
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "ONELOOP_NODE": str(NODE)},
    )
    assert done.returncode == 0, done.stderr

"""The load generator guidellm, which brings torch along: `make test-clients HEAVY=1` installs it and runs this."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.clients.common import MODEL
from tests.clients.conftest import ROOT

NUM_REQUESTS, NUM_OUTPUT = 12, 16


def test_a_run_of_fixed_lengths(url: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [
        *(os.environ["ONELOOP_GUIDELLM"], "run", "--disable-progress"),
        *("--backend", f"kind=openai_http,target={url},model={MODEL}"),
        *("--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--tokenizer", f"kind=huggingface_auto,model={ROOT / 'engine' / 'demo'}"),
        *("--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={NUM_OUTPUT}"),
        *("--output", f"kind=json,path={report}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    assert metrics["request_totals"] == {
        "successful": NUM_REQUESTS,
        "errored": 0,
        "incomplete": 0,
        "total": NUM_REQUESTS,
    }
    # It asks for that many tokens, whatever the model would like to end with, and believes what `usage` says.
    output = metrics["output_token_count"]["successful"]
    assert (output["min"], output["max"], output["count"]) == (NUM_OUTPUT, NUM_OUTPUT, NUM_REQUESTS)

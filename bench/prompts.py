"""The README's ten prompts against a running server, at temperature 0: `python -m bench.prompts --port 8000`.

Prints a Markdown table of what was asked and what was answered.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import engine.demo

PROMPTS = Path(engine.demo.__path__[0]) / "prompts.json"


def answer(base_url: str, prompt: dict[str, Any]) -> str:
    """The text of one unstreamed chat completion."""
    body = {"messages": prompt["messages"], "temperature": 0, "max_tokens": 200}
    if "tools" in prompt:
        body["tools"] = prompt["tools"]
    request = urllib.request.Request(
        f"{base_url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        message = json.load(response)["choices"][0]["message"]
    calls = message.get("tool_calls")
    if calls:
        return " ".join(f"{call['function']['name']}({call['function']['arguments']})" for call in calls)
    return str(message["content"])


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.prompts", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(argv)
    print("| prompt | answer |\n|---|---|")
    for prompt in json.loads(PROMPTS.read_text()):
        asked = "<br>".join(
            message["content"] if message["role"] == "user" else f"*{message['role']}: {message['content']}*"
            for message in prompt["messages"]
        )
        if "tools" in prompt:
            asked += " *(with the tool " + ", ".join(tool["function"]["name"] for tool in prompt["tools"]) + ")*"
        try:
            text = " ".join(answer(f"http://{args.host}:{args.port}", prompt).split())
        except urllib.error.URLError as error:
            print(f"error: no answer from http://{args.host}:{args.port}: {error}", file=sys.stderr)
            return 1
        cells = [cell.replace("|", "\\|").replace("<tool_call>", "`<tool_call>`") for cell in (asked, text)]
        print(f"| {cells[0]} | {cells[1]} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

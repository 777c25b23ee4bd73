"""The agents of package.json: how each is pointed at a server, and what its model must say to read a file.

`line` is what the README shows (a test holds them together); it is what runs here, with the server's own address.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

README_URL = "http://127.0.0.1:8000"
QUESTION = "What does note.txt say?"


@dataclass(frozen=True)
class Program:
    """line: shell, as the README has it. more: what a test adds to it, for no terminal is there.

    tool: a call that reads the file {path}; a name that holds a `?` is looked up in the prompt (`x?` is the first
    declared name that ends in x). files: what lies in the home directory. env: more of the environment.
    thinks: it gives reasoning back with the next request.
    """

    name: str
    line: str
    more: str
    tool: tuple[str, dict[str, Any]]
    files: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    thinks: bool = False


_CODEX = (
    "codex -c model_provider=oneloop -m oneloop-demo "
    """-c 'model_providers.oneloop={name="oneloop",base_url="http://127.0.0.1:8000/v1",wire_api="responses"}'"""
)
_CODEX_MORE = " exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox"
_PI = {
    "chat": ("openai-completions", f"{README_URL}/v1"),
    "messages": ("anthropic-messages", README_URL),
    "responses": ("openai-responses", f"{README_URL}/v1"),
}


def _pi(api: str, url: str) -> str:
    models = [{"id": "oneloop-demo", "contextWindow": 131072, "maxTokens": 4096}]
    return json.dumps({"providers": {"oneloop": {"baseUrl": url, "api": api, "apiKey": "none", "models": models}}})


_OPENCODE = {
    "model": "oneloop/oneloop-demo",
    "provider": {
        "oneloop": {
            "npm": "@ai-sdk/openai-compatible",
            "options": {"baseURL": f"{README_URL}/v1", "apiKey": "none"},
            "models": {"oneloop-demo": {"limit": {"context": 131072, "output": 4096}}},
        }
    },
}
_CONTINUE = f"""name: local
version: 0.0.1
schema: v1
models:
  - name: oneloop
    provider: openai
    model: oneloop-demo
    apiBase: {README_URL}/v1
    apiKey: none
    capabilities: [tool_use]
"""
_COPILOT = (
    "COPILOT_PROVIDER_BASE_URL=http://127.0.0.1:8000/v1 COPILOT_PROVIDER_API_KEY=none "
    "COPILOT_MODEL=oneloop-demo copilot"
)
_COPILOT_MORE = f" --allow-all-tools -p '{QUESTION}'"
_COPILOT_TOOL: tuple[str, dict[str, Any]] = ("view", {"path": "{path}"})
_SHELL: tuple[str, dict[str, Any]] = ("exec_command", {"cmd": "cat {path}"})
_READ: tuple[str, dict[str, Any]] = ("read", {"path": "{path}"})

PROGRAMS = (
    Program("Codex", _CODEX, f"{_CODEX_MORE} '{QUESTION}'", _SHELL, thinks=True),
    Program(
        "Codex, MCP",
        _CODEX,
        # A busy machine takes longer to start Python than Codex waits for it.
        """ -c 'mcp_servers.notes={command="python3",args=["notes.py"],startup_timeout_sec=60}'"""
        + f"{_CODEX_MORE} '{QUESTION}'",
        ("read_note?", {"path": "{path}"}),
        thinks=True,
    ),
    Program(
        "Claude Code",
        "ANTHROPIC_BASE_URL=http://127.0.0.1:8000 ANTHROPIC_API_KEY=none ANTHROPIC_MODEL=oneloop-demo "
        "ANTHROPIC_SMALL_FAST_MODEL=oneloop-demo claude",
        f" -p --dangerously-skip-permissions '{QUESTION}'",
        ("Read", {"file_path": "{path}"}),
        env={"IS_SANDBOX": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"},
        thinks=True,
    ),
    Program(
        "opencode",
        "opencode",
        f" run '{QUESTION}'",
        ("read", {"filePath": "{path}"}),
        files={".config/opencode/opencode.json": json.dumps(_OPENCODE)},
        env={"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"},
        thinks=True,
    ),
    Program("Copilot CLI", _COPILOT, _COPILOT_MORE, _COPILOT_TOOL, env={"COPILOT_OFFLINE": "1"}, thinks=True),
    Program(
        "Cline",
        "cline auth -p openai -k none -m oneloop-demo -b http://127.0.0.1:8000/v1",
        f" && cline -P openai -m oneloop-demo '{QUESTION}'",
        ("read_files", {"files": [{"path": "{path}"}]}),
        thinks=True,
    ),
    Program(
        "Qwen Code",
        "OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none OPENAI_MODEL=oneloop-demo "
        "qwen --auth-type openai",
        f" -y -p '{QUESTION}'",
        ("read_file", {"file_path": "{path}", "absolute_path": "{path}"}),
        thinks=True,
    ),
    Program(
        "Continue CLI",
        "cn --config continue.yaml",
        f" --auto -p '{QUESTION}'",
        ("Read", {"filepath": "{path}"}),
        files={"continue.yaml": _CONTINUE},
    ),
    *(
        Program(
            f"pi, {api}",
            "pi --provider oneloop --model oneloop-demo",
            f" -p '{QUESTION}'",
            _READ,
            files={".pi/agent/models.json": _pi(*_PI[api])},
            # It does not ask /v1/messages for any.
            thinks=api != "messages",
        )
        for api in _PI
    ),
)

"""One tool loop of each agent against the server: `make test-agents`, in a network with loopback alone.

The agents are real and so is the server; what the model says is dictated: a call that reads a file, then a sentence
with the word that the file holds. An agent that cannot make its second request never says that word.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import uvloop

from engine.text.chat_template import ChatTemplate
from tests.agents.programs import PROGRAMS, README_URL, Program
from tests.server.dictate import dictated
from tests.server.support import DEMO, live, served_model

HERE = Path(__file__).parent
BIN = Path(os.environ.get("ONELOOP_AGENTS", HERE.parents[1] / ".venv-agents")) / "node_modules" / ".bin"
WORD = "SECRET-4711"
ANSWER = f"The file says {WORD}."
BOUND_S = 120.0
# The longest prompt of an agent has 40k of the demo model's tokens.
CONTEXT = 131_072
THOUGHT = "I should look into the note."

# The demo model's template, as newer models have theirs: one system message, first, and reasoning in past turns.
DEMO_TEMPLATE = (DEMO / "chat_template.jinja").read_text()
_START = "'<|im_start|>assistant\\n' + "
_THOUGHT = (
    "('<think>\\n' + message.reasoning_content + '\\n</think>\\n' if message.reasoning_content is string else '') + "
)
STRICT_TEMPLATE = (
    "{%- for message in messages -%}{%- if message.role == 'system' and not loop.first -%}"
    "{{- raise_exception('System message must be at the beginning.') -}}{%- endif -%}{%- endfor -%}"
) + DEMO_TEMPLATE.replace(f"{_START}text_of(", f"{_START}{_THOUGHT}text_of(")
assert STRICT_TEMPLATE.count("<think>") == 1


def pytest_asyncio_loop_factories() -> dict[str, object]:
    return {"uvloop": uvloop.new_event_loop}


def call_of(program: Program, note: Path, prompt: str) -> str:
    """The dictated call, by the name that the prompt declares."""
    name, arguments = program.tool
    if name.endswith("?"):
        found = re.search(rf'"name": "([^"]*{re.escape(name[:-1])})"', prompt)
        assert found is not None, f"no tool {name[:-1]} is declared"
        name = found[1]
    filled = json.dumps(arguments).replace("{path}", str(note))
    return f'<tool_call>\n{{"name": "{name}", "arguments": {filled}}}\n</tool_call>'


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
async def test_tool_loop(program: Program, tmp_path: Path) -> None:
    await tool_loop(program, tmp_path, DEMO_TEMPLATE)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
async def test_tool_loop_of_a_strict_template(program: Program, tmp_path: Path) -> None:
    """Where a system message may stand at the beginning alone, and the model thinks before it calls."""
    prompts = await tool_loop(program, tmp_path, STRICT_TEMPLATE, thought=THOUGHT)
    if program.thinks:
        last = next(prompt for prompt in reversed(prompts) if WORD in prompt)
        assert f"<think>\n{THOUGHT}\n</think>" in last, "the model no longer sees what it thought"


async def tool_loop(program: Program, tmp_path: Path, template: str, thought: str = "") -> list[str]:
    """A question to the agent, a call of the model, its result, an answer. Returns the prompts."""
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    note = work / "note.txt"
    note.write_text(WORD)
    shutil.copy(HERE / "notes.py", work)
    prompts: list[str] = []

    def say(prompt: str) -> str:
        prompts.append(prompt)
        if WORD in prompt:
            return ANSWER
        if "<tools>" not in prompt:
            # Titles and the like are asked for without tools.
            return "A title"
        call = call_of(program, note, prompt)
        return f"<think>\n{thought}\n</think>\n\n{call}" if thought else call

    chat_template = ChatTemplate({"default": template}, {})
    model = served_model(max_model_len=CONTEXT, names=("oneloop-demo",), chat_template=chat_template)
    async with live(model=model, num_pages=2 * CONTEXT // 16) as server:
        with dictated(server, say=say):
            for name, text in program.files.items():
                # A relative name lies where the program runs, one with a dot in its home.
                file = (home if name.startswith(".") else work) / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text.replace(README_URL, server.url))
            home.mkdir(exist_ok=True)
            environment = {
                "PATH": f"{BIN}:{os.environ['PATH']}",
                "HOME": str(home),
                "TERM": "dumb",
                "DO_NOT_TRACK": "1",
                "DISABLE_TELEMETRY": "1",
                **program.env,
            }
            process = await asyncio.create_subprocess_exec(
                "bash",
                "-c",
                (program.line + program.more).replace(README_URL, server.url),
                env=environment,
                cwd=work,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            try:
                async with asyncio.timeout(BOUND_S):
                    output, _ = await process.communicate()
            except TimeoutError:
                process.kill()
                await process.wait()
                raise
        text = output.decode(errors="replace")
        assert ANSWER in text, text
        assert process.returncode == 0, text
        assert any(WORD in prompt for prompt in prompts)
        await server.all_free()
    return prompts


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_readme_says_so(program: Program) -> None:
    readme = (HERE.parents[1] / "README.md").read_text()
    assert program.line in readme

#!/usr/bin/env bash
# pydantic-ai-slim 2.68.0 (MIT), with a server that leaves a model's <think>...</think> in the text: in a stream a thought
# begins where a chunk's text is the tag "<think>" and nothing else, and ends where one is "</think>" and nothing else. That
# is so where a server sends each token by itself; one that joins tokens into a chunk when it is busy, or speculates and
# has several at once, sends the same text and gets another answer: the thought becomes a part of the answer, or, where
# the closing tag shares its chunk, the answer a part of the thought and there is no answer. The same text without stream
# is split wherever the tags stand. And a model that speaks of the tag has the rest of its words for a thought.
# Two runs of one agent against one server differ thus by the load. A server that parses the reasoning itself
# (reasoning_content) is not concerned. Nothing is said.
#
# Seen: five ways to cut a text into chunks, and the parts of the answer. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile openai==3.57.0 "pydantic-ai-slim[openai]==2.68.0"
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pydantic_ai.messages import ModelRequest, UserPromptPart
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Server(BaseHTTPRequestHandler):
    """Answers with the question's text, a chunk a line."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        lines = body["messages"][-1]["content"].split("\n")
        head = {"id": "chatcmpl-1", "created": 1, "model": "m"}
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if body.get("stream") else "application/json")
        self.end_headers()
        if body.get("stream"):
            for number, line in enumerate([*lines, ""]):
                choice = {"index": 0, "delta": {"content": line}, "finish_reason": "stop" if number == len(lines) else None}
                chunk = {**head, "object": "chat.completion.chunk", "choices": [choice]}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            choice = {"index": 0, "message": {"role": "assistant", "content": "".join(lines)}, "finish_reason": "stop"}
            self.wfile.write(json.dumps({**head, "object": "chat.completion", "choices": [choice]}).encode())


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
provider = OpenAIProvider(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none")
model = OpenAIChatModel("m", provider=provider)


def parts(response):
    return [(part.part_kind, part.content) for part in response.parts]


async def ask(chunks):
    asked = [ModelRequest(parts=[UserPromptPart("\n".join(chunks))])]
    async with model.request_stream(asked, None, ModelRequestParameters()) as stream:
        async for _ in stream:
            pass
        streamed = parts(stream.get())
    whole = parts(await model.request(asked, None, ModelRequestParameters()))
    print(f"{chunks}: streamed {streamed}, whole {whole}")
    return streamed, whole


split = [("thinking", "two and two"), ("text", "four")]
cases = [
    (["<think>", "two ", "and two", "</think>", "four"], split, split),
    (["<think>two ", "and two", "</think>", "four"], [("text", "<think>two and two</think>four")], split),
    (["<think>", "two ", "and two", "</think>four"], [("thinking", "two and two</think>four")], split),
    (["<th", "ink>", "two and two", "</think>", "four"], [("text", "<think>two and two</think>four")], split),
    (["Write ", "<think>", " first"], [("text", "Write "), ("thinking", " first")], [("text", "Write "), ("text", " first")]),
]


async def main():
    for chunks, streamed, whole in cases:
        assert await ask(chunks) == (streamed, whole)


asyncio.run(main())
PY

#!/usr/bin/env bash
# openai 3.57.0 (Apache-2.0; chat.completions.stream()), langchain-openai 1.7.4 and pydantic-ai-slim 2.68.0 (both MIT): what
# a chunk of a stream says again is not the same thing said again, it is put behind what there is. A server that writes a
# tool's name in every chunk of its call, as if each chunk were to stand for itself, makes a call of "windwind" of two
# chunks for all three; the openai client joins the call's id and the role as well, so that one answer of five chunks is by an
# "assistantassistant...". The chunk's own type allows either, and a client of one's own that keeps the last word sees
# nothing of it. The openai client adds up numbers likewise, and of a field of the choice that it does not know
# (token_ids, stop_reason) it keeps what the choice's first chunk says, and loses one that comes later.
# So a server says a role, an id and a name once, and trainers do not read token_ids from get_final_completion().
#
# Seen: a call in two chunks with the name in both; three chunks with the role, and with one of three token ids each.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile openai==3.57.0 langchain-openai==1.7.4 "pydantic-ai-slim[openai]==2.68.0"
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
from langchain_openai import ChatOpenAI
from pydantic_ai.messages import ModelRequest, UserPromptPart
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


def call(arguments, name="wind"):
    function = {"arguments": arguments} | ({"name": name} if name else {})
    return {"tool_calls": [{"index": 0, "function": function} | ({"id": "call_1", "type": "function"} if name else {})]}


streams = {
    "once": [({"role": "assistant"} | call('{"at"'), {}), (call(": 1}", None), {}), ({}, {"finish_reason": "tool_calls"})],
    "twice": [({"role": "assistant"} | call('{"at"'), {}), (call(": 1}"), {}), ({}, {"finish_reason": "tool_calls"})],
    "words": [
        ({"role": "assistant", "content": "north "}, {"token_ids": [1]}),
        ({"role": "assistant", "content": "wind"}, {"token_ids": [2]}),
        ({"role": "assistant"}, {"token_ids": [3], "stop_reason": 3, "finish_reason": "stop"}),
    ],
}


class Server(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        head = {"id": "chatcmpl-1", "created": 1, "model": "m", "object": "chat.completion.chunk"}
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for delta, beside in streams[body["messages"][-1]["content"]]:
            chunk = {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None, **beside}]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"


def by_openai(text):
    client = openai.OpenAI(base_url=url, api_key="none")
    with client.chat.completions.stream(model="m", messages=[{"role": "user", "content": text}]) as stream:
        return stream.get_final_completion().choices[0]


def by_langchain(text):
    whole = None
    for chunk in ChatOpenAI(base_url=url, api_key="none", model="m").stream(text):
        whole = chunk if whole is None else whole + chunk
    return whole


async def by_pydantic(text):
    model = OpenAIChatModel("m", provider=OpenAIProvider(base_url=url, api_key="none"))
    asked = [ModelRequest(parts=[UserPromptPart(text)])]
    async with model.request_stream(asked, None, ModelRequestParameters()) as stream:
        async for _ in stream:
            pass
        return stream.get()


for text, name in (("once", "wind"), ("twice", "windwind")):
    message = by_openai(text).message
    of_openai, chain, (part,) = message.tool_calls[0], by_langchain(text).tool_calls[0], asyncio.run(by_pydantic(text)).parts
    print(text, (of_openai.function.name, of_openai.id, message.role), chain, (part.tool_name, part.tool_call_id, part.args))
    assert of_openai.function.name == chain["name"] == part.tool_name == name
    assert of_openai.id == ("call_1" if text == "once" else "call_1call_1") and message.role == "assistant"
    assert json.loads(of_openai.function.arguments) == chain["args"] == json.loads(part.args) == {"at": 1}
choice = by_openai("words")
print(choice.message.role, choice.message.content, choice.finish_reason, choice.model_extra)
assert (choice.message.role, choice.message.content) == ("assistant" * 3, "north wind")
assert choice.model_extra == {"token_ids": [1]} and choice.finish_reason == "stop"
PY

#!/usr/bin/env bash
# langchain-openai 1.7.4 and pydantic-ai-slim 2.68.0 (both MIT): where each chunk of a stream has a usage, they add them up.
# Servers that write one into every chunk (vLLM's continuous_usage_stats, several hosted ones by themselves) write the
# tokens so far, as nothing else would fit the field's name; so the prompt counts once for each chunk and the answer's
# tokens grow with the square of their number. openai's own stream() and openai-agents take the last one. (pydantic-ai
# has openai_continuous_usage_stats for it, which asks the server for them as well; langchain-openai has nothing.)
# Budgets, bills and tokens a second that come from these counts are off by as many times as there are chunks. So a server
# writes a running usage for those alone who ask for it. Nothing is said.
#
# Seen, a prompt of 10 tokens, an answer of 4 in 4 chunks: 40 and 10 (1 + 2 + 3 + 4) tokens, where the last chunk says 10
# and 4, which is what openai and openai-agents 0.24.0 have; with the usage in the last chunk alone all have 10 and 4.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile openai==3.57.0 langchain-openai==1.7.4 openai-agents==0.24.0 \
    "pydantic-ai-slim[openai]==2.68.0"
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
from agents import Agent, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from langchain_openai import ChatOpenAI
from pydantic_ai.messages import ModelRequest, UserPromptPart
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Server(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        running = "running" in json.dumps(body["messages"])
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for count, text in enumerate(("north ", "wind ", "and ", "sun"), 1):
            delta = {"content": text} | ({"role": "assistant"} if count == 1 else {})
            choice = {"index": 0, "delta": delta, "finish_reason": "stop" if count == 4 else None}
            usage = {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count}
            chunk = {"id": "chatcmpl-1", "created": 1, "model": "m", "object": "chat.completion.chunk", "choices": [choice]}
            chunk |= {"usage": usage} if running or count == 4 else {}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"
set_tracing_disabled(True)


def by_openai(text):
    client = openai.OpenAI(base_url=url, api_key="none")
    with client.chat.completions.stream(model="m", messages=[{"role": "user", "content": text}]) as stream:
        usage = stream.get_final_completion().usage
    return usage.prompt_tokens, usage.completion_tokens


async def by_agents(text):
    model = OpenAIChatCompletionsModel("m", openai.AsyncOpenAI(base_url=url, api_key="none"))
    run = Runner.run_streamed(Agent(name="a", model=model), text)
    async for _ in run.stream_events():
        pass
    return run.raw_responses[0].usage.input_tokens, run.raw_responses[0].usage.output_tokens


def by_langchain(text):
    whole = None
    for chunk in ChatOpenAI(base_url=url, api_key="none", model="m").stream(text):
        whole = chunk if whole is None else whole + chunk
    return whole.usage_metadata["input_tokens"], whole.usage_metadata["output_tokens"]


async def by_pydantic(text):
    model = OpenAIChatModel("m", provider=OpenAIProvider(base_url=url, api_key="none"))
    asked = [ModelRequest(parts=[UserPromptPart(text)])]
    async with model.request_stream(asked, None, ModelRequestParameters()) as stream:
        async for _ in stream:
            pass
        usage = stream.get().usage
    return usage.input_tokens, usage.output_tokens


for text, summed in (("last", (10, 4)), ("running", (40, 10))):
    seen = [by_openai(text), asyncio.run(by_agents(text)), by_langchain(text), asyncio.run(by_pydantic(text))]
    print(f"{text}: openai, openai-agents, langchain-openai, pydantic-ai: {seen}")
    assert seen == [(10, 4), (10, 4), summed, summed]
PY

#!/usr/bin/env bash
# llama-index-llms-openai 0.8.3 with llama-index-core 0.14.25 (both MIT): close() of a stream that stream_chat or
# stream_complete gave, and aclose() of astream_chat's, end the outer of several generators, each of which holds the next
# one. The innermost, which has the connection, is not closed: nobody reads it, and it stays open. A server that ends a
# request when its client goes away sees no one go: it generates to the end, holds the request's place and its cache, and
# the tokens count. The synchronous one is let go when the last reference to the generator is, the asynchronous one not even
# then; only the cancelling of a task that waits for the next piece ends it. openai's own stream, which is below all of
# that, closes at once. So "stop" in an application made with it stops nothing but the display, and a bound on
# max_tokens is what a server has against it. Nothing is said.
#
# Seen: of 100 chunks, 20 ms apart, how many the server had sent when it met a closed connection, after 2 were read and the
# stream was closed: a few for openai and for a cancelled task, all of them otherwise. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile llama-index-llms-openai-like==0.8.1 llama-index-llms-openai==0.8.3 \
    llama-index-core==0.14.25
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
import asyncio
import gc
import json
import queue
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

ended = queue.Queue()


class Server(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        head = {"id": "chatcmpl-1", "created": 1, "model": "m", "object": "chat.completion.chunk"}
        sent = 0
        try:
            while sent < 100:
                choice = {"index": 0, "delta": {"role": "assistant", "content": f"{sent} "}, "finish_reason": None}
                self.wfile.write(f"data: {json.dumps({**head, 'choices': [choice]})}\n\n".encode())
                sent += 1
                time.sleep(0.02)
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        ended.put(sent)


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"
model = OpenAILike(model="m", api_base=url, api_key="none", is_chat_model=True)
asked = [ChatMessage(role="user", content="Count.")]


def see(name, sent, whole):
    print(f"{name}: {sent} of 100")
    assert (sent == 100) == whole


def begin(stream):
    next(iter(stream))
    next(iter(stream))
    return stream


async def begin_async():
    stream = await model.astream_chat(asked)
    await anext(stream)
    await anext(stream)
    return stream


async def read():
    async for _ in await model.astream_chat(asked):
        pass


async def by_async():
    stream = await begin_async()
    await stream.aclose()
    see("astream_chat, aclose()", await asyncio.to_thread(ended.get), True)
    stream = await begin_async()
    await stream.aclose()
    del stream
    gc.collect()
    see("astream_chat, aclose() and let go", await asyncio.to_thread(ended.get), True)
    task = asyncio.create_task(read())
    await asyncio.sleep(0.5)
    task.cancel()
    see("astream_chat, the task cancelled", await asyncio.to_thread(ended.get), False)


client = openai.OpenAI(base_url=url, api_key="none")
stream = begin(client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Count."}], stream=True))
stream.close()
see("openai, close()", ended.get(), False)
for name, start in (("stream_chat", lambda: model.stream_chat(asked)), ("stream_complete", lambda: model.stream_complete("Count."))):
    stream = begin(start())
    stream.close()
    see(f"{name}, close()", ended.get(), True)
    stream = begin(start())
    stream.close()
    del stream
    gc.collect()
    see(f"{name}, close() and let go", ended.get(), False)
asyncio.run(by_async())
PY

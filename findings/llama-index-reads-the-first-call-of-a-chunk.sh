#!/usr/bin/env bash
# llama-index-llms-openai 0.8.3 with llama-index-llms-openai-like 0.8.1 (both MIT): of the tool calls in one chunk of a stream
# the first alone is read, though the field is a list; the others are dropped. A server that parses a model's calls when
# they are complete, or two of whose tokens share a chunk (speculation, a busy moment), sends the end of one call beside
# the beginning of the next: then the second call has its arguments, and neither a name nor an id. Calls whose pieces come
# by turns fall apart likewise, for a piece is put to the last call or made a call of its own, whatever its index says.
# The same calls without stream are all there, and one call a chunk, as OpenAI sends them, is read rightly. So a server
# gives each call of a chunk a chunk of its own. Nothing is said; the agent runs the one tool and goes on.
#
# Seen: two calls in five forms of stream and without, allow_parallel_tool_calls=True. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile llama-index-llms-openai-like==0.8.1 llama-index-llms-openai==0.8.3 \
    llama-index-core==0.14.25
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

oslo = '{"city": "Oslo"}'


def call(index, name=None, arguments=""):
    head = {"id": f"call_{index}", "type": "function"} if name else {}
    return {"index": index, **head, "function": {"arguments": arguments} | ({"name": name} if name else {})}


streams = {
    "one a chunk": [[call(0, "weather", oslo)], [call(1, "time", oslo)]],
    "in pieces": [[call(0, "weather")], [call(0, None, oslo)], [call(1, "time")], [call(1, None, oslo)]],
    "two in a chunk": [[call(0, "weather", oslo), call(1, "time", oslo)]],
    "end and beginning": [[call(0, "weather", oslo[:9])], [call(0, None, oslo[9:]), call(1, "time")], [call(1, None, oslo)]],
    "by turns": [[call(0, "weather")], [call(1, "time")], [call(0, None, oslo)], [call(1, None, oslo)]],
}


class Server(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        head = {"id": "chatcmpl-1", "created": 1, "model": "m"}
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if body.get("stream") else "application/json")
        self.end_headers()
        if body.get("stream"):
            for calls in [*streams[body["messages"][-1]["content"]], None]:
                delta = {"tool_calls": calls} if calls else {}
                choice = {"index": 0, "delta": delta, "finish_reason": None if calls else "tool_calls"}
                chunk = {**head, "object": "chat.completion.chunk", "choices": [choice]}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            calls = [{key: value for key, value in part.items() if key != "index"} for part in streams["two in a chunk"][0]]
            choice = {"index": 0, "message": {"role": "assistant", "tool_calls": calls}, "finish_reason": "tool_calls"}
            self.wfile.write(json.dumps({**head, "object": "chat.completion", "choices": [choice]}).encode())


def weather(city: str) -> str:
    """The weather of a city."""
    return "sun"


def time(city: str) -> str:
    """The time of a city."""
    return "noon"


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
model = OpenAILike(
    model="m", api_base=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", is_chat_model=True,
    is_function_calling_model=True,
)
given = {"tools": [FunctionTool.from_defaults(tool) for tool in (weather, time)], "allow_parallel_tool_calls": True}


def calls(response):
    found = model.get_tool_calls_from_response(response, error_on_no_tool_call=False)
    return [(one.tool_id, one.tool_name, one.tool_kwargs) for one in found]


both = [("call_0", "weather", {"city": "Oslo"}), ("call_1", "time", {"city": "Oslo"})]
nameless = ("", "", {"city": "Oslo"})
expected = {
    "one a chunk": both,
    "in pieces": both,
    "two in a chunk": both[:1],
    "end and beginning": [both[0], nameless],
    "by turns": [("call_0", "weather", {}), ("call_1", "time", {}), nameless, nameless],
}
for form in streams:
    seen = calls(list(model.stream_chat_with_tools(user_msg=form, **given))[-1])
    print(f"{form}: {seen}")
    assert seen == expected[form]
seen = calls(model.chat_with_tools(user_msg="whole", **given))
print("without stream:", seen)
assert seen == both
PY

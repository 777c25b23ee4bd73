#!/usr/bin/env bash
# anthropic 2.14.0 (MIT), the Python client, messages.stream(): when max_tokens ends an answer amid the arguments of a tool,
# the message that get_final_message() and the content_block_stop event give has an input like any other. The JSON was cut,
# and what there is of it is read: a number counts as far as it has come, so 1500 that was cut after two digits is
# 15; a list has the elements so far; a string that was cut is left out with its key. No error, no mark on the block: only
# stop_reason, which arrives after the block has ended, tells. (The client's own tool runner looks at it and does not run
# the tool.) One would expect a broken JSON to be an error, as json.loads of the same text is.
#
# Seen: the input of each cut text, against a server of a few lines. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile anthropic==2.14.0
"$dir/venv/bin/python" - <<'PY'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anthropic

cut = {
    '{"to": "ann", "amount": 15': {"to": "ann", "amount": 15},
    '{"keep": ["a", "b"], "drop": ["c", "d': {"keep": ["a", "b"], "drop": ["c"]},
    '{"amount": 1500, "currency": "EU': {"amount": 1500},
    '{"factor": 0.2': {"factor": 0.2},
}


class Server(BaseHTTPRequestHandler):
    """Answers with a call whose arguments are the text of the request, in two pieces, ended by max_tokens."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text, usage = body["messages"][0]["content"], {"input_tokens": 9, "output_tokens": 9}
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [], "usage": usage}
        tool = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}
        events = [{"type": "message_start", "message": {**message, "stop_reason": None, "stop_sequence": None}}]
        events.append({"type": "content_block_start", "index": 0, "content_block": tool})
        for piece in (text[:9], text[9:]):
            delta = {"type": "input_json_delta", "partial_json": piece}
            events.append({"type": "content_block_delta", "index": 0, "delta": delta})
        events.append({"type": "content_block_stop", "index": 0})
        delta = {"stop_reason": "max_tokens", "stop_sequence": None}
        events += [{"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for event in events:
            self.wfile.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.server_port}", api_key="none", max_retries=0)
for text, expected in cut.items():
    try:
        json.loads(text)
    except ValueError:
        pass
    else:
        raise SystemExit("the text is whole")
    with client.messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": text}]) as stream:
        ended = [event.content_block.input for event in stream if event.type == "content_block_stop"]
        final = stream.get_final_message()
    print(text, "->", final.content[0].input, final.stop_reason)
    assert ended == [final.content[0].input] == [expected] and final.stop_reason == "max_tokens"
PY

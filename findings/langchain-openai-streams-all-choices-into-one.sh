#!/usr/bin/env bash
# langchain-openai 1.7.4 (MIT): ChatOpenAI(n=2).stream() asks the server for two choices and puts the pieces of both into
# one message, in the order of their arrival: two sentences word by word through each other, with a finish reason that is
# both of them joined. The chunks carry no index by which to part them. ChatOpenAI(n=2, streaming=True) is an error,
# and a plain invoke() is the first choice alone, so one would expect either here. Whatever is built on a chain that
# streams (an agent, a server's own route, astream_events) gives its user that text. Nothing is said.
#
# Seen: the text and finish reason of stream(), of invoke(), and of both choices by generate(); the ValueError of
# streaming=True. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile openai==3.57.0 langchain-openai==1.7.4
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

texts = (("The ", "wind ", "turned."), ("A ", "mill ", "stood."))
reasons = ("stop", "length")


class Server(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert body["n"] == 2
        head = {"id": "chatcmpl-1", "created": 1, "model": "m"}
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if body.get("stream") else "application/json")
        self.end_headers()
        if body.get("stream"):
            for place in range(3):
                for index, words in enumerate(texts):
                    delta = {"content": words[place]} | ({} if place else {"role": "assistant"})
                    choice = {"index": index, "delta": delta, "finish_reason": reasons[index] if place == 2 else None}
                    chunk = {**head, "object": "chat.completion.chunk", "choices": [choice]}
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            choices = [
                {"index": n, "message": {"role": "assistant", "content": "".join(words)}, "finish_reason": reasons[n]}
                for n, words in enumerate(texts)
            ]
            self.wfile.write(json.dumps({**head, "object": "chat.completion", "choices": choices}).encode())


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
given = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "api_key": "none", "model": "m", "n": 2}
model = ChatOpenAI(**given)
pieces = list(model.stream("A sentence."))
whole = sum(pieces[1:], pieces[0])
invoked = model.invoke("A sentence.")
both = [choice.text for choice in model.generate([[HumanMessage("A sentence.")]]).generations[0]]
try:
    ChatOpenAI(**given, streaming=True)
    refused = None
except ValueError as error:
    refused = str(error)
print("stream():", repr(whole.content), whole.response_metadata["finish_reason"], [piece.content for piece in pieces])
print("invoke():", repr(invoked.content), "generate():", both)
print("streaming=True:", refused)
assert whole.content == "The A wind mill turned.stood." and whole.response_metadata["finish_reason"] == "stoplength"
assert not any("index" in piece.response_metadata or "index" in piece.additional_kwargs for piece in pieces)
assert invoked.content == "The wind turned." and both == ["The wind turned.", "A mill stood."]
assert refused is not None and "n must be 1 when streaming" in refused
PY

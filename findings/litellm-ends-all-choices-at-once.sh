#!/usr/bin/env bash
# litellm 1.106.12 (MIT), between clients and servers of the OpenAI form (here its provider for vLLM): a stream of several
# choices, n=2 or more, has one finish_reason. It is the first that the server sent, and it is given to choice 0, whichever
# choice had ended; those of all others are dropped, a "length" among them. So choice 0 is reported as cut amid its
# text and goes on afterwards, and a choice that was cut never ends. The texts themselves arrive under their own index.
# Whoever keeps only answers that ended by themselves (sampling for a vote, rollouts) keeps or throws away the wrong ones.
# Without stream each choice has its own reason, and one choice alone streams rightly. Nothing is said.
#
# Seen: a server of a few lines ends choice 1 by "length", then choice 0 by "stop"; what arrives is a "length" for choice 0
# amid its text, no reason for choice 1, and no "stop". Both reasons in one chunk: that of choice 0 alone arrives.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile litellm==1.106.12
LITELLM_LOCAL_MODEL_COST_MAP=True "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import litellm


def choice(index, text=None, reason=None):
    return {"index": index, "delta": {"content": text} if text else {}, "finish_reason": reason}


streams = {
    "one after another": [
        [choice(0, "north ")], [choice(1, "south ")], [choice(1, reason="length")], [choice(0, "wind")], [choice(0, reason="stop")],
    ],
    "at once": [[choice(0, "north")], [choice(1, "south")], [choice(0, reason="stop"), choice(1, reason="length")]],
    "alone": [[choice(0, "north ")], [choice(0, "wind")], [choice(0, reason="length")]],
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
            for choices in streams[body["messages"][0]["content"]]:
                chunk = {**head, "object": "chat.completion.chunk", "choices": choices}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            message = {"role": "assistant", "content": "north"}
            choices = [{"index": n, "message": message, "finish_reason": reason} for n, reason in enumerate(("stop", "length"))]
            usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
            self.wfile.write(json.dumps({**head, "object": "chat.completion", "choices": choices, "usage": usage}).encode())


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()


def ask(text, n, stream):
    return litellm.completion(
        model="hosted_vllm/m", api_base=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", n=n, stream=stream,
        messages=[{"role": "user", "content": text}],
    )


def streamed(text, n):
    parts = [part for chunk in ask(text, n, True) for part in chunk.choices]
    texts = {index: "".join(part.delta.content or "" for part in parts if part.index == index) for index in range(n)}
    reasons = [(part.index, part.finish_reason) for part in parts if part.finish_reason]
    after = "".join(part.delta.content or "" for part in parts[[bool(part.finish_reason) for part in parts].index(True) :])
    print(f"{text}: texts {texts}, reasons {reasons}, text after the first reason {after!r}")
    return texts, reasons, after


whole = [(part.index, part.finish_reason) for part in ask("whole", 2, False).choices]
print("without stream:", whole)
assert whole == [(0, "stop"), (1, "length")]
assert streamed("one after another", 2) == ({0: "north wind", 1: "south "}, [(0, "length")], "wind")
assert streamed("at once", 2) == ({0: "north", 1: "south"}, [(0, "stop")], "")
assert streamed("alone", 1) == ({0: "north wind"}, [(0, "length")], "")
PY

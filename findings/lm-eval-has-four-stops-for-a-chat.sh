#!/usr/bin/env bash
# lm_eval 0.4.13 (MIT), the evaluation harness, model local-chat-completions: of a task's stop strings the first four are
# sent, as many as OpenAI takes, to whatever server it is; the others are neither sent nor looked for in the answer.
# The harness's own humaneval has five, and the one that is left out is "\nprint": the model goes on and what follows is
# run with the program. local-completions sends all of them, and the text of the end token behind them, but that only
# while it asks one at a time: with num_concurrent=2 the end is not among them, and a model that spells it out goes on.
# So the same model on the same server has other answers on its two endpoints, and by how many are asked at once,
# for which the server is not the cause. Nothing is said.
#
# Seen: the stop strings that a server gets, and the answer of one that keeps them. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile "lm_eval[api]==0.4.13"
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files

import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

written = "    return a + b\nprint(add(1, 2))<end>\nassert add(1, 2) == 4"
stops = []


class Server(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        stops.append(json.loads(self.rfile.read(int(self.headers["content-length"])))["stop"])
        text = written
        for stop in stops[-1]:
            text = text.split(stop)[0]
        choice = {"index": 0, "text": text, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [choice]}).encode())


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()


def ask(kind, place, prompt, until, **given):
    model = kind(
        base_url=f"http://127.0.0.1:{server.server_port}/v1/{place}", model="m", tokenizer_backend="none",
        eos_string="<end>", max_retries=1, **given,
    )
    (answer,) = model.generate_until([Instance("generate_until", {}, (prompt, {"until": list(until)}), 0)])
    print(place, given, stops[-1], "->", repr(answer))
    return stops[-1], answer


task = files("lm_eval").joinpath("tasks/humaneval/humaneval.yaml").read_text()
five = yaml.load(task.replace("!function", ""), yaml.SafeLoader)["generation_kwargs"]["until"]
print("humaneval:", five)
assert five[4:] == ["\nprint"]
chat = JsonChatStr(json.dumps([{"role": "user", "content": "def add(a, b):"}]))
for given in ({}, {"num_concurrent": 2}):
    assert ask(LocalChatCompletion, "chat/completions", chat, five, **given) == (five[:4], written)
whole = "    return a + b"
assert ask(LocalCompletionsAPI, "completions", "def add(a, b):", five) == ([*five, "<end>"], whole)
assert ask(LocalCompletionsAPI, "completions", "def add(a, b):", five, num_concurrent=2) == (five, whole)
assert ask(LocalCompletionsAPI, "completions", "def add(a, b):", five[:1]) == ([five[0], "<end>"], written.split("<end>")[0])
assert ask(LocalCompletionsAPI, "completions", "def add(a, b):", five[:1], num_concurrent=2) == (five[:1], written)
PY

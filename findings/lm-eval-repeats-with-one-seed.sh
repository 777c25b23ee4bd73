#!/usr/bin/env bash
# lm_eval 0.4.13 (MIT), the evaluation harness, its models that ask a server (local-completions, local-chat-completions
# and those built on them): a task with repeats (pass@k, a vote over samples) sends each of them as a request of its own,
# all with the same "seed", 1234 unless another is given. A server that keeps a request's seed, as OpenAI's form has it,
# answers each with the same text: k samples are one, pass@64 is pass@1 and a vote is always unanimous, at any temperature.
# On a server that passes the field over the very same run is right. Nothing is said, and the scores look plausible;
# leaving the seed out is not among the arguments: no value of them stands for none.
#
# Seen: 8 repeats at temperature 0.8 are 8 requests with seed 1234, and a server that draws one of four words by the
# seed gives one word 8 times; seed=None is a TypeError. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile "lm_eval[api]==0.4.13"
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import lm_eval
from lm_eval.models.openai_completions import LocalChatCompletion

asked = []


class Server(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked.append((body["temperature"], body.get("seed")))
        word = random.Random(body.get("seed")).choice(["north", "south", "east", "west"])
        choice = {"index": 0, "message": {"role": "assistant", "content": word}, "finish_reason": "stop"}
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [choice]}).encode())


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
task = {
    "task": "wind",
    "custom_dataset": lambda **given: {"test": datasets.Dataset.from_list([{"question": "Which wind?", "answer": "north"}])},
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "repeats": 8,
    "generation_kwargs": {"do_sample": True, "temperature": 0.8, "until": ["\n"]},
    "metric_list": [{"metric": "exact_match"}],
    "filter_list": [{"name": "all", "filter": [{"function": "take_first_k", "k": 8}]}],
}


def ask(**given):
    asked.clear()
    url = f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
    model = LocalChatCompletion(base_url=url, model="m", max_retries=1, **given)
    found = lm_eval.simple_evaluate(model, tasks=[task], apply_chat_template=True, log_samples=True, bootstrap_iters=0)
    answers = found["samples"]["wind"][0]["resps"][0]
    print(given, asked, answers)
    return asked, answers


for given, seed in (({}, 1234), ({"num_concurrent": 4}, 1234), ({"seed": 7}, 7)):
    sent, answers = ask(**given)
    assert sent == [(0.8, seed)] * 8 and len(answers) == 8 and len(set(answers)) == 1
try:
    ask(seed=None)
except TypeError as error:
    print("seed=None:", error)
else:
    raise AssertionError("None is taken")
PY

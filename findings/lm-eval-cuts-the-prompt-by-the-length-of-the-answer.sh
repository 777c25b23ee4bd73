#!/usr/bin/env bash
# lm_eval 0.4.13 (MIT), the evaluation harness, model local-completions: a prompt is cut from its left to the last
# max_length - max_gen_toks tokens (2047 less the task's, unless max_length is given). The sign of that difference is not
# looked at: where a task asks for more tokens than max_length holds, it is the first ones that are taken away, as many as
# are too many, whatever the prompt's length. So a short question is sent as an empty list of tokens, which a server
# refuses or answers from nothing, and a long one loses its beginning though it was meant to be cut elsewhere. 32768 tokens
# for an answer, as the harness's own task aime has, empty every prompt; 2048, as its mmlu_pro has, cost the first token.
# The warning is printed for such tasks alone: it compares what is left after the cut, so a prompt that was
# cut as it should be says nothing. A score of such a run is not the model's; max_length must be the server's.
#
# Seen, max_length as it comes, prompts of numbered words: tokens that the server gets of 3,000 with 256 for the answer:
# the last 1,791, no warning; of 100 with 2,047: all; with 2,048: 99, the first is missing; with 32,768: none; of 3,000
# with 4,096: the last 951. With max_length=40000 all arrive. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile "lm_eval[api]==0.4.13" transformers==5.24.0 tokenizers==0.23.3
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

bodies, warnings = [], []


class Server(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"index": 0, "text": "north", "finish_reason": "stop"}]}).encode())


class Listener(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())


logging.getLogger("lm_eval.models.api_models").addHandler(Listener(logging.WARNING))
server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(3000)} | {"<unk>": 3000, "</s>": 3001}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained("words")


def ask(length, answer, **limits):
    bodies.clear()
    warnings.clear()
    model = LocalCompletionsAPI(
        base_url=f"http://127.0.0.1:{server.server_port}/v1/completions", model="m", tokenizer="words",
        tokenizer_backend="huggingface", max_retries=1, **limits,
    )
    text = " ".join(f"w{n}" for n in range(length))
    model.generate_until([Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": answer}), 0)])
    (sent,) = bodies[0]["prompt"]
    print(f"prompt {length}, answer {answer}, {limits}: {len(sent)} tokens from {sent[:1]}, warned: {bool(warnings)}")
    return len(sent), sent[:1], bool(warnings)


assert ask(3000, 256) == (1791, [1209], False)
assert ask(100, 2047) == (100, [0], True)
assert ask(100, 2048) == (99, [1], True)
assert ask(100, 32768) == (0, [], True)
assert ask(3000, 4096) == (951, [2049], True)
assert ask(100, 32768, max_length=40000) == (100, [0], False)
PY

#!/usr/bin/env bash
# lm_eval 0.4.13 (MIT), the evaluation harness: its model hf encodes a text as the tokenizer does by itself, with the token
# for the beginning where the model was trained with one (Llama, Gemma, Mistral). local-completions, which asks a server about
# the same model, sends tokens, and leaves that one out: add_bos_token is None for the one and False for the other, and
# a server adds nothing to tokens. So a model that is served without a fault has other scores than its own, by as much as
# it rests on that token, and the engine is blamed. add_bos_token=True gives what the tokenizer does by itself.
# Whoever compares an engine with transformers by this harness sets it first. Nothing is said.
#
# Seen, a small random model and a server that computes with that very model: hf gives it <s> and the words,
# local-completions the words alone; the log-likelihoods differ by more than a tenth, and by less than 1e-4 with
# add_bos_token=True. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile "lm_eval[api]==0.4.13" transformers==5.24.0 tokenizers==0.23.3 torch==2.13.0 \
    accelerate==1.15.0 peft==0.21.2 numpy
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, bos_token_id=62, eos_token_id=63,
)).eval()
for weight in model.parameters():
    if weight.dim() == 2:
        torch.nn.init.normal_(weight, std=0.3)
words = [*(f"w{number}" for number in range(61)), "<unk>", "<s>", "</s>"]
made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 62)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
tokenizer.save_pretrained("model")
asked = []


def watched(function):
    def forward(ids, *args, **given):
        asked.append(ids[0].tolist())
        return function(ids, *args, **given)

    return forward


class Server(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        (ids,) = json.loads(self.rfile.read(int(self.headers["content-length"])))["prompt"]
        with torch.no_grad():
            rows = compute(torch.tensor([ids])).logits[0].log_softmax(-1)
        ids.append(int(rows[-1].argmax()))
        own = [None, *(float(row[one]) for row, one in zip(rows, ids[1:]))]
        best = [None, *({words[int(row.argmax())]: float(row.max())} for row in rows)]
        shown = {"tokens": [words[one] for one in ids], "token_logprobs": own, "top_logprobs": best, "text_offset": []}
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"index": 0, "text": "", "logprobs": shown}]}).encode())


model.forward = compute = watched(model.forward)
server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()


def score(name, made):
    asked.clear()
    ((likelihood, _),) = made.loglikelihood([Instance("loglikelihood", {}, ("w1 w2 w3 w4", " w5 w6"), 0)])
    print(f"{name}: {likelihood:.4f}, the model got {asked[-1]}")
    return likelihood, asked[-1]


served = {"base_url": f"http://127.0.0.1:{server.server_port}/v1/completions", "model": "m", "tokenizer": "model"}
served |= {"tokenizer_backend": "huggingface", "max_retries": 1}
right, ids = score("hf", HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1))
seen, sent = score("local-completions", LocalCompletionsAPI(**served))
mended, whole = score("local-completions, add_bos_token=True", LocalCompletionsAPI(**served, add_bos_token=True))
assert ids == [62, 1, 2, 3, 4, 5] and sent == [1, 2, 3, 4, 5, 6] and whole == [62, 1, 2, 3, 4, 5, 6]
assert abs(seen - right) > 0.1 and abs(mended - right) < 1e-4
PY

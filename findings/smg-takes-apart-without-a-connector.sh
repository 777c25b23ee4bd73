#!/usr/bin/env bash
# smg 1.13.0: `smg launch --pd-disaggregation --prefill URL --decode URL` before servers that answer as vLLM does sends
# each prompt to both, and says to neither that the pages of the first are for the second: no kv_transfer_params. Both
# compute the whole prompt, and nothing is logged or wrong in the answer. The flags have no word for the connector; a
# worker that is added by POST /workers with "kv_connector": "NixlConnector" is asked for them, and the decoder is told.
#
# Seen: the kv_transfer_params that two servers of a few lines get, by the flags and by POST /workers.
# Needs python3 and pip. Exits with 1 when this has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'smg==1.13.0'
cat > "$work/apart.py" <<'PY'
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEPT = {"do_remote_prefill": True, "remote_engine_id": "e", "remote_block_ids": [1], "remote_host": "127.0.0.1", "remote_port": 1}
seen = {}


class Worker(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def answer(self, fields):
        data = json.dumps(fields).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/v1/models":
            return self.answer({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm", "max_model_len": 4096}]})
        return self.answer({"version": "0.33.0"} if self.path == "/version" else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        params = seen[self.server.name] = body.get("kv_transfer_params")
        message = {"role": "assistant", "content": "Hi"}
        told = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
        told["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
        told["usage"] = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        self.answer(told | ({"kv_transfer_params": KEPT} if params and params.get("do_remote_decode") else {}))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def asked(flags, added):
    """What each worker was told for one chat."""
    seen.clear()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    command = [sys.executable, "-m", "smg", "launch", "--pd-disaggregation", *words, *flags]
    router = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            time.sleep(0.3)
            try:
                if added:
                    for worker in added:
                        post(f"{url}/workers", worker)
                    added = None
                with urllib.request.urlopen(f"{url}/workers", timeout=5) as response:
                    if sum(worker["is_healthy"] for worker in json.load(response)["workers"]) == 2:
                        break
            except OSError:
                continue
        post(f"{url}/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "Hi"}]})
        return seen["prefill"], seen["decode"]
    finally:
        router.terminate()
        router.wait(60)


urls = {}
for name in ("prefill", "decode"):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Worker)
    server.name = name
    urls[name] = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
flags = asked(["--prefill", urls["prefill"], "--decode", urls["decode"]], None)
added = asked([], [
    {"url": urls["prefill"], "worker_type": "prefill", "kv_connector": "NixlConnector"},
    {"url": urls["decode"], "worker_type": "decode"},
])
print(f"by flags: prefill {flags[0]}, decode {flags[1]}")
print(f"by POST /workers: prefill {added[0]}, decode {added[1]}")
sys.exit(not (flags == (None, None) and added[0]["do_remote_decode"] and added[1] == KEPT))
PY
"$work/venv/bin/python" "$work/apart.py"

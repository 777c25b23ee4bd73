#!/usr/bin/env bash
# Claude Code 2.1.197 (@anthropic-ai/claude-code, runs without a login against any ANTHROPIC_BASE_URL): the first block of
# its system prompt is a line of accounting, "x-anthropic-billing-header: ...", and a part of it changes with the user's
# first message. It stands before everything else, so two sessions share no prefix beyond it: a server that caches the
# keys and values of common prefixes computes some 20,000 equal tokens anew for each session, unless it leaves it out.
#
# Seen: two sessions that differ in the user's words alone differ in the first system block, and in no other one.
# Needs node 20 and npm. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$dir"' EXIT
cd "$dir"
npm install --silent --no-audit --no-fund @anthropic-ai/claude-code@2.1.197 >/dev/null

cat > record.py <<'PY'
import http.server, json

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        # The request of the session itself is the one with tools; others ask for a title.
        if body.get("tools"):
            with open("requests", "a") as file:
                print(json.dumps([block["text"] for block in body["system"]]), file=file)
        answer = b'{"type": "error", "error": {"type": "invalid_request_error", "message": "only recorded"}}'
        self.send_response(400)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
with open("port", "w") as file:
    file.write(str(server.server_port))
server.serve_forever()
PY
python3 record.py & server=$!
for _ in $(seq 100); do [ -s port ] && break; sleep 0.1; done

export HOME="$dir/home" ANTHROPIC_API_KEY=none ANTHROPIC_MODEL=some-model CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1
export ANTHROPIC_BASE_URL="http://127.0.0.1:$(cat port)" CLAUDE_CODE_MAX_RETRIES=0
mkdir -p "$HOME" work
cd work
for words in "What is in this folder?" "Please write a haiku about rain."; do
  timeout 90 ../node_modules/.bin/claude -p "$words" </dev/null >/dev/null 2>&1 || true
done
cd ..

python3 - <<'PY'
import json

first, second = [json.loads(line) for line in open("requests")][:2]
print("first session: ", first[0])
print("second session:", second[0])
differing = [index for index, (a, b) in enumerate(zip(first, second)) if a != b]
print("differing system blocks:", differing, "of", len(first))
assert first[0].startswith("x-anthropic-billing-header") and len(first) == len(second) and differing == [0]
PY

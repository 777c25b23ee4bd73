#!/usr/bin/env bash
# Codex CLI 0.171.0 (@openai/codex, Apache-2.0), default settings, any provider with wire_api="responses":
# its first request declares tools that are not functions. One is of type "namespace", an object whose own "tools" are
# functions; a hosted one (web_search) comes along whatever the provider is. A server that takes {"type": "function"}
# alone, which is all that most clients send, cannot answer a single request.
#
# Seen (kinds of the tools of the first request, each once, sorted): function namespace web_search
# Needs node 20 and npm. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$dir"' EXIT
cd "$dir"
npm install --silent --no-audit --no-fund --ignore-scripts @openai/codex@0.171.0 >/dev/null

cat > record.py <<'PY'
import http.server, json

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open("kinds", "w") as file:
            file.write(" ".join(sorted({tool["type"] for tool in body["tools"]})))
        with open("namespaces", "w") as file:
            for tool in body["tools"]:
                if tool["type"] == "namespace":
                    print(tool["name"], *(inner["name"] for inner in tool["tools"]), file=file)
        answer = b'{"error": {"message": "only recorded", "type": "invalid_request_error"}}'
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

export HOME="$dir/home" DUMMY_KEY=none
mkdir -p "$HOME"
timeout 60 ./node_modules/.bin/codex exec --skip-git-repo-check -m some-model -c model_provider=local \
  -c "model_providers.local={name=\"local\",base_url=\"http://127.0.0.1:$(cat port)/v1\",wire_api=\"responses\",env_key=\"DUMMY_KEY\"}" \
  "Say hello." </dev/null >/dev/null 2>&1 || true

echo "kinds: $(cat kinds)"
echo "namespaces and their functions:"
cat namespaces
[ "$(cat kinds)" = "function namespace web_search" ]

#!/usr/bin/env bash
# ray 2.60.0: `ray.init(_node_ip_address="127.0.0.1")` starts a node with the machine's address in its network, and its
# daemons listen on all interfaces. On Linux the loopback address is replaced before it is used. What keeps it is the
# variable that lets Windows and macOS have clusters, set to 0 before ray is imported.
#
# Seen: the node has another address than it was given, and with RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 the given one.
# Needs Linux with an address beside 127.0.0.1, python3 and pip. Exits with 1 when this has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'ray==2.60.0'
cat > "$work/seen.py" <<'PY'
import ray

ray.init(_node_ip_address="127.0.0.1", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print(ray.util.get_node_ip_address())
ray.shutdown()
PY
export RAY_USAGE_STATS_ENABLED=0
given=$("$work/venv/bin/python" "$work/seen.py" 2>/dev/null | tail -1)
kept=$(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 "$work/venv/bin/python" "$work/seen.py" 2>/dev/null | tail -1)
echo "127.0.0.1 was given: the node is at $given, and with the variable at $kept"
[ "$given" != 127.0.0.1 ] && [ "$kept" = 127.0.0.1 ]

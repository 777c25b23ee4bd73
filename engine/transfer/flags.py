"""--kv-transfer-config, vLLM's object, and the options that it makes. Imports no numpy.

What would change what is done, and is not done here, ends the start with one line that names it.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from engine.config import StartupError, TransferOptions, shortened

FLAG = "--kv-transfer-config"
ROLES = ("kv_both", "kv_producer", "kv_consumer")
# vLLM's default port of the side channel, and the variables that say otherwise.
DEFAULT_PORT = 5600
DEFAULT_TIMEOUT_S = 120
_HOST_VARIABLE, _PORT_VARIABLE = "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT"
_TIMEOUT_VARIABLE = "VLLM_NIXL_ABORT_REQUEST_TIMEOUT"
# Taken where they ask for what is always so.
_FIXED: dict[str, tuple[object, ...]] = {
    "kv_buffer_device": ("cpu",),
    "kv_rank": (0,),
    "kv_parallel_size": (1,),
    "kv_load_failure_policy": ("recompute",),
    "kv_connector_module_path": (),
    "enable_permute_local_kv": (False,),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prefill and decode apart")
    group.add_argument(
        FLAG,
        dest="kv_transfer_config",
        metavar="JSON",
        help='vLLM\'s object, such as \'{"kv_connector": "NixlConnector", "kv_role": "kv_both"}\'',
    )


def options_from(args: argparse.Namespace) -> TransferOptions:
    """Raises StartupError."""
    if args.kv_transfer_config is None:
        return TransferOptions()
    try:
        given = json.loads(args.kv_transfer_config)
    except ValueError:
        raise StartupError(f"{FLAG}: '{shortened(args.kv_transfer_config)}' is not JSON") from None
    return parse(given, os.environ)


def parse(given: Any, environment: Mapping[str, str]) -> TransferOptions:
    """From vLLM's object. Raises StartupError."""
    if not isinstance(given, dict):
        raise StartupError(f"{FLAG} is not a JSON object")
    left = {key: value for key, value in given.items() if value is not None}
    extra = left.pop("kv_connector_extra_config", {})
    if not isinstance(extra, dict):
        raise StartupError(f"{FLAG}: kv_connector_extra_config must be an object")
    extra = dict(extra)
    known = {*_FIXED, "kv_connector_extra_config"}

    def take(where: dict[str, Any], key: str, default: Any, good: Callable[[Any], bool], what: str) -> Any:
        known.add(key if where is left else f"kv_connector_extra_config.{key}")
        value = where.pop(key, default)
        if value is not default and not good(value):
            raise StartupError(f"{FLAG}: {key} must be {what}, not {shortened(json.dumps(value))}")
        return value

    def integer(low: int, high: int) -> Callable[[Any], bool]:
        return lambda value: type(value) is int and low <= value <= high

    def number(low: float, high: float) -> Callable[[Any], bool]:
        return lambda value: type(value) in (int, float) and low < value <= high

    def text(value: Any) -> bool:
        return isinstance(value, str) and 0 < len(value) <= 256 and value.isprintable()

    connector = take(left, "kv_connector", None, text, "a name")
    if connector is None:
        raise StartupError(f"{FLAG}: kv_connector is missing")
    role = take(left, "kv_role", None, lambda value: value in ROLES, f"one of {', '.join(ROLES)}")
    if role is None:
        raise StartupError(f"{FLAG}: kv_role is missing; it is one of {', '.join(ROLES)}")
    host = take(left, "kv_ip", None, text, "an address") or environment.get(_HOST_VARIABLE) or "127.0.0.1"
    port = take(left, "kv_port", None, integer(0, 65535), "a port")
    if port is None:
        port = _number_of(environment, _PORT_VARIABLE, DEFAULT_PORT, 65535)
    timeout = take(extra, "timeout", None, number(0, 86_400), "a number of seconds up to 86400")
    if timeout is None:
        timeout = _number_of(environment, _TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S, 86_400)
    peers = take(
        extra, "peers", None, lambda value: isinstance(value, list) and all(map(_network, value)), "a list of networks"
    )
    receive = take(extra, "receive_timeout", None, number(0, 3600), "a number of seconds up to 3600")
    share = take(extra, "kept_share", None, number(0, 1), "a number above 0 and at most 1")
    backends = take(
        extra, "backends", None, lambda value: isinstance(value, list) and all(map(text, value)), "a list of names"
    )
    data_port = take(extra, "data_port", None, integer(0, 65535), "a port")
    engine_id = take(left, "engine_id", None, text, "a printable text")
    if backends is not None and connector != "NixlConnector":
        raise StartupError(f"{FLAG}: backends are the NixlConnector's")
    if data_port is not None and connector != "TcpConnector":
        raise StartupError(f"{FLAG}: data_port is the TcpConnector's")
    for key in list(left):
        if key in _FIXED:
            value = left.pop(key)
            if value not in _FIXED[key]:
                said = " or ".join(map(json.dumps, _FIXED[key])) or "nothing"
                raise StartupError(f"{FLAG}: {key} can only be {said} here, not {shortened(json.dumps(value))}")
    for unknown in (*left, *(f"kv_connector_extra_config.{key}" for key in extra)):
        raise StartupError(f"{FLAG}: '{shortened(unknown)}' is not known here; known are {', '.join(sorted(known))}")
    if _is_wildcard(host):
        raise StartupError(f"{FLAG}: kv_ip {host} is no address at which another server could find this one")
    others = {"keep_timeout_s": float(timeout), "receive_timeout_s": receive, "kept_share": share}
    others |= {"peers": None if peers is None else tuple(peers), "data_port": data_port}
    others |= {"backends": None if backends is None else tuple(backends)}
    given_others = {name: value for name, value in others.items() if value is not None}
    return TransferOptions(connector, role, engine_id, host, int(port), **given_others)


def _number_of(environment: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) <= most):
        raise StartupError(f"{name} must be a number up to {most}, not '{text[:100]}'")
    return int(text)


def _network(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(ipaddress.ip_network(value))
    except ValueError:
        return False


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False

"""`kv_transfer_params`: what a router says of a prompt's pages between servers, in vLLM's words."""

from __future__ import annotations

from itertools import chain
from typing import Any

from engine.request import RemotePages, Transfer
from server.protocol.body import Body, invalid
from server.state import State

NAME = "kv_transfer_params"
MAX_KEYS = 64
MAX_WORD = 256
MAX_BLOCKS = 1_000_000


def read_transfer(body: Body, state: State) -> Transfer | None:
    """None where nothing is to be done. Raises RequestError for what is malformed, and for what this server does not
    do; words that are missing are told of when the pages are wanted."""
    given = body.object(NAME)
    if not given:
        return None
    if len(given) > MAX_KEYS:
        raise invalid(NAME, f"must have at most {MAX_KEYS} keys")
    keep, reads = (_flag(given, name) for name in ("do_remote_decode", "do_remote_prefill"))
    engine_id, request_id, host = (_word(given, f"remote_{name}") for name in ("engine_id", "request_id", "host"))
    port = _port(given)
    num_pages = _num_blocks(given)
    _size(given)
    if keep and reads:
        raise invalid(NAME, "cannot ask for do_remote_decode and do_remote_prefill at once")
    options = state.engine.config.transfer
    if keep and not options.keeps:
        raise invalid(f"{NAME}.do_remote_decode", _needs("kv_producer"))
    if reads and not options.reads:
        raise invalid(f"{NAME}.do_remote_prefill", _needs("kv_consumer"))
    if keep:
        return Transfer(keep=True)
    return Transfer(source=RemotePages(engine_id, request_id, host, port, num_pages)) if reads else None


def _needs(role: str) -> str:
    return f"needs a server that runs with --kv-transfer-config and the kv_role {role} or kv_both"


def _flag(given: dict[str, Any], name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(f"{NAME}.{name}", "must be a boolean")
    return bool(value)


def _word(given: dict[str, Any], name: str) -> str | None:
    value = given.get(name)
    if value is not None and not (isinstance(value, str) and 0 < len(value) <= MAX_WORD):
        raise invalid(f"{NAME}.{name}", f"must be a string of 1 to {MAX_WORD} characters")
    return value


def _port(given: dict[str, Any]) -> int | None:
    """Routers that build it from text send text."""
    value = given.get("remote_port")
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 5:
        value = int(value)
    if value is not None and not (type(value) is int and 0 < value < 65536):
        raise invalid(f"{NAME}.remote_port", "must be an integer from 1 to 65535")
    return value


def _num_blocks(given: dict[str, Any]) -> int | None:
    """A list of ids, or one for each group of layers. Which they are the other server says itself."""
    value = given.get("remote_block_ids")
    if value is None:
        return None
    lists = value if isinstance(value, list) and value and all(isinstance(one, list) for one in value) else [value]
    if not all(isinstance(one, list) and len(one) <= MAX_BLOCKS for one in lists) or not all(
        type(block) is int and block >= 0 for block in chain.from_iterable(lists)
    ):
        raise invalid(f"{NAME}.remote_block_ids", "must be a list of ids, or of such lists")
    return max(map(len, lists))


def _size(given: dict[str, Any]) -> None:
    value = given.get("tp_size")
    if value is not None and not (type(value) is int and value > 0):
        raise invalid(f"{NAME}.tp_size", "must be an integer of at least 1")

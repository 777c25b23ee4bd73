"""The side channel between two servers: JSON objects with their length before them, over TCP.

Small words only: what is kept, whether it still is. The pages' bytes go by a connector.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import struct

from engine.transfer.base import Json, TransferError

# A prompt of a million tokens has some 60,000 pages, of at most 8 characters each.
MAX_MESSAGE = 4 * 1024 * 1024
MAX_NESTING = 8
_LENGTH = struct.Struct(">I")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class WireError(Exception):
    """What came is no message, or nothing came."""


async def read_message(reader: asyncio.StreamReader) -> Json | None:
    """The next object; None at the end of the stream. Raises WireError."""
    try:
        head = await reader.readexactly(_LENGTH.size)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise WireError("the connection broke off amid a message") from None
        return None
    except OSError as error:
        raise WireError(f"the connection broke off ({error.strerror or error})") from None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_MESSAGE:
        raise WireError(f"a message of {length} bytes is none of ours")
    try:
        value = json.loads(await reader.readexactly(length))
    except (ValueError, RecursionError):
        raise WireError("a message is not JSON") from None
    except (asyncio.IncompleteReadError, OSError):
        raise WireError("the connection broke off amid a message") from None
    if not isinstance(value, dict):
        raise WireError("a message is not an object")
    return value


def pack(message: Json) -> bytes:
    data = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(data)) + data


class Channel:
    """A connection to a peer: `await ask(...)` one thing after another."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def ask(self, message: Json) -> Json:
        """Raises TransferError for no answer, and for one that is an error."""
        try:
            self._writer.write(pack(message))
            await self._writer.drain()
            answer = await read_message(self._reader)
        except (WireError, OSError) as error:
            raise TransferError("peer", f"it does not answer: {error}") from None
        if answer is None:
            raise TransferError("peer", "it hung up")
        if "error" in answer:
            reason = answer.get("reason")
            raise TransferError(reason if reason in REASONS else "peer", f"it says {str(answer['error'])[:200]!r}")
        return answer

    def close(self) -> None:
        self._writer.close()


# Why pages were not had: what is counted.
REASONS = (
    *("missing", "peer", "unknown", "mismatch", "expired", "transfer", "timeout", "room", "adapter", "resting"),
    "internal",
)


async def connect(host: str, port: int, networks: tuple[Network, ...]) -> Channel:
    """To an address that a client named, if it is of these networks. A name is not looked up, for whoever may send a
    prompt could have any asked for. Raises TransferError."""
    host = "127.0.0.1" if host == "localhost" else host
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        raise TransferError("peer", "its host is no address") from None
    if not is_allowed(host, networks):
        raise TransferError("peer", "its address is in none of the networks of kv_connector_extra_config.peers")
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=MAX_MESSAGE)
    except OSError as error:
        raise TransferError("peer", f"no connection ({error.strerror or 'refused'})") from None
    return Channel(reader, writer)


def is_allowed(address: str, networks: tuple[Network, ...]) -> bool:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return any(parsed in network for network in networks)


def family_of(host: str) -> socket.AddressFamily:
    """Of a listener at this address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET

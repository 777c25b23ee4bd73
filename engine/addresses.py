"""Whose connection it is, where connections are counted."""

from __future__ import annotations

import ipaddress


def household(host: str) -> str:
    """The address that counts for a peer's: of IPv6 the network of 64 bits, all of which whoever has one address has.

    host: as a socket tells it, with a zone perhaps (`fe80::1%eth0`). What is no address counts as it is.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    zone = f"%{address.scope_id}" if address.scope_id else ""
    return f"{ipaddress.ip_address(int(address) >> 64 << 64)}{zone}/64" if int(address) >> 64 else str(address)

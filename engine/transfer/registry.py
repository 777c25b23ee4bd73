"""Connectors by name. Each is imported when it is wanted."""

from __future__ import annotations

import importlib
from typing import Any, cast

from engine.config import StartupError, TransferOptions
from engine.transfer.base import Connector

CONNECTORS = {
    "NixlConnector": "engine.transfer.nixl",
    "TcpConnector": "engine.transfer.tcp",
}


def make_connector(options: TransferOptions) -> Connector:
    """Raises StartupError for one that cannot be had here."""
    assert options.connector is not None
    if options.connector not in CONNECTORS:
        known = ", ".join(CONNECTORS)
        raise StartupError(f"--kv-transfer-config: kv_connector '{options.connector}' is none of {known}")
    module: Any = importlib.import_module(CONNECTORS[options.connector])
    return cast(Connector, module.make(options))

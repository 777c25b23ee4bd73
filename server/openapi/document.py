"""The OpenAPI 3.1 document: every route, every field that is read, every shape that is answered.

Written by hand beside the code and held against it by tests/server/test_openapi.py, which walks the routes, records
the fields that are read, and validates real answers. A family of routes is one module with SCHEMAS and PATHS, and its
name in FAMILIES. Pure; served by endpoints/docs.py.
"""

from __future__ import annotations

import re
from typing import Any

from server.openapi import (
    admin,
    anthropic,
    llamacpp,
    ollama,
    openai,
    pooling,
    responses,
    rollouts,
    sglang,
    small,
    tei,
    tokens,
    watching,
    web,
)
from server.openapi.words import Json, string
from server.protocol.body import REFUSED_EVERYWHERE
from server.short_forms import short_form

FAMILIES: tuple[Any, ...] = (
    *(openai, responses, pooling, tei, anthropic, ollama, sglang, tokens, llamacpp, admin, rollouts, small, watching),
    web,
)


def document(version: str, root_path: str = "") -> Json:
    """The whole document; root_path: what a proxy puts before the paths."""
    schemas: Json = {}
    paths: Json = {}
    for family in FAMILIES:
        schemas |= family.SCHEMAS
        for path, item in family.PATHS.items():
            for form in (path, short_form(path)):
                if form is not None:
                    paths[form] = {method: _named(method, form, operation) for method, operation in item.items()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "oneloop",
            "version": version,
            "description": (
                "Every route of this server, with the fields that it takes. One server does not prefill for another by "
                f"{', '.join(REFUSED_EVERYWHERE)}: a body with one of these is refused."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": root_path.rstrip("/") or "/"}],
        "security": [{}, {"bearer": []}, {"header": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            # Where --api-key is set.
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }


def _named(method: str, path: str, operation: Json) -> Json:
    """The operation with an id, and with the variables of its path."""
    name = re.sub(r"\W+", "_", f"{method}{path}").strip("_")
    variables = [
        {"name": variable, "in": "path", "required": True, "schema": string(least=1)}
        for variable in re.findall(r"\{(\w+)\}", path)
    ]
    parameters = [*variables, *operation.get("parameters", ())]
    return {"operationId": name, **operation} | ({"parameters": parameters} if parameters else {})

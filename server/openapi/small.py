"""Routes that are no generation: probes, figures, caches and profiles; and the error of most routes."""

from __future__ import annotations

from server.openapi.words import NULL, OBJECT, Json, array, constant, either, get, gives, integer, post, string

SCHEMAS: Json = {
    "Error": gives(
        {
            "error": gives(
                {
                    "message": string(least=1),
                    "type": constant(
                        "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
                    ),
                    "param": either(string(), NULL),
                    "code": either(string(), NULL),
                }
            )
        }
    ),
    "Server": gives({"name": constant("oneloop"), "version": string(), "models": array(string(), least=1)}),
    "Version": gives({"version": string()}),
    "Done": gives({"success": constant(True)}, {"message": string(), "file": string()}),
}

_INFO = get("Resolved options as they were at start, and the engine's state now.", OBJECT)
_FLUSH = "Forget every cached prefix; 400 while requests run or wait."

PATHS: Json = {
    "/health": get("200 while the engine makes progress.", None),
    "/ready": get("The same.", None),
    "/metrics": get("Prometheus text.", string(), kind="text/plain"),
    "/": get("What this is.", "Server"),
    "/v1": get("What this is.", "Server"),
    "/version": get("The version.", "Version"),
    "/server_info": _INFO,
    "/get_server_info": _INFO,
    "/load": get("How many requests run or wait.", gives({"server_load": integer(0)})),
    "/flush_cache": get(_FLUSH, "Done") | post(_FLUSH, None, "Done"),
    "/reset_prefix_cache": get(_FLUSH, "Done") | post(_FLUSH, None, "Done"),
    "/start_profile": post("Record what the device does (CUDA, --profile-dir).", None, "Done"),
    "/stop_profile": post("Write the trace.", None, "Done"),
    "/openapi.json": get("This document.", OBJECT),
}

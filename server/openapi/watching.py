"""What the engine does, for /live and for programs: GET /live/events, /requests/{id}/cache, /trace."""

from __future__ import annotations

from server.openapi.words import NULL, OBJECT, Json, array, constant, either, get, gives, integer, number, string

_ID = either(string(), NULL)
_EVENT = gives({"ms": number(), "kind": string(), "value": either(integer(0), string())})

SCHEMAS: Json = {
    "CacheAnswer": gives(
        {
            "id": string(),
            "object": constant("list"),
            "data": array(
                gives(
                    {
                        "id": string(),
                        "cause": constant(
                            "hit", "first", "differs", "evicted", "flushed", "namespace", "not_cached_yet",
                            "not_resumable", "every_token", "disabled",
                        ),
                        "explanation": string(),
                        "prompt_tokens": integer(1),
                        "cached_tokens": integer(0),
                        "cacheable_tokens": integer(0, about="Of whole pages, one token short."),
                        "nearest": _ID,
                        "common_tokens": integer(0),
                        "first_difference": either(integer(0), NULL),
                        "hint": either(constant("inserted", "left_out", "reordered", "number"), NULL),
                        "evicted_seconds_ago": either(number(0), NULL),
                        "admitted_seconds_ago": number(0),
                        "text": either(
                            gives({"common": string(), "here": string(), "there": string()}),
                            NULL,
                        ),
                        "timeline": array(_EVENT),
                    }
                ),
                least=1,
            ),
        }
    ),
    "Trace": gives(
        {
            "traceEvents": array(OBJECT, least=1),
            "displayTimeUnit": constant("ms"),
            "otherData": gives({"seconds": number(0), "forgotten": {"type": "boolean"}, "left_out": integer(0)}),
        }
    ),
}  # fmt: skip

PATHS: Json = {
    "/live/events": get(
        "What /live shows, as server-sent events.",
        gives({"data": string() | {"contentMediaType": "application/json", "contentSchema": OBJECT}}),
        kind="text/event-stream",
        query={"limit": integer(0, about="How many; 0: no end.")},
    ),
    "/requests/{request_id}/cache": get(
        "Why a prompt found what it found in the prefix cache.", "CacheAnswer"
    ),
    "/trace": get(
        "Record for some seconds, and give it in Chrome's trace format.",
        "Trace",
        query={"seconds": number(0, 60, about="5 where it is not given.")},
    ),
}

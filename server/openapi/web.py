"""The pages and what they ask for."""

from __future__ import annotations

from server.openapi.words import (
    ANYTHING,
    NULL,
    Json,
    array,
    boolean,
    constant,
    either,
    get,
    gives,
    integer,
    post,
    string,
    takes,
)

_KIND = constant("", "fence", "table", "ul", "ol", "paragraph", about="What the text goes on with.")
_BEFORE = string("What the end of a block is read behind, such as the head of its table.")

SCHEMAS: Json = {
    "WebConfig": gives(
        {
            "version": string(),
            "models": array(string(), least=1),
            "max_model_len": integer(1),
            "chats": boolean(),
            "tools": boolean(),
            "reasons": boolean(),
            "images": constant(False),
            "controls": array(
                gives({"name": string(), "schema": {"type": "object"}, "default": either(ANYTHING, NULL)})
            ),
        }
    ),
    "WebRenderRequest": takes(
        {"text": string("Markdown, from the start of a block on; at most 32,000 characters.")},
        {"kind": _KIND, "before": _BEFORE, "final": boolean("Whether nothing follows.")},
    ),
    "WebRendered": gives(
        {
            "blocks": array(
                gives(
                    {
                        "html": string(),
                        "length": integer(0, about="Of its source, in UTF-16 units."),
                        "joins": boolean("Its container goes on in that of the block before."),
                    }
                )
            ),
            "state": gives({"kind": _KIND, "before": _BEFORE}, None, "Where the source of the last block begins."),
        }
    ),
}

_PAGE = get("A page for people.", string(), kind="text/html")
_PART = get("A part of a page.", string(), kind="text/css")
_PART["get"]["responses"]["200"]["content"] |= {
    kind: {"schema": string()} for kind in ("text/html", "text/javascript", "image/svg+xml")
}

PATHS: Json = {
    "/live": _PAGE,
    "/web/{name}": _PART,
    "/web/api/config": get("The model, and what a chat can be asked with.", "WebConfig"),
    "/web/api/render": post(
        "Markdown as blocks of HTML: no HTML of the text's own, no links but to the web, no images.",
        "WebRenderRequest",
        "WebRendered",
        examples=({"text": "**x**\n\ny", "final": True}, {"text": "b\n", "kind": "fence", "before": "```\n"}),
    ),
}

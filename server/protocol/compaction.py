"""POST /v1/responses/compact: a conversation as a request for its summary.

What the client is given back is read by sealed.py.
"""

from __future__ import annotations

from typing import Any

from server.protocol.body import Body, invalid
from server.protocol.generation import Plan
from server.protocol.refusals import refuse
from server.protocol.responses import Asked, parse_response
from server.state import State

_PROMPT = (
    "Write a summary of this conversation for the one who will go on with it and has not seen it: what the user wants, "
    "what was decided and done, names, paths and results that matter, and what is left to do. Write the summary alone."
)
# A summary that is longer saves little.
_MAX_TOKENS = 4096
# The prompt is another one than that of which pages are kept.
REFUSALS: dict[str, tuple[object, ...]] = {"kv_transfer_params": ()}


async def parse_compaction(body: Body, state: State, response_id: str, owner: str) -> tuple[Plan, Asked]:
    """The plan of the summary; the last of the items asks for it. Raises RequestError, under the client's names."""
    if body.boolean("stream", False):
        raise invalid("stream", "is not supported here: the shorter conversation comes at once")
    refuse(body, REFUSALS)
    given = body.raw("input")
    items: Any = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if items is None and body.has("previous_response_id"):
        items = []
    elif not isinstance(items, list) or not items:
        raise invalid("input", "must be a string or a list with at least one item")
    changes = {
        "input": [*items, {"role": "user", "content": _PROMPT}],
        "store": False,
        "tool_choice": "none" if body.has("tools") else None,
        "max_output_tokens": body.raw("max_output_tokens") if body.has("max_output_tokens") else _MAX_TOKENS,
    }
    # Of the form of an answer, which a summary has not.
    changes |= dict.fromkeys(("text", "include", "top_logprobs", "stream", "stream_options"))
    return await parse_response(body.changed(changes), state, response_id, owner)

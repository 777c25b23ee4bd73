"""POST /tokenize and /detokenize, under the names of vLLM and of SGLang."""

from __future__ import annotations

from aiohttp import web

from server.protocol.body import are_token_ids, invalid, read_body
from server.protocol.chat import encode_messages
from server.protocol.errors import json_response
from server.protocol.generation import read_model
from server.protocol.tool_fields import read_tools
from server.state import STATE


async def tokenize(request: web.Request) -> web.Response:
    """Ids of `prompt`, or of `messages` as a chat would render them."""
    state, body = request.app[STATE], await read_body(request)
    read_model(body, state.model)
    tokenizer = state.tokenizer
    with_strings = body.boolean("return_token_strs", False)
    prompt = body.string("prompt", None)
    if (prompt is None) == (not body.has("messages")):
        raise invalid("prompt", "or `messages` is required, and only one of them")
    if prompt is None:
        _, tokens = await encode_messages(body, state, read_tools(body))
    else:
        add_special_tokens = body.boolean("add_special_tokens", True)
        tokens = await tokenizer.encode_async(prompt, add_special_tokens=add_special_tokens)
    return json_response(
        {
            "count": len(tokens),
            "max_model_len": state.model.max_model_len,
            "tokens": tokens,
            "token_strs": [tokenizer.id_to_token(token) for token in tokens] if with_strings else None,
        }
    )


async def detokenize(request: web.Request) -> web.Response:
    """Text of `tokens`, special ones included unless `skip_special_tokens`."""
    state, body = request.app[STATE], await read_body(request)
    read_model(body, state.model)
    tokens, vocab_size = body.raw("tokens"), state.model.model_config.vocab_size
    if not are_token_ids(tokens, vocab_size):
        raise invalid("tokens", f"must be a list of token ids from 0 to {vocab_size - 1}")
    skip = body.boolean("skip_special_tokens", False)
    text = state.tokenizer.decode(tokens, skip_special_tokens=skip)
    # vLLM's name and SGLang's.
    return json_response({"prompt": text, "text": text})


ROUTES = tuple(
    ("POST", prefix + path, handler)
    for path, handler in (("/tokenize", tokenize), ("/detokenize", detokenize))
    for prefix in ("", "/v1")
)

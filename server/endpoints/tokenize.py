"""POST /tokenize and /detokenize, as vLLM, SGLang and llama.cpp have them."""

from __future__ import annotations

from aiohttp import web

from server.protocol.body import Body, are_token_ids, invalid, read_body
from server.protocol.chat import encode_messages
from server.protocol.errors import json_response
from server.protocol.generation import read_model
from server.protocol.tool_fields import read_tools
from server.state import STATE, State


async def tokenize(request: web.Request) -> web.Response:
    """Ids of `prompt`, or of `messages` as a chat would render them; or of `content`, in llama.cpp's shape."""
    state, body = request.app[STATE], await read_body(request)
    read_model(body, state.model)
    given = [name for name in ("prompt", "messages", "content") if body.has(name)]
    if len(given) != 1:
        raise invalid("prompt", "or `messages` or `content` is required, and only one of them")
    if given == ["content"]:
        return await _tokenize_content(body, state)
    tokenizer = state.tokenizer
    with_strings = body.boolean("return_token_strs", False)
    prompt = body.string("prompt", None)
    if prompt is None:
        _, tokens = await encode_messages(body, state, read_tools(body))
    else:
        add_special_tokens = body.boolean("add_special_tokens", True)
        tokens = await tokenizer.encode_async(prompt, add_special_tokens=add_special_tokens)
    return json_response(
        {
            "count": len(tokens),
            "max_model_len": state.model.max_model_len,
            "tokens": list(tokens),
            "token_strs": [tokenizer.id_to_token(token) for token in tokens] if with_strings else None,
        }
    )


async def _tokenize_content(body: Body, state: State) -> web.Response:
    """Ids alone, or each with the piece of text that it is: a string, or its bytes where they are no whole characters.

    `parse_special` false, which reads the model's marks as text, is a 400.
    """
    content, with_pieces = body.string("content", ""), body.boolean("with_pieces", False)
    if not body.boolean("parse_special", True):
        raise invalid("parse_special", "must be true: this server reads a mark of the model as what it is")
    tokenizer = state.tokenizer
    tokens = await tokenizer.encode_async(content, add_special_tokens=body.boolean("add_special", False))
    if not with_pieces:
        return json_response({"tokens": tokens})
    return json_response({"tokens": [{"id": token, "piece": _piece(tokenizer.token_bytes(token))} for token in tokens]})


def _piece(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


async def detokenize(request: web.Request) -> web.Response:
    """Text of `tokens`, special ones included unless `skip_special_tokens`."""
    state, body = request.app[STATE], await read_body(request)
    read_model(body, state.model)
    tokens, vocab_size = body.raw("tokens"), state.model.model_config.vocab_size
    if not are_token_ids(tokens, vocab_size):
        raise invalid("tokens", f"must be a list of token ids from 0 to {vocab_size - 1}")
    skip = body.boolean("skip_special_tokens", False)
    text = state.tokenizer.decode(tokens, skip_special_tokens=skip)
    # vLLM's name, SGLang's and llama.cpp's.
    return json_response({"prompt": text, "text": text, "content": text})


ROUTES = tuple(
    ("POST", prefix + path, handler)
    for path, handler in (("/tokenize", tokenize), ("/detokenize", detokenize))
    for prefix in ("", "/v1")
)

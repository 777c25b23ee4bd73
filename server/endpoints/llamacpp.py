"""llama.cpp's own API: /completion, /infill, and what its clients and its editors' plugins look at, /props, /slots and
/lora-adapters. The latter show no prompt."""

from __future__ import annotations

import dataclasses
from functools import partial

from aiohttp import web

from engine.request import RequestError, SamplingParams, UnavailableError
from server.answers.llamacpp import NativeAnswer, settings_of
from server.endpoints.info import version
from server.protocol.body import read_body
from server.protocol.errors import json_response
from server.protocol.llamacpp import NAMES, parse_infill, parse_native
from server.protocol.naming import in_words_of
from server.responder import respond
from server.state import REQUEST_ID, STATE, ServedModel


async def completion(request: web.Request) -> web.StreamResponse:
    """The text that goes on from a prompt, or from each of several."""
    state, body = request.app[STATE], await read_body(request)
    with in_words_of(NAMES):
        plan, wanted = await parse_native(body, state, f"cmpl-{request[REQUEST_ID]}")
        return await respond(request, state, plan, partial(NativeAnswer, wanted=wanted))


async def infill(request: web.Request) -> web.StreamResponse:
    """The text between what is before a hole and what is behind it."""
    state, body = request.app[STATE], await read_body(request)
    with in_words_of(NAMES):
        plan, wanted = await parse_infill(body, state, f"cmpl-{request[REQUEST_ID]}")
        return await respond(request, state, plan, partial(NativeAnswer, wanted=wanted))


async def props(request: web.Request) -> web.Response:
    """The model, its template, and what is sampled by where a request says nothing. model_path is its name: where it
    lies is nobody's business."""
    state = request.app[STATE]
    model, tokenizer = state.model, state.engine.tokenizer
    # There may be several; clients show one.
    eos = (
        None if tokenizer is None or not tokenizer.eos_token_ids else tokenizer.id_to_token(tokenizer.eos_token_ids[0])
    )
    return json_response(
        {
            "default_generation_settings": {
                "id": 0,
                "id_task": -1,
                "n_ctx": model.max_model_len,
                "speculative": False,
                "is_processing": False,
                "params": _sampling(model),
            },
            "total_slots": state.engine.limits.max_num_seqs,
            "model_alias": model.names[0],
            "model_path": model.names[0],
            "chat_template": "" if model.chat_template is None else model.chat_template.source,
            "modalities": {"vision": False, "audio": False},
            "eos_token": eos,
            "build_info": f"oneloop-{version()}",
            "is_sleeping": state.engine.sleep_level > 0,
        }
    )


def _sampling(model: ServedModel) -> dict[str, object]:
    """The model's own defaults."""
    defaults, neutral = model.generation_defaults, SamplingParams()
    given = {
        name: value
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        if (value := getattr(defaults, name)) is not None
    }
    return settings_of(dataclasses.replace(neutral, max_tokens=defaults.max_new_tokens, **given))


async def slots(request: web.Request) -> web.Response:
    """Every sequence that runs, in its place. `?fail_on_no_slot=1`: a 503 where none is free."""
    state = request.app[STATE]
    found = state.engine.slots()
    wanted = request.query.get("fail_on_no_slot", "0")
    if wanted not in ("0", "1"):
        raise RequestError("`fail_on_no_slot` must be 0 or 1.", param="fail_on_no_slot")
    if wanted == "1" and None not in found:
        raise UnavailableError("no slot available")
    shown: list[dict[str, object]] = []
    for index, slot in enumerate(found):
        one: dict[str, object] = {
            "id": index,
            "n_ctx": state.model.max_model_len,
            "speculative": False,
            "is_processing": slot is not None,
        }
        if slot is not None:
            num_prompt, num_output, num_left = slot
            one["n_prompt_tokens"] = num_prompt
            one["next_token"] = {"has_next_token": True, "n_decoded": num_output, "n_remain": num_left}
        shown.append(one)
    return json_response(shown)


async def lora_adapters(request: web.Request) -> web.Response:
    """There are none."""
    return json_response([])


ROUTES = (
    ("POST", "/completion", completion),
    ("POST", "/infill", infill),
    ("GET", "/props", props),
    ("GET", "/slots", slots),
    ("GET", "/lora-adapters", lora_adapters),
)

"""GET /props and /slots: what llama.cpp's clients and its editors' plugins look at. No prompt is shown."""

from __future__ import annotations

from aiohttp import web

from engine.request import SamplingParams, UnavailableError
from server.endpoints.info import version
from server.protocol.errors import json_response
from server.state import STATE, ServedModel


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
    """Under llama.cpp's names; -1 is no limit there."""
    defaults, neutral = model.generation_defaults, SamplingParams()

    def either(given: object, otherwise: object) -> object:
        return otherwise if given is None else given

    return {
        "n_predict": either(defaults.max_new_tokens, -1),
        "temperature": either(defaults.temperature, 1.0),
        "top_k": either(defaults.top_k, 0),
        "top_p": either(defaults.top_p, 1.0),
        "min_p": either(defaults.min_p, 0.0),
        "repeat_penalty": either(defaults.repetition_penalty, 1.0),
        "presence_penalty": neutral.presence_penalty,
        "frequency_penalty": neutral.frequency_penalty,
        "stop": [],
    }


async def slots(request: web.Request) -> web.Response:
    """Every sequence that runs, in its place. `?fail_on_no_slot=1`: a 503 where none is free."""
    state = request.app[STATE]
    found = state.engine.slots()
    if request.query.get("fail_on_no_slot") == "1" and None not in found:
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


ROUTES = (("GET", "/props", props), ("GET", "/slots", slots))

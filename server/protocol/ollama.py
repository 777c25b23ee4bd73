"""POST /api/chat, /api/generate, /api/embed and /api/embeddings: Ollama's bodies become those of a chat, a completion
or /v1/embeddings, which become plans."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from engine.request import ContextLengthExceededError, Request, RequestError
from server.adapters import adapter_name
from server.protocol.body import Body, invalid
from server.protocol.chat import is_begun, is_last_of_assistant, parse_chat
from server.protocol.completions import parse_completion
from server.protocol.embeddings import EmbeddingPlan, embedding_of, parse_embedding
from server.protocol.errors import message_with_field
from server.protocol.generation import Plan, read_model, room_for, with_max_tokens
from server.protocol.ignored import ignore
from server.protocol.refusals import refuse, refuse_in
from server.state import ServedModel, State

OPTIONS = {
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
} | {
    name: name
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")
}
# Our name of a field and Ollama's, for errors.
_NAMES = {ours: f"options.{theirs}" for theirs, ours in OPTIONS.items()} | {
    "response_format": "format",
    "response_format.schema": "format",
    "response_format.json_schema": "format",
    "response_format.json_schema.schema": "format",
    "reasoning_effort": "think",
}
CHAT_NAMES = _NAMES | {
    "prompt": "messages",
    "messages[].reasoning_content": "messages[].thinking",
    # What stands for images; Ollama's own contents have no parts.
    "messages[].content[]": "messages[].images",
}
EMBED_NAMES = {"truncate_prompt_tokens": "truncate"}
OLD_EMBED_NAMES = {"input": "prompt"}
GENERATE_NAMES = _NAMES | {"messages": "prompt"}
# Ollama's words for "until the model stops": its runner has no limit of 0 either.
ENDLESS = (0, -1, -2)
# What repeat_last_n: 0 turns off.
_PENALTIES = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
# A text of Go's kind, as "1h30m", or the bare number that Python's clients write into a text.
_DURATION = re.compile(r"[+-]?(([0-9]+[.]?[0-9]*|[.][0-9]+)(ns|us|µs|μs|ms|s|m|h))+|[+-]?[0-9]+([.][0-9]*)?")
_MAX_DURATION = 64
EFFORTS = ("low", "medium", "high", "max")
# What is taken and changes no answer. Of the hardware and the memory the server's own flags decide; a prompt is never
# shifted, so that nothing of it has to be kept (num_keep); mirostat_tau and _eta say something only beside a mirostat.
# mirostat, tfs_z and typical_p are odd ones: they are in Ollama's examples of all options, and its own runner has no
# such samplers; where one asks for something the answer says that it was left out.
NUMBER_HINTS = (
    *("num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread"),
    *("mirostat", "mirostat_tau", "mirostat_eta", "typical_p", "tfs_z"),
)
_NEUTRAL = {"mirostat": 0, "typical_p": 1, "tfs_z": 1}
FLAG_HINTS = (
    *("low_vram", "f16_kv", "logits_all", "vocab_only", "embedding_only"),
    *("use_mmap", "use_mlock", "numa"),
)
# What this server cannot do, with the values that ask for nothing.
OPTION_REFUSALS: dict[str, tuple[object, ...]] = {
    "rope_frequency_base": (0,),
    "rope_frequency_scale": (0, 1),
}
REFUSALS: dict[str, tuple[object, ...]] = {
    "kv_transfer_params": (),
    "template": ("",),
    "context": ([],),
    "images": ([],),
    "width": (0,),
    "height": (0,),
    "steps": (0,),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the answer has to know beside the Plan.

    model: the name that the client uses. chat: /api/chat's shape. started_at: when the request came, by the engine's
    clock, in seconds.
    """

    model: str
    chat: bool
    started_at: float


def read_name(body: Body, model: ServedModel) -> tuple[str, str]:
    """The model's name as the client writes it, and as it is served: `name:latest` is `name`. Raises the 404."""
    given = body.string("model", None) or body.string("name", None) or model.names[0]
    name = given.removesuffix(":latest") if given not in model.names else given
    served = name in model.names or adapter_name(name, model) is not None
    return given, read_model(Body({"model": name if served else given}), model)


async def parse(body: Body, state: State, response_id: str, *, chat: bool) -> Plan | None:
    """None where there is nothing to answer: so clients have a model loaded. Raises RequestError, in our names."""
    options = body.object("options") or {}
    fields = _read_fields(body, options, state)
    num_ctx = _read_num_ctx(options, state)
    suffix = "" if chat else body.string("suffix", "")
    raw = not chat and (body.boolean("raw", False) or bool(suffix))
    messages = _read_messages(body.raw("messages")) if chat else _as_messages(body)
    if not messages:
        return None
    if raw:
        plan = await _parse_raw(body, fields, state, response_id)
    else:
        fields |= {"messages": messages} | _read_think(body, state)
        if is_last_of_assistant(messages[-1]):
            # The answer goes on with it, as it does in Ollama.
            fields["continue_final_message"] = begun = is_begun(messages[-1], state)
            if not begun and len(messages) > 1:
                fields["messages"] = messages[:-1]
        if chat and body.raw("tools") != []:
            fields["tools"] = body.raw("tools")
        plan = await parse_chat(Body(fields, body.size), state, response_id)
    endless = _is_endless(options.get("num_predict"))

    def count(request: Request) -> int:
        size, most = len(request.prompt_token_ids), request.sampling.max_tokens
        if most is None or endless:
            most = max(1, room_for(state, request.prompt_token_ids))
        if num_ctx is None:
            return most
        if size >= num_ctx:
            raise _too_long(size, num_ctx)
        return min(most, num_ctx - size)

    return with_max_tokens(plan, count)


async def parse_embed(body: Body, state: State) -> EmbeddingPlan | None:
    """/api/embed: vectors of length 1; texts that are too long are cut unless `truncate` is false. See parse."""
    given = body.raw("input")
    if not isinstance(given, str | list | None) or not all(isinstance(text, str) for text in given or ()):
        raise invalid("input", "must be a string or a list of strings")
    # 0 is Go's word for "not said".
    dimensions = body.integer("dimensions", None, 0) or None
    fields = {"input": given, "dimensions": dimensions, "normalize": True}
    return await _parse_embedding(body, state, fields, cut=body.boolean("truncate", True))


async def parse_old_embed(body: Body, state: State) -> EmbeddingPlan | None:
    """/api/embeddings, which was there first: one prompt, and its vector as it is. See parse."""
    return await _parse_embedding(body, state, {"input": body.string("prompt", ""), "normalize": False}, cut=False)


async def _parse_embedding(body: Body, state: State, fields: dict[str, Any], *, cut: bool) -> EmbeddingPlan | None:
    options = body.object("options") or {}
    _check_options(options, state)
    num_ctx = _read_num_ctx(options, state)
    wants_unloading(body)
    name = read_name(body, state.model)[1]
    embedding_of(state.model)
    if not fields["input"]:
        return None
    most = (num_ctx or state.model.max_model_len) if cut else None
    plan = await parse_embedding(Body(fields | {"model": name, "truncate_prompt_tokens": most}, body.size), state)
    size = max(map(len, plan.prompts))
    if num_ctx is not None and size > num_ctx:
        raise _too_long(size, num_ctx)
    return plan


def _too_long(size: int, num_ctx: int) -> ContextLengthExceededError:
    return ContextLengthExceededError(
        f"The prompt has {size} tokens, and by `options.num_ctx` the maximum context length is {num_ctx} tokens.",
        param="options.num_ctx",
    )


def error_body(error: RequestError, request_id: str | None) -> dict[str, object]:
    """The JSON object of an error, as Ollama writes it. request_id: goes into a header."""
    return {"error": message_with_field(error)}


def _read_fields(body: Body, options: dict[str, Any], state: State) -> dict[str, Any]:
    """What a chat and a completion have in common, in our names."""
    refuse(body, REFUSALS)
    _check_options(options, state)
    fields: dict[str, Any] = {ours: options.get(theirs) for theirs, ours in OPTIONS.items()}
    if _is_endless(fields["max_tokens"]):
        fields["max_tokens"] = None
    if fields["stop"] == "":
        fields["stop"] = None
    if fields["seed"] == -1:
        # Ollama's default: another text every time.
        fields["seed"] = None
    if options.get("repeat_last_n") == 0:
        fields |= {name: off for name, off in _PENALTIES.items() if _is_number(fields[name]) or fields[name] is None}
    fields["model"] = read_name(body, state.model)[1]
    fields["stream"] = body.boolean("stream", True)
    fields |= {"logprobs": body.raw("logprobs"), "top_logprobs": body.raw("top_logprobs")}
    form = body.raw("format")
    if form == "json":
        fields["response_format"] = {"type": "json_object"}
    elif isinstance(form, dict):
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": form}}
    elif form is not None and form != "":
        raise invalid("format", "must be json, or a JSON schema")
    return fields


def _check_options(options: dict[str, Any], state: State) -> None:
    """What no sampler of ours reads. Options that nobody knows are not looked at, as in Ollama.

    repeat_last_n is how far back a penalty looks. Here it looks at the whole text, as -1 asks; a shorter window is
    taken and not kept to, because every client sends one, and 0 turns the penalties off.
    """
    refuse_in("options", options, OPTION_REFUSALS)
    fields = Body({f"options.{name}": value for name, value in options.items()})
    for name in NUMBER_HINTS:
        if (value := options.get(name)) is not None and not _is_number(value):
            raise invalid(f"options.{name}", "must be a number")
        if value is not None and value != _NEUTRAL.get(name, value):
            ignore("options", name)
    for name in FLAG_HINTS:
        fields.boolean(f"options.{name}", False)
    window = fields.integer("options.repeat_last_n", -1, -1)
    if not fields.boolean("options.penalize_newline", True) and window != 0 and _penalises(options, state):
        raise invalid("options.penalize_newline", "must be true beside a penalty: penalties here know no exceptions")


def _penalises(options: dict[str, Any], state: State) -> bool:
    repeat = options.get("repeat_penalty")
    if repeat is None:
        repeat = state.model.generation_defaults.repetition_penalty
    return repeat not in (None, 1) or any(options.get(name) for name in ("presence_penalty", "frequency_penalty"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_endless(num_predict: Any) -> bool:
    return _is_number(num_predict) and num_predict in ENDLESS


def _read_num_ctx(options: dict[str, Any], state: State) -> int | None:
    """The context that the client wants, None where it is all that there is: clients ask for more, unseen."""
    num_ctx = Body({"options.num_ctx": options.get("num_ctx")}).integer("options.num_ctx", None, 1)
    return None if num_ctx is None or num_ctx >= state.model.max_model_len else num_ctx


def wants_unloading(body: Body) -> bool:
    """Whether keep_alive is 0, in any of its forms: seconds, or a text as "5m". The model stays; it costs nothing."""
    value = body.raw("keep_alive")
    if value is None:
        return False
    if _is_number(value):
        return bool(value == 0)
    if not isinstance(value, str) or len(value) > _MAX_DURATION or not _DURATION.fullmatch(value):
        raise invalid("keep_alive", 'must be a number of seconds, or a duration as "5m" or "1h30m"')
    return not any(digit in value for digit in "123456789")


def _read_think(body: Body, state: State) -> dict[str, Any]:
    think = body.raw("think")
    if think is None:
        return {}
    if not isinstance(think, bool) and not (isinstance(think, str) and think in EFFORTS):
        raise invalid("think", f"must be true, false or one of {', '.join(EFFORTS)}")
    if think and state.reasoning_family is None:
        raise invalid("think", "cannot be honoured: this model does not support thinking that this server can read")
    if isinstance(think, bool):
        return {"chat_template_kwargs": {"enable_thinking": think, "thinking": think}}
    return {"reasoning_effort": think}


async def _parse_raw(body: Body, fields: dict[str, Any], state: State, response_id: str) -> Plan:
    """A prompt without a template: as it is, or the two sides of a hole."""
    for name in ("system", "think"):
        if body.raw(name) not in (None, "") and body.raw(name) is not False:
            raise invalid(name, f"cannot be combined with `{'suffix' if body.raw('suffix') else 'raw'}`")
    # A completion has one field for both.
    top, wanted = body.integer("top_logprobs", None, 0, state.model.max_logprobs), body.boolean("logprobs", False)
    if top and not wanted:
        raise invalid("top_logprobs", "needs `logprobs` to be true")
    fields |= {"prompt": body.raw("prompt"), "suffix": body.raw("suffix"), "logprobs": (top or 0) if wanted else None}
    return await parse_completion(Body(fields, body.size), state, response_id, default_max_tokens=None)


def _as_messages(body: Body) -> list[dict[str, Any]]:
    """The chat of /api/generate; empty without a prompt."""
    system, prompt = body.string("system", ""), body.string("prompt", "")
    if not prompt:
        return []
    return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": prompt}]


def _read_messages(messages: Any) -> list[Any]:
    """Ollama's messages in a chat's names; what is in them else is the chat's to check."""
    if messages is None:
        return []
    if not isinstance(messages, list):
        raise invalid("messages", "must be a list")
    read: list[Any] = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise invalid(f"messages[{index}]", "must be an object")
        turn = message | ({"content": ""} if message.get("content") is None else {})
        if not isinstance(images := turn.pop("images", None), list | None) or not all(
            isinstance(image, str) for image in images or ()
        ):
            raise invalid(f"messages[{index}].images", "must be a list of strings")
        if images and isinstance(text := turn["content"], str):
            # One part stands for all of them: in the user's newest turn it is an error, before it a bracketed word.
            turn["content"] = [{"type": "text", "text": text}, {"type": "image"}] if text else [{"type": "image"}]
        if message.get("thinking") is not None:
            turn["reasoning_content"] = turn.pop("thinking")
        if message.get("tool_name") is not None:
            turn["name"] = turn.pop("tool_name")
        read.append(turn)
    return read

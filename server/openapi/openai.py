"""Chat, completions, models and tokens, as OpenAI, vLLM and SGLang have them; and what other families share of it."""

from __future__ import annotations

from engine.request import MAX_STOP_LENGTH, MAX_STOP_STRINGS, RANGES
from server.openapi.rollouts import SPANS
from server.openapi.words import (
    ANYTHING,
    NULL,
    OBJECT,
    Json,
    alternatives,
    array,
    boolean,
    constant,
    either,
    events,
    get,
    gives,
    integer,
    mapping,
    number,
    post,
    ref,
    refused,
    string,
    takes,
)
from server.protocol.body import MAX_NESTING
from server.protocol.chat import EFFORTS, ROLES
from server.protocol.completions import DEFAULT_MAX_TOKENS, MAX_PROMPTS
from server.protocol.generation import (
    MAX_BAD_WORD_LENGTH,
    MAX_BAD_WORDS,
    MAX_BEST_OF,
    MAX_CHOICES,
    MAX_DRAFT_TOKENS,
    MAX_PRIORITY,
    MAX_SALT_LENGTH,
    MAX_TIMEOUT_S,
)
from server.protocol.refusals import CHAT_REFUSALS, COMPLETION_REFUSALS
from server.protocol.structured_fields import BACKENDS, OTHER_BACKENDS
from server.protocol.tool_fields import MAX_TOOLS
from server.protocol.transfer import MAX_WORD

# ---- what is asked

IDS = array(integer(0))
SCHEMA = either(OBJECT, string(), about="A JSON Schema (only references within it), or a string of one.")
_REGEX = string(least=1, about="A regular expression that the whole text keeps.")
_GRAMMAR = string(least=1, about="Lark, or EBNF (`root ::= ...`).")
_CHOICE = array(string(least=1), least=1, about="The text is one of these.")
_TAG = either(OBJECT, string(), about="A structural tag.")
STRUCTURE: Json = {
    "response_format": either(
        takes({"type": constant("text")}),
        takes({"type": constant("json_object")}, {"schema": SCHEMA}),
        takes(
            {
                "type": constant("json_schema"),
                "json_schema": takes(
                    {"schema": SCHEMA},
                    {"name": string(least=1, most=64), "description": string(), "strict": boolean()},
                ),
            },
        ),
        takes({"type": constant("json_schema"), "schema": SCHEMA}, {"strict": boolean(), "json_schema": NULL}),
        takes({"type": constant("json", "json_object"), "value": SCHEMA}, about="Text Generation Inference's."),
        takes({"type": constant("regex"), "value": _REGEX}, about="Text Generation Inference's."),
        takes({"type": constant("grammar"), "grammar": _GRAMMAR}, about="Fireworks'."),
        takes({"type": constant("structural_tag")}, about="With the fields of a structural tag beside it."),
    ),
    "structured_outputs": takes(
        {},
        {
            "json": SCHEMA,
            "regex": _REGEX,
            "choice": _CHOICE,
            "grammar": _GRAMMAR,
            "json_object": boolean(),
            "structural_tag": _TAG,
            "disable_any_whitespace": boolean(),
            "disable_additional_properties": constant(False),
            "whitespace_pattern": string(least=1, most=1024),
        },
        "vLLM's: exactly one of json, regex, choice, grammar, json_object, structural_tag.",
    ),
    "guided_json": SCHEMA,
    "guided_regex": _REGEX,
    "guided_choice": _CHOICE,
    "guided_grammar": _GRAMMAR,
    "guided_json_object": boolean(),
    "guided_whitespace_pattern": string(least=1, most=1024),
    "guided_decoding_backend": constant(*BACKENDS, *OTHER_BACKENDS, about="Changes nothing here."),
    "json_schema": SCHEMA,
    "regex": _REGEX,
    "ebnf": _GRAMMAR,
    "grammar": either(_GRAMMAR, constant("", about="As llama.cpp has it: none.")),
    "structural_tag": _TAG,
}


def _ranged(name: str, about: str = "") -> Json:
    allowed = RANGES[name]
    return number(allowed.low, allowed.high, about, above=allowed.above)


SAMPLING: Json = {
    "temperature": _ranged("temperature", "0 is greedy. The model's own default, else 1."),
    "top_p": _ranged("top_p"),
    "top_k": integer(-1, about="-1 and 0 are off."),
    "min_p": _ranged("min_p"),
    "seed": integer(-(2**63), 2**64 - 1, "The same seed gives the same text in any batch, streamed or not."),
    "presence_penalty": _ranged("presence_penalty"),
    "frequency_penalty": _ranged("frequency_penalty"),
    "repetition_penalty": _ranged("repetition_penalty"),
    "repeat_penalty": _ranged("repetition_penalty", "llama.cpp's name."),
    "logit_bias": mapping(number(-100, 100), "By token id."),
    "allowed_token_ids": array(integer(0), least=1),
    "bad_words": array(string(least=1, most=MAX_BAD_WORD_LENGTH), most=MAX_BAD_WORDS),
    "stop": either(
        string(least=1, most=MAX_STOP_LENGTH),
        array(string(least=1, most=MAX_STOP_LENGTH), most=MAX_STOP_STRINGS),
    ),
    "stop_token_ids": IDS,
    "ignore_eos": boolean(),
    "include_stop_str_in_output": boolean(),
    "skip_special_tokens": boolean(),
    "spaces_between_special_tokens": boolean(),
    "min_tokens": integer(0, about="At most max_tokens."),
}
TRANSFER = takes(
    {},
    {
        "do_remote_decode": boolean("Answer one token, and keep the prompt's pages for the server that goes on."),
        "do_remote_prefill": boolean("Another server keeps the prompt's pages."),
        **{f"remote_{name}": string(least=1, most=MAX_WORD) for name in ("engine_id", "request_id", "host")},
        "remote_port": either(integer(1, 65535), string()),
        "remote_block_ids": array(either(integer(0), array(integer(0)))),
        "tp_size": integer(1),
    },
    about="Needs --kv-transfer-config; vLLM's object, which routers send.",
)
KEPT = gives(
    {
        "do_remote_prefill": constant(True),
        "do_remote_decode": constant(False),
        "remote_block_ids": IDS,
        "remote_engine_id": string(),
        "remote_request_id": string(),
        "remote_host": string(),
        "remote_port": integer(1, 65535),
        "tp_size": integer(1, 1),
    },
    about="For the server that goes on; where do_remote_decode asked for it and the pages could be kept.",
)
MODEL: Json = {"model": string("A name of /v1/models; the served model without it.")}
TERMS: Json = {
    "cache_salt": string(least=1, most=MAX_SALT_LENGTH, about="Prefixes are shared among equal salts only."),
    "lora_path": string("The name of a LoRA adapter, as SGLang names them; `model` may do it, too."),
    "priority": integer(-MAX_PRIORITY, MAX_PRIORITY, "Lower is earlier. Not 0 only under --schedule-policy priority."),
    "user": string("Whose share of the server it is, under --schedule-policy fair."),
    "timeout": number(0, MAX_TIMEOUT_S, "Seconds; goes before the header X-Request-Timeout.", above=True),
}
PREDICTION = takes(
    {
        "type": constant("content"),
        "content": either(string(), array(takes({"type": constant("text"), "text": string()}), least=1)),
    },
    about="What the answer may repeat: it comes sooner then, and is the same, where the server tries drafts.",
)
GENERATION: Json = {
    **MODEL,
    **TERMS,
    **SAMPLING,
    **STRUCTURE,
    "n": integer(1, MAX_CHOICES),
    "best_of": integer(1, MAX_BEST_OF, "At least `n`; equal to it in a stream."),
    "stream": boolean(),
    "stream_options": takes(
        {}, {"include_usage": boolean(), "continuous_usage_stats": boolean()}, "Only where `stream` is true."
    ),
    "echo": boolean(),
    "prompt_logprobs": alternatives("Not in a stream."),
    "speculative": boolean("False: no drafts are tried for it, where the server tries any. They change no token."),
    "max_draft_tokens": integer(0, MAX_DRAFT_TOKENS, "Of one step."),
    "kv_transfer_params": TRANSFER,
    "return_token_ids": boolean(),
    "return_tokens_as_token_ids": boolean(),
    "add_special_tokens": boolean(),
    "request_id": string(least=1, most=128, about="Comes back as X-Request-Id."),
    "n_predict": integer(-1, about="llama.cpp's name of max_tokens."),
}


_FUNCTION = takes(
    {"name": string(least=1, most=128)}, {"description": string(), "parameters": OBJECT, "strict": boolean()}
)
TOOL = takes({"function": _FUNCTION}, {"type": constant("function")})
_LANGUAGE = takes({"syntax": constant("lark", "regex"), "definition": string(least=1)})
_CUSTOM = takes(
    {"name": string(least=1, most=128)},
    {
        "description": string(),
        "format": either(takes({"type": constant("text")}), takes({"type": constant("grammar"), "grammar": _LANGUAGE})),
    },
    "A tool whose input is a text; where it must be called, its grammar holds.",
)
_PICK = either(
    *(takes({"type": constant(kind), kind: takes({"name": string()})}) for kind in ("function", "custom")),
)
OTHER_TOOL = takes({"type": string(least=1)}, about="Of any other type: left out.")
TOOLS: Json = {
    "tools": array(
        either(
            TOOL,
            takes({"type": constant("custom"), "custom": _CUSTOM}),
            OTHER_TOOL,
        ),
        most=MAX_TOOLS,
    ),
    "tool_choice": either(
        constant("none", "auto", "required"),
        _PICK,
        takes(
            {
                "type": constant("allowed_tools"),
                "allowed_tools": takes(
                    {"mode": constant("auto", "required"), "tools": array(either(_PICK, OTHER_TOOL), least=1)}
                ),
            }
        ),
    ),
    "parallel_tool_calls": boolean(),
}
_TEXT_PART = either(
    takes({"type": constant("text"), "text": string()}),
    takes({"type": string(least=1)}, about="Of any other kind: named in the text, but in the newest turn an error."),
)
MESSAGE = takes(
    {"role": constant(*ROLES)},
    {
        "content": either(string(), array(_TEXT_PART)),
        "name": string(),
        "tool_call_id": string(),
        "reasoning": string(),
        "reasoning_content": string(),
        "tool_calls": array(
            takes({"function": takes({"name": string()}, {"arguments": either(string(), OBJECT)})}, {"id": string()})
        ),
    },
)
TEMPLATE: Json = {
    "chat_template_kwargs": mapping(ANYTHING, f"For the model's template; nested at most {MAX_NESTING} deep."),
    "reasoning_effort": constant(*EFFORTS),
    "add_generation_prompt": boolean(),
    "continue_final_message": boolean(),
    "add_special_tokens": boolean(),
}
_BUDGET = integer(-1, about="Most tokens of reasoning; -1 is no limit. Needs a model that reasons.")
THINKING: Json = {
    "thinking_token_budget": _BUDGET,
    "max_thinking_tokens": _BUDGET,
    "include_reasoning": boolean("false leaves the reasoning out of the answer."),
    "separate_reasoning": boolean("false leaves it in the content."),
    "stream_reasoning": boolean("false sends each stretch of it at once."),
}


def prompts(most: int, least: int = 0) -> Json:
    """A prompt or at most `most` of them, as text or ids. least: characters of a text."""
    return either(
        string(least=least or None),
        array(string(least=least or None), least=1, most=most),
        array(integer(0), least=1),
        array(array(integer(0), least=1), least=1, most=most),
    )


_TOKENIZE_COMMON: Json = {**MODEL, "add_special_tokens": boolean(), "return_token_strs": boolean()}

# ---- what is answered

TOKEN = {"token": string(), "logprob": number(), "bytes": array(integer(0, 255))}
PROMPT_LOGPROBS = array(
    either(NULL, mapping(gives({"logprob": number(), "rank": integer(1), "decoded_token": string()})))
)
_FINISH = constant("stop", "length", "tool_calls", "abort")
_STOPPED: Json = {name: either(string(), integer(), NULL) for name in ("stop_reason", "matched_stop")}
_REASONING: Json = {"reasoning": string(), "reasoning_content": string()}


def _answer(kind: str, choice: Json, optional: Json | None = None) -> Json:
    head = {"id": string(), "object": constant(kind), "created": integer(0), "model": string()}
    return gives(head | {"choices": array(choice)}, optional)


SCHEMAS: Json = {
    "Usage": gives(
        {
            "prompt_tokens": integer(0),
            "completion_tokens": integer(0),
            "total_tokens": integer(0),
            "prompt_tokens_details": gives({"cached_tokens": integer(0)}),
        },
        {
            "completion_tokens_details": gives(
                {"reasoning_tokens": integer(0, about="Of a chat.")},
                {
                    "accepted_prediction_tokens": integer(
                        0, about="Drafts, of a `prediction` or other, that were right."
                    ),
                    "rejected_prediction_tokens": integer(0),
                },
            )
        },
    ),
    "ChatRequest": takes(
        {"messages": array(MESSAGE, least=1)},
        {
            **GENERATION,
            "prediction": PREDICTION,
            **TOOLS,
            **TEMPLATE,
            **THINKING,
            "max_completion_tokens": integer(-1),
            "max_tokens": integer(-1, about="The same under its older name."),
            "logprobs": boolean(),
            "top_logprobs": alternatives("Needs `logprobs`."),
            "return_prompt_text": boolean("The rendered prompt comes back as `prompt_text`."),
            "web_search_options": ANYTHING | {"description": "Changes nothing here."},
            **refused(CHAT_REFUSALS),
        },
    ),
    "CompletionRequest": takes(
        {"prompt": prompts(MAX_PROMPTS)},
        {
            **GENERATION,
            "max_tokens": integer(-1, about=f"{DEFAULT_MAX_TOKENS} where that fits. 0: only the prompt; -1: no limit."),
            "logprobs": alternatives(),
            "suffix": string("What is to follow the answer; of models that can fill in the middle, and texts."),
            **refused(COMPLETION_REFUSALS),
        },
    ),
    "TokenizeRequest": either(
        takes({"prompt": string()}, {**_TOKENIZE_COMMON, "messages": NULL}),
        takes({"messages": array(MESSAGE, least=1)}, {**_TOKENIZE_COMMON, **TOOLS, **TEMPLATE, "prompt": NULL}),
        takes(
            {"content": string("llama.cpp's name, for an answer in its shape.")},
            {
                **MODEL,
                "add_special": boolean(),
                "with_pieces": boolean("Each id comes with its text."),
                "parse_special": constant(True),
                "prompt": NULL,
                "messages": NULL,
            },
        ),
    ),
    "RenderRequest": takes({"messages": array(MESSAGE, least=1)}, {**MODEL, **TOOLS, **TEMPLATE}),
    "Rendered": gives({"model": string(), "prompt": string(), "token_ids": IDS}),
    "DetokenizeRequest": takes({"tokens": IDS}, {**MODEL, "skip_special_tokens": boolean()}),
    "ToolCall": either(
        gives(
            {
                "id": string(),
                "type": constant("function"),
                "function": gives({"name": string(), "arguments": string()}),
            }
        ),
        gives({"id": string(), "type": constant("custom"), "custom": gives({"name": string(), "input": string()})}),
    ),
    "ChatLogprobs": gives({"content": array(gives(TOKEN | {"top_logprobs": array(gives(TOKEN))}))}),
    "Logprobs": gives(
        {
            "text_offset": array(integer(0)),
            "token_logprobs": array(either(number(), NULL)),
            "tokens": array(string()),
            "top_logprobs": array(either(mapping(number()), NULL)),
        }
    ),
    "Chat": _answer(
        "chat.completion",
        gives(
            {
                "index": integer(0),
                "message": gives(
                    {"role": constant("assistant"), "content": either(string(), NULL)},
                    {**_REASONING, "tool_calls": array(ref("ToolCall"), least=1)},
                ),
                "logprobs": either(ref("ChatLogprobs"), NULL),
                "finish_reason": _FINISH,
                **_STOPPED,
            },
            {"token_ids": IDS, "weight_versions": SPANS},
        ),
        {
            "usage": ref("Usage"),
            "prompt_token_ids": IDS,
            "prompt_text": string(),
            "prompt_logprobs": PROMPT_LOGPROBS,
            "kv_transfer_params": KEPT,
        },
    ),
    "ChatChunk": _answer(
        "chat.completion.chunk",
        gives(
            {
                "index": integer(0),
                "delta": gives(
                    {},
                    {
                        "role": constant("assistant"),
                        "content": string(),
                        **_REASONING,
                        "tool_calls": array(
                            gives(
                                {"index": integer(0)},
                                {
                                    "id": string(),
                                    "type": constant("function", "custom"),
                                    "function": gives({"arguments": string()}, {"name": string()}),
                                    "custom": gives({"input": string()}, {"name": string()}),
                                },
                            )
                        ),
                    },
                ),
                "logprobs": either(ref("ChatLogprobs"), NULL),
                "finish_reason": either(_FINISH, NULL),
            },
            {**_STOPPED, "token_ids": IDS, "weight_versions": SPANS},
        ),
        {
            "usage": either(ref("Usage"), NULL),
            "prompt_token_ids": IDS,
            "prompt_text": string(),
            "kv_transfer_params": KEPT,
        },
    ),
    "Completion": _answer(
        "text_completion",
        gives(
            {
                "index": integer(0),
                "text": string(),
                "logprobs": either(ref("Logprobs"), NULL),
                "finish_reason": either(_FINISH, NULL, about="null in the chunks of a stream but the last."),
            },
            {
                **_STOPPED,
                "token_ids": IDS,
                "weight_versions": SPANS,
                "prompt_token_ids": IDS,
                "prompt_logprobs": PROMPT_LOGPROBS,
            },
        ),
        {"usage": either(ref("Usage"), NULL), "kv_transfer_params": KEPT},
    ),
    "Tokens": gives(
        {
            "count": integer(0),
            "max_model_len": integer(1),
            "tokens": IDS,
            "token_strs": either(array(string()), NULL),
        }
    ),
    "Pieces": gives(
        {
            "tokens": either(
                IDS, array(gives({"id": integer(0), "piece": either(string(), array(integer(0, 255)))}), least=1)
            )
        },
        about="llama.cpp's shape.",
    ),
    "Text": gives(
        {"prompt": string(), "text": string(), "content": string()},
        about="The text under vLLM's name, SGLang's and llama.cpp's.",
    ),
    "Model": gives(
        {
            "id": string(),
            "object": constant("model"),
            "created": integer(0),
            "owned_by": constant("oneloop"),
            "root": string(),
            "parent": NULL,
            "max_model_len": integer(1),
            "context_length": integer(1),
            "max_context_length": integer(1),
            "max_input_tokens": integer(1),
            "max_tokens": integer(1),
            "max_output_tokens": integer(1),
            "meta": gives({name: integer(1) for name in ("n_ctx", "n_ctx_train", "n_vocab", "n_params")}),
        }
    ),
    "AnthropicModel": gives(
        {
            "type": constant("model"),
            "id": string(),
            "display_name": string(),
            "created_at": string(),
            "max_input_tokens": integer(1),
            "max_tokens": integer(1),
        },
        about="Where the request has the header anthropic-version.",
    ),
    "Models": either(
        gives({"object": constant("list"), "data": array(ref("Model"), least=1)}),
        gives(
            {
                "data": array(ref("AnthropicModel")),
                "has_more": boolean(),
                "first_id": either(string(), NULL),
                "last_id": either(string(), NULL),
            }
        ),
    ),
}


# ---- routes

HELLO: list[Json] = [{"role": "user", "content": "What is 17 + 25?"}]
WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_TOKENIZE = post(
    "Ids of a prompt, or of messages as a chat would render them.",
    "TokenizeRequest",
    either(ref("Tokens"), ref("Pieces")),
    examples=(
        {"prompt": "Hello"},
        {"messages": HELLO, "tools": [WEATHER], "return_token_strs": True},
        {"content": "Hello"},
        {"content": "é", "with_pieces": True},
    ),
)
_DETOKENIZE = post("Text of token ids.", "DetokenizeRequest", "Text", examples=({"tokens": [5, 6, 7]},))

_RENDER = post(
    "The prompt of a chat.", "RenderRequest", "Rendered", examples=({"messages": HELLO, "tools": [WEATHER]},)
)

PATHS: Json = {
    "/v1/chat/completions": post(
        "The next message of a chat.",
        "ChatRequest",
        "Chat",
        streamed=events("ChatChunk"),
        examples=(
            {"messages": HELLO, "temperature": 0},
            {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 8},
            {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "n": 2, "max_tokens": 4, "stream": True},
            {"messages": HELLO, "logprobs": True, "prompt_logprobs": 1, "return_token_ids": True, "max_tokens": 4},
            {"messages": HELLO, "return_prompt_text": True, "max_tokens": 2},
            {"messages": HELLO, "response_format": {"type": "json_object"}, "max_tokens": 20},
            {"messages": HELLO, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 100},
            {"messages": HELLO, "tools": [WEATHER], "tool_choice": "required", "stream": True, "max_tokens": 100},
        ),
    ),
    "/v1/completions": post(
        "The text that goes on from a prompt.",
        "CompletionRequest",
        "Completion",
        streamed=events("Completion"),
        examples=(
            {"prompt": "Once upon a time", "temperature": 0},
            {"prompt": ["a", "b"], "n": 2, "stream": True, "stream_options": {"include_usage": True}},
            {"prompt": "def f():", "suffix": "return x", "max_tokens": 3},
            {"prompt": [5, 6, 7], "echo": True, "logprobs": 2, "max_tokens": 3, "return_token_ids": True},
            {"prompt": [[5, 6], [7]], "echo": True, "logprobs": 0, "max_tokens": 3, "stream": True},
            {"prompt": "x", "best_of": 3, "prompt_logprobs": 2, "stop": ["e"], "return_tokens_as_token_ids": True},
            {"prompt": "x", "stream": True, "return_token_ids": True, "max_tokens": 3},
        ),
    ),
    "/v1/chat/completions/render": _RENDER,
    "/apply-template": _RENDER,
    "/tokenize": _TOKENIZE,
    "/v1/tokenize": _TOKENIZE,
    "/detokenize": _DETOKENIZE,
    "/v1/detokenize": _DETOKENIZE,
    "/v1/models": get(
        "The served model, once for each of its names.",
        "Models",
        query={
            "limit": string("1 to 1000; this and what follows: of Anthropic's clients, which get pages."),
            "after_id": string("The page begins behind this name."),
            "before_id": string("The page ends before this name."),
        },
    ),
    "/v1/models/{id}": get("The served model by one of its names.", either(ref("Model"), ref("AnthropicModel"))),
}

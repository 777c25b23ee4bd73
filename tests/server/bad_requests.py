"""Malformed requests as tables: what is sent, and the field that the 4xx has to name. Run by test_errors.py.

A route of another family joins in by a `Family` of its own in FAMILIES; a new field is one row.
"""

from __future__ import annotations

from server.protocol.ollama import FLAG_HINTS, NUMBER_HINTS
from tests.server.bad_fields import (
    BAD_REGEXES,
    BAD_SCHEMAS,
    CHAT,
    COMPLETION,
    HI,
    LARK,
    NO_LIST_OF_IDS,
    NOT,
    SAMPLING,
    STRUCTURE,
    TERMS,
    TOOL,
    VOCAB,
    All,
    Family,
    Row,
    check_anthropic,
    check_ollama,
    check_tei,
    message,
    nested,
    wrong_kinds,
)

TOKENIZE: list[Row] = [
    ("prompt", All({"prompt": None})),
    *(("prompt", value) for value in (5, True, [], ["x"], [3], {})),
    ("prompt", All({"prompt": "x", "messages": HI})),
    *(("add_special_tokens", value) for value in (0, "yes", [], {})),
    *(("return_token_strs", value) for value in (0, "yes", [], {})),
    *(("model", value) for value in (5, True, [], {})),
]
# `prompt: None` takes the good body's prompt away.
TOKENIZE_CHAT: list[Row] = [
    (name, All({"prompt": None, name.replace("[", ".").split(".")[0]: value}))
    for name, value in CHAT
    if name is not None and name.startswith("messages") and value != [] and not isinstance(value, All)
]
DETOKENIZE: list[Row] = [
    ("tokens", All({"tokens": None})),
    *(("tokens", value) for value in NO_LIST_OF_IDS),
    *(("skip_special_tokens", value) for value in (0, "yes", [], {})),
    *(("model", value) for value in (5, True, [], {})),
]

MESSAGES: list[Row] = [
    *wrong_kinds(
        string="model",
        number="temperature top_p",
        integer="max_tokens top_k",
        boolean="stream",
        list="messages stop_sequences tools",
        object="metadata tool_choice thinking output_config chat_template_kwargs",
    ),
    *(row for row in TERMS if row[0] in ("cache_salt", "priority")),
    *(("metadata.user_id", {"user_id": value}) for value in NOT["string"]),
    *(("temperature", value) for value in (-0.1, 2.1)),
    *(("max_tokens", value) for value in (None, 0, -1)),
    ("messages", []),
    *(("messages[0].role", [{"role": role, "content": "x"}]) for role in (None, "", "tool", 5, [])),
    *(("messages[0].content", message(content=value)) for value in (5, {})),
    *(("messages[0].content[0]", message(content=[value])) for value in (None, 5, "x", {}, {"type": "image"})),
    ("messages[1].content[0]", [*HI, *message(content=[{"type": "document", "source": {"type": "base64"}}])]),
    ("messages[0].content[0]", message("assistant", [{"type": "tool_use"}])),
    ("messages[0].content[0].tool_use_id", message(content=[{"type": "tool_result", "content": "x"}])),
    ("messages", message(extra=nested(100))),
    ("system", [{"type": "x", "content": nested(600)}]),
    *(("system", value) for value in (5, True, {})),
    *(("tools[0]", [value]) for value in (None, 5, "f")),
    *(("tools[0].type", [{"type": value}]) for value in (5, "", [])),
    ("tool_choice", All({"tools": [{"type": "web_search_20250305"}], "tool_choice": {"type": "any"}})),
    *(("tools[0].input_schema", [{"name": "f", "input_schema": value}]) for value in (None, 5, "x", [])),
    ("tools[0].name", [{"input_schema": {}}]),
    *(("tool_choice.type", {"type": value}) for value in (None, "", "required", 5)),
    ("tool_choice.name", {"type": "tool"}),
    *(("thinking.type", {"type": value}) for value in (None, "", "on", 5)),
    *(("thinking.budget_tokens", {"type": "enabled", "budget_tokens": value}) for value in (None, 0, -1, "5", 10**6)),
    ("output_config.effort", {"effort": 5}),
    *(("output_config.format.type", {"format": value}) for value in ({}, {"type": "xml"})),
    ("output_config.format.type", All({"output_format": {}})),
]
RESPONSES: list[Row] = [
    # Of what the answer repeats also what nobody reads, deeper than it could be written.
    ("tools", [{"type": "function", "name": "f", "more": nested(300)}]),
    ("tools", [{"type": "web_search", "more": nested(600)}]),
    ("tool_choice", {"type": "function", "name": "f", "more": nested(300)}),
    ("metadata", {"more": nested(300)}),
    ("text.format", {"format": {"type": "text", "more": nested(300)}}),
    *(row for row in SAMPLING if row[0] in ("temperature", "top_p", "min_p", "seed", "logit_bias")),
    *TERMS,
    *wrong_kinds(
        string="model instructions previous_response_id prompt_cache_key safety_identifier",
        integer="max_output_tokens top_logprobs",
        boolean="stream store parallel_tool_calls include_reasoning separate_reasoning stream_reasoning",
        list="tools include",
        object="text reasoning metadata stream_options",
    ),
    *(("input", value) for value in (None, 5, True, {}, [])),
    *(("input[0]", [value]) for value in (5, "x", [], True)),
    *(("input[0].role", [{"role": role, "content": "x"}]) for role in (None, "", "tool", 5)),
    *(("input[0].type", [{"type": kind}]) for kind in ("", [], 5)),
    # Nothing but what is left out.
    *(("input", [{"type": kind}]) for kind in ("web_search_call", "compaction", "a\r\nb: c")),
    *(("input[0].content", message(content=value)) for value in (5, {})),
    *(("input[0].content[0]", message(content=[value])) for value in (None, 5, "x", {}, {"type": "input_image"})),
    ("input", message(extra=nested(100))),
    ("input[0].call_id", [{"type": "custom_tool_call", "name": "f"}]),
    ("input[0].call_id", [{"type": "function_call_output", "call_id": 5}]),
    ("previous_response_id", "resp_none"),
    *(("include[0]", [value]) for value in (5, "", None, [])),
    ("include", ["x"] * 65),
    *(("tools[0]", [value]) for value in (None, 5, "f", {}, {"type": ""})),
    *(("tools[0].name", [{"type": kind, "name": name}]) for kind in ("custom", "namespace") for name in (None, 5, "")),
    ("tools[0].format.syntax", [{"type": "custom", "name": "c", "format": LARK | {"syntax": "x"}}]),
    ("tools[0].tools[1].name", [{"type": "namespace", "name": "n", "tools": [TOOL | {"name": "f"}] * 1 + [TOOL]}]),
    *(
        ("tool_choice", All({"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": kind}}))
        for kind in ("web_search", "mcp", "computer")
    ),
    *(("tools[0].name", [{"type": "function", "name": name}]) for name in (None, 5, "", "a b")),
    ("text.verbosity", {"verbosity": "huge"}),
    ("truncation", "some"),
    *((name, 5) for name in ("messages", "max_tokens", "response_format", "n", "background")),
    # Its model does not reason.
    *((name, value) for name in ("thinking_token_budget", "max_thinking_tokens") for value in (5, -2, "5", True)),
]
OLLAMA: list[Row] = [
    *wrong_kinds(string="model", boolean="stream logprobs", integer="top_logprobs", object="options"),
    *(("format", value) for value in (5, True, [], "xml", {"type": "nothing"}, {"$ref": "#/missing"})),
    *(
        (f"options.{name}", {name: value})
        for name in ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty")
        for value in ("", "0.5", [], {}, True, -2.1, 2.1)
    ),
    *((f"options.{name}", {name: value}) for name in ("top_k", "seed") for value in NOT["integer"]),
    *(("options.num_predict", {"num_predict": value}) for value in (*NOT["integer"], -3)),
    *(("options.num_ctx", {"num_ctx": value}) for value in (*NOT["integer"], 0, -1)),
    *(("options.repeat_last_n", {"repeat_last_n": value}) for value in (*NOT["integer"], -2)),
    *(("options.stop", {"stop": value}) for value in (5, {}, [5], [""])),
    *((f"options.{name}", {name: value}) for name in NUMBER_HINTS for value in ("", "1", [], {}, True)),
    *((f"options.{name}", {name: value}) for name in FLAG_HINTS for value in ("", "true", [], {}, 1)),
    *(("options.mirostat", {"mirostat": value}) for value in ("0", False, {})),
    *(("options.tfs_z", {"tfs_z": value}) for value in ("1", True, [])),
    *(("options.rope_frequency_base", {"rope_frequency_base": value}) for value in (1e6, "x")),
    *(("options.rope_frequency_scale", {"rope_frequency_scale": value}) for value in (0.5, "x")),
    *(("options.penalize_newline", {"penalize_newline": value, "repeat_penalty": 1.1}) for value in (False, 0, "", [])),
    *(("keep_alive", value) for value in (True, [], {}, "", "soon", "5 m", "1x", "m", "--1", "nan", "1e3s", "٥m")),
    *(("think", value) for value in (5, [], "deep", True)),
]
_OLLAMA_KEPT: list[Row] = [
    *wrong_kinds(string="model name", object="options"),
    *(("options.num_ctx", {"num_ctx": value}) for value in (*NOT["integer"], 0)),
    *(("options.num_gpu", {"num_gpu": value}) for value in ("1", True)),
    *(("keep_alive", value) for value in (True, [], "soon")),
]
OLLAMA_EMBED: list[Row] = [
    *_OLLAMA_KEPT,
    *wrong_kinds(boolean="truncate", integer="dimensions"),
    *(("input", value) for value in (5, True, {}, [5], ["a", ""], ["a", None], [["a"]], ["a"] * 2049)),
    *(("dimensions", value) for value in (-1, 2)),
    ("input", All({"input": "w " * 600, "truncate": False})),
    ("options.num_ctx", All({"input": "w " * 60, "truncate": False, "options": {"num_ctx": 8}})),
]
OLLAMA_OLD_EMBED: list[Row] = [
    *_OLLAMA_KEPT,
    *wrong_kinds(string="prompt"),
    ("prompt", All({"prompt": "w " * 600})),
    ("options.num_ctx", All({"prompt": "w " * 60, "options": {"num_ctx": 8}})),
]
GENERATE: list[Row] = [
    *wrong_kinds(boolean="stream return_text_in_logprobs return_logprob"),
    *(("text", value) for value in (None, 5, True, {}, [], [5], [["a"]], ["a"] * 1025)),
    *(("input_ids", All({"text": None, "input_ids": value})) for value in (5, "x", {}, [-1], [VOCAB], ["a"], [[]])),
    *(("sampling_params", value) for value in (5, "x", [{}], True)),
    *(
        (f"sampling_params.{name}", {name: value})
        for name in ("temperature", "top_p", "min_p", "repetition_penalty")
        for value in ("", "0.5", [], {}, True, -2.1, 2.1)
    ),
    *(("sampling_params.n", {"n": value}) for value in (*NOT["integer"], 0)),
    *(("sampling_params.max_new_tokens", {"max_new_tokens": value}) for value in (*NOT["integer"], -2)),
    *(("sampling_params.stop", {"stop": value}) for value in (5, {}, [5], [""])),
    *(("sampling_params.regex", {"regex": value}) for value in BAD_REGEXES if value != ""),
    *(("sampling_params.json_schema", {"json_schema": value}) for value in BAD_SCHEMAS),
    ("top_logprobs_num", All({"return_logprob": True, "top_logprobs_num": 21})),
    ("top_logprobs_num", 5),
    ("rid", 5),
    *(("priority", value) for value in (*NOT["integer"], 1)),
    ("image_data", ["http://127.0.0.1/x.png"]),
]

TOKENS: list[Row] = [
    *(row for row in TERMS if row[0] in ("cache_salt", "priority")),
    *wrong_kinds(string="model request_id", boolean="stream", object="stream_options"),
    *(("token_ids", value) for value in (None, 5, "x", {}, [], [-1], [VOCAB], ["a"], [[5]], [True], [1.5])),
    *(("sampling_params", value) for value in (None, 5, "x", [{}], True)),
    *(
        (f"sampling_params.{name}", {name: value})
        for name in ("temperature", "top_p", "min_p", "repetition_penalty")
        for value in ("", "0.5", [], {}, True, -2.1, 2.1)
    ),
    *(
        (f"sampling_params.{name}", {name: value})
        for name in ("n", "max_tokens", "logprobs", "prompt_logprobs", "output_kind")
        for value in (*NOT["integer"], -2, 10**6)
        if (name, value) != ("max_tokens", 10**6)
    ),
    *(("sampling_params.stop", {"stop": value}) for value in (5, {}, [5], [""])),
    *(("sampling_params.stop_token_ids", {"stop_token_ids": value}) for value in NO_LIST_OF_IDS),
    ("sampling_params.structured_outputs.regex", {"structured_outputs": {"regex": "("}}),
    ("sampling_params.detokenize", {"detokenize": False, "stop": "x"}),
    ("sampling_params.detokenize", {"detokenize": 5}),
    ("sampling_params.truncate_prompt_tokens", {"truncate_prompt_tokens": 5}),
    ("sampling_params.extra_args", {"extra_args": {"a": 1}}),
    ("features", {"mm_hashes": {}}),
    ("output_mode", "text"),
    ("return_token_ids", False),
]

EMBEDDINGS: list[Row] = [
    *TERMS,
    *wrong_kinds(
        string="model encoding_format",
        integer="dimensions truncate_prompt_tokens",
        boolean="normalize add_special_tokens",
    ),
    *(
        ("input", value)
        for value in (
            None, "", [], ["a", ""], [""], ["a", 5], [[]], [[5], []], [5, "a"], [-1], [VOCAB], [True], [1.5],
            {"text": "a"}, 5, ["a"] * 2049, [[5]] * 2049,
        )
    ),
    ("encoding_format", "hex"),
    # Its model was trained for one length.
    *(("dimensions", value) for value in (0, -1, 2)),
    *(("truncate_prompt_tokens", value) for value in (0, -2, 513)),
    ("messages", HI),
    ("truncation_side", "left"),
    ("embed_dtype", "float16"),
    ("endianness", "big"),
]  # fmt: skip
POOLED: list[Row] = [
    *TERMS,
    *wrong_kinds(
        string="model prompt_name input_type",
        integer="truncate_prompt_tokens",
        boolean="add_special_tokens use_activation activation",
    ),
    *(("input", value) for value in (5, "", [], [""], ["a", 5], [[]], [-1], [VOCAB], {"text": "a"}, ["a"] * 2049)),
    ("prompt_name", "x"),
    ("input_type", "query"),
    ("truncate_prompt_tokens", 0),
    ("lora_path", "x"),
]
CLASSIFY: list[Row] = [*POOLED, ("input", All({"messages": HI}))]
POOLING: list[Row] = [
    *POOLED,
    ("input", None),
    *wrong_kinds(string="task encoding_format"),
    ("task", "score"),
    ("encoding_format", "hex"),
    ("model", All({"task": "token_classify"})),
]
TEI: list[Row] = [
    *TERMS,
    *wrong_kinds(string="truncation_direction", boolean="truncate"),
    ("truncation_direction", "Left"),
]
_TEI_INPUTS: list[Row] = [
    *wrong_kinds(string="prompt_name"),
    *(("inputs", value) for value in (None, 5, "", [], [""], ["a", 5], [[]], [-1], [VOCAB], {"text": "a"})),
    ("prompt_name", "x"),
]
TEI_EMBED: list[Row] = [*TEI, *_TEI_INPUTS, *wrong_kinds(integer="dimensions", boolean="normalize")]
TEI_EMBED_ALL: list[Row] = [*TEI, *_TEI_INPUTS]
TEI_PREDICT: list[Row] = [
    *TEI,
    *wrong_kinds(boolean="raw_scores"),
    *(
        ("inputs", value)
        for value in (
            None, 5, "", [], [""], [5], ["a", "b", "c"], [[]], [["a", ""]], [["a"], "b"], [["a", "b", "c"]], [[5]], {},
            [["a"]] * 2049,
        )
    ),
]  # fmt: skip
TEI_SIMILARITY: list[Row] = [
    *TERMS,
    *(("inputs", value) for value in (5, "x", [])),
    *(("inputs.source_sentence", All({"inputs": value})) for value in (None, {}, {"source_sentence": 5})),
    *(
        ("inputs.sentences", All({"inputs": {"source_sentence": "a", "sentences": value}}))
        for value in (None, 5, "x", [], [5], ["a", ""], ["a"] * 2048)
    ),
    ("parameters", 5),
    ("parameters.truncate", All({"parameters": {"truncate": 5}})),
    ("parameters.prompt_name", All({"parameters": {"prompt_name": "x"}})),
    ("parameters.truncation_direction", All({"parameters": {"truncation_direction": "Left"}})),
]
SCORE: list[Row] = [
    *TERMS,
    *wrong_kinds(string="model instruction"),
    *(("text_1", value) for value in (None, 5, "", [], {}, [[]], ["a", "b"])),
    *(("text_2", value) for value in (None, 5, "", [], ["b", 5], ["b", ""], {"image": "x"}, ["b"] * 2049)),
    ("text_1", All({"text_1": ["a", "b"], "text_2": ["c", "d", "e"]})),
    ("queries", All({"text_1": None, "queries": 5, "documents": "x"})),
    ("lora_path", "x"),
]
LABELS: list[Row] = [
    *TERMS,
    *wrong_kinds(string="model", boolean="apply_softmax item_first"),
    *(("label_token_ids", value) for value in (5, [], "5", [-1], [VOCAB], [True], [5] * 129)),
    *(("items", value) for value in (5, [], {}, [5], [None], [[5]], ["a", [5]], ["a"] * 2049)),
    ("items", All({"query": [5], "items": [[-1]]})),
    ("items", All({"query": "", "items": ["a", ""]})),
    *(("items", All({"query": value})) for value in (5, None, ["a"], {})),
]
RERANK: list[Row] = [
    *TERMS,
    *wrong_kinds(string="model instruction", integer="top_n", boolean="return_documents"),
    *(("query", value) for value in (None, "", 5, ["a"], {})),
    *(("documents", value) for value in (None, [], 5, "", [5], [""], [{"title": "x"}], ["a"] * 2049)),
    ("top_n", -1),
    ("truncate_prompt_tokens", 5),
    ("max_tokens_per_doc", 5),
    ("rank_fields", ["title"]),
]
NATIVE: list[Row] = [
    *TERMS,
    *wrong_kinds(string="model grammar", integer="n_predict n_probs repeat_last_n seed top_k"),
    *wrong_kinds(number="temperature top_p min_p repeat_penalty presence_penalty frequency_penalty"),
    *wrong_kinds(boolean="stream ignore_eos return_tokens timings_per_token"),
    *(
        ("prompt", value)
        for value in (None, 5, [], [[]], ["x", -1], ["x", None], [VOCAB], [True], [["x", VOCAB]], [["x", []]])
    ),
    *(("prompt.prompt_string", value) for value in ({}, {"prompt_string": 5})),
    ("prompt.multimodal_data", {"prompt_string": "x", "multimodal_data": ["aGk="]}),
    ("prompt[1].prompt_string", ["x", {}]),
    *(("n_cmpl", value) for value in (0, 129, "2")),
    *(("response_fields", value) for value in ("x", [5], ["x"] * 65, ["x" * 257])),
    *(("n_predict", value) for value in (-2, 10**30)),
    *(("n_probs", value) for value in (-1, 10**6)),
    *(("stop", value) for value in (5, [5], [""], ["x"] * 17)),
    *(
        ("logit_bias[0]", [value])
        for value in (5, [], [5], [5, 1, 1], [True, 1], [None, 1], [5, True], [5, "x"], [[], 1])
    ),
    *(("logit_bias", value) for value in ([[5, 101]], [[VOCAB, 1]], [[-1, 1]], {"x": 1}, "x")),
    *(("json_schema", value) for value in (5, [], "x")),
    *(("mirostat", value) for value in (1, 2)),
    ("dry_multiplier", 0.5),
    ("lora", [{"id": 0, "scale": 1}]),
]
# The tests give the demo model's tokenizer the tokens for it.
INFILL: list[Row] = [
    *(row for row in NATIVE if row[0] is not None and not row[0].startswith("prompt")),
    *wrong_kinds(string="input_prefix input_suffix prompt"),
    ("input_prefix", All({"input_prefix": None})),
    ("input_suffix", All({"input_suffix": None})),
    *(("input_extra", value) for value in (5, "x", {}, [{"text": "x"}] * 1025)),
    *(("input_extra[0].text", [value]) for value in (5, "x", {}, {"text": 5}, {"filename": "x"})),
    ("input_extra[1].filename", [{"text": "x"}, {"text": "x", "filename": 5}]),
]
ABORT: list[Row] = [
    ("rid", All({"rid": None})),
    *((name, value) for name in ("rid", "request_ids") for value in (5, True, {}, "", [""], [5], [["x"]])),
    *wrong_kinds(boolean="abort_all"),
]
WEIGHTS: list[Row] = [
    *wrong_kinds(string="model_path load_format weight_version", boolean="flush_cache abort_all_requests"),
    *(("model_path", value) for value in (None, "", "a\0b", "x" * 4000, "x" * 4097, "/no/such/directory")),
    ("load_format", "gguf"),
    ("flush_cache", False),
    *(("weight_version", value) for value in ("", "x" * 129)),
]

FAMILIES: list[Family] = [
    Family("/v1/completions", {"prompt": "x", "max_tokens": 1}, SAMPLING + STRUCTURE + COMPLETION),
    Family("/v1/chat/completions", {"messages": HI, "max_tokens": 1}, SAMPLING + STRUCTURE + CHAT),
    Family("/tokenize", {"prompt": "x"}, TOKENIZE + TOKENIZE_CHAT),
    Family("/detokenize", {"tokens": [5]}, DETOKENIZE),
    Family("/v1/chat/completions/render", {"messages": HI}, [row for row in TOKENIZE_CHAT if row[0] != "messages[0]"]),
    Family("/v1/messages", {"messages": HI, "max_tokens": 1}, MESSAGES, check_anthropic),
    Family(
        "/v1/messages/count_tokens", {"messages": HI}, wrong_kinds(string="model", list="messages"), check_anthropic
    ),
    Family("/v1/responses", {"input": "x", "max_output_tokens": 1}, RESPONSES),
    Family("/v1/responses/input_tokens", {"input": "x"}, wrong_kinds(string="model instructions", list="tools")),
    Family(
        "/v1/responses/compact",
        {"input": "x", "max_output_tokens": 1},
        [*wrong_kinds(string="model instructions", list="tools"), ("stream", True), ("input", []), ("input", 5)],
    ),
    Family("/api/chat", {"messages": HI, "stream": False, "options": {"num_predict": 1}}, OLLAMA, check_ollama, True),
    Family(
        "/api/generate", {"prompt": "x", "stream": False, "options": {"num_predict": 1}}, OLLAMA, check_ollama, True
    ),
    Family("/api/show", {}, wrong_kinds(string="model name"), check_ollama, True),
    Family("/api/embed", {"input": "x"}, OLLAMA_EMBED, check_ollama, True),
    Family("/api/embeddings", {"prompt": "x"}, OLLAMA_OLD_EMBED, check_ollama, True),
    Family("/api/pull", {"stream": False}, wrong_kinds(string="model name", boolean="stream"), check_ollama, True),
    Family("/v1/embeddings", {"input": "x"}, EMBEDDINGS),
    Family("/embed", {"inputs": "x"}, TEI_EMBED, check_tei),
    Family("/embed_all", {"inputs": "x"}, TEI_EMBED_ALL, check_tei),
    Family("/predict", {"inputs": "x"}, TEI_PREDICT, check_tei),
    Family("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}, TEI_SIMILARITY, check_tei),
    Family("/classify", {"input": "x"}, CLASSIFY),
    Family("/v1/classify", {"messages": HI}, wrong_kinds(string="model", list="messages")),
    Family("/pooling", {"input": "x"}, POOLING),
    Family("/v1/pooling", {"input": "x"}, POOLING),
    Family("/score", {"text_1": "a", "text_2": "b"}, SCORE),
    Family("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [5]}, LABELS),
    Family("/rerank", {"query": "a", "documents": ["b"]}, RERANK),
    Family("/abort_request", {"rid": "unknown"}, ABORT),
    Family("/update_weights_from_disk", {"model_path": "."}, WEIGHTS),
    Family("/completion", {"prompt": "x", "n_predict": 1}, NATIVE),
    Family("/infill", {"input_prefix": "x", "input_suffix": "y", "n_predict": 1}, INFILL),
    Family("/inference/v1/generate", {"token_ids": [5], "sampling_params": {"max_tokens": 1}}, TOKENS),
    Family("/generate", {"text": "x", "sampling_params": {"max_new_tokens": 1}}, GENERATE),
]

"""What NVIDIA Dynamo's frontend asks of a worker, as this engine's own words, and deltas as its chunks.

Token ids in, token ids out: template, tokenizer, stop strings and tool calls are the frontend's. Imports nothing of
Dynamo. What would change the answer and is not done here is refused by its name, never left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from engine.models.generation import GenerationDefaults
from engine.request import MAX_TOP_LOGPROBS, FinishReason, RequestError, SamplingParams, checked
from engine.stream import Delta, TokenLogprob, TokenStream
from engine.text.grammar.spec import GrammarSpec
from server.logprobs import LOWEST, Spelling

Json = dict[str, Any]

MAX_SALT_LENGTH = 1024
# Fields of sampling_options with the names that SamplingParams has for them.
_SAMPLING = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
)
_FINISHED = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ABORT: "cancelled"}
# The order in which vLLM looks at them; the frontend sends one.
_STRUCTURES = (
    ("json", "json_schema"),
    ("regex", "regex"),
    ("choice", "choice"),
    ("grammar", "grammar"),
    ("structural_tag", "structural_tag"),
)


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """model: whose answer is wanted, "" for the model's own. namespace: a cache salt. priority: lower is earlier."""

    token_ids: list[int]
    model: str
    sampling: SamplingParams
    structure: GrammarSpec | None
    namespace: str
    priority: int


def read(
    given: Mapping[str, Any],
    token_ids: Sequence[int],
    own: GenerationDefaults,
    vocab_size: int,
    most_logprobs: int = MAX_TOP_LOGPROBS,
) -> TokenRequest:
    """given: Dynamo's PreprocessedRequest. own: what counts where a field is missing. Raises RequestError."""
    for name in ("multi_modal_data", "encoder_result"):
        if given.get(name):
            raise RequestError("This worker reads text only.", param=name)
    for name in ("prefill_result", "bootstrap_info"):
        if given.get(name):
            raise RequestError("This worker computes prompts itself and takes no KV cache from others.", param=name)
    if not token_ids:
        raise RequestError("`token_ids` must not be empty.", param="token_ids")
    if not all(type(one) is int and 0 <= one < vocab_size for one in token_ids):
        raise RequestError(f"`token_ids` must be token ids from 0 to {vocab_size - 1}.", param="token_ids")
    extra = _object(given, "extra_args")
    # What clients say of sampling beyond the frontend's own fields comes beside them.
    options = _without_none(_object(given, "sampling_options")) | _without_none(_object(extra, "sampling_options"))
    for name in ("n", "best_of"):
        # The runtime ends a request with the first chunk that ends a choice: the others would be cut off.
        if options.pop(name, 1) != 1:
            raise RequestError(f"`{name}` must be 1: a Dynamo worker answers one choice a request.", param=name)
    structure = _structure(options.pop("guided_decoding", None))
    if structure is not None and given.get("require_reasoning"):
        raise RequestError("A structure after reasoning cannot be enforced here.", param="guided_decoding")
    sampling = _sampling(options, own)
    sampling = _with_stops(sampling, _object(given, "stop_conditions"))
    output = _object(given, "output_options")
    sampling = replace(sampling, logprobs=output.get("logprobs"), prompt_logprobs=output.get("prompt_logprobs"))
    routing = _object(given, "routing")
    priority = routing.get("priority") or 0
    if type(priority) is not int:
        raise RequestError("`priority` must be an integer.", param="priority")
    return TokenRequest(
        token_ids=list(token_ids),
        model=_text(given, "model"),
        sampling=checked(sampling, vocab_size, most_logprobs),
        structure=structure,
        namespace=_salt(given, extra, routing),
        # Dynamo's grows with importance.
        priority=-priority,
    )


def _sampling(options: Json, own: GenerationDefaults) -> SamplingParams:
    values: Json = {name: getattr(own, name, None) for name in _SAMPLING}
    values |= {name: options.pop(name, values[name]) for name in _SAMPLING}
    values = _without_none(values)
    if options.pop("use_beam_search", False):
        raise RequestError("Beam search is not supported.", param="use_beam_search")
    if options.pop("length_penalty", 1.0) != 1.0:
        raise RequestError("`length_penalty` belongs to beam search, which is not supported.", param="length_penalty")
    bias = options.pop("logit_bias", {})
    if not isinstance(bias, Mapping):
        raise RequestError("`logit_bias` must be an object.", param="logit_bias")
    values["logit_bias"] = tuple((_id(key), value) for key, value in bias.items())
    if (words := options.pop("bad_words_token_ids", None)) is not None:
        values["bad_words"] = tuple(
            tuple(_list(word, "bad_words_token_ids")) for word in _list(words, "bad_words_token_ids")
        )
    if (allowed := options.pop("allowed_token_ids", None)) is not None:
        values["allowed_token_ids"] = tuple(_list(allowed, "allowed_token_ids"))
    # Both are about the text, which the frontend makes.
    options.pop("include_stop_str_in_output", None)
    options.pop("detokenize", None)
    if options:
        name = next(iter(options))
        raise RequestError(f"`{name[:64]}` is not supported by this worker.", param=name[:64])
    return SamplingParams(max_tokens=own.max_new_tokens, **values)


def _list(value: Any, name: str) -> list[Any]:
    """What is in it is checked with everything else."""
    if not isinstance(value, list):
        raise RequestError(f"`{name}` must be a list of token ids.", param=name)
    return value


def _id(text: Any) -> int:
    """A key of a JSON object; what is none is refused with the values."""
    try:
        return int(text)
    except (TypeError, ValueError):
        return -1


def _with_stops(sampling: SamplingParams, given: Json) -> SamplingParams:
    """Stop strings are looked for where the text is made; that frontend ends the request."""
    stops = _without_none(given)
    if stops.get("max_thinking_tokens") is not None:
        raise RequestError("A limit of reasoning cannot be kept here.", param="max_thinking_tokens")
    ids: list[int] = []
    for name in ("stop_token_ids", "stop_token_ids_visible", "stop_token_ids_hidden"):
        ids += _list(stops.get(name, []), name)
    if not all(type(one) is int for one in ids):
        raise RequestError("`stop_token_ids` must be a list of token ids.", param="stop_token_ids")
    if not isinstance(ignore_eos := stops.get("ignore_eos", False), bool):
        raise RequestError("`ignore_eos` must be true or false.", param="ignore_eos")
    return replace(
        sampling,
        max_tokens=stops.get("max_tokens", sampling.max_tokens),
        min_tokens=stops.get("min_tokens", 0),
        ignore_eos=ignore_eos,
        stop_token_ids=tuple(dict.fromkeys(ids)),
    )


def without_eos(sampling: SamplingParams, eos_token_ids: Sequence[int]) -> SamplingParams:
    """The frontend lists the model's own ends among the stop ids; here ignore_eos rules over them."""
    kept = tuple(one for one in sampling.stop_token_ids if one not in eos_token_ids)
    return replace(sampling, stop_token_ids=kept)


def _structure(given: Any) -> GrammarSpec | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise RequestError("`guided_decoding` must be an object.", param="guided_decoding")
    blanks = given.get("whitespace_pattern")
    for name, kind in _STRUCTURES:
        if (wanted := given.get(name)) is not None:
            text = wanted if isinstance(wanted, str) and name != "choice" else orjson.dumps(wanted).decode()
            return GrammarSpec(
                kind,  # type: ignore[arg-type]
                text,
                whitespace_pattern=blanks if kind == "json_schema" else None,
                param=f"guided_{name}",
            )
    return None


def _salt(given: Mapping[str, Any], extra: Json, routing: Json) -> str:
    """Prompts share pages with others of the same salt alone."""
    for found in (
        _object(given, "nvext").get("cache_salt"),
        _object(extra, "nvext").get("cache_salt"),
        routing.get("cache_namespace"),
    ):
        if found is None:
            continue
        if not isinstance(found, str) or len(found) > MAX_SALT_LENGTH:
            raise RequestError(
                f"`cache_salt` must be a text of at most {MAX_SALT_LENGTH} characters.", param="cache_salt"
            )
        return found
    return ""


def _object(given: Mapping[str, Any], name: str) -> Json:
    value = given.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"`{name}` must be an object.", param=name)
    return dict(value)


def _without_none(given: Json) -> Json:
    return {name: value for name, value in given.items() if value is not None}


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name) or ""
    if not isinstance(value, str):
        raise RequestError(f"`{name}` must be a text.", param=name)
    return value


# ---- what goes back


class Chunks:
    """The deltas of a request as Dynamo's GenerateChunk. spelling: how tokens are written beside their logprobs."""

    def __init__(self, wanted: TokenRequest, stream: TokenStream, spelling: Spelling) -> None:
        self._sampling = wanted.sampling
        self._stream = stream
        self._spelling = spelling

    def next(self, delta: Delta) -> Json:
        """finish_reason, usage and the prompt's logprobs come with the last. Not for a delta that is an error."""
        chunk: Json = {"token_ids": delta.token_ids, "index": 0}
        if self._sampling.logprobs is not None and delta.logprobs:
            chunk["log_probs"] = [max(entry.logprob, LOWEST) for entry in delta.logprobs]
            if self._sampling.logprobs:
                chunk["top_logprobs"] = [list(self._top(entry)) for entry in delta.logprobs]
        if delta.finish_reason is not None:
            chunk["finish_reason"] = _FINISHED[delta.finish_reason]
            chunk["completion_usage"] = self._usage()
            if self._stream.prompt_logprobs is not None:
                chunk["engine_data"] = {"prompt_logprobs": self._of_prompt(self._stream.prompt_logprobs)}
        return chunk

    def _usage(self) -> Json:
        stream = self._stream
        return {
            "prompt_tokens": stream.num_prompt_tokens,
            "completion_tokens": stream.num_output_tokens,
            "total_tokens": stream.num_prompt_tokens + stream.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": stream.num_cached_tokens},
        }

    def _top(self, entry: TokenLogprob) -> Iterator[Json]:
        """The likeliest tokens, and the token itself where it is none of them."""
        for rank, token_id, logprob in _ranked(entry, self._sampling.logprobs or 0):
            yield {
                "rank": rank,
                "token_id": token_id,
                "token": self._spelling.text(token_id),
                "logprob": max(logprob, LOWEST),
                "bytes": list(self._spelling.bytes(token_id)),
            }

    def _of_prompt(self, entries: list[TokenLogprob]) -> list[Json | None]:
        """The first token has none. Keys are token ids as text."""
        most = self._sampling.prompt_logprobs or 0
        return [None, *({str(ranked[1]): self._entry(*ranked) for ranked in _ranked(one, most)} for one in entries)]

    def _entry(self, rank: int, token_id: int, logprob: float) -> Json:
        return {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": self._spelling.text(token_id)}


def _ranked(entry: TokenLogprob, most: int) -> Iterator[tuple[int, int, float]]:
    """Rank, token id and log-probability."""
    listed = entry.top[:most]
    for rank, (token_id, logprob) in enumerate(listed, 1):
        yield rank, token_id, logprob
    if entry.token_id not in [token_id for token_id, _ in listed]:
        yield entry.rank, entry.token_id, entry.logprob

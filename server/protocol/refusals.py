"""Fields that clients know and this server cannot honour yet, with the values that ask for nothing.

A refused field set to anything else is a 400 that names it: nothing is silently ignored. To honour a field, take its
line out and read it in generation.py, chat.py or completions.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.request import RequestError
from server.protocol.body import Body

# null is neutral everywhere.
_COMMON: dict[str, tuple[object, ...]] = {
    # Samplers of llama.cpp.
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "typical_p": (1,),
    "dynatemp_range": (0,),
    "top_n_sigma": (-1,),
    "t_max_predict_ms": (-1, 0),
    "n_probs": (0,),
    "post_sampling_probs": (False,),
    "lora": ([],),
    "extra_key": ("",),
    "session_params": ({},),
    "sampling_logprobs_mode": (),
    "return_prompt_token_ids": (False,),
    "return_meta_info": (False,),
    "return_sampling_mask": (False,),
    "length_penalty": (1,),
    "logprob_token_ids": ([],),
    "use_beam_search": (False,),
    "stop_regex": ("", []),
    "no_stop_trim": (False,),
    "truncate_prompt_tokens": (),
    "stream_interval": (1,),
    "repetition_detection": (),
    "watermark": (),
    "watermarking": (False,),
    "custom_logit_processor": (),
    "custom_params": (),
    "logits_processors": ([],),
    "vllm_xargs": ({},),
    "ec_transfer_params": (),
    "return_token_offsets": (False,),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
}

CHAT_REFUSALS = _COMMON | {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "documents": ([],),
    "chat_template": (),
    "modalities": (["text"],),
    "audio": (),
    "input_ids": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}

COMPLETION_REFUSALS = _COMMON | {
    "return_prompt_text": (False,),
    # Where a raw prompt stands in its reasoning only its writer knows.
    "thinking_token_budget": (),
    "max_thinking_tokens": (),
    "prompt_embeds": (),
}

_POOLING_REFUSALS: dict[str, tuple[object, ...]] = {
    "use_activation": (),
    "softmax": (),
    "activation": (),
    "mm_processor_kwargs": ({},),
    "rid": (),
}

EMBEDDING_REFUSALS = _POOLING_REFUSALS | {
    "messages": (),
    "truncation_side": ("right",),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "task": (),
}

# Of every model but one with a classifier.
SCORE_REFUSALS = _POOLING_REFUSALS | {"truncate_prompt_tokens": ()}

CLASSIFIER_REFUSALS: dict[str, tuple[object, ...]] = {
    "mm_processor_kwargs": ({},),
    "rid": (),
}

RANK_REFUSALS: dict[str, tuple[object, ...]] = {
    "max_tokens_per_doc": (),
    "max_chunks_per_doc": (),
    "rank_fields": (["text"],),
}


def refuse(body: Body, refusals: dict[str, tuple[object, ...]]) -> None:
    """Raise RequestError for the first field that asks for something that is not there yet."""
    for name, neutral in refusals.items():
        value = body.raw(name)
        # False == 0 in Python, but a flag is no number.
        if value is not None and not any(
            value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral
        ):
            raise not_supported(name)


def refuse_in(where: str, fields: Mapping[str, Any], refusals: dict[str, tuple[object, ...]]) -> None:
    """The same for the fields of an object that stands at `where` in the body."""
    refuse(
        Body({f"{where}.{name}": fields.get(name) for name in refusals}),
        {f"{where}.{name}": neutral for name, neutral in refusals.items()},
    )


def not_supported(name: str) -> RequestError:
    return RequestError(f"`{name}` is not supported by this server yet.", param=name)

"""The flags of speculative decoding, in vLLM's spelling (one JSON object) and in SGLang's, -> SpeculationOptions.

Whatever is not done here ends the start with one line that names it: a key that were ignored would promise something.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from engine.config import SpeculationOptions, StartupError, shortened

MAX_DRAFT_TOKENS = 128
# Drafts of a row at most, where nobody says how many.
_DEFAULT_TOKENS = {"ngram": 8, "suffix": 24, "draft_model": 4, "eagle3": 3, "mtp": 1}
_NEED_MODEL = ("draft_model", "eagle3")
_FLAG = "--speculative-config"
_REASONS = {
    "eagle": "heads of EAGLE 1 and 2 are not read; eagle3 is",
    "ngram_gpu": "drafts are looked up on the host; ngram is",
    "medusa": "its heads are not read",
    "mlp_speculator": "its heads are not read",
    "dflash": "blocks are not drafted in one pass",
    "dspark": "blocks are not drafted in one pass",
    "extract_hidden_states": "nobody is given hidden states",
    "custom_class": "no code of others is loaded",
}
# Keys of vLLM that would change what runs, and why they cannot.
_REFUSED = {
    "quantization": "the draft is read as its checkpoint has it",
    "max_model_len": "the draft has the model's own context",
    "kv_cache_dtype": "the draft's cache is the model's",
    "moe_backend": "there is one",
    "attention_backend": "there is one",
    "disable_padded_drafter_batch": "no batch is padded here",
    "parallel_drafting": "drafts are made one after the other",
    "draft_load_config": "it is read like the model",
    "code_revision": "no code of a hub is run",
    "rejection_sample_method": "drafts are accepted where they equal what is drawn anyway: only standard",
    "synthetic_acceptance_rate": "drafts are accepted where they equal what is drawn anyway",
    "draft_tensor_parallel_size": "the draft runs on one device: only 1",
}
_HARMLESS = {"rejection_sample_method": "standard", "draft_tensor_parallel_size": 1}


def add_draft_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speculative decoding (the same tokens, sooner)")
    group.add_argument(
        _FLAG,
        "-sc",
        dest="speculative_config",
        metavar="JSON",
        help='such as \'{"method": "ngram", "num_speculative_tokens": 8}\'; ngram, suffix, draft_model, eagle3, mtp',
    )
    group.add_argument(
        "--speculative-algorithm", metavar="NAME", help="SGLang's: NGRAM, STANDALONE, EAGLE3, NEXTN; and SUFFIX"
    )
    group.add_argument("--speculative-draft-model-path", "--speculative-draft-model", metavar="DIR")
    group.add_argument("--speculative-draft-model-revision", metavar="NAME")
    group.add_argument("--speculative-num-steps", type=int, metavar="N", help="drafts of a row")
    group.add_argument("--speculative-num-draft-tokens", type=int, metavar="N", help="those and the row's own token")
    group.add_argument("--speculative-eagle-topk", type=int, metavar="1", help="drafts are chains, no trees")
    group.add_argument("--speculative-accept-threshold-single", type=float, metavar="1.0", help="nothing is lossy")
    group.add_argument("--speculative-accept-threshold-acc", type=float, metavar="1.0", help="nothing is lossy")
    group.add_argument("--speculative-ngram-min-match-window-size", type=int, metavar="N", help="tokens of a match")
    group.add_argument("--speculative-ngram-max-match-window-size", type=int, metavar="N")


def draft_options(args: argparse.Namespace) -> SpeculationOptions:
    """Raises StartupError."""
    sglang = {
        name: value for name, value in vars(args).items() if name.startswith("speculative_") and value is not None
    }
    text = sglang.pop("speculative_config", None)
    if text is not None and sglang:
        other = "--" + next(iter(sglang)).replace("_", "-")
        raise StartupError(f"{_FLAG} and {other} say the same in two ways; give one")
    if text is not None:
        try:
            given = json.loads(text)
        except ValueError:
            raise StartupError(f"{_FLAG}: '{shortened(text)}' is not JSON") from None
        return options_from(given)
    return _from_sglang(sglang) if sglang else SpeculationOptions()


def options_from(given: Any, flag: str = _FLAG) -> SpeculationOptions:
    """From vLLM's JSON object. flag: how messages call it."""
    if not isinstance(given, dict):
        raise StartupError(f"{flag} is not a JSON object")
    left = dict(given)
    known = {"num_speculative_tokens_per_batch_size"}

    def take(key: str, check: Callable[[Any], bool], what: str, default: Any = None) -> Any:
        known.add(key)
        value = left.pop(key, None)
        if value is None:
            return default
        if not check(value):
            raise StartupError(f"{flag}: {key} must be {what}, not {shortened(json.dumps(value, default=str))}")
        return value

    def integer(low: int, high: int) -> Callable[[Any], bool]:
        return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    def number(low: float, high: float) -> Callable[[Any], bool]:
        return lambda value: (
            isinstance(value, (int, float)) and not isinstance(value, bool) and low <= float(value) <= high
        )

    def is_text(value: Any) -> bool:
        return isinstance(value, str) and bool(value)

    def is_bool(value: Any) -> bool:
        return isinstance(value, bool)

    model = take("model", is_text, "a directory or a hub id")
    method = take("method", is_text, "a name")
    if method is None:
        method = "ngram" if model in ("ngram", "[ngram]") else "draft_model" if model else None
    if method is None:
        raise StartupError(f"{flag}: method is missing ({', '.join(_DEFAULT_TOKENS)})")
    if method.endswith("_mtp"):
        method = "mtp"  # vLLM's older names, one for each family
    if method not in _DEFAULT_TOKENS:
        reason = _REASONS.get(method, f"it is none of {', '.join(_DEFAULT_TOKENS)}")
        raise StartupError(f"{flag}: method {json.dumps(shortened(method))} is not supported: {reason}")
    if method in ("ngram", "suffix"):
        if model not in (None, method, f"[{method}]"):
            raise StartupError(f"{flag}: method {method} takes no model")
        model = None
    if method in _NEED_MODEL and model is None:
        raise StartupError(f"{flag}: method {method} needs model, the directory or hub id of what drafts")
    tokens = take("num_speculative_tokens", integer(1, MAX_DRAFT_TOKENS), f"an integer from 1 to {MAX_DRAFT_TOKENS}")
    table = _table(left.pop("num_speculative_tokens_per_batch_size", None), flag)
    if tokens is None:
        tokens = max((count for _, _, count in table), default=0) or _DEFAULT_TOKENS[method]
    elif any(count > tokens for _, _, count in table):
        raise StartupError(f"{flag}: num_speculative_tokens_per_batch_size has more than num_speculative_tokens")
    low = take("prompt_lookup_min", integer(1, 1024), "an integer from 1 to 1024")
    high = take("prompt_lookup_max", integer(1, 1024), "an integer from 1 to 1024")
    if method != "ngram" and (low is not None or high is not None):
        raise StartupError(f"{flag}: prompt_lookup_min and prompt_lookup_max are of method ngram")
    # One that is given stands for both, as in vLLM.
    low, high = low or high or 5, high or low or 5
    if low > high:
        raise StartupError(f"{flag}: prompt_lookup_min {low} is more than prompt_lookup_max {high}")
    if method != "suffix" and (stray := next((key for key in left if key.startswith("suffix_decoding_")), None)):
        raise StartupError(f"{flag}: {shortened(stray)} is of method suffix")
    options = SpeculationOptions(
        method=method,
        model=model,
        num_draft_tokens=tokens,
        by_batch_size=table,
        prompt_lookup_min=low,
        prompt_lookup_max=high,
        revision=take("revision", is_text, "a name"),
        use_vocabulary_map=take("use_heterogeneous_vocab", is_bool, "true or false", False),
        draft_sample_method=take(
            "draft_sample_method",
            lambda value: value in ("greedy", "probabilistic"),
            "greedy or probabilistic",
            "greedy",
        ),
        suffix_max_tree_depth=take("suffix_decoding_max_tree_depth", integer(1, 1024), "an integer from 1 to 1024", 24),
        suffix_max_cached_requests=take(
            "suffix_decoding_max_cached_requests", integer(0, 10**7), "an integer from 0 to 10000000", 10_000
        ),
        suffix_max_spec_factor=take(
            "suffix_decoding_max_spec_factor", number(0.0, 1000.0), "a number from 0 to 1000", 1.0
        ),
        suffix_min_token_prob=take("suffix_decoding_min_token_prob", number(0.0, 1.0), "a number from 0 to 1", 0.1),
        adaptive=take("adaptive", is_bool, "true or false", True),
    )
    for key, value in left.items():
        if key in _REFUSED:
            if value is None or (key in _HARMLESS and value == _HARMLESS[key]):
                continue
            raise StartupError(f"{flag}: {key} is not supported: {_REFUSED[key]}")
        shown = json.dumps(shortened(key))
        raise StartupError(f"{flag}: {shown} is no key of it; known are {', '.join(sorted(known))}")
    if options.use_vocabulary_map and method != "draft_model":
        raise StartupError(f"{flag}: use_heterogeneous_vocab is of method draft_model")
    return options


def _table(given: Any, flag: str) -> tuple[tuple[int, int, int], ...]:
    """Of rows [from, to, drafts], by the number of sequences that decode; rising, and with no size in two of them."""
    rows = [] if given is None else given
    name = "num_speculative_tokens_per_batch_size"
    what = f"{flag}: {name} must be a list of [from, to, tokens], with sizes that rise"
    if not isinstance(rows, list):
        raise StartupError(what)
    last = 0
    for row in rows:
        right = isinstance(row, list) and len(row) == 3 and all(isinstance(one, int) and one >= 0 for one in row)
        if not right or isinstance(row[2], bool) or not last < row[0] <= row[1] or row[2] > MAX_DRAFT_TOKENS:
            raise StartupError(what)
        last = row[1]
    return tuple((row[0], row[1], row[2]) for row in rows)


def _from_sglang(given: dict[str, Any]) -> SpeculationOptions:
    def take(name: str) -> Any:
        return given.pop(f"speculative_{name}", None)

    algorithm, model = take("algorithm"), take("draft_model_path")
    if algorithm is None:
        flag = "--" + next(iter(given), "speculative_draft_model_path").replace("_", "-")
        raise StartupError(f"{flag} needs --speculative-algorithm")
    methods = {"NGRAM": "ngram", "SUFFIX": "suffix", "STANDALONE": "draft_model", "EAGLE3": "eagle3", "NEXTN": "mtp"}
    method = methods.get(algorithm.upper())
    if algorithm.upper() == "EAGLE" and model is None:
        method = "mtp"  # the name under which SGLang runs a model's own layer
    if method is None:
        reason = _REASONS.get(algorithm.lower(), f"it is none of {', '.join(methods)}")
        raise StartupError(f"--speculative-algorithm {algorithm} is not supported: {reason}")
    for name, only in (("eagle_topk", 1), ("accept_threshold_single", 1.0), ("accept_threshold_acc", 1.0)):
        value = take(name)
        if value is not None and value != only:
            why = (
                "drafts are chains" if only == 1 and name == "eagle_topk" else "no draft is accepted that is not drawn"
            )
            raise StartupError(f"--speculative-{name.replace('_', '-')} {value}: {why}, so it can be {only} only")
    steps, tokens = take("num_steps"), take("num_draft_tokens")
    if steps is not None and tokens is not None and tokens != steps + 1:
        raise StartupError(
            f"--speculative-num-draft-tokens {tokens} is not --speculative-num-steps {steps} and the row's own token"
        )
    for name, value, least in (("num-steps", steps, 1), ("num-draft-tokens", tokens, 2)):
        if value is not None and not least <= value <= MAX_DRAFT_TOKENS:
            raise StartupError(f"--speculative-{name} {value} is not from {least} to {MAX_DRAFT_TOKENS}")
    return options_from(
        {
            "method": method,
            "model": model,
            "revision": take("draft_model_revision"),
            "num_speculative_tokens": steps or (tokens - 1 if tokens else None),
            "prompt_lookup_min": take("ngram_min_match_window_size"),
            "prompt_lookup_max": take("ngram_max_match_window_size"),
        },
        f"--speculative-algorithm {algorithm}",
    )

"""What may be said of speculative decoding on the command line, and what ends the start with a line that names it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.config import SpeculationOptions, StartupError
from engine.flags import parse


def options(*argv: str) -> SpeculationOptions:
    return parse(argv)[0].speculation


def of_json(**given: Any) -> SpeculationOptions:
    return options("--speculative-config", json.dumps(given))


def test_nothing_speculates_unless_it_is_asked_for() -> None:
    assert options() == SpeculationOptions() and SpeculationOptions().method is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": "ngram"}, {"num_draft_tokens": 8, "prompt_lookup_min": 5, "prompt_lookup_max": 5}),
        ({"model": "[ngram]", "num_speculative_tokens": 3}, {"method": "ngram", "num_draft_tokens": 3}),
        ({"method": "ngram", "prompt_lookup_max": 3}, {"prompt_lookup_min": 3, "prompt_lookup_max": 3}),
        ({"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4}, {"prompt_lookup_min": 2}),
        ({"method": "ngram", "num_speculative_tokens": None, "adaptive": False}, {"adaptive": False}),
        ({"method": "suffix"}, {"num_draft_tokens": 24, "suffix_max_spec_factor": 1.0}),
        ({"method": "suffix", "suffix_decoding_min_token_prob": 0}, {"suffix_min_token_prob": 0}),
        ({"model": "small"}, {"method": "draft_model", "model": "small"}),
        ({"model": "small", "use_heterogeneous_vocab": True}, {"use_vocabulary_map": True}),
        ({"method": "eagle3", "model": "head", "revision": "main"}, {"model": "head", "revision": "main"}),
        ({"method": "deepseek_mtp"}, {"method": "mtp", "model": None}),
        ({"method": "ngram", "draft_tensor_parallel_size": 1, "rejection_sample_method": "standard"}, {}),
        (
            {"method": "ngram", "num_speculative_tokens_per_batch_size": [[1, 4, 6], [5, 9, 0]]},
            {"by_batch_size": ((1, 4, 6), (5, 9, 0)), "num_draft_tokens": 6},
        ),
    ],
)
def test_vllms_object(given: dict[str, Any], expected: dict[str, Any]) -> None:
    made = of_json(**given)
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "method is missing"),
        ({"method": "eagle", "model": "x"}, '"eagle" is not supported: heads of EAGLE 1 and 2'),
        ({"method": "nonsense"}, "none of ngram, suffix"),
        ({"method": 3}, "method must be a name"),
        ({"method": "ngram", "model": "x"}, "takes no model"),
        ({"method": "eagle3"}, "needs model"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens must be an integer from 1 to 128"),
        ({"method": "ngram", "num_speculative_tokens": 129}, "from 1 to 128, not 129"),
        ({"method": "ngram", "num_speculative_tokens": 2.5}, "num_speculative_tokens"),
        ({"method": "ngram", "prompt_lookup_min": 4, "prompt_lookup_max": 2}, "prompt_lookup_min 4 is more"),
        ({"method": "suffix", "prompt_lookup_min": 4}, "are of method ngram"),
        (
            {"method": "ngram", "suffix_decoding_max_tree_depth": 4},
            "suffix_decoding_max_tree_depth is of method suffix",
        ),
        ({"method": "suffix", "suffix_decoding_min_token_prob": 2}, "a number from 0 to 1"),
        ({"model": "x", "draft_sample_method": "other"}, "greedy or probabilistic"),
        ({"model": "x", "quantization": "fp8"}, "quantization is not supported"),
        ({"model": "x", "draft_tensor_parallel_size": 2}, "draft_tensor_parallel_size is not supported"),
        ({"model": "x", "rejection_sample_method": "fly"}, "rejection_sample_method is not supported"),
        ({"method": "ngram", "parallel_drafting": True}, "parallel_drafting is not supported"),
        ({"method": "ngram", "use_heterogeneous_vocab": True}, "use_heterogeneous_vocab is of method draft_model"),
        (
            {"method": "ngram", "lookahead": 3},
            '"lookahead" is no key of it; known are adaptive, draft_sample_method, method, ',
        ),
        ({"method": "ngram", "num_speculative_tokens_per_batch_size": [[4, 1, 2]]}, "sizes that rise"),
        ({"method": "ngram", "num_speculative_tokens_per_batch_size": [[1, 4, 2], [4, 9, 1]]}, "sizes that rise"),
        ({"method": "ngram", "num_speculative_tokens_per_batch_size": 3}, "must be a list"),
        (
            {"method": "ngram", "num_speculative_tokens": 2, "num_speculative_tokens_per_batch_size": [[1, 4, 3]]},
            "more than num_speculative_tokens",
        ),
    ],
)
def test_what_is_not_done_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(StartupError, match="--speculative-config: ") as raised:
        of_json(**given)
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "ngram", "[]", "3", '"ngram"', "null", "{"])
def test_what_is_no_object(text: str) -> None:
    with pytest.raises(StartupError, match="--speculative-config"):
        options("--speculative-config", text)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--speculative-algorithm NGRAM --speculative-num-draft-tokens 9", {"method": "ngram", "num_draft_tokens": 8}),
        (
            "--speculative-algorithm NGRAM --speculative-ngram-min-match-window-size 1 "
            "--speculative-ngram-max-match-window-size 12",
            {"prompt_lookup_min": 1, "prompt_lookup_max": 12},
        ),
        ("--speculative-algorithm suffix", {"method": "suffix"}),
        (
            "--speculative-algorithm STANDALONE --speculative-draft-model-path d",
            {"method": "draft_model", "model": "d"},
        ),
        (
            "--speculative-algorithm EAGLE3 --speculative-draft-model d --speculative-num-steps 4 "
            "--speculative-num-draft-tokens 5 --speculative-eagle-topk 1 --speculative-draft-model-revision r",
            {"method": "eagle3", "num_draft_tokens": 4, "revision": "r"},
        ),
        ("--speculative-algorithm NEXTN --speculative-accept-threshold-acc 1.0", {"method": "mtp"}),
        ("--speculative-algorithm EAGLE", {"method": "mtp"}),
    ],
)
def test_sglangs_flags(argv: str, expected: dict[str, Any]) -> None:
    made = options(*argv.split())
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--speculative-num-steps 3", "--speculative-num-steps needs --speculative-algorithm"),
        ("--speculative-algorithm EAGLE --speculative-draft-model-path d", "heads of EAGLE 1 and 2"),
        ("--speculative-algorithm UNO", "none of NGRAM"),
        ("--speculative-algorithm STANDALONE", "needs model"),
        ("--speculative-algorithm NGRAM --speculative-eagle-topk 4", "drafts are chains"),
        ("--speculative-algorithm NGRAM --speculative-accept-threshold-single 0.5", "--speculative-accept-threshold-s"),
        ("--speculative-algorithm NGRAM --speculative-num-steps 0", "--speculative-num-steps 0 is not from 1"),
        ("--speculative-algorithm NGRAM --speculative-num-draft-tokens 1", "is not from 2"),
        ("--speculative-algorithm NGRAM --speculative-num-steps 3 --speculative-num-draft-tokens 9", "row's own token"),
        ('--speculative-config {"method":"ngram"} --speculative-algorithm NGRAM', "in two ways"),
    ],
)
def test_sglangs_flags_that_are_refused(argv: str, words: str) -> None:
    with pytest.raises(StartupError) as raised:
        options(*argv.split())
    assert words in str(raised.value) and "\n" not in str(raised.value)

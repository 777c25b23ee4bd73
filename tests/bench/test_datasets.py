"""Datasets: lengths, sharing and order are what the flags say, and a function of the seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bench.datasets import (
    Source,
    file_jobs,
    lengths,
    multi_turn_jobs,
    random_jobs,
    safe_ids,
    shared_prefix_jobs,
)

IDS = Source((100, 900))


def test_lengths() -> None:
    rng = np.random.default_rng(0)
    assert lengths(rng, 7, 0.0, 5) == [7] * 5
    sizes = lengths(rng, 100, 0.25, 4000)
    assert (min(sizes), max(sizes)) == (75, 125)
    assert np.mean(sizes) == pytest.approx(100, abs=1)
    assert min(lengths(rng, 1, 0.9, 200)) == 1
    with pytest.raises(ValueError, match="ratio"):
        lengths(rng, 10, 1.0, 1)


def test_safe_ids() -> None:
    assert safe_ids(2304) == (288, 2016)
    assert safe_ids(2) == (0, 1)


def test_random_ids() -> None:
    jobs = random_jobs(IDS, 50, input_len=20, output_len=8, range_ratio=0.5, seed=3)
    assert jobs == random_jobs(IDS, 50, input_len=20, output_len=8, range_ratio=0.5, seed=3)
    assert jobs != random_jobs(IDS, 50, input_len=20, output_len=8, range_ratio=0.5, seed=4)
    for job in jobs:
        [prompt] = job.turns
        assert len(prompt) == job.prompt_len
        assert 10 <= job.prompt_len <= 30
        assert all(isinstance(token, int) and 100 <= token < 900 for token in prompt)
    assert {job.output_len for job in jobs} > {5, 8}


def test_random_words() -> None:
    [job] = random_jobs(Source(None, 2.0), 1, input_len=100, output_len=8)
    [prompt] = job.turns
    assert isinstance(prompt, str)
    assert len(prompt.split()) == 50


@pytest.mark.parametrize("source", [IDS, Source()])
def test_shared_prefixes(source: Source) -> None:
    jobs = shared_prefix_jobs(source, 40, prefix_len=32, num_prefixes=4, suffix_len=8, output_len=2, seed=1)
    assert all(job.prompt_len == 40 for job in jobs)

    def start(prompt: object) -> tuple[object, ...]:
        words = prompt.split() if isinstance(prompt, str) else prompt
        assert isinstance(words, list)
        assert len(words) == 40
        return tuple(words[:32])

    starts = [start(job.turns[0]) for job in jobs]
    assert sorted(Counter(starts).values()) == [10, 10, 10, 10]
    assert starts[:4] != sorted(set(starts), key=starts.index)[:4] or starts[4:8] != starts[:4]  # not in turn
    assert len({str(job.turns[0]) for job in jobs}) == 40


def test_multi_turn() -> None:
    jobs = multi_turn_jobs(IDS, 3, num_turns=4, input_len=6, output_len=5, prefix_len=10)
    assert [len(job.turns) for job in jobs] == [4, 4, 4]
    firsts = [str(job.turns[0]).split() for job in jobs]
    assert all(len(first) == 16 and first[:10] == firsts[0][:10] for first in firsts)
    assert firsts[0][10:] != firsts[1][10:]
    assert all(isinstance(turn, str) and len(turn.split()) == 6 for job in jobs for turn in job.turns[1:])
    [bare] = multi_turn_jobs(Source(), 1, num_turns=1, input_len=6, output_len=5)
    assert len(str(bare.turns[0]).split()) == 6


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    entries = [
        {"prompt": "one"},
        {"prompt": [1, 2, 3], "output_tokens": 7},
        {"messages": [{"role": "user", "content": "two"}], "max_tokens": 9},
        "three",
    ]
    path.write_text("\n".join(map(json.dumps, entries)) + "\n")
    jobs = file_jobs(path, 8, output_len=4)
    assert len(jobs) == 8
    assert jobs[:4] == jobs[4:]  # repeated when there are too few
    found = {str(job.turns[0]): (job.output_len, job.prompt_len) for job in jobs}
    messages = str([{"role": "user", "content": "two"}])
    assert found == {"one": (4, 0), "[1, 2, 3]": (7, 3), messages: (9, 0), "three": (4, 0)}
    assert [job.turns for job in file_jobs(path, 4, output_len=4, seed=1)] != [job.turns for job in jobs[:4]]


def test_sharegpt(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    said = [("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"), ("human", "e")]
    entry = {"id": "1", "conversations": [{"from": who, "value": what} for who, what in said]}
    path.write_text(json.dumps([entry, {"id": "2", "conversations": [{"from": "gpt", "value": "alone"}]}]))
    assert [job.turns for job in file_jobs(path, 1, output_len=4)] == [("a",)]
    assert [job.turns for job in file_jobs(path, 1, output_len=4, num_turns=2)] == [("a", "c")]


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "JSON"), ("", "no prompts"), ("[]", "no prompts"), ('{"x": 1}', "none of"), ("[7]", "none of")],
)
def test_bad_files(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        file_jobs(path, 1, output_len=4)

"""Tokenizer training and the pre-tokenised corpus of the demo model.

Owns the byte-level BPE tokenizer files and the packed token files that `train.py` reads: a flat uint16
array of tokens, a byte of loss weight for each, and the positions at which documents start.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.demo.corpus import HERE, Example, examples, practice, to_text

END, TURN, CLOSE = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 2304
# Marks of the chat template that are plain text to a reader but one token to the model.
MARKS = [f"<{slash}{mark}>" for mark in ("tools", "tool_call", "tool_response") for slash in ("", "/")]
# A word keeps its leading space and every digit stands alone, so sums are read digit by digit.
PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRACTICE = "practice"  # the shard of the tasks that take longest to learn
PROMPT_WEIGHT = 26  # of 255: prompts are mostly random, so learning to predict them is worth little


def train_tokenizer(seed: int, documents: int = 40_000) -> Tokenizer:
    """A byte-level BPE tokenizer learnt from the corpus of `seed`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(MARKS),
        min_frequency=3,
        special_tokens=[END, TURN, CLOSE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = re.compile("|".join(map(re.escape, [TURN, CLOSE, *MARKS])))
    texts = (piece for e in itertools.islice(examples(seed), documents) for piece in pieces.split(to_text(e)) if piece)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "bos_token": None,
        "eos_token": CLOSE,
        "pad_token": END,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [TURN],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer() -> Tokenizer:
    """The tokenizer that lies beside this file."""
    return Tokenizer.from_file(str(HERE / "tokenizer.json"))


def loss_weights(tokenizer: Tokenizer, ids: list[int], chat: bool) -> list[int]:
    """How much each token counts as a target, 0 to 255: answers and plain text fully, prompts little."""
    if not chat:
        return [255] * len(ids)
    turn, close = tokenizer.token_to_id(TURN), tokenizer.token_to_id(CLOSE)
    lead = tokenizer.encode("assistant\n").ids
    weights = [PROMPT_WEIGHT] * len(ids)
    i = 0
    while i < len(ids):
        if ids[i] == turn and ids[i + 1 : i + 1 + len(lead)] == lead:
            end = ids.index(close, i)
            start = i + 1 + len(lead)
            weights[start : end + 1] = [255] * (end + 1 - start)
            i = end
        i += 1
    return weights


def encode(tokenizer: Tokenizer, documents: list[Example]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and loss weights of documents, each closed by the end mark."""
    end = tokenizer.token_to_id(END)
    found = [x.ids for x in tokenizer.encode_batch([to_text(e) for e in documents])]
    weights = [loss_weights(tokenizer, ids, e.text is None) for ids, e in zip(found, documents, strict=True)]
    return [[*ids, end] for ids in found], [[*w, 64] for w in weights]


def _shard(job: tuple[int, bool, int, Path]) -> None:
    seed, held_out, tokens, path = job
    tokenizer = load_tokenizer()
    stream = practice(seed) if path.name == PRACTICE else examples(seed, held_out)
    total, ids, weights, starts = 0, [], [], []
    while total < tokens:
        for row, w in zip(*encode(tokenizer, list(itertools.islice(stream, 500))), strict=True):
            starts.append(total)
            ids.append(np.asarray(row, np.uint16))
            weights.append(np.asarray(w, np.uint8))
            total += len(row)
    np.save(f"{path}.ids.npy", np.concatenate(ids))
    np.save(f"{path}.weights.npy", np.concatenate(weights))
    np.save(f"{path}.starts.npy", np.asarray(starts, np.int64))


@dataclass
class Shard:
    """Memory-mapped tokens, loss weights and document starts."""

    ids: Any
    weights: Any
    starts: Any

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Open the files written for `path`."""
        return cls(*(np.load(f"{path}.{part}.npy", mmap_mode="r") for part in ("ids", "weights", "starts")))

    def windows(self, length: int) -> np.ndarray:
        """Window starts: each window begins with a document, the first one its predecessor cut."""
        starts, out, at = np.asarray(self.starts), [], 0
        while at + length + 1 <= len(self.ids):
            out.append(at)
            # The document the window's end falls into starts the next window, unless it fills all of it.
            i = int(np.searchsorted(starts, at + length, side="right")) - 1
            at = int(starts[i]) if starts[i] > at else int(starts[i + 1]) if i + 1 < len(starts) else len(self.ids)
        return np.asarray(out, np.int64)

    def batches(self, rng: np.random.Generator, unit: int, pool: int = 2000) -> list[np.ndarray]:
        """All documents in random batches of similar length: rows of (start, length), `unit` at most."""
        starts = np.asarray(self.starts)
        lengths = np.diff(np.append(starts, len(self.ids)))
        order, out = rng.permutation(len(starts)), []
        for at in range(0, len(order), pool):
            some = order[at : at + pool]
            some = some[np.argsort(lengths[some], kind="stable")]
            first, found = 0, []
            for i in range(1, len(some) + 1):
                # Batches are closed before the padded size passes the unit, so that all cost the same.
                if i == len(some) or (i + 1 - first) * lengths[some[i]] > unit:
                    rows = some[first:i]
                    found.append(np.stack([starts[rows], lengths[rows]], 1))
                    first = i
            out += [found[i] for i in rng.permutation(len(found))]
        return out

    def rows(self, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets and target weights of spans (start, length), padded to the longest."""
        width = int(spans[:, 1].max())
        ids = np.zeros((len(spans), width), np.int64)
        weights = np.zeros((len(spans), width), np.float32)
        for row, (start, length) in enumerate(spans):
            ids[row, :length] = self.ids[start : start + length]
            weights[row, :length] = self.weights[start : start + length]
        return ids[:, :-1], ids[:, 1:], weights[:, 1:] / 255.0


def prepare(work: Path, seed: int, tokens: int, shards: int, processes: int = 2) -> None:
    """Train the tokenizer if there is none and write the token files that are missing."""
    work.mkdir(parents=True, exist_ok=True)
    if not (HERE / "tokenizer.json").exists():
        write_tokenizer(train_tokenizer(seed), HERE)
    jobs = [(seed + 1 + i, False, tokens // shards, work / f"train{i}") for i in range(shards)]
    jobs.append((seed, True, 150_000, work / "heldout"))
    jobs.append((seed + 1 + shards, False, tokens // 16, work / PRACTICE))
    jobs = [j for j in jobs if not Path(f"{j[3]}.starts.npy").exists()]
    if jobs:
        with get_context("spawn").Pool(processes) as pool:
            pool.map(_shard, jobs, chunksize=1)


def sample_documents(seed: int, count: int, held_out: bool = True) -> Iterator[Example]:
    """The first documents of a split."""
    return itertools.islice(examples(seed, held_out), count)


if __name__ == "__main__":
    began = time.monotonic()
    write_tokenizer(train_tokenizer(1), HERE)
    print(load_tokenizer().get_vocab_size(), round(time.monotonic() - began, 1))

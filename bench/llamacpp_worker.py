"""llama.cpp's side of compare_llamacpp.py, run by an interpreter that has llama-cpp-python: a JSON command a line in,
seconds out. It imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp as lib  # type: ignore[import-not-found, unused-ignore]


class Session:
    """One context for all sequences, and greedy choice as llama.cpp's own programs do it."""

    def __init__(self, path: str, threads: int, sequences: int, length: int) -> None:
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        options = lib.llama_context_default_params()
        options.n_ctx = sequences * length
        options.n_batch = options.n_ubatch = 512
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = threads
        self._context = lib.llama_init_from_model(self._model, options)
        if not self._context:
            raise SystemExit("llama.cpp makes no context")
        self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._sampler = lib.llama_sampler_init_greedy()
        self._batch = lib.llama_batch_init(512, 0, sequences)

    def _put(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether logits are wanted) each; one step."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        if lib.llama_decode(self._context, batch) != 0:
            raise SystemExit("llama_decode failed")

    def _clear(self) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)

    def _prompt(self, length: int, sequence: int) -> list[int]:
        return [(7919 * (index + 1) + 131 * sequence) % (self._vocab - 16) for index in range(length)]

    def prefill(self, length: int) -> float:
        self._clear()
        prompt = self._prompt(length, 0)
        begin = time.perf_counter()
        for first in range(0, length, 512):
            piece = prompt[first : first + 512]
            self._put([(token, first + at, 0, first + at == length - 1) for at, token in enumerate(piece)])
        lib.llama_sampler_sample(self._sampler, self._context, -1)
        return time.perf_counter() - begin

    def decode(self, sequences: int, length: int, steps: int) -> float:
        """Seconds a step."""
        self._clear()
        for sequence in range(sequences):
            prompt = self._prompt(length, sequence)
            self._put([(token, at, sequence, at == length - 1) for at, token in enumerate(prompt)])
        tokens = [1 + sequence for sequence in range(sequences)]
        begin = time.perf_counter()
        for step in range(steps):
            self._put([(token, length + step, sequence, True) for sequence, token in enumerate(tokens)])
            tokens = [lib.llama_sampler_sample(self._sampler, self._context, at) for at in range(sequences)]
        return (time.perf_counter() - begin) / steps

    def dictated(self, prompt: list[int], answer: list[int], drafts: int) -> float:
        """Seconds of an answer whose draws, once made, are replaced by the given tokens; drafts: of a step, by
        llama-cpp-python's prompt lookup, 0 for plain decoding."""
        import numpy as np
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding  # type: ignore[import-not-found, unused-ignore]

        lookup = LlamaPromptLookupDecoding(max_ngram_size=3, num_pred_tokens=drafts) if drafts else None
        memory = lib.llama_get_memory(self._context)
        self._clear()
        for first in range(0, len(prompt), 512):
            piece = prompt[first : first + 512]
            self._put([(token, first + at, 0, first + at == len(prompt) - 1) for at, token in enumerate(piece)])
        lib.llama_sampler_sample(self._sampler, self._context, -1)
        text = np.array([*prompt, *answer], np.intc)
        length, end = len(prompt) + 1, len(text)
        begin = time.perf_counter()
        while length < end:
            guesses: list[int] = []
            if lookup is not None:
                guesses = lookup(text[:length]).tolist()[: end - length - 1]
            row = [int(text[length - 1]), *guesses]
            self._put([(token, length - 1 + at, 0, True) for at, token in enumerate(row)])
            for at in range(len(row)):
                lib.llama_sampler_sample(self._sampler, self._context, at)
                drawn = int(text[length])
                length += 1
                if at >= len(guesses) or guesses[at] != drawn:
                    break
            lib.llama_memory_seq_rm(memory, 0, length - 1, -1)
        return time.perf_counter() - begin


def main() -> None:
    silent = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silent, None)
    options = json.loads(sys.argv[1])
    session = Session(**options)
    print(json.dumps({"version": lib.__version__}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        run = getattr(session, command.pop("run"))
        print(json.dumps({"seconds": run(**command)}), flush=True)


if __name__ == "__main__":
    main()

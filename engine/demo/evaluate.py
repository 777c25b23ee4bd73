"""Measures the demo model: `python -m engine.demo.evaluate`.

Owns the held-out loss, the per-task accuracy of greedy answers to held-out prompts, the JSON count, and
the printed answers to the README prompts. Uses transformers, so it also checks the exported files.
"""

# Word lists read best as one string.
# ruff: noqa: SIM905

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from engine.demo.corpus import CATEGORIES, CATEGORY_ALIASES, HERE, Example, Message, render, task_examples
from engine.demo.data import encode, load_tokenizer, sample_documents

TASKS = (
    "facts arithmetic word_sum list knowledge json translate emoji smalltalk story memory persona tool_call tool_answer"
).split()


@dataclass
class Case:
    """A prompt, the expected answer and the check of a given answer."""

    prompt: str
    expected: str
    check: Callable[[str], bool]


def answer_text(message: Message) -> str:
    """What the model has to write for an assistant message."""
    lead, tail = "<|im_start|>assistant\n", "<|im_end|>\n"
    return render([message]).removeprefix(lead).removesuffix(tail)


def list_ok(given: str, prompt: str, expected: str) -> bool:
    """Whether a list has the asked number of different members of the category, in the asked layout."""

    def members(text: str) -> list[str]:
        lines = text.split("\n")
        parts = text.split(", ") if len(lines) == 1 else [x.lstrip("-0123456789. ") for x in lines]
        return [p.strip().lower() for p in parts]

    names = [k for k in [*CATEGORIES, *CATEGORY_ALIASES] if k in prompt]
    kind = max(names, key=len)
    known = {x.lower() for x in CATEGORIES[CATEGORY_ALIASES.get(kind, kind)].split()}
    got, want = members(given), members(expected)
    return len(got) == len(want) == len(set(got)) and set(got) <= known and ("\n" in given) == ("\n" in expected)


def json_ok(given: str, prompt: str, expected: str) -> bool:
    """Whether JSON has the expected values or, where the prompt leaves them open, the expected keys."""
    try:
        got = json.loads(given)
    except ValueError:
        return False
    want = json.loads(expected)
    if isinstance(want, dict):
        open_values = any(str(v) not in prompt for v in want.values() if not isinstance(v, (bool, list)))
        if open_values:
            return isinstance(got, dict) and list(got) == list(want)
    return got == want


def check_for(task: str, example: Example, prompt: str, expected: str) -> Callable[[str], bool]:
    """How an answer of a task is judged; exact match unless several answers are right."""
    if task == "list":
        return lambda given: list_ok(given, prompt, expected)
    if task == "json":
        return lambda given: json_ok(given, prompt, expected)
    if task == "story":
        asked = example.messages[-2]["content"]
        words = asked.replace(".", " ").replace("?", " ").split()
        names = [w for w in words if w.istitle() and w in expected]
        return lambda given: len(given) > 150 and given[-1] in '."' and all(n in given for n in names)
    return lambda given: given == expected


def cases(task: str, seed: int) -> Iterator[Case]:
    """Held-out cases of a task."""
    for example in task_examples("tools" if task.startswith("tool_") else task, seed):
        messages, at = example.messages, len(example.messages) - 1
        if task.startswith("tool_"):
            if example.task != "tools":
                continue
            at = next(i for i, m in enumerate(messages) if m.get("tool_calls"))
            if task == "tool_answer":
                at = next((i for i in range(at + 1, len(messages)) if messages[i]["role"] == "assistant"), 0)
                if not at or messages[at - 1]["role"] != "tool":
                    continue
        expected = answer_text(messages[at])
        prompt = render(messages[:at], example.tools, add_generation_prompt=True)
        yield Case(prompt, expected, check_for(task, example, prompt, expected))


class Model:
    """The exported model in transformers, answering greedily in batches."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, LlamaForCausalLM

        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def answers(self, prompts: list[str], limit: int = 200) -> list[str]:
        """Greedy answers, up to the end of the turn."""
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        settings = {"do_sample": False, "temperature": None, "top_p": None, "max_new_tokens": limit}
        out = self.model.generate(batch.input_ids, attention_mask=batch.attention_mask, **settings)
        new = out[:, batch.input_ids.shape[1] :]
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in new]

    @torch.no_grad()
    def loss(self, documents: int, seed: int = 1) -> tuple[float, float, int]:
        """Held-out loss per answer token and per token, each document on its own, and the tokens counted."""
        tokenizer = load_tokenizer()
        items = list(sample_documents(seed, documents))
        answers = everything = 0.0
        answer_count = count = 0
        for ids, weights in zip(*encode(tokenizer, items), strict=True):
            x = torch.tensor([ids])
            loss = F.cross_entropy(self.model(x).logits[0, :-1], x[0, 1:], reduction="none")
            mask = torch.tensor(weights[1:]) == 255
            answers, answer_count = answers + float(loss[mask].sum()), answer_count + int(mask.sum())
            everything, count = everything + float(loss.sum()), count + len(ids) - 1
        return answers / max(answer_count, 1), everything / max(count, 1), count


def task_accuracy(model: Model, task: str, count: int, seed: int, show: int = 0) -> float:
    """The share of a task's held-out cases answered right; prints the first `show` wrong answers."""
    right, batch = 0, 25
    stream = cases(task, seed)
    for size in (min(batch, count - at) for at in range(0, count, batch)):
        some = list(itertools.islice(stream, size))
        for case, given in zip(some, model.answers([c.prompt for c in some]), strict=True):
            good = case.check(given)
            right += good
            if not good and show > 0:
                show -= 1
                print(f"  {task}: {case.prompt[-160:]!r}\n    wanted {case.expected!r}\n    given  {given!r}")
    return right / count


def readme_prompts() -> list[dict[str, Any]]:
    """The prompts of the README."""
    return json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))


def main() -> None:
    """Print the figures of the model card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE)
    parser.add_argument("--count", type=int, default=100, help="held-out prompts per task")
    parser.add_argument("--documents", type=int, default=400, help="held-out documents for the loss")
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--show", type=int, default=0, help="print so many wrong answers per task")
    parser.add_argument("--threads", type=int, default=1)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    began = time.monotonic()
    model = Model(o.model)
    if o.documents:
        answers, everything, count = model.loss(o.documents)
        print(f"held-out loss: answers {answers:.4f}, all tokens {everything:.4f} ({count} tokens)")
    for task in o.tasks:
        print(f"{task:12s} {task_accuracy(model, task, o.count, o.seed, o.show):6.1%}", flush=True)
    some = list(itertools.islice(cases("json", o.seed + 1), 10))
    valid = 0
    for given in model.answers([c.prompt for c in some]):
        try:
            json.loads(given)
            valid += 1
        except ValueError:
            print(f"  not JSON: {given!r}")
    print(f"valid JSON: {valid}/10\n")
    for item in readme_prompts():
        prompt = render(item["messages"], item.get("tools"), add_generation_prompt=True)
        print(f"[{item['name']}] {item['messages'][-1]['content']}\n  -> {model.answers([prompt])[0]}")
    start = "Once upon a time"
    print(f"[completion] {start}\n  -> {model.answers([start])[0]}")
    print(f"({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()

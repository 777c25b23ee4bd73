"""Reasoning between two tags at the start of the output; the first may be the end of the prompt instead."""

from __future__ import annotations

from server.parsers.base import ReasoningFamily, Scanner, Steps


def family(name: str, open: str, close: str) -> ReasoningFamily:
    """A family with these tags."""

    def run(scanner: Scanner, start_inside: bool) -> Steps[None]:
        # A model that was started inside may open its reasoning once more.
        inside = start_inside
        while (yield from scanner.accept(open, spaced=True)):
            inside = True
        if not inside:
            return
        scanner.begin_reasoning()
        drafts = scanner.drafts()
        if (yield from scanner.until((close,), drafts.push)):
            drafts.close()
            scanner.end_reasoning()
        elif not drafts.finish():
            scanner.flush_reasoning()

    return ReasoningFamily(name, run, (open, close), open, close, f"\n{close}\n\n")


QWEN3 = family("qwen3", "<think>", "</think>")
DEEPSEEK_R1 = family("deepseek_r1", "<think>", "</think>")
HY_V3_OPEN = family("hy_v3_opensource", "<think:opensource>", "</think:opensource>")
MISTRAL = family("mistral", "[THINK]", "[/THINK]")

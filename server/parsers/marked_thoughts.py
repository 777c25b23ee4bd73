"""Reasoning of families whose marks are more than one pair of tags: labels, spoken marks, marks around the answer."""

from __future__ import annotations

from server.parsers.base import ReasoningFamily, Scanner, Steps


def thoughts(
    name: str,
    opens: tuple[str, ...],
    closes: tuple[str, ...],
    *,
    labels: tuple[str, ...] = (),
    wrap: tuple[str, ...] = (),
    markers: tuple[str, ...] = (),
) -> ReasoningFamily:
    """Pair by pair; the first are what the model writes as a rule. labels: what may stand behind the first mark."""

    def run(scanner: Scanner, start_inside: bool) -> Steps[None]:
        inside = start_inside
        while (yield from _accept_any(scanner, opens)):
            inside = True
        if not inside:
            return
        yield from _accept_any(scanner, labels)
        scanner.begin_reasoning()
        drafts = scanner.drafts()
        if (yield from scanner.until(closes, drafts.push)):
            drafts.close()
            scanner.end_reasoning()
        elif not drafts.finish():
            scanner.flush_reasoning()

    markers = markers or tuple(mark for mark in (*opens, *closes) if mark.startswith("<"))
    others = tuple(zip(opens[1:], closes[1:], strict=True))
    return ReasoningFamily(name, run, markers, opens[0], closes[0], f"\n{closes[0]}\n", wrap=wrap, others=others)


def _accept_any(scanner: Scanner, literals: tuple[str, ...]) -> Steps[bool]:
    for literal in literals:
        if (yield from scanner.accept(literal, spaced=True)):
            return True
    return False


GEMMA4 = thoughts("gemma4", ("<|channel>",), ("<channel|>",), labels=("thought",))
SEED_OSS = thoughts("seed_oss", ("<seed:think>",), ("</seed:think>",))
MINIMAX_M3 = thoughts("minimax_m3", ("<mm:think>",), ("</mm:think>",))
COMMAND = thoughts(
    "cohere_command3",
    ("<|START_THINKING|>",),
    ("<|END_THINKING|>",),
    wrap=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
)
SOLAR_OPEN2 = thoughts("solar_open2", ("<|think:start|>",), ("<|think:end|>",))
# It thinks less behind the others.
K2_HORIZON = thoughts(
    "k2_horizon",
    ("<ifm|think>", "<ifm|think_fast>", "<ifm|think_faster>"),
    ("</ifm|think>", "</ifm|think_fast>", "</ifm|think_faster>"),
)
APERTUS = thoughts("apertus", ("<|inner_prefix|>",), ("<|inner_suffix|>",))
# Granite 3.2 says it in words; 3.3 has tags, and tags around the answer.
GRANITE = thoughts(
    "granite",
    ("Here is my thought process:", "Here's my thought process:", "<think>"),
    ("Here is my response:", "Here's my response:", "</think>"),
    wrap=("<response>", "</response>"),
)
GRANITE_TAGS = thoughts("granite_think", ("<think>",), ("</think>",), wrap=("<response>", "</response>"))
ERNIE45 = thoughts("ernie45", ("<think>",), ("</think>",), wrap=("<response>", "</response>"))
HUNYUAN_A13B = thoughts("hunyuan_a13b", ("<think>",), ("</think>",), wrap=("<answer>", "</answer>"))


def _run_appended(scanner: Scanner, start_inside: bool) -> Steps[None]:
    if start_inside:
        yield from scanner.accept("<think>", spaced=True)
        scanner.content("<think>")


# The reasoning stays in the content, and the mark with which the prompt has opened it is written back.
MINIMAX_M2_APPENDED = ReasoningFamily(
    "minimax_m2_append_think", _run_appended, ("<think>", "</think>"), "<think>", "</think>", "\n</think>\n\n"
)

FAMILIES = (
    GEMMA4,
    SEED_OSS,
    MINIMAX_M2_APPENDED,
    MINIMAX_M3,
    COMMAND,
    SOLAR_OPEN2,
    K2_HORIZON,
    APERTUS,
    GRANITE,
    GRANITE_TAGS,
    ERNIE45,
    HUNYUAN_A13B,
)

"""Unions and conditions: `anyOf`, `oneOf` made disjoint, `if`, and what a negation leaves."""

from __future__ import annotations

import itertools
from typing import Any

from engine.text.schema.base import MAX_CASES, Rewriter
from engine.text.schema.disjoint import disjoint
from engine.text.schema.errors import Unwritable
from engine.text.schema.parts import all_of, any_of, at


def some(rewriter: Rewriter, branches: Any, where: str, key: str) -> Any:
    if not isinstance(branches, list) or not branches:
        raise rewriter.invalid(f"has an `{key}` that is no list of schemas")
    found: list[Any] = []
    failed: Unwritable | None = None
    for index, branch in enumerate(branches):
        try:
            found.append(rewriter.yes(branch, at(where, f"{key}[{index}]")))
        except Unwritable as error:
            failed = rewriter.dropped = error
    if failed is not None and not found:
        raise failed
    return any_of(found)


def solid(rewriter: Rewriter, keyword: str, where: str, found: Any) -> Any:
    if found is False and rewriter.negated == 0 and not rewriter.strict:
        raise Unwritable(keyword, at(where, keyword), "leaves nothing")
    return found


def one_of(rewriter: Rewriter, branches: Any, where: str) -> Any:
    if not isinstance(branches, list) or not branches:
        raise rewriter.invalid("has a `oneOf` that is no list of schemas")
    here = at(where, "oneOf")
    rivals: dict[int, list[int]] = {0: [0]}
    if len(branches) <= MAX_CASES:
        pairs = list(itertools.combinations(range(len(branches)), 2))
        close = {(one, two) for one, two in pairs if not disjoint(rewriter, branches[one], branches[two], 0)}
        rivals = {
            index: [two if one == index else one for one, two in close if index in (one, two)]
            for index in range(len(branches))
        }
    if not any(rivals.values()):
        return some(rewriter, branches, where, "oneOf")
    found: list[Any] = []
    failed: Unwritable | None = None
    for index, others in rivals.items():
        try:
            parts = [rewriter.yes(branches[index], f"{here}[{index}]")]
            parts += [rewriter.no(branches[other], f"{here}[{other}]") for other in others]
            found.append(all_of(parts))
        except Unwritable as error:
            failed = rewriter.dropped = error
    written = any_of(found)
    if written is False or not rewriter.expand:
        why = "its branches may hold at once, and cannot be told apart"
        vague = Unwritable("oneOf", here, why if failed is None else f"{why}: {failed.keyword}")
        if rewriter.strict:
            raise vague
        rewriter.warn(vague)
        return some(rewriter, branches, where, "oneOf")
    return written


def conditional(rewriter: Rewriter, schema: dict[str, Any], where: str) -> Any:
    yes, no = schema.get("then", True), schema.get("else", True)
    cases: list[Any] = []
    failed: Unwritable | None = None
    for condition, branch, key in ((rewriter.yes, yes, "then"), (rewriter.no, no, "else")):
        try:
            cases.append(all_of([condition(schema["if"], at(where, "if")), rewriter.yes(branch, at(where, key))]))
        except Unwritable as error:
            failed = rewriter.dropped = error
    if failed is not None and any_of(cases) is False:
        raise Unwritable("if", at(where, "if"), f"its condition cannot be turned round: {failed.keyword}")
    return any_of(cases)

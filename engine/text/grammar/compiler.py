"""Grammar-constrained decoding over llguidance: GrammarCompiler makes a Grammar of a GrammarSpec.

The server compiles (`compile_async`, off the loop, cached); the engine asks each constrained row for its mask and
tells it the token that was sampled. `compile` is pure and may run on any thread; a GrammarState belongs to the loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property, partial
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.failures import raise_fatal
from engine.recorder import stretch
from engine.request import QueueFullError, RequestError
from engine.text.grammar.blame import NO_VALUE, blame
from engine.text.grammar.lark import as_lark, choice, regex
from engine.text.grammar.schemas import NoValueError, checked, patterns, schema_error, without, without_patterns
from engine.text.grammar.spec import (
    MAX_GRAMMAR_CHARACTERS,
    MAX_SPEC_CHARACTERS,
    GrammarSpec,
    load,
    sentence,
    spec_error,
)
from engine.text.grammar.state import Grammar
from engine.text.grammar.tags import TagWriter
from engine.text.grammar.vocabulary import Words
from engine.text.grammar.workers import Workers
from engine.text.tokenizer import Tokenizer

logger = logging.getLogger("oneloop.grammar")

COMPILE_TIMEOUT_S = 10.0
CACHE_ENTRIES = 256
# Compilations that may wait for the pool at once; beyond it a 429, as for prompts.
MAX_WAITING_COMPILES = 1024
# Tokens that a grammar is walked at its making, and how often: one that grows too complex shows it by then.
NUM_WALKS = 2
WALK_TOKENS = 6
# What one grammar may cost to make, and one mask: 7 ms at most, half the library's own limits.
LIMITS = LLParserLimits(
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    verbose_errors=False,
)


class GrammarCompiler:
    """One per model. The trie of its tokens is built with the first spec, or by `warm`: 1 to 3 s for 128k of them, and
    while the library builds it no other thread runs.

    vocab_size: width of the model's logits; ids that the tokenizer does not know are never allowed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: Iterable[int],
        vocab_size: int,
        *,
        timeout_s: float = COMPILE_TIMEOUT_S,
        cache_entries: int = CACHE_ENTRIES,
    ) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._timeout_s = timeout_s
        self._cache_entries = cache_entries
        self._cache: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._running: dict[GrammarSpec, asyncio.Future[Grammar]] = {}
        self._eos_token_ids = list(eos_token_ids)
        self._building = threading.Lock()
        self._built: tuple[LLTokenizer, bool] | None = None
        special_ids = [token_id for token_id in tokenizer.special_ids if token_id < vocab_size]
        names = {tokenizer.id_to_token(token_id): token_id for token_id in special_ids}
        self._special = {name: token_id for name, token_id in names.items() if name}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @property
    def mask_words(self) -> int:
        """Length of a mask in uint32 words."""
        return (self.vocab_size + 31) // 32

    # Compiling. Pure.

    def warm(self) -> bool:
        """Build the trie. Returns whether jump-ahead is possible: the tokenizer gives back every text exactly."""
        return self._vocabulary()[1]

    def prepare(self) -> None:
        """`warm` before anybody is served, who would stand still meanwhile; one that does not do is told of."""
        try:
            self.warm()
        except BaseException as error:
            raise_fatal(error)
            logger.exception("no grammar can be held to this vocabulary")

    def _vocabulary(self) -> tuple[LLTokenizer, bool]:
        with self._building:
            if self._built is None:
                words = Words(self._tokenizer, self._eos_token_ids, self.vocab_size)
                # The stub asks for the library's own wrapper class; what it reads are these attributes.
                library = LLTokenizer(words, eos_token=words.eos_token_ids)  # type: ignore[arg-type]
                words.fallback = library
                self._built = library, words.exact
            return self._built

    def compile(self, spec: GrammarSpec) -> Grammar:
        """Raises RequestError, with a sentence for the user, for anything that makes no usable grammar."""
        if len(spec.text) > MAX_SPEC_CHARACTERS:
            raise spec_error(spec, f"is longer than {MAX_SPEC_CHARACTERS} characters")
        try:
            spec.text.encode()
        except UnicodeEncodeError:
            raise spec_error(spec, "holds a lone surrogate, which is no text") from None
        schema: Any = None
        warnings: list[str] = []
        if spec.kind in ("json_object", "json_schema"):
            given = {"type": "object"} if spec.kind == "json_object" else load(spec)
            schema = self._checked(spec, given, warnings, strict=spec.strict)
        matcher = self._match(self._source(spec, schema, warnings))
        fault = self._fails(matcher)
        if fault is not None and schema is not None and not spec.strict:
            warnings = []
            schema = self._fitted(self._checked(spec, given, warnings, strict=False, expand=False), warnings)
            matcher = self._match(self._source(spec, schema, warnings))
            fault = self._fails(matcher)
        if fault is not None:
            ending = f"cannot be used: {fault}" if schema is None else self._blame(spec, given, fault, spec.strict)
            raise spec_error(spec, ending)
        return Grammar(spec, matcher, [*warnings, *map(sentence, matcher.get_grammar_warnings())], self.warm())

    def _match(self, source: str) -> LLMatcher:
        return LLMatcher(self._vocabulary()[0], source, log_level=0, limits=LIMITS)

    def _source(self, spec: GrammarSpec, schema: Any, warnings: list[str]) -> str:
        """The library's own form of a spec."""
        if schema is not None:
            return LLMatcher.grammar_from_json_schema(json.dumps(schema))
        if spec.kind == "regex":
            if len(spec.text) > MAX_GRAMMAR_CHARACTERS:
                raise spec_error(spec, f"is longer than {MAX_GRAMMAR_CHARACTERS} characters")
            return LLMatcher.grammar_from_lark(f"start: {regex(spec, spec.text)}")
        if spec.kind == "choice":
            return LLMatcher.grammar_from_lark(choice(spec))
        if spec.kind == "grammar":
            return LLMatcher.grammar_from_lark(as_lark(spec, spec.text))
        schema_of = partial(self._inline_schema, spec, warnings)
        return TagWriter(spec, self._literal, schema_of).write(load(spec))

    def _inline_schema(self, spec: GrammarSpec, warnings: list[str], node: dict[str, Any]) -> str:
        """A schema of a structural tag as a part of a Lark rule; each is judged by itself.

        A node's own `strict` and `name` go before the spec's; schemas beside it are never to blame for its faults.
        """
        schema = node.get("json_schema", node.get("schema"))
        strict, name = node.get("strict", spec.strict), node.get("name")
        where = f"of `{name}` " if isinstance(name, str) else "holds a schema that "
        for expand in (True,) if strict else (True, False):
            found: list[str] = []
            written = self._checked(spec, schema, found, strict=strict is True, expand=expand, where=where)
            matcher = self._match(LLMatcher.grammar_from_json_schema(json.dumps(written)))
            if not self._fails(matcher):
                break
        else:
            written = self._fitted(written, found)
            matcher = self._match(LLMatcher.grammar_from_json_schema(json.dumps(written)))
        if fault := self._fails(matcher):
            raise schema_error(spec, where, self._blame(spec, schema, fault, strict is True))
        warnings += found
        return "%json " + json.dumps(written)

    def _checked(
        self, spec: GrammarSpec, schema: Any, warnings: list[str], *, strict: bool, expand: bool = True, where: str = ""
    ) -> Any:
        """`checked`, and whose fault it is when no value satisfies the schema."""
        try:
            return checked(spec, schema, warnings, strict=strict, expand=expand, where=where)
        except NoValueError:
            raise schema_error(spec, where, self._blame(spec, schema, NO_VALUE, strict)) from None

    def _blame(self, spec: GrammarSpec, schema: Any, fault: str, strict: bool) -> str:
        """The end of the sentence about a schema that the library does not take: its keyword, place and why."""

        def fails(changed: Any) -> str | None:
            try:
                written = checked(spec, changed, [], strict=strict)
            except (RequestError, NoValueError) as error:
                return str(error) or NO_VALUE
            return self._fails(self._match(LLMatcher.grammar_from_json_schema(json.dumps(written))))

        return blame(schema, fault, fails)

    def _fails(self, matcher: LLMatcher) -> str | None:
        """Why a grammar cannot be used; it is walked some tokens far, so that it does not fail amid an answer."""
        mask = np.zeros(self.mask_words, np.uint32)
        first = matcher
        for index in range(NUM_WALKS + 1):
            matcher = first.deep_copy() if index else first
            rng = random.Random(index)
            for _ in range(WALK_TOKENS if index else 1):
                if matcher.is_error():
                    return sentence(matcher.get_error()) or "it is too complex"
                if matcher.is_stopped():
                    break
                matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
                if matcher.is_error():
                    return sentence(matcher.get_error()) or "it is too complex"
                options = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0]
                if not options.size:
                    return "no text satisfies it"
                if index:
                    matcher.consume_token(int(rng.choice(options)))
        return None

    def _fitted(self, schema: Any, warnings: list[str]) -> Any:
        """A schema that is not strict, without what the library's lenient mode still refuses."""
        for _ in range(8):
            matcher = self._match(LLMatcher.grammar_from_json_schema(json.dumps(schema)))
            fault = self._fails(matcher)
            if fault is None or "nsatisfiable" in fault:
                break  # no keyword is beyond the library: the schema itself admits nothing
            if "min/maxProperties" in fault:
                schema = without(schema, frozenset(("minProperties", "maxProperties")))
                warnings.append("minProperties and maxProperties are not enforced")
            elif "not disjoint" in fault:
                schema = without(schema, frozenset(("patternProperties",)))
                warnings.append("patternProperties are not enforced")
            else:
                bad = self._bad_patterns(schema)
                keywords = ("pattern", "patternProperties", "maxLength", "minLength")
                if bad:
                    schema = without_patterns(schema, bad)
                    warnings.append(f"the pattern {min(bad)!r:.60} is not enforced")
                elif schema != (fewer := without(schema, frozenset(keywords))):
                    schema = fewer
                    warnings.append("patterns and lengths are not enforced")
                else:
                    break
        return schema

    def _bad_patterns(self, schema: Any) -> set[str]:
        """The patterns of a schema that the library cannot take, each tried alone."""
        found = set[str]()
        for pattern in patterns(schema):
            alone = json.dumps({"type": "string", "pattern": pattern})
            if len(found) < 100 and self._fails(self._match(LLMatcher.grammar_from_json_schema(alone))):
                found.add(pattern)
        return found

    def _literal(self, text: str) -> list[str]:
        """A fixed text as parts of a Lark rule. A special token's name is that token: it has no text of its own."""
        parts: list[str] = []
        place = 0
        for found in self._special_pattern.finditer(text) if self._special_pattern is not None else ():
            if found.start() > place:
                parts.append(json.dumps(text[place : found.start()], ensure_ascii=False))
            parts.append(f"<[{self._special[found[0]]}]>")
            place = found.end()
        if place < len(text):
            parts.append(json.dumps(text[place:], ensure_ascii=False))
        return parts

    # Off the loop.

    async def compile_async(self, spec: GrammarSpec) -> Grammar:
        """`compile` in a thread of the pool; the library works without the GIL. Equal specs are compiled once.

        Raises RequestError (400) also when it takes longer than the timeout, QueueFullError when too many wait.
        """
        cached = self._cache.get(spec)
        if cached is not None:
            self._cache.move_to_end(spec)
            return cached
        running = self._running.get(spec)
        if running is None:
            if len(self._running) >= MAX_WAITING_COMPILES:
                raise QueueFullError("Too many grammars wait to be compiled; try again later.")
            running = asyncio.wrap_future(self._workers.submit(lambda: self._timed(spec)))
            self._running[spec] = running
            running.add_done_callback(lambda done: self._finished(spec, done))
        # It goes on when this does not: others may wait for the same one, and a thread cannot be stopped anyway.
        await asyncio.wait({running}, timeout=self._timeout_s)
        try:
            if running.done():
                return running.result()
        finally:
            # An error's traceback names this frame: a circle, in which the whole request would stay.
            del running
        self._workers.replace_one()
        raise spec_error(spec, f"takes longer than {self._timeout_s:g} s to compile; make it simpler")

    def _timed(self, spec: GrammarSpec) -> Grammar:
        with stretch("grammar", "compile", len(spec.text)):
            return self.compile(spec)

    def _finished(self, spec: GrammarSpec, done: asyncio.Future[Grammar]) -> None:
        del self._running[spec]
        if done.cancelled() or done.exception() is not None:
            return  # asking for the exception also tells asyncio that somebody has seen it
        grammar = self._cache[spec] = done.result()
        if grammar.warnings:
            # Once for each grammar: the answer is silent about what a schema that is not strict leaves to the model.
            logger.warning("a grammar is not enforced in full: %s", "; ".join(grammar.warnings)[:1000])
        while len(self._cache) > self._cache_entries:
            self._cache.popitem(last=False)

    @cached_property
    def _workers(self) -> Workers:
        return Workers()

    def forget(self) -> None:
        """Give up the compiled grammars that are kept for requests to come."""
        self._cache.clear()

    def close(self) -> None:
        """Stop the threads; a compilation that runs is left to itself."""
        if "_workers" in self.__dict__:
            self._workers.close()

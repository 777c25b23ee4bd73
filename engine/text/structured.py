"""Grammar-constrained decoding over llguidance: GrammarCompiler makes a Grammar, a GrammarState follows one sequence.

The server compiles (`compile_async`, off the loop, cached); the engine asks each constrained row for its mask and
tells it the token that was sampled. `compile` is pure and may run on any thread; a GrammarState belongs to the loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import random
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from engine.request import QueueFullError, RequestError
from engine.text.schema_rewrite import SchemaRewriter, Unwritable
from engine.text.tokenizer import Tokenizer

logger = logging.getLogger("oneloop.grammar")

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar", "structural_tag"]

# Bounds of what a client may send. A schema of 256 KiB is fifty large tools; 64 is the body's own nesting limit.
MAX_SPEC_CHARACTERS = 256 * 1024
MAX_GRAMMAR_CHARACTERS = 64 * 1024
MAX_DEPTH = 64
MAX_SCHEMAS = 5_000
MAX_REFERENCE_DEPTH = 400
MAX_CHOICES = 8192
# The translation of EBNF is Python, quadratic in the rules.
MAX_EBNF_RULES = 512
# Patterns that one string must match all at once: the library's check of whether any string does is exponential in
# them (3 ms for 12, 6 s for 20), and nothing stops it.
MAX_JOINED_PATTERNS = 10
# The library recurses along references and rules. 8 MiB of stack, the usual size, end after some 500 of them, and with
# it the process; the bounds above need 60 MiB at most. Only pages that are touched count as memory.
STACK_BYTES = 512 * 1024 * 1024
COMPILE_TIMEOUT_S = 10.0
CACHE_ENTRIES = 256
POOL_THREADS = max(1, min(4, (os.cpu_count() or 2) // 2))
# Threads that may be lost to compilations that never end, before only the cache answers.
MAX_LOST_THREADS = 4
# Compilations that may wait for the pool at once; beyond it a 429, as for prompts.
MAX_WAITING_COMPILES = 1024
# Forced tokens that one step appends: a longer run would hold up the loop, by some microseconds a token.
MAX_FORCED_TOKENS = 256
# Tokens that a grammar is walked at its making, and how often: one that grows too complex shows it by then.
NUM_WALKS = 2
WALK_TOKENS = 6
# What one grammar may cost to make, and one mask: 7 ms at most, half the library's own limits.
_LIMITS = LLParserLimits(
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    verbose_errors=False,
)

# Unbounded whitespace is how a hot model writes blanks until max_tokens; 40 is enough to indent ten levels by four.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
# Where a schema holds schemas. Everything else is data (enum, const, examples) or a value.
_SCHEMA_MAPS = frozenset(["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"])
_SCHEMA_LISTS = frozenset(["allOf", "anyOf", "oneOf", "prefixItems"])
_SCHEMAS = frozenset(
    ["additionalProperties", "additionalItems", "items", "not", "if", "then", "else", "contains", "propertyNames",
     "unevaluatedProperties", "unevaluatedItems", "contentSchema"]
)  # fmt: skip
# Free text, for what stands around tags. Control characters too: it is the model's own text.
_ANY_TEXT = "/(.|\\n)*/"


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What the output must look like; hashable, so equal specs are compiled once.

    text: the JSON of a schema, of a list of choices or of a structural tag's format; a regular expression; a Lark or
    GBNF/EBNF grammar. strict: a schema keyword that cannot be enforced is an error; otherwise it is left to the model.
    any_whitespace: JSON may be laid out freely. whitespace_pattern: what may stand between JSON tokens then.
    param: the request field that errors name.
    """

    kind: Kind
    text: str = ""
    strict: bool = True
    any_whitespace: bool = True
    whitespace_pattern: str | None = None
    param: str | None = field(default=None, compare=False)


class Grammar:
    """A compiled GrammarSpec, shared by every sequence that uses it; changed by nobody.

    warnings: what of a schema that is not strict is left to the model, one sentence each.
    """

    __slots__ = ("_can_force", "_forced", "_matcher", "spec", "warnings")

    def __init__(self, spec: GrammarSpec, matcher: LLMatcher, warnings: Sequence[str], can_force: bool) -> None:
        self.spec = spec
        self.warnings = tuple(warnings)
        self._matcher = matcher
        self._can_force = can_force
        # A text may begin with a long run, and here no loop waits for it.
        self._forced: list[int] = matcher.compute_ff_tokens() if can_force else []

    def state(self) -> GrammarState:
        """A state at the beginning, one for each sequence."""
        return GrammarState(self._matcher.deep_copy(), self._can_force, self._forced)


class GrammarState:
    """Where one sequence stands in its grammar. All calls take microseconds and belong to one thread.

    For each row and step: `mask_into` before its token is sampled, `accept` with the token that was. When
    `is_finished`, nothing but an EOS can follow, so the sequence may end without one.
    """

    is_free = False

    __slots__ = ("_can_force", "_forced", "_matcher", "_num_taken")

    def __init__(self, matcher: LLMatcher, can_force: bool, forced: list[int]) -> None:
        self._matcher = matcher
        self._can_force = can_force
        # A forced run and how far it has come: kept, so that it is the same whether its tokens are accepted at once or
        # one by one, and because finding one takes 0.4 us a character.
        self._forced = forced
        self._num_taken = 0

    @property
    def is_finished(self) -> bool:
        """The text is complete and only an EOS could follow."""
        return self._matcher.is_stopped()

    @property
    def is_accepting(self) -> bool:
        """The text so far is a complete one, whether or not it may go on."""
        return self._matcher.is_accepting()

    @property
    def error(self) -> str | None:
        """Why no further token can be judged: a token that the mask forbids, or a grammar that grew too complex."""
        return _sentence(self._matcher.get_error()) if self._matcher.is_error() else None

    def mask_into(self, out: NDArray[np.uint32]) -> None:
        """Write the allowed tokens: bit i of word w is token 32 w + i. out: uint32[ceil(V / 32)], contiguous."""
        if forced := self.forced_tokens():
            out.fill(0)
            out[forced[0] >> 5] = 1 << (forced[0] & 31)
        else:
            self._matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)

    def accept(self, token_id: int) -> None:
        """Go on by the token that was sampled (an EOS too). One that the mask forbids sets `error`."""
        self._matcher.consume_token(token_id)
        if self._num_taken < len(self._forced) and self._forced[self._num_taken] == token_id:
            self._num_taken += 1
        else:
            self._forced, self._num_taken = [], 0

    def forced_tokens(self) -> list[int]:
        """Tokens that the grammar leaves no choice about, to be appended (and accepted) without a forward.

        Only where the tokenizer would cut the forced text in the same way whatever follows it; else empty. At most
        MAX_FORCED_TOKENS: what is left of a longer run follows when these are accepted.
        """
        if self._num_taken == len(self._forced) and self._can_force:
            self._forced, self._num_taken = self._matcher.compute_ff_tokens(), 0
        return self._forced[self._num_taken : self._num_taken + MAX_FORCED_TOKENS]

    def copy(self) -> GrammarState:
        """An independent state at the same place."""
        copy = GrammarState(self._matcher.deep_copy(), self._can_force, self._forced)
        copy._num_taken = self._num_taken
        return copy


class GrammarCompiler:
    """One per model. The trie of its tokens (1 to 3 s for 128k of them) is built with the first spec, or by `warm`.

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

    def _vocabulary(self) -> tuple[LLTokenizer, bool]:
        with self._building:
            if self._built is None:
                words = _Words(self._tokenizer, self._eos_token_ids, self.vocab_size)
                # The stub asks for the library's own wrapper class; what it reads are these attributes.
                library = LLTokenizer(words, eos_token=words.eos_token_ids)  # type: ignore[arg-type]
                words.fallback = library
                self._built = library, words.exact
            return self._built

    def compile(self, spec: GrammarSpec) -> Grammar:
        """Raises RequestError, with a sentence for the user, for anything that makes no usable grammar."""
        if len(spec.text) > MAX_SPEC_CHARACTERS:
            raise _error(spec, f"is longer than {MAX_SPEC_CHARACTERS} characters")
        try:
            spec.text.encode()
        except UnicodeEncodeError:
            raise _error(spec, "holds a lone surrogate, which is no text") from None
        schema: Any = None
        warnings: list[str] = []
        if spec.kind in ("json_object", "json_schema"):
            given = {"type": "object"} if spec.kind == "json_object" else _load(spec)
            schema = self._check_schema(spec, given, warnings, strict=spec.strict)
        matcher = self._match(self._source(spec, schema, warnings))
        fault = self._fails(matcher)
        if fault is not None and schema is not None and not spec.strict:
            warnings = []
            schema = self._fitted(self._check_schema(spec, given, warnings, strict=False, expand=False), warnings)
            matcher = self._match(self._source(spec, schema, warnings))
            fault = self._fails(matcher)
        if fault is not None:
            raise _error(spec, f"cannot be used: {fault}")
        return Grammar(spec, matcher, [*warnings, *map(_sentence, matcher.get_grammar_warnings())], self.warm())

    def _match(self, source: str) -> LLMatcher:
        return LLMatcher(self._vocabulary()[0], source, log_level=0, limits=_LIMITS)

    def _source(self, spec: GrammarSpec, schema: Any, warnings: list[str]) -> str:
        """The library's own form of a spec."""
        if schema is not None:
            return LLMatcher.grammar_from_json_schema(json.dumps(schema))
        if spec.kind == "regex":
            if len(spec.text) > MAX_GRAMMAR_CHARACTERS:
                raise _error(spec, f"is longer than {MAX_GRAMMAR_CHARACTERS} characters")
            return LLMatcher.grammar_from_lark(f"start: {_regex(spec, spec.text)}")
        if spec.kind == "choice":
            choices = _load(spec)
            if not isinstance(choices, list) or not choices or len(choices) > MAX_CHOICES:
                raise _error(spec, f"must be a list of 1 to {MAX_CHOICES} strings")
            if not all(isinstance(choice, str) and choice for choice in choices):
                raise _error(spec, "must hold non-empty strings only")
            # A terminal and no rule: the lexer then sees all choices at once, whatever they share.
            quoted = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in dict.fromkeys(choices))
            return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {quoted}")
        if spec.kind == "grammar":
            return LLMatcher.grammar_from_lark(_as_lark(spec, spec.text))
        return _TagWriter(self, spec, warnings).write(_load(spec))

    def _check_schema(
        self, spec: GrammarSpec, schema: Any, warnings: list[str], *, strict: bool, expand: bool = True, where: str = ""
    ) -> Any:
        """The schema as the library takes it. Raises RequestError for one that is too deep, too large or remote.

        where: what the sentences call it, where a spec holds several.
        """

        def invalid(what: str) -> RequestError:
            if where.startswith("of `"):
                # Tools were sent, and no tag.
                return RequestError(f"The schema {where}{what}.", param=spec.param)
            return _error(spec, f"{where}{what}")

        if not isinstance(schema, dict | bool):
            raise invalid("must be a JSON schema: an object")
        _bound(schema, invalid)
        try:
            written = SchemaRewriter(schema, strict=strict, invalid=invalid, warnings=warnings, expand=expand).write()
        except Unwritable as error:
            sentence = (
                f"has `{error.keyword}` at `{error.where or 'its top'}`, which cannot be kept in full: {error.why}"
            )
            raise invalid(sentence) from None
        except RecursionError:
            raise invalid(f"follows references more than {MAX_REFERENCE_DEPTH} schemas deep") from None
        except (TypeError, AttributeError):
            # A keyword's value of another kind than the standard has it: the walk finds no list, or no number.
            raise invalid("has a keyword whose value is not of the kind that JSON Schema asks for") from None
        if written is False:
            raise invalid("cannot be used: no value satisfies it")
        if written is True:
            written = {}
        if len(json.dumps(written)) > 4 * MAX_SPEC_CHARACTERS:
            raise invalid("grows too large when its `not`, `oneOf` and the like are written out")
        try:
            joined = _Joined(written).count(written)
        except RecursionError:
            raise invalid(f"follows references more than {MAX_REFERENCE_DEPTH} schemas deep") from None
        if joined > MAX_JOINED_PATTERNS:
            raise invalid(f"joins more than {MAX_JOINED_PATTERNS} patterns in one place")
        options: dict[str, Any] = {"lenient": not strict, "whitespace_flexible": spec.any_whitespace}
        if spec.any_whitespace:
            options["whitespace_pattern"] = spec.whitespace_pattern or _WHITESPACE
        return {"x-guidance": options, **written}

    def inline_schema(self, spec: GrammarSpec, node: dict[str, Any], warnings: list[str]) -> str:
        """A schema of a structural tag as a part of a Lark rule; each is judged by itself.

        A node's own `strict` and `name` go before the spec's; schemas beside it are never to blame for its faults.
        """
        schema = node.get("json_schema", node.get("schema"))
        strict, name = node.get("strict", spec.strict), node.get("name")
        where = f"of `{name}` " if isinstance(name, str) else "holds a schema that "
        for expand in (True,) if strict else (True, False):
            found: list[str] = []
            written = self._check_schema(spec, schema, found, strict=strict is True, expand=expand, where=where)
            matcher = self._match(LLMatcher.grammar_from_json_schema(json.dumps(written)))
            if not self._fails(matcher):
                break
        else:
            written = self._fitted(written, found)
            matcher = self._match(LLMatcher.grammar_from_json_schema(json.dumps(written)))
        if fault := self._fails(matcher):
            if where.startswith("of `"):
                raise RequestError(f"The schema {where}cannot be used: {fault}.", param=spec.param)
            raise _error(spec, f"{where}cannot be used: {fault}")
        warnings += found
        return "%json " + json.dumps(written)

    def _fails(self, matcher: LLMatcher) -> str | None:
        """Why a grammar cannot be used; it is walked some tokens far, so that it does not fail amid an answer."""
        mask = np.zeros(self.mask_words, np.uint32)
        first = matcher
        for index in range(NUM_WALKS + 1):
            matcher = first.deep_copy() if index else first
            rng = random.Random(index)
            for _ in range(WALK_TOKENS if index else 1):
                if matcher.is_error():
                    return _sentence(matcher.get_error()) or "it is too complex"
                if matcher.is_stopped():
                    break
                matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
                if matcher.is_error():
                    return _sentence(matcher.get_error()) or "it is too complex"
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
                schema = _without(schema, frozenset(("minProperties", "maxProperties")))
                warnings.append("minProperties and maxProperties are not enforced")
            elif "not disjoint" in fault:
                schema = _without(schema, frozenset(("patternProperties",)))
                warnings.append("patternProperties are not enforced")
            else:
                bad = self._bad_patterns(schema)
                keywords = ("pattern", "patternProperties", "maxLength", "minLength")
                if bad:
                    schema = _without_patterns(schema, bad)
                    warnings.append(f"the pattern {min(bad)!r:.60} is not enforced")
                elif schema != (fewer := _without(schema, frozenset(keywords))):
                    schema = fewer
                    warnings.append("patterns and lengths are not enforced")
                else:
                    break
        return schema

    def _bad_patterns(self, schema: Any) -> set[str]:
        """The patterns of a schema that the library cannot take, each tried alone."""
        found = set[str]()
        for pattern in _patterns(schema):
            alone = json.dumps({"type": "string", "pattern": pattern})
            if len(found) < 100 and self._fails(self._match(LLMatcher.grammar_from_json_schema(alone))):
                found.add(pattern)
        return found

    def literal(self, text: str) -> list[str]:
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
            running = asyncio.wrap_future(self._workers.submit(lambda: self.compile(spec)))
            self._running[spec] = running
            running.add_done_callback(lambda done: self._finished(spec, done))
        try:
            # Shielded: others may wait for the same one, and a thread cannot be stopped anyway.
            return await asyncio.wait_for(asyncio.shield(running), self._timeout_s)
        except TimeoutError:
            self._workers.replace_one()
            raise _error(spec, f"takes longer than {self._timeout_s:g} s to compile; make it simpler") from None

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
    def _workers(self) -> _Workers:
        return _Workers()

    def close(self) -> None:
        """Stop the threads; a compilation that runs is left to itself."""
        if "_workers" in self.__dict__:
            self._workers.close()


class _Workers:
    """Threads with a deep stack. Daemons: one that is lost to a hopeless grammar must not hold up the exit."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Grammar], Callable[[], Grammar]] | None] = queue.SimpleQueue()
        self._num_threads = 0
        for _ in range(POOL_THREADS):
            self._start()

    def submit(self, job: Callable[[], Grammar]) -> Future[Grammar]:
        future: Future[Grammar] = Future()
        self._jobs.put((future, job))
        return future

    def replace_one(self) -> None:
        """A job has run out of time; its thread may never come back."""
        if self._num_threads < POOL_THREADS + MAX_LOST_THREADS:
            self._start()

    def close(self) -> None:
        for _ in range(self._num_threads):
            self._jobs.put(None)

    def _start(self) -> None:
        self._num_threads += 1
        usual = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=self._work, name=f"grammar-{self._num_threads}", daemon=True).start()
        finally:
            threading.stack_size(usual)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)


class _Words:
    """Our tokenizer as the library reads one: `tokens`, `special_token_ids` and a call from text to ids.

    exact: the call gives ids whose bytes are the text again, which jump-ahead needs.
    """

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: list[int], vocab_size: int) -> None:
        assert eos_token_ids, "a grammar ends with an EOS"
        self.eos_token_ids = eos_token_ids
        self.eos_token_id = eos_token_ids[0]
        self.special_token_ids = sorted(id for id in {*tokenizer.special_ids, *eos_token_ids} if id < vocab_size)
        # An id that the model cannot say is in no forced text either.
        special = frozenset((*self.special_token_ids, *range(vocab_size, tokenizer.vocab_size)))
        # A token without bytes is in nobody's text. Special ones go by their name.
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(min(tokenizer.vocab_size, vocab_size))]
        self.tokens += [b""] * (vocab_size - len(self.tokens))
        for token_id in special:
            if token_id < vocab_size and not self.tokens[token_id]:
                self.tokens[token_id] = f"<special {token_id}>".encode()
        self.fallback: LLTokenizer | None = None
        self._tokenizer = tokenizer
        self._special = special
        # SentencePiece models put a space before the first word. Behind a byte that merges with nothing there is none.
        self._lead: str | None = None
        self._num_lead = 0
        for lead in ("", "\x02", "\n"):
            ids = tokenizer.encode(lead, add_special_tokens=False)
            if all(
                self._exact(text, lead, len(ids)) is not None for text in ('{"name": "', "a b", " x", "é", "\n\n1,")
            ):
                self._lead, self._num_lead = lead, len(ids)
                break
        self.exact = tokenizer.rule is not None and self._lead is not None

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        ids = None if self._lead is None else self._exact(text, self._lead, self._num_lead)
        if ids is None:
            # Rare: the text spells a special token, or the tokenizer normalises it.
            ids = self.fallback.greedy_tokenize(text) if self.fallback is not None else []
        return ids

    def _exact(self, text: str, lead: str, num_lead: int) -> list[int] | None:
        ids = self._tokenizer.encode(lead + text, add_special_tokens=False)[num_lead:]
        if not self._special.isdisjoint(ids) or b"".join(map(self._tokenizer.token_bytes, ids)) != text.encode():
            return None
        return ids


class _Joined:
    """How many patterns may have to hold for one string, from above: members of allOf and targets of $ref add up."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._known: dict[int, int] = {}
        self._depth = 0

    def count(self, schema: Any) -> int:
        if not isinstance(schema, dict):
            return 0
        known = self._known.get(id(schema))
        if known is not None:
            return known
        if self._depth == MAX_REFERENCE_DEPTH:
            raise RecursionError
        self._known[id(schema)] = 0  # a cycle adds nothing
        self._depth += 1
        total = sum(key in schema for key in ("pattern", "format"))
        total += sum(map(self.count, _children(schema, ("allOf",))))
        if "$ref" in schema:
            total += self.count(point(self._root, schema["$ref"]))
        for keys in (("anyOf", "oneOf"), (*_SCHEMA_MAPS - {"$defs", "definitions"}, *_SCHEMAS, "prefixItems")):
            total += max(map(self.count, _children(schema, keys)), default=0)
        self._known[id(schema)] = total
        self._depth -= 1
        return total


def point(root: Any, reference: Any) -> Any:
    """What a JSON pointer (RFC 6901) names; None where it names nothing, which the library reports."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found = root
    for part in unquote(reference[1:]).split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(part)
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            return None
    return found


def _children(schema: dict[str, Any], keys: Iterable[str]) -> list[Any]:
    """The schemas under some keywords."""
    found: list[Any] = []
    for key in keys:
        value = schema.get(key)
        if isinstance(value, list):
            found += value
        elif isinstance(value, dict):
            found += value.values() if key in _SCHEMA_MAPS else [value]
    return found


class _TagWriter:
    """Turns the format of a structural tag into one Lark grammar (with side grammars where a tag holds one)."""

    def __init__(self, compiler: GrammarCompiler, spec: GrammarSpec, warnings: list[str]) -> None:
        self._compiler = compiler
        self._spec = spec
        self._warnings = warnings
        self._rules: list[str] = []
        self._grammars: list[dict[str, str]] = []

    def write(self, tree: Any) -> str:
        start = self._element(tree, "format", 0)
        lark = "\n".join([f"start: {start}", f"TEXT: {_ANY_TEXT}", *self._rules])
        return json.dumps({"grammars": [{"name": "main", "lark_grammar": lark}, *self._grammars]})

    def _rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def _bad(self, where: str, what: str) -> RequestError:
        return _error(self._spec, f"is not valid: `{where}` {what}")

    def _string(self, node: dict[str, Any], name: str, where: str, *, empty: bool = True) -> str:
        value = node.get(name)
        if not isinstance(value, str) or not (empty or value):
            raise self._bad(f"{where}.{name}", "must be a string" if empty else "must be a non-empty string")
        return value

    def _list(self, node: dict[str, Any], name: str, where: str) -> list[Any]:
        value = node.get(name)
        if not isinstance(value, list) or not value:
            raise self._bad(f"{where}.{name}", "must be a list that is not empty")
        return value

    def _element(self, node: Any, where: str, depth: int) -> str:
        """An expression for a node, usable inside a sequence."""
        if not isinstance(node, dict):
            raise self._bad(where, "must be an object with a `type`")
        if depth > MAX_DEPTH or len(self._rules) > MAX_SCHEMAS:
            raise self._bad(where, "is too large or too deep")
        kind = node.get("type")
        if kind == "sequence":
            return self._sequence(self._list(node, "elements", where), where, depth)
        if kind == "or":
            options = self._list(node, "elements", where)
            return "(" + " | ".join(
                self._element(inner, f"{where}.elements[{index}]", depth + 1) for index, inner in enumerate(options)
            ) + ")"  # fmt: skip
        if kind == "tag":
            return self._sequence(self._tag_parts(node, where), where, depth)
        if kind == "triggered_tags":
            return self._triggered(node, where, depth)
        if kind == "tags_with_separator":
            return self._separated(node, where, depth)
        return self._leaf(node, kind, where)

    def _leaf(self, node: dict[str, Any], kind: Any, where: str) -> str:
        if kind == "const_string":
            return " ".join(self._compiler.literal(self._string(node, "value", where))) or '""'
        if kind == "any_text":
            return "TEXT"
        if kind == "json_schema":
            return self._rule(self._compiler.inline_schema(self._spec, node, self._warnings))
        if kind == "regex":
            pattern = self._string(node, "pattern", where, empty=False)
            if len(pattern) > MAX_GRAMMAR_CHARACTERS:
                raise self._bad(f"{where}.pattern", "is too long")
            return self._rule(_regex(self._spec, pattern))
        if kind == "grammar":
            name = f"g{len(self._grammars)}"
            lark = _as_lark(self._spec, self._string(node, "grammar", where, empty=False))
            self._grammars.append({"name": name, "lark_grammar": lark})
            return f"@{name}"
        raise self._bad(f"{where}.type", f"is {json.dumps(kind)[:40]}, which is not supported")

    def _tag_parts(self, node: Any, where: str) -> list[Any]:
        if not isinstance(node, dict):
            raise self._bad(where, "must be a tag: an object with `begin`, `content` and `end`")
        begin = {"type": "const_string", "value": self._string(node, "begin", where)}
        end = node.get("end", "")
        ends = end if isinstance(end, list) and end else [end]
        if not all(isinstance(text, str) for text in ends):
            raise self._bad(f"{where}.end", "must be a string")
        closing: Any = [{"type": "const_string", "value": text} for text in ends]
        return [begin, node.get("content"), closing[0] if len(closing) == 1 else {"type": "or", "elements": closing}]

    def _sequence(self, nodes: list[Any], where: str, depth: int) -> str:
        parts: list[str] = []
        index = 0
        while index < len(nodes):
            node = nodes[index]
            following = nodes[index + 1] if index + 1 < len(nodes) else None
            if isinstance(node, dict) and node.get("type") == "any_text" and isinstance(following, dict):
                pieces = self._compiler.literal(following["value"]) if following.get("type") == "const_string" else []
                if pieces and not pieces[0].startswith("<["):
                    # Lazy, or the free text would swallow what ends it.
                    parts += [self._rule(f"TEXT {pieces[0]}", "[lazy]"), *pieces[1:]]
                    index += 2
                    continue
            parts.append(self._element(node, f"{where}.elements[{index}]", depth + 1))
            index += 1
        return self._rule(" ".join(parts))

    def _triggered(self, node: dict[str, Any], where: str, depth: int) -> str:
        """Free text in which a trigger begins one of the tags that start with it."""
        triggers = self._list(node, "triggers", where)
        tags = self._list(node, "tags", where)
        if not all(isinstance(trigger, str) and trigger for trigger in triggers):
            raise self._bad(f"{where}.triggers", "must hold non-empty strings")
        options: list[str] = []
        for index, tag in enumerate(tags):
            here = f"{where}.tags[{index}]"
            begin, content, end = self._tag_parts(tag, here)
            trigger = next((text for text in triggers if begin["value"].startswith(text)), None)
            if trigger is None:
                raise self._bad(f"{here}.begin", "starts with none of the triggers")
            pieces = self._compiler.literal(trigger)
            if pieces[0].startswith("<["):
                head = " ".join(["TEXT", *pieces])
            elif len(pieces) == 1:
                head = self._rule(f"TEXT {pieces[0]}", "[lazy]")
            else:
                raise self._bad(f"{where}.triggers", "must not mix text with a special token that follows it")
            rest = {"type": "const_string", "value": begin["value"][len(trigger) :]}
            options.append(self._rule(f"{head} {self._sequence([rest, content, end], here, depth + 1)}"))
        choice = self._rule(" | ".join(options))
        least = "+" if node.get("at_least_one") is True else "*"
        if node.get("stop_after_first") is True:
            return choice if least == "+" else f"({choice} | TEXT)"
        return f"{choice}{least} TEXT"

    def _separated(self, node: dict[str, Any], where: str, depth: int) -> str:
        """Tags and nothing else, with a separator between them."""
        tags = self._list(node, "tags", where)
        separator = " ".join(self._compiler.literal(self._string(node, "separator", where)))
        choice = self._rule(
            " | ".join(
                self._sequence(self._tag_parts(tag, f"{where}.tags[{index}]"), f"{where}.tags[{index}]", depth + 1)
                for index, tag in enumerate(tags)
            )
        )
        repeated = choice if node.get("stop_after_first") is True else f"{choice} ({separator} {choice})*"
        return f"({repeated})" if node.get("at_least_one") is True else f"({repeated})?"


# ---- small things


def _error(spec: GrammarSpec, what: str) -> RequestError:
    names = {
        "json_object": "The JSON object format", "json_schema": "The JSON schema", "regex": "The regular expression",
        "choice": "The list of choices", "grammar": "The grammar", "structural_tag": "The structural tag",
    }  # fmt: skip
    return RequestError(f"{names[spec.kind]} {what}.", param=spec.param)


def _load(spec: GrammarSpec) -> Any:
    try:
        value = json.loads(spec.text)
    except ValueError as error:
        raise _error(spec, f"is not valid JSON: {error}") from None
    except RecursionError:
        raise _error(spec, "is nested too deep") from None
    level = [value]
    for _ in range(4 * MAX_DEPTH):
        # Schemas alternate with the maps that hold them, and data (enum, const) may nest too.
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return value
    raise _error(spec, "is nested too deep")


def _sentence(text: str) -> str:
    """What the library says, on one short line without its trailing stop."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("at ", "stack backtrace")))[:300].rstrip(
        " ."
    )


def _bound(schema: Any, invalid: Callable[[str], RequestError]) -> None:
    """Raises for a schema that is nested too deep, or holds too many."""
    level, count = [schema], 0
    for _ in range(MAX_DEPTH + 1):
        count += len(level)
        if count > MAX_SCHEMAS:
            raise invalid(f"holds more than {MAX_SCHEMAS} schemas")
        level = [
            inner
            for outer in level
            if isinstance(outer, dict)
            for inner in _children(outer, (*_SCHEMA_MAPS, *_SCHEMA_LISTS, *_SCHEMAS, "items"))
        ]
        if not level:
            return
    raise invalid(f"is nested more than {MAX_DEPTH} schemas deep")


def _patterns(schema: Any) -> set[str]:
    """Every pattern that stands in a schema, of values and of names."""
    found: set[str] = set()
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            found.add(schema["pattern"])
        if isinstance(schema.get("patternProperties"), dict):
            found.update(schema["patternProperties"])
        for inner in _children(schema, (*_SCHEMA_MAPS, *_SCHEMA_LISTS, *_SCHEMAS, "items")):
            found |= _patterns(inner)
    return found


def _without_patterns(schema: Any, bad: set[str]) -> Any:
    """A schema without some patterns, the others still held."""
    if isinstance(schema, list):
        return [_without_patterns(inner, bad) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if not (key == "pattern" and value in bad)}
    for key, value in kept.items():
        if key == "patternProperties":
            kept[key] = {name: _without_patterns(inner, bad) for name, inner in value.items() if name not in bad}
        elif key in _SCHEMA_MAPS and isinstance(value, dict):
            kept[key] = {name: _without_patterns(inner, bad) for name, inner in value.items()}
        elif key in _SCHEMAS or key in _SCHEMA_LISTS:
            kept[key] = _without_patterns(value, bad)
    return kept


def _without(schema: Any, keywords: frozenset[str]) -> Any:
    """A schema without some keywords, wherever schemas stand in it."""
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in keywords:
            continue
        if key in _SCHEMA_MAPS and isinstance(value, dict):
            kept[key] = {name: _without(inner, keywords) for name, inner in value.items()}
        elif isinstance(value, list) and (key in _SCHEMA_LISTS or key == "items"):
            kept[key] = [_without(inner, keywords) for inner in value]
        else:
            kept[key] = _without(value, keywords) if key in _SCHEMAS else value
    return kept


def _without_anchors(pattern: str) -> str:
    """A pattern always describes the whole text, so anchors at its ends say nothing; inside it they are errors."""
    pattern = pattern.removeprefix("^")
    escapes = len(pattern) - 1 - len(pattern[:-1].rstrip("\\"))
    if pattern.endswith("$") and escapes % 2 == 0:
        pattern = pattern[:-1]
    return pattern


def _regex(spec: GrammarSpec, pattern: str) -> str:
    """A pattern as a Lark terminal. \\d and \\w are ASCII, as in JSON Schema: nobody means Arabic digits."""
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        # The library would drop it without a word.
        raise _error(spec, "ends with a backslash that escapes nothing")
    return f"/{regex_to_lark(_without_anchors(pattern), 'dw')}/"


def _as_lark(spec: GrammarSpec, text: str) -> str:
    """Lark as it is; GBNF and EBNF (`root ::= ...`) translated."""
    if not text.strip():
        raise _error(spec, "is empty")
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise _error(spec, f"is longer than {MAX_GRAMMAR_CHARACTERS} characters")
    if text.count("::=") > MAX_EBNF_RULES:
        raise _error(spec, f"has more than {MAX_EBNF_RULES} rules")
    try:
        return any_to_lark(text)
    except RecursionError:
        raise _error(spec, "is nested too deep") from None
    except Exception as error:  # the translator raises bare Exception and IndexError
        raise _error(spec, f"cannot be read: {_sentence(str(error))}") from None

"""Grammars that an answer must follow: JSON, a JSON schema, a regular expression, a choice of texts, or rules.

In: a grammar and a tokenizer. Out: which tokens may come next, and when nothing may. Must never know: requests,
tensors, HTTP.

llguidance does the work. What it takes is bounded by its own limits, for a text that it compiles and for every token.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from amalgam.errors import RequestError, describe

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from amalgam.text.tokenizer import Tokenizer

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]

MAX_SOURCE_CHARS = 2**17
MAX_CHOICES = 4096
_MAX_CACHED = 64
_NUM_THREADS = 2  # masks take them for microseconds

_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like.

    Attributes:
        source: of a `json_schema` the schema, of a `choice` a list of texts, both as JSON; a `regex` that the whole
            answer must match, as Rust's regex crate has them; `lark` rules as llguidance has them; for a
            `json_object`, which is any, nothing.
    """

    kind: GrammarKind
    source: str = ""

    @classmethod
    def of_schema(cls, schema: Mapping[str, Any] | bool) -> Grammar:
        return cls("json_schema", json.dumps(schema, ensure_ascii=False))

    @classmethod
    def of_choices(cls, texts: Sequence[str]) -> Grammar:
        return cls("choice", json.dumps(list(texts), ensure_ascii=False))


class CompiledGrammar:
    """A grammar that is ready to be followed by any number of answers. Any thread."""

    def __init__(self, matcher: LLMatcher, threads: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._threads = threads

    def start(self) -> GrammarState:
        """For one answer."""
        return GrammarState(self._matcher.deep_copy(), self._threads)


class GrammarState:
    """How far one answer has got. One thread at a time.

    Attributes:
        error: why the grammar cannot be followed any further.
    """

    def __init__(self, matcher: LLMatcher, threads: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._threads = threads
        self._masks: Future[list[_Mask]] | None = None
        self.error: RequestError | None = None

    def num_valid(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens may follow, one after the other."""
        return int(self._matcher.validate_tokens(list(token_ids)))

    def take(self, token_id: int) -> bool:
        """The answer has a token more; whether it is complete: nothing may follow, or the grammar is lost."""
        self._masks = None
        self._matcher.consume_token(token_id)
        self._check()
        return bool(self._matcher.is_stopped())

    def prepare(self, proposed_ids: Sequence[int] = ()) -> None:
        """Begin to compute, in another thread, the masks of the token after the answer's own and after each proposal.

        No other method but `blocked` may be called before that one.
        """
        self._masks = self._threads.submit(self._compute, tuple(proposed_ids))

    def blocked(self, num_proposed: int = 0) -> _Mask | None:
        """Which tokens of the tokenizer may not follow the answer's own and so many proposed ones.

        None: the proposals end the answer, or are wrong, before.

        Raises:
            RequestError: the grammar has become too complex.
        """
        if self._masks is None:
            self.prepare()
        assert self._masks is not None
        masks = self._masks.result()
        if self.error is not None:
            raise self.error
        return masks[num_proposed] if num_proposed < len(masks) else None

    def _compute(self, proposed_ids: tuple[int, ...]) -> list[_Mask]:
        matcher = self._matcher
        masks = [_blocked(matcher.compute_bitmask())]
        num_taken = 0
        for token_id in proposed_ids:
            if matcher.validate_tokens([token_id]) != 1 or not matcher.consume_token(token_id):
                break
            num_taken += 1
            if matcher.is_stopped():
                break
            masks.append(_blocked(matcher.compute_bitmask()))
        self._check()
        if num_taken:
            matcher.rollback(num_taken)
        return masks

    def _check(self) -> None:
        if self._matcher.is_error() and self.error is None:
            self.error = RequestError(
                f"The grammar cannot be followed any further: {describe(self._matcher.get_error(), 400)}.",
                remedy="Make it simpler.",
            )


def _blocked(bits: bytes) -> _Mask:
    return np.unpackbits(~np.frombuffer(bits, np.uint8), bitorder="little").view(np.bool_)


def compile_grammar(tokenizer: Tokenizer, grammar: Grammar) -> CompiledGrammar:
    """Make a grammar ready, or take it from those that were made last. Blocks for up to a second; any thread.

    Raises:
        RequestError: it is malformed, asks for what llguidance does not have, or is too complex.
    """
    with _lock:
        compiler = _compilers.get(tokenizer)
        if compiler is None:
            compiler = _compilers[tokenizer] = _Compiler(tokenizer)
    return compiler.compile(grammar)


class _Compiler:
    """The grammars of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Not the tokenizer itself, which would then never be let go.
        self._arguments = tokenizer.grammar_vocabulary()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "amalgam-grammar")
        self._lock = threading.Lock()
        self._cached: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        with self._lock:
            if (found := self._cached.get(grammar)) is not None:
                self._cached.move_to_end(grammar)
                return found
        compiled = CompiledGrammar(self._match(grammar), self._threads)
        with self._lock:
            self._cached[grammar] = compiled
            while len(self._cached) > _MAX_CACHED:
                self._cached.popitem(last=False)
        return compiled

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        return LLTokenizer(**self._arguments)

    def _match(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, _text(grammar), log_level=0)
        if matcher.is_error():
            raise RequestError(
                f"The {grammar.kind} cannot be followed: {describe(matcher.get_error(), 600)}.",
                remedy="Correct it, or leave out what is not supported.",
            )
        return matcher


def _text(grammar: Grammar) -> str:
    """As llguidance takes it.

    Raises:
        RequestError: it is malformed.
    """
    from llguidance import LLMatcher

    if len(grammar.source) > MAX_SOURCE_CHARS:
        raise RequestError(
            f"The {grammar.kind} has {len(grammar.source)} characters.", remedy=f"Allowed: {MAX_SOURCE_CHARS}."
        )
    match grammar.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}')
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(grammar.source)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(grammar.source))))
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.source)


_lock = threading.Lock()
_compilers: WeakKeyDictionary[Tokenizer, _Compiler] = WeakKeyDictionary()

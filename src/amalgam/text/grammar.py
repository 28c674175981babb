"""Grammars that an answer must follow: JSON, a JSON schema, a regular expression, a choice of texts, or rules.

In: a grammar and a tokenizer. Out: which tokens may come next, and when nothing may. Must never know: requests,
tensors, HTTP.

llguidance does the work. Its own limits do not bound what a grammar takes to compile, so that each one is tried first
in a process that can be killed; see `grammar_trial`.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

from amalgam.base.escaping import one_line
from amalgam.base.strict_json import is_longer
from amalgam.errors import RequestError, UnavailableError, describe
from amalgam.text.grammar_trial import Trial, make_matcher, make_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from llguidance import LLMatcher

    from amalgam.text.tokenizer import Tokenizer

    _Mask = npt.NDArray[np.bool_]

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]

KINDS = ", ".join(get_args(GrammarKind))
MAX_SOURCE_CHARS = 2**17
MAX_CHOICES = 4096
TRIAL_SECONDS = 0.5  # then it is compiled once more, here
_MAX_CACHED = 64
# Between two tokens of JSON. Without an end a model may write spaces for ever.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
_MAX_FAULT_CHARS = 600
_NUM_THREADS = 2  # masks take them for microseconds


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
        """
        Raises:
            RequestError: it is too long. Told before it is written out, which would take long.
        """
        return cls._written("json_schema", schema)

    @classmethod
    def of_choices(cls, texts: Sequence[str]) -> Grammar:
        """
        Raises:
            RequestError: they are too long together.
        """
        return cls._written("choice", list(texts))

    @classmethod
    def _written(cls, kind: GrammarKind, value: Any) -> Grammar:
        if is_longer(value, MAX_SOURCE_CHARS):
            raise RequestError(
                f"The {kind} has more than {MAX_SOURCE_CHARS} characters.", remedy=f"Allowed: {MAX_SOURCE_CHARS}."
            )
        return cls(kind, json.dumps(value, ensure_ascii=False))


class CompiledGrammar:
    """A grammar that is ready to be followed by any number of answers. Any thread."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, threads: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._threads = threads

    def start(self) -> GrammarState:
        """For one answer."""
        return GrammarState(self._matcher.deep_copy(), self._vocab_size, self._threads)


class GrammarState:
    """How far one answer has got. One thread at a time.

    Attributes:
        error: why the grammar cannot be followed any further.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, threads: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._threads = threads
        self._masks: Future[list[_Mask]] | None = None
        self.error: RequestError | None = None

    def num_valid(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens may follow, one after the other; none of those that the tokenizer does not have."""
        # A model may have more rows than its tokenizer has tokens; asked about one, the matcher fails for good.
        is_known = [0 <= token_id < self._vocab_size for token_id in token_ids]
        return int(self._matcher.validate_tokens(list(token_ids[: [*is_known, False].index(False)])))

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
        masks = [self._blocked()]
        num_taken = 0
        for token_id in proposed_ids:
            if self.num_valid((token_id,)) != 1 or not matcher.consume_token(token_id):
                break
            num_taken += 1
            if matcher.is_stopped():
                break
            masks.append(self._blocked())
        self._check()
        if num_taken:
            matcher.rollback(num_taken)
        return masks

    def _blocked(self) -> _Mask:
        import numpy as np  # which the server has no time for until its port is open

        bits = ~np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def _check(self) -> None:
        if self._matcher.is_error() and self.error is None:
            self.error = RequestError(
                f"The grammar cannot be followed any further{_quoted(self._matcher.get_error())}",
                remedy="Make it simpler.",
            )


def check_grammar(grammar: Grammar) -> None:
    """Refuse what is malformed before there is a tokenizer, which takes a model to be opened. Milliseconds.

    Lark rules may name tokens, and so only their length is checked. What is too complex is found by `compile_grammar`.

    Raises:
        RequestError: it is malformed, or asks for what llguidance does not have.
    """
    from llguidance import LLMatcher

    text = _text(grammar)
    fault = "" if grammar.kind == "lark" else LLMatcher.validate_grammar(text)
    if fault:
        raise _refused(grammar, fault)


def compile_grammar(tokenizer: Tokenizer, grammar: Grammar) -> CompiledGrammar:
    """Make a grammar ready, or take it from those that were made last. Blocks for up to a second; any thread.

    The first one of a tokenizer takes longer, as a large vocabulary has to be read: see `prepare_grammars`.

    Raises:
        RequestError: it is malformed, asks for what llguidance does not have, or is too complex.
        UnavailableError: the machine has no descriptors or memory left to try it.
    """
    return prepare_grammars(tokenizer).compile(grammar)


def prepare_grammars(tokenizer: Tokenizer) -> GrammarCompiler:
    """Read a tokenizer's vocabulary, so that its first grammar is made as fast as others. Blocks; any thread."""
    with _lock:
        compiler = _compilers.get(tokenizer)
        if compiler is None:
            compiler = _compilers[tokenizer] = GrammarCompiler(tokenizer)
    return compiler


class GrammarCompiler:
    """The grammars of one tokenizer, which it does not keep alive. Any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokens, special_ids, encode = tokenizer.grammar_vocabulary()
        eos_ids = sorted(tokenizer.eos_token_ids)
        if not eos_ids or eos_ids[-1] >= len(tokens):  # llguidance needs one: a token that nobody has
            eos_ids = [token_id for token_id in eos_ids if token_id < len(tokens)] or [len(tokens)]
        if eos_ids == [len(tokens)]:
            tokens, special_ids = [*tokens, b"\xff<end>"], [*special_ids, len(tokens)]
        self._vocab_size = tokenizer.vocab_size
        self._tokenizer = make_tokenizer(tokens, special_ids, eos_ids, encode)
        self._trial = Trial(tokens, special_ids, eos_ids)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "amalgam-grammar")
        self._lock = threading.Lock()
        self._known: OrderedDict[Grammar, CompiledGrammar | RequestError] = OrderedDict()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """See `compile_grammar`."""
        with self._lock:
            found = self._known.get(grammar)
            if found is not None:
                self._known.move_to_end(grammar)
        if found is None:
            text = _text(grammar)
            fault = self._try(text)
            if fault is None:  # not kept: another time it may be found out
                raise RequestError(
                    f"The {grammar.kind} {describe(grammar.source)} takes more time or memory than it may.",
                    remedy="Make it simpler: fewer optional properties, smaller repetitions and multiples.",
                )
            found = _refused(grammar, fault) if fault else self._compile(grammar, text)
            with self._lock:
                self._known[grammar] = found
                while len(self._known) > _MAX_CACHED:
                    self._known.popitem(last=False)
        if isinstance(found, RequestError):  # a new one: whoever catches it may add to it
            raise RequestError(found.what, remedy=found.remedy)
        return found

    def _try(self, text: str) -> str | None:
        try:
            return self._trial.run(text, TRIAL_SECONDS)
        except OSError as error:
            raise UnavailableError(
                f"No process can be started to try a grammar: {error}.", remedy="Try again later."
            ) from error

    def _compile(self, grammar: Grammar, text: str) -> CompiledGrammar | RequestError:
        matcher = make_matcher(self._tokenizer, text)
        if matcher.is_error():
            return _refused(grammar, matcher.get_error())
        matcher.compute_bitmask()  # fills what all of its copies share
        return CompiledGrammar(matcher, self._vocab_size, self._threads)


def _refused(grammar: Grammar, fault: str) -> RequestError:
    if grammar.kind == "regex":  # llguidance puts it into a rule, whose name and columns are none of the user's
        fault = fault.partition(" (in regex): ")[2] or fault
        fault = fault.partition("\n   1 | start: ")[0]
    return RequestError(
        f"The {grammar.kind} cannot be followed{_quoted(fault)}",
        remedy="Correct it, or leave out what is not supported.",
    )


def _quoted(fault: str) -> str:
    """The end of a sentence: llguidance's words, which point at places in lines where they have several."""
    lines = fault.strip("\n")[:_MAX_FAULT_CHARS].split("\n")
    if len(lines) == 1:
        return f": {describe(fault, _MAX_FAULT_CHARS)}."
    return ":\n" + "".join(f"    {one_line(line)}\n" for line in lines)


def _text(grammar: Grammar) -> str:
    """As llguidance takes it.

    Raises:
        RequestError: it is malformed.
    """
    from llguidance import LLMatcher

    source = grammar.source
    if len(source) > MAX_SOURCE_CHARS:
        raise RequestError(f"The {grammar.kind} has {len(source)} characters.", remedy=f"Allowed: {MAX_SOURCE_CHARS}.")
    if grammar.kind == "json_object" and source:
        raise RequestError(f"A json_object has the source {describe(source)}.", remedy="Allowed: none.")
    try:
        match grammar.kind:
            case "json_object":
                return _json_text('{"type": "object"}')
            case "json_schema":
                return _json_text(source)
            case "regex":
                return str(LLMatcher.grammar_from_regex(source))
            case "choice":
                return str(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {_choice_rule(source)}"))
            case "lark":
                return str(LLMatcher.grammar_from_lark(source))
    except ValueError as error:  # no JSON, or a lone surrogate
        raise _refused(grammar, str(error)) from None
    raise RequestError(f"There is no grammar of the kind {describe(grammar.kind)}.", remedy=f"There are {KINDS}.")


def _json_text(schema: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITESPACE}))


def as_rule(grammar: Grammar) -> str | None:
    """The right side of a Lark rule that says the same, to be put into a larger grammar; None: there is none.

    Raises:
        RequestError: it is malformed.
    """
    match grammar.kind:
        case "json_object":
            return _json_rule({"type": "object"})
        case "json_schema":
            try:
                return _json_rule(json.loads(grammar.source))
            except (ValueError, RecursionError) as error:
                raise _refused(grammar, str(error)) from None
        case "choice":
            return _choice_rule(grammar.source)
    return None


def _json_rule(schema: Any) -> str:
    fields = schema if isinstance(schema, dict) else {"allOf": [schema]}
    return "%json " + json.dumps({"x-guidance": {"whitespace_pattern": _WHITESPACE}, **fields}, ensure_ascii=False)


def _choice_rule(source: str) -> str:
    return " | ".join(json.dumps(text, ensure_ascii=False) for text in _choices(source))  # as Lark quotes too


def _choices(source: str) -> list[str]:
    try:
        choices = json.loads(source)
    except (ValueError, RecursionError):
        choices = None
    is_list = isinstance(choices, list) and 0 < len(choices) <= MAX_CHOICES
    if not is_list or not all(isinstance(text, str) and text for text in choices):
        raise RequestError(
            f"The choice is {describe(source)}.",
            remedy=f"Give a JSON list of 1 to {MAX_CHOICES} texts, none of them empty.",
        )
    return list(dict.fromkeys(choices))


_lock = threading.Lock()
_compilers: WeakKeyDictionary[Tokenizer, GrammarCompiler] = WeakKeyDictionary()

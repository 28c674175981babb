"""Grammars: what they let through, judged by other readers of the same formats, and how hostile ones end."""

from __future__ import annotations

import gc
import json
import random
import re
import weakref
from collections.abc import Sequence

import numpy as np
import pytest

from amalgam.errors import RequestError
from amalgam.text.grammar import CompiledGrammar, Grammar, check_grammar, compile_grammar
from amalgam.text.parts import TokenizerParts
from amalgam.text.tokenizer import Tokenizer
from tests.conftest import DEMO
from tests.errors import raises
from tests.text.tokenizer_files import LLAMA3, byte_level, sentence_piece

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


def is_whole(tokenizer: Tokenizer, compiled: CompiledGrammar, text: str) -> bool:
    """Whether a text is what the grammar asks for, from the first token to the last."""
    state = compiled.start()
    token_ids = tokenizer.encode(text)
    for index, token_id in enumerate(token_ids):
        blocked = state.blocked()
        if blocked is None or blocked[token_id]:
            return False
        if state.take(token_id):
            return index == len(token_ids) - 1
    blocked = state.blocked()
    return blocked is not None and not all(blocked[token_id] for token_id in tokenizer.eos_token_ids)


def written(tokenizer: Tokenizer, compiled: CompiledGrammar, seed: int, max_tokens: int = 400) -> list[int] | None:
    """An answer that a model without any sense gives; None if it does not come to an end."""
    choose, state, token_ids = random.Random(seed), compiled.start(), list[int]()
    for _ in range(max_tokens):
        blocked = state.blocked()
        assert blocked is not None
        allowed = (~blocked).nonzero()[0].tolist()
        assert allowed
        ends = [token_id for token_id in allowed if token_id in tokenizer.eos_token_ids]
        token_id = ends[0] if ends and choose.random() < 0.5 else choose.choice(allowed)
        if token_id in tokenizer.eos_token_ids:
            return token_ids
        token_ids.append(token_id)
        if state.take(token_id):
            assert state.error is None
            return token_ids
    return None


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar("json_object"), ['{"a": [1, {"b": null}]}', "{}"], ["[1]", "1", '{"a": }', "{'a': 1}"]),
        (Grammar.of_schema(PERSON), ['{"name": "Ann", "age": 3}'], ['{"name": "Ann"}', '{"name": 1, "age": 3}', "{}"]),
        (Grammar("regex", r"[0-9]{3}-(a|b)+"), ["123-ab", "000-a"], ["12-a", "123-", "123-c", "x123-a"]),
        (Grammar.of_choices(["yes", "no", 'a "b"\n|é', "(x)*"]), ["yes", 'a "b"\n|é', "(x)*"], ["ye", "maybe", "xx"]),
        (Grammar("lark", 'start: "(" start ")" | ""'), ["((()))", "()"], ["((", ")("]),
    ],
    ids=lambda value: value.kind if isinstance(value, Grammar) else "",
)
def test_what_follows_a_grammar(
    tokenizer: Tokenizer, grammar: Grammar, good: Sequence[str], bad: Sequence[str]
) -> None:
    compiled = compile_grammar(tokenizer, grammar)
    assert [text for text in good if not is_whole(tokenizer, compiled, text)] == []
    assert [text for text in bad if is_whole(tokenizer, compiled, text)] == []


def test_whatever_is_written_follows_it(tokenizer: Tokenizer) -> None:
    """By the standard library's readers."""
    person, number = Grammar.of_schema(PERSON), Grammar("regex", r"-?[0-9]{1,6}(\.[0-9]{1,4})?")
    answers = [written(tokenizer, compile_grammar(tokenizer, person), seed) for seed in range(30)]
    found = [json.loads(tokenizer.decode(token_ids)) for token_ids in answers if token_ids is not None]
    assert len(found) > 5
    for one in found:
        assert set(one) == {"name", "age"}
        assert isinstance(one["name"], str)
        assert len(one["name"]) <= 8
        assert isinstance(one["age"], int)
    answers = [written(tokenizer, compile_grammar(tokenizer, number), seed) for seed in range(30)]
    assert None not in answers
    texts = [tokenizer.decode(token_ids) for token_ids in answers if token_ids is not None]
    assert all(re.fullmatch(r"-?[0-9]{1,6}(\.[0-9]{1,4})?", text) for text in texts)


def test_a_proposal_is_judged_and_forgotten(tokenizer: Tokenizer) -> None:
    state = compile_grammar(tokenizer, Grammar.of_schema(PERSON)).start()
    right = tokenizer.encode('{"name": "A", "age": 1}')
    wrong = [*right[:2], *tokenizer.encode("}}")]
    assert (state.num_valid(right), state.num_valid(wrong)) == (len(right), 2)
    first = state.blocked()
    state.prepare(wrong)
    assert [state.blocked(count) is None for count in range(len(wrong) + 1)] == [False] * 3 + [True] * (len(wrong) - 2)
    masks = [state.blocked(count) for count in range(3)]
    np.testing.assert_array_equal(masks[0], first)
    for token_id, mask in zip(right[:2], masks[1:], strict=True):
        state.take(token_id)
        np.testing.assert_array_equal(state.blocked(), mask)
    state.prepare(right[2:])  # complete with the last one
    assert state.blocked(len(right) - 3) is not None
    assert state.blocked(len(right) - 2) is None


def test_a_proposal_that_is_no_token_of_the_tokenizer_leaves_the_answer_as_it_is(tokenizer: Tokenizer) -> None:
    state = compile_grammar(tokenizer, Grammar.of_schema(PERSON)).start()
    right, padding = tokenizer.encode('{"name"'), tokenizer.vocab_size + 3
    assert (state.num_valid([right[0], padding, right[1]]), state.num_valid([-1])) == (1, 0)
    state.prepare([right[0], padding])
    assert [state.blocked(count) is None for count in range(3)] == [False, False, True]
    assert not state.take(right[0]) and state.error is None


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        (Grammar("json_schema", "{"), []),
        (Grammar("json_schema", '{"type": "strin"}'), []),
        (Grammar.of_schema({"type": "string", "not": {"const": "a"}}), ["not"]),
        (Grammar.of_schema({"$ref": "http://example.com/a.json"}), ["http://example.com/a.json"]),
        (Grammar("json_schema", '{"const": "\ud800"}'), []),
        (Grammar("regex", "(a"), []),
        (Grammar("regex", "(?=a)b"), []),
        (Grammar("choice", "[]"), []),
        (Grammar("choice", '["a", 1]'), []),
        (Grammar("choice", '["\\ud800"]'), []),
        (Grammar("choice", "[" * 100_000), []),
        (Grammar("lark", "start: missing"), ["missing"]),
        (Grammar("lark", 'start: "a"\n' * 100_000), [1_100_000]),
        (Grammar("json_object", "{}"), []),
        (Grammar("xml", "<a/>"), ["xml"]),  # type: ignore[arg-type]
    ],
    ids=lambda value: f"{value.kind} {value.source[:20]}" if isinstance(value, Grammar) else "",
)
def test_what_cannot_be_followed_is_refused_by_name(
    tokenizer: Tokenizer, grammar: Grammar, named: Sequence[object]
) -> None:
    for _ in range(2):  # also when it is known already
        with raises(RequestError, *named):
            compile_grammar(tokenizer, grammar)
    if grammar.kind == "lark":  # which needs the tokenizer
        return
    with raises(RequestError, *named):
        check_grammar(grammar)


def test_where_a_fault_lies_is_shown_in_lines_of_which_none_steers_a_terminal() -> None:
    with raises(RequestError) as caught:
        check_grammar(Grammar("regex", "a\x1b[2J\u202e(b"))
    lines = str(caught.value).splitlines()
    assert r"        a\x1b[2J\u202e(b" in lines and len(lines) > 3
    assert "".join(lines).isprintable()


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar.of_schema({"type": "integer", "multipleOf": 9999991}),
        Grammar("lark", "start: A\nA: ~/.*(a|b).{14}(c|d).*/ & /[a-d]{30,60}/"),
        Grammar("regex", "a?" * 8000 + "a" * 8000),
        Grammar.of_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(4000)}}),
    ],
    ids=["multiple", "complement", "repetition", "optional properties"],
)
def test_hostile_ones_end_with_the_process_that_tries_them(tokenizer: Tokenizer, grammar: Grammar) -> None:
    with raises(RequestError, grammar.kind):
        compile_grammar(tokenizer, grammar)
    assert is_whole(tokenizer, compile_grammar(tokenizer, Grammar("regex", "ab+")), "abb")


def test_a_grammar_is_made_once(tokenizer: Tokenizer) -> None:
    first = compile_grammar(tokenizer, Grammar("regex", "once"))
    assert compile_grammar(tokenizer, Grammar("regex", "once")) is first
    for index in range(64):
        compile_grammar(tokenizer, Grammar("regex", f"other{index}"))
    assert compile_grammar(tokenizer, Grammar("regex", "once")) is not first


def test_grammars_keep_no_tokenizer_alive() -> None:
    tokenizer = Tokenizer(TokenizerParts(byte_level(LLAMA3)), frozenset())
    compile_grammar(tokenizer, Grammar("regex", "a"))
    known = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert known() is None


@pytest.fixture(scope="module", params=["prepend", "first", "never", "llama3"])
def other(request: pytest.FixtureRequest) -> Tokenizer:
    """Pieces of SentencePiece, bytes spelled out, and no end of sequence."""
    backend = byte_level(LLAMA3) if request.param == "llama3" else sentence_piece(request.param)
    return Tokenizer(TokenizerParts(backend), frozenset())


def test_other_tokenizers_spell_what_follows(other: Tokenizer) -> None:
    compiled = compile_grammar(other, Grammar("regex", "x[a-zé春]{2,9}( [a-zé春]{2,9}){1,3}!"))
    tokens, _, _ = other.grammar_vocabulary()
    answers = [written(other, compiled, seed) for seed in range(20)]
    for token_ids in answers:
        assert token_ids is not None
        text = b"".join(tokens[token_id] for token_id in token_ids).decode()
        assert re.fullmatch("x[a-zé春]{2,9}( [a-zé春]{2,9}){1,3}!", text)
        assert other.decode(token_ids).strip() == text


def test_a_grammar_may_begin_behind_a_thought(tokenizer: Tokenizer) -> None:
    rules = 'start: thought answer\nthought[suffix="</think>"]: /(?s:.*)/\nanswer: %json {"type": "object"}'
    compiled = compile_grammar(tokenizer, Grammar("lark", rules))
    assert is_whole(tokenizer, compiled, 'Well { "x" …\n</think>{"a": 1}')
    assert not is_whole(tokenizer, compiled, "Well</think>1")

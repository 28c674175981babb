"""A form for the content of an answer whose prompt opens reasoning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amalgam.errors import RequestError, UnsupportedError
from amalgam.text.answers.registry import answer_format
from amalgam.text.grammar import Grammar, compile_grammar
from amalgam.text.tokenizer import Tokenizer
from tests.errors import raises

DEMO = Path(__file__).parents[2] / "models" / "demo"
THINKING = "{{ messages }}<think></think>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


@pytest.mark.parametrize(
    ("grammar", "content"),
    [
        (Grammar.of_schema({"const": {"a": 1}}), '{"a": 1}'),
        (Grammar("json_object"), '{"b": [2]}'),
        (Grammar.of_choices(["yes", "no"]), "no"),
    ],
)
def test_the_form_begins_behind_the_reasoning(tokenizer: Tokenizer, grammar: Grammar, content: str) -> None:
    answers = answer_format(THINKING, tokenizer.special_tokens)
    joined = compile_grammar(tokenizer, answers.after_reasoning(grammar, "<think>\n")).start()
    whole = tokenizer.encode(f"Let me see: {json.dumps({})}.</think>\n\n{content}")
    assert joined.num_valid(whole) == len(whole)
    wrong = tokenizer.encode("Let me see.</think>maybe")
    assert joined.num_valid(wrong) < len(wrong)


@pytest.mark.parametrize(
    "grammar", [Grammar("json_object"), Grammar.of_schema({"type": "object"}), Grammar.of_schema(True)]
)
def test_spaces_have_an_end(tokenizer: Tokenizer, grammar: Grammar) -> None:
    joined = answer_format(THINKING, tokenizer.special_tokens).after_reasoning(grammar, "<think>\n")
    compiled = compile_grammar(tokenizer, joined)
    for text, is_valid in (
        ('x</think>\n\n{\n"a": 1 }', True),
        ("x</think>{" + " " * 99, False),
        ("x</think>" + "\n" * 99, False),
    ):
        whole = tokenizer.encode(text)
        assert (compiled.start().num_valid(whole) == len(whole)) is is_valid


@pytest.mark.parametrize(
    "grammar", [Grammar("json_schema", "{"), Grammar("choice", "5"), Grammar("choice", "[1]"), Grammar("choice", "[]")]
)
def test_what_is_malformed_is_refused(grammar: Grammar) -> None:
    with pytest.raises(RequestError):
        answer_format(THINKING, {}).after_reasoning(grammar, "<think>\n")


def test_without_reasoning_before_it_the_form_stays_as_it_is(tokenizer: Tokenizer) -> None:
    grammar = Grammar("regex", "a+")
    assert answer_format(THINKING, {}).after_reasoning(grammar, "assistant\n") is grammar
    assert answer_format("{{ messages }}", {}).after_reasoning(grammar, "<think>") is grammar
    with raises(UnsupportedError, "regex"):
        answer_format(THINKING, {}).after_reasoning(grammar, "<think>")
    with raises(UnsupportedError, "gpt_oss"):
        answer_format(None, {}, "gpt_oss").after_reasoning(grammar)

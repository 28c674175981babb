"""Rules: exact names, then the most specific pattern, then the default."""

from __future__ import annotations

import pytest

from amalgam.composition.patterns import compile_pattern, specificity
from amalgam.composition.rules import Choices
from amalgam.config.placement import Rule
from amalgam.errors import PlanError
from tests.errors import raises

NAMES = [
    f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
    for layer in range(3)
    for expert in range(12)
    for part in ("gate", "up", "down")
] + ["model.embed_tokens.weight", "model.norm.weight"]
EXPERT = "model.layers.1.mlp.experts.7.up_proj.weight"


def rules(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(pattern=pattern, source=source) for pattern, source in pairs)


@pytest.mark.parametrize(
    ("given", "source", "why"),
    [
        ((), "base", "default source"),
        ((("*experts*", "int4"),), "int4", "only rule"),
        ((("*", "fp8"), ("*experts*", "int4")), "int4", "literal characters"),
        ((("*experts*", "int4"), ("*", "fp8")), "int4", "literal characters"),
        (((EXPERT, "fp8"), ("model.layers.1.mlp.experts.7.*", "int4")), "fp8", "exact name"),
        ((("*.up_proj.*", "fp8"), ("*.experts.*", "int4")), "int4", "stands later"),
        (((EXPERT, "fp8"), (EXPERT, "int4")), "int4", "stands later"),
        ((("model.layers.{0-1}.*", "fp8"),), "fp8", "only rule"),
        ((("model.layers.*.mlp.experts.{3,7}.*", "fp8"),), "fp8", "only rule"),
        ((("model.layers.[0-2].mlp.experts.?.*", "fp8"),), "fp8", "only rule"),
    ],
)
def test_which_rule_wins_and_why(given: tuple[tuple[str, str], ...], source: str, why: str) -> None:
    explanation = Choices(NAMES, rules(*given), "base").explain(EXPERT)
    assert explanation.choice.source == source
    assert why in explanation.why
    assert [rule.source for rule in explanation.matching][:1] == ([source] if given else [])


def test_numbers_match_whole() -> None:
    choices = Choices(NAMES, rules(("model.layers.*.mlp.experts.1.*", "int4")), "base")
    assert choices["model.layers.0.mlp.experts.1.up_proj.weight"].source == "int4"
    assert choices["model.layers.0.mlp.experts.11.up_proj.weight"].source == "base"
    assert not compile_pattern("experts.{1-3}").fullmatch("experts.13")


def test_a_dot_is_a_dot() -> None:
    assert not compile_pattern("model.norm").fullmatch("modelxnorm")


def test_specificity_counts_literal_characters() -> None:
    assert specificity("a*b{c,d}[ef]?g") == 3


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("model.layers.9.*", "'model.layers.9.*'"),
        ("model.layers.1.mlp.experts.7.up_proj", EXPERT),
        ("model.layers.[0-2.*", "'['"),
        ("model.layers.{0-2.*", "'{'"),
        ("model.layers.{5-2}.*", "5-2"),
        ("model.layers.{0-99999999}.*", "0-99999999"),
        ("model.layers.[z-a].*", "[z-a]"),
        ("model.layers.[].*", "[]"),
        ("*a" * 9, 9),
    ],
)
def test_bad_rules_are_refused_by_name(pattern: str, named: object) -> None:
    with raises(PlanError, repr(pattern), named):
        Choices(NAMES, rules((pattern, "int4")), "base")


@pytest.mark.parametrize(
    ("pattern", "idle"),
    [
        ("model.layers.*.mlp.experts.{0,99}.*", "99"),
        ("model.layers.{0-1,3}.*", "3"),
        ("model.layers.{0,1}.mlp.experts.{0,90-99}.{up,down}_proj.weight", "90-99"),
        ("*.{up,down,left}_proj.*", "left"),
        ("*{embed,norms}*", "norms"),
        ("*{1,11}.{up,qkv}*", "qkv"),
    ],
)
def test_an_alternative_that_matches_nothing_is_refused_by_name(pattern: str, idle: str) -> None:
    """As a whole pattern is: what is left out of a plan by a typo would go unnoticed."""
    with raises(PlanError, repr(pattern), repr(idle)):
        Choices(NAMES, rules((pattern, "int4")), "base")


def test_a_range_may_reach_further_than_the_model() -> None:
    assert Choices(NAMES, rules(("*.experts.{0-127}.up_proj.*", "int4")), "base")[EXPERT].source == "int4"


def test_an_alternative_is_not_idle_because_another_one_or_a_stronger_rule_was_taken() -> None:
    stronger = ("model.layers.*.mlp.experts.7.up_proj.weight", "fp8")
    for pattern in ("*experts{.1,.11,.7}*.up_proj*", "*{layers,experts}*", "*.experts.{5,7}.up_proj.*"):
        assert Choices(NAMES, rules((pattern, "int4"), stronger), "base")[EXPERT].source == "fp8"


def test_a_shadowed_rule_is_no_error() -> None:
    choices = Choices(NAMES, rules(("*.experts.7.*", "int4"), ("model.layers.*.experts.7.*", "fp8")), "base")
    assert choices[EXPERT].source == "fp8"


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with raises(PlanError, EXPERT):
        Choices(NAMES, (), "base").explain("model.layers.1.mlp.experts.7.up_proj.weigth")


def test_many_stars_are_one_star() -> None:
    choices = Choices(NAMES, rules(("*" * 40 + "up_proj.weight", "int4")), "base")
    assert choices[EXPERT].source == "int4"


def test_a_rule_that_stronger_ones_override_everywhere_is_named() -> None:
    weak, strong = rules(("model.layers.*.mlp.experts.*", "int4"), ("model.layers.{1,1}.mlp.experts.*", "fp8"))
    assert Choices([EXPERT], (weak, strong), "base").overridden == (weak,)
    assert Choices([EXPERT], (strong,), "base").overridden == ()

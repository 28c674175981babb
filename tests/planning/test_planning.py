"""From texts to a plan, on two layers of the demo model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from amalgam.composition.loader import ModelLoader
from amalgam.config.placement import build_rules
from amalgam.config.settings import build_settings
from amalgam.errors import ConfigError, PlanError
from amalgam.evaluation.quality import Reference
from amalgam.evaluation.running import Contestant, open_contestant
from amalgam.evaluation.texts import Sample
from amalgam.experts.history import Tally
from amalgam.experts.saved.sets import SavedSet
from amalgam.planning.budget import parse_budget
from amalgam.planning.corrections import corrected
from amalgam.planning.knapsack import solve
from amalgam.planning.losses import costs, losses
from amalgam.planning.planner import RANDOM, Planner
from amalgam.planning.problem import Problem, problem_of
from amalgam.planning.proof import HAND, UNIFORM, Scale, deciding_of, judge
from amalgam.planning.recipes import cost_of, hand_recipes, random_plan, uniforms, usage_only
from amalgam.planning.scores import scores
from amalgam.planning.sensitivity import Sensitivities, SensitivityStudy, WeightErrors
from amalgam.planning.use import use_of_set, use_of_texts
from amalgam.planning.writing import rules_of, write_config
from tests.errors import raises
from tests.planning.conftest import SOURCES


@pytest.fixture(scope="module")
def study(
    loader: ModelLoader, problem: Problem, sample: Sample, tmp_path_factory: pytest.TempPathFactory
) -> SensitivityStudy:
    return SensitivityStudy(loader, problem, sample, tmp_path_factory.mktemp("sensitivities"))


@pytest.fixture(scope="module")
def sensitivities(study: SensitivityStudy) -> Sensitivities:
    return study.measure()


@pytest.fixture(scope="module")
def base(loader: ModelLoader) -> Contestant:
    return open_contestant("base", loader, loader.plan(()), torch.float32, 64)


@pytest.fixture(scope="module")
def scale(problem: Problem, base: Contestant, sample: Sample) -> Scale:
    return Scale(problem, Reference(base, sample))


@pytest.fixture(scope="module")
def planner(problem: Problem, sensitivities: Sensitivities, scale: Scale) -> Planner:
    return Planner(problem, sensitivities, use_of_texts(problem, sensitivities), scale)


def test_every_projection_has_a_choice(problem: Problem) -> None:
    assert problem.sources == ("int3", "int4", "int8", "base")
    assert len(problem.items) == 2 * (4 + 16 * 3)
    assert {len(item.options) for item in problem.items} == {4}
    assert problem.bits_of("int3") == 3.125 and problem.bits_of("int4") == 4.5
    expert = next(item for item in problem.items if item.name == "model.layers.1.mlp.experts.5.down_proj.weight")
    assert (expert.layer, expert.expert, expert.part, expert.role) == (1, 5, "down", "expert")
    assert problem.mapping(problem.uniform("base") or []) == {}


@pytest.mark.parametrize("source", ["int3", "int4", "int8", "base"])
def test_a_plan_takes_the_memory_that_is_counted(source: str, loader: ModelLoader, problem: Problem) -> None:
    """But for the tensor that says a weight's shape, which does not stay."""
    version = loader.build(loader.plan(loader.uniform(source)), 1).version
    counted = problem.fixed_memory + problem.memory_bytes(problem.uniform(source) or [])
    assert counted == pytest.approx(version.nbytes, rel=0.001)


def test_a_floor_takes_narrower_options_away(loader: ModelLoader) -> None:
    found = problem_of(loader, floors={"model.layers.0.*": "int4"}, compares=False)
    for item in found.items:
        assert (item.options[0].source == "int3") == (item.layer == 1)
    with raises(PlanError, repr("model.layers.7.*")):
        problem_of(loader, floors={"model.layers.7.*": "int4"}, compares=False)
    with raises(PlanError, repr("model.layers.{1,7}.*"), repr("7")):
        problem_of(loader, floors={"model.layers.{1,7}.*": "int4"}, compares=False)


def test_without_other_precisions_there_is_nothing_to_plan(loader: ModelLoader) -> None:
    with raises(PlanError):
        problem_of(loader, sources=["base"])
    with raises(PlanError, repr("int5")):
        problem_of(loader, sources=["int5"])


def test_sensitivities_tell_divergences_of_the_last_layer(
    sensitivities: Sensitivities, scale: Scale, problem: Problem
) -> None:
    """Its experts', behind which nothing is routed: to second order they are exact."""
    everything = problem.uniform("base")
    assert everything is not None
    for part, low, high in (("down", 0.6, 1.6), ("up", 0.6, 1.6)):
        choice = list(everything)
        expected = 0.0
        for row, item in enumerate(problem.items):
            if item.layer == 1 and item.part == part:
                choice[row] = item.index_of("int4") or 0
                expected += sensitivities.weights[item.name].options["int4"].divergence
        measured = scale.divergence("part", choice).value
        assert low < expected / measured < high, (part, expected, measured)


def test_wider_options_do_less(sensitivities: Sensitivities) -> None:
    for name, each in sensitivities.weights.items():
        options = each.options
        assert options["base"].divergence == options["base"].rounding_error == 0, name
        assert options["int8"].rounding_error < options["int4"].rounding_error < options["int3"].rounding_error, name
        if each.num_tokens:
            assert options["int8"].divergence < options["int3"].divergence, name


def test_measuring_goes_on_where_it_stopped(study: SensitivityStudy, sensitivities: Sensitivities) -> None:
    """And gives the same as in one go; a damaged file is measured again."""
    assert study.cost().num_weights == 0
    assert study.measure() == sensitivities
    first = study.folder / "layer-0000.json"
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    cost = study.cost()
    assert (cost.num_done, cost.num_layers) == (1, 2) and cost.seconds > 0 and cost.read_bytes > 0
    again = study.measure()
    assert first.read_bytes() == whole and again == sensitivities


def test_other_texts_are_other_sensitivities(
    loader: ModelLoader, problem: Problem, sample: Sample, study: SensitivityStudy
) -> None:
    part = Sample(sample.windows[:5], sample.unit)
    assert SensitivityStudy(loader, problem, part, study.folder.parent).folder != study.folder


def test_what_no_gradient_has_seen_is_not_free(problem: Problem, sensitivities: Sensitivities) -> None:
    """It is taken to be like the layer's others that all tokens reach."""
    name = "model.layers.1.self_attn.o_proj.weight"
    seen = sensitivities.weights[name]
    options = {source: dataclasses.replace(error, divergence=0.0) for source, error in seen.options.items()}
    unseen = dataclasses.replace(seen, num_tokens=0, options=options)
    found = losses(problem, dataclasses.replace(sensitivities, weights={**sensitivities.weights, name: unseen}), None)
    row = next(index for index, item in enumerate(problem.items) if item.name == name)
    assert found[row][0] > found[row][1] > found[row][2] > found[row][3] == 0
    assert 0.05 < found[row][0] / seen.options["int3"].divergence < 20


def test_losses_follow_the_use(problem: Problem, sensitivities: Sensitivities) -> None:
    own = use_of_texts(problem, sensitivities)
    cell = (1, 3)
    doubled = dataclasses.replace(own, mass={**own.mass, cell: 2 * own.mass[cell]})
    before, after = losses(problem, sensitivities, own), losses(problem, sensitivities, doubled)
    for row, item in enumerate(problem.items):
        expected = 2.0 if (item.layer, item.expert) == cell else 1.0
        assert after[row, 0] == pytest.approx(expected * before[row, 0])


def test_an_expert_that_no_token_reached_is_not_free(problem: Problem, sensitivities: Sensitivities) -> None:
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    options = {
        source: dataclasses.replace(option, divergence=0.0, output_error=0.0)
        for source, option in sensitivities.weights[name].options.items()
    }
    unseen = dataclasses.replace(sensitivities.weights[name], num_tokens=0, gate_mass=0.0, options=options)
    changed = dataclasses.replace(sensitivities, weights={**sensitivities.weights, name: unseen})
    row = next(row for row, item in enumerate(problem.items) if item.name == name)
    found = losses(problem, changed, use_of_texts(problem, changed))
    assert found[row, 0] > found[row, 1] > found[row, 2] > 0


def test_an_expert_with_small_gates_is_not_taken_to_matter_as_the_others_do(
    problem: Problem, sensitivities: Sensitivities
) -> None:
    """Where a token's divergence goes by the square of its gate, what is expected of an expert does too."""
    tokens = 1000

    def errors(of: WeightErrors, gate: float) -> WeightErrors:
        options = {
            source: dataclasses.replace(option, divergence=option.rounding_error * gate**2)
            for source, option in of.options.items()
        }
        return dataclasses.replace(of, num_tokens=tokens, gate_mass=gate * tokens, options=options)

    def loss(gate: float) -> float:
        gates = {item.name: gate if item.expert == 2 else 0.5 for item in problem.items if item.expert is not None}
        weights = {name: errors(sensitivities.weights[name], of_it) for name, of_it in gates.items()}
        changed = dataclasses.replace(sensitivities, weights={**sensitivities.weights, **weights})
        row = next(row for row, item in enumerate(problem.items) if item.expert == 2)
        return float(losses(problem, changed, use_of_texts(problem, changed))[row, 0])

    assert loss(0.05) == pytest.approx(0.01 * loss(0.5), rel=0.05)


def test_use_of_another_model_or_of_nothing_is_refused(loader: ModelLoader) -> None:
    def saved(experts: int, tokens: int) -> SavedSet:
        counts = np.zeros((2, 2, experts), np.int64)
        counts[0, :, 0] = tokens * 4
        tally = Tally(counts, counts.astype(float) / 4, np.array([tokens, 0]), np.array(1))
        return SavedSet("demo", (0, 1), experts, 4, 0.0, 1.0, tally, np.zeros((2, experts)))

    with raises(ConfigError, "8", "16"):
        use_of_set(saved(8, 1000), loader.spec, "the set")
    with raises(ConfigError, "12"):
        use_of_set(saved(16, 12), loader.spec, "the set")
    found = use_of_set(saved(16, 1000), loader.spec, "the set")
    assert found.activations[1, 0] > 3.9 > 0.01 > found.activations[1, 7] > 0 and found.unevenness > 1
    even = dataclasses.replace(found, mass=dict.fromkeys(found.mass, 0.25))
    assert even.unevenness == 0 and "even" in even.remark()


def test_rivals_keep_the_budget(problem: Problem, sensitivities: Sensitivities) -> None:
    cost = costs(problem, "stored")
    budget = 4.5 * problem.num_weights / 8
    found = uniforms(problem, cost, budget)
    assert set(found) == {"int3", "int4"}
    hands = dict(hand_recipes(problem, cost, budget))
    assert hands, "down in int4, gate and up in int3"
    for choice in (
        *found.values(),
        *hands.values(),
        usage_only(problem, cost, budget, use_of_texts(problem, sensitivities)),
        random_plan(problem, cost, budget, 3),
    ):
        assert cost_of(choice, cost) <= budget * (1 + 1e-9)
    for choice in hands.values():
        sources = {item.part: item.options[index].source for item, index in zip(problem.items, choice, strict=True)}
        assert sources["gate"] == sources["up"] == "int3" and sources["down"] in ("int4", "int8")


def test_a_plan_is_judged_by_what_it_does(planner: Planner, problem: Problem) -> None:
    found = planner.plan(parse_budget("4.5bpw"))
    choice = [int(index) for index in found.solution.choice]
    assert problem.bits_per_weight(choice) <= 4.5
    kinds = {rival.kind: rival for rival in found.verdict.rivals}
    assert {UNIFORM, HAND} <= kinds.keys()
    wins = all(kinds[kind].difference.is_below_zero for kind in (UNIFORM, HAND))
    assert found.verdict.is_accepted == wins
    if not wins:
        assert found.verdict.choice in {kinds[UNIFORM].choice, kinds[HAND].choice}
    assert planner.held_out.divergence("plan", choice).value < kinds[UNIFORM].divergence.value


def test_a_plan_that_is_no_better_is_not_returned(
    planner: Planner, scale: Scale, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose sensitivities are upside down."""
    upside_down = planner.losses.max() * 2 - np.where(np.isfinite(planner.losses), planner.losses, -np.inf)
    monkeypatch.setattr(Planner, "losses", upside_down)
    found = planner.plan(parse_budget("4.5bpw"))
    assert not found.verdict.is_accepted and found.verdict.chosen != "plan"
    assert found.verdict.divergence.value < scale.divergence("plan", list(found.solution.choice)).value


def test_a_plan_without_rivals_that_decide_is_the_one_there_is(planner: Planner, scale: Scale) -> None:
    choice = [int(index) for index in planner.plan(parse_budget("4.5bpw")).solution.choice]
    verdict = judge(scale, choice, {UNIFORM: {}, HAND: {}, RANDOM: {"random": choice}})
    assert verdict.is_accepted and verdict.choice == tuple(choice)
    assert deciding_of(verdict.rivals) == [] and [rival.kind for rival in verdict.rivals] == [RANDOM]


def test_budgets_of_bytes_count_everything(planner: Planner, problem: Problem) -> None:
    larger = dataclasses.replace(planner, other_bytes=1_000_000)
    budget = parse_budget("9MB")
    left = [each.costs(budget).budget for each in (planner, larger)]
    assert left == [9e6 - problem.fixed_memory, 8e6 - problem.fixed_memory]
    with raises(PlanError, "1,000,000"):
        larger.costs(parse_budget("4MB"))
    with raises(PlanError):
        planner.plan(parse_budget("2.5bpw"))


def test_checks_scale_groups_to_what_was_measured(planner: Planner, problem: Problem, scale: Scale) -> None:
    cost = planner.costs(parse_budget("4.5bpw"))
    choice = [int(index) for index in solve(planner.losses, cost.values, cost.budget).choice]
    found, checks = corrected(problem, planner.losses, scale, choice, max_groups=7)
    assert [check.part for check in checks][:4] == ["attention q", "attention k", "attention v", "attention o"]
    assert all(check.factor > 0 for check in checks)
    for check in checks:
        rows = [row for row, item in enumerate(problem.items) if f"{item.role} {item.part}" == check.part]
        assert found[rows] == pytest.approx(planner.losses[rows] * check.factor)


def test_the_text_has_to_be_long_enough(problem: Problem, base: Contestant, sample: Sample) -> None:
    few = Sample(sample.windows[:4], sample.unit)
    with raises(ConfigError, "4"):
        Scale(problem, Reference(base, few))


def test_the_configuration_means_the_choice(
    loader: ModelLoader, problem: Problem, planner: Planner, tmp_path: Path, small: Path
) -> None:
    found = planner.plan(parse_budget("4.2bpw"))
    choice = [int(index) for index in found.solution.choice]
    rules = rules_of(loader, problem, choice)
    assert len(rules) < len(problem.mapping(choice))
    chosen = loader.choose(build_rules(rules))
    wanted = problem.mapping(choice)
    assert all(chosen[name].source == wanted.get(name, "base") for name in loader.names)
    model = {
        "base_path": str(small / "base"),
        "mixed_precision": {"sources": {name: str(small / name) for name in SOURCES}},
    }
    settings = build_settings({"model": model})
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"model": model, "server": {"port": 9000}}))
    out = tmp_path / "plan.yaml"
    write_config(out, settings, rules, ["why"], own)
    data = yaml.safe_load(out.read_text())
    assert data["server"] == {"port": "9000"} and data["model"]["mixed_precision"]["weight_mapping"] == rules
    assert out.read_text().startswith("# why\n")
    with raises(ConfigError, out):
        write_config(out, settings, rules, [], own)


def test_scores_need_no_texts(loader: ModelLoader, problem: Problem, sensitivities: Sensitivities) -> None:
    found = scores(loader, problem)
    ranks = found.ranks(sensitivities)
    assert set(ranks) == {"rounding", "kurtosis", "spectrum"} and all(-1 <= rank <= 1 for rank in ranks.values())
    assert json.dumps(ranks)

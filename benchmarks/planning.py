"""Plans for the demo model against the plans that others would make, by seeds and budgets.

    python benchmarks/planning.py [--model FOLDER] [--budgets 3.5bpw 4.5bpw 6bpw] [--seeds 5] [--work FOLDER]
        [--calibration FILE …] [--heldout FILE …] [--tokens 16000] [--heldout-tokens 12000]
        [--group-size 128] [--unchecked] [--frontier OUT.html]

Sources in int2, int3, int4 and int8, with several groups and zero points, are made in the work folder by rounding. A
seed draws the documents that sensitivities are measured on, and the labels of the gradients. The held-out texts are
never calibrated with; by default they are this project's own English, Chinese and Python, which no model has seen.
Activations are float32, so that weights alone count. Prints a table of each seed and budget, one over the seeds (means,
with a 95% interval by Student's t), and one JSON object as the last line.

What a seed and budget gave is kept in the work folder at once; the same command goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from amalgam.composition.loader import ModelLoader
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.evaluation.confidence import Interval
from amalgam.evaluation.quality import Reference, by_domain
from amalgam.evaluation.running import Contestant, open_contestant
from amalgam.evaluation.texts import Document, Sample, read_texts, sample_of
from amalgam.formats.grid import QuantizeOptions
from amalgam.planning.budget import parse_budget
from amalgam.planning.drawing import frontier_html
from amalgam.planning.planner import Planner
from amalgam.planning.problem import Problem, problem_of
from amalgam.planning.proof import Scale
from amalgam.planning.sensitivity import SensitivityStudy
from amalgam.planning.use import use_of_texts
from amalgam.text.tokenizer import Tokenizer
from amalgam.tools.bench import commit, hardware

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
WINDOW = 128
# 97.5% quantiles of Student's t for 1, 2, … degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def sources(group_size: int) -> dict[str, tuple[str, QuantizeOptions]]:
    """Name → format and options: group sizes and zero points are formats too."""
    fine, fine_with_zeros, coarse = QuantizeOptions(32), QuantizeOptions(32, has_zero_points=True), group_size
    return {
        "int2-g32z": ("int2", fine_with_zeros),
        f"int3-g{coarse}": ("int3", QuantizeOptions(coarse)),
        "int3-g32": ("int3", fine),
        "int3-g32z": ("int3", fine_with_zeros),
        f"int4-g{coarse}": ("int4", QuantizeOptions(coarse)),
        "int4-g32": ("int4", fine),
        "int4-g32z": ("int4", fine_with_zeros),
        f"int8-g{coarse}": ("int8", QuantizeOptions(coarse)),
    }


def heldout_documents(files: list[str]) -> list[Document]:
    if files:
        return read_texts(files)
    found = [Document("english", path.read_text("utf-8")) for path in sorted((ROOT / "docs").rglob("*.md"))]
    found += [Document("python", path.read_text("utf-8")) for path in sorted((ROOT / "src/amalgam").rglob("*.py"))]
    chinese = (ROOT / "README.zh-CN.md").read_text("utf-8")
    return [*found, Document("chinese", chinese)]


def open_model(model: str, work: Path, group_size: int) -> tuple[ModelLoader, Contestant, Tokenizer]:
    paths = {}
    for name, (weight_format, options) in sources(group_size).items():
        folder = work / name
        if not folder.exists():
            quantize_checkpoint(model, folder, weight_format, options, carries_others=False)
        paths[name] = str(folder)
    settings = ModelSettings(base_path=model, mixed_precision=MixedPrecisionSettings(sources=paths))
    loader = ModelLoader(settings, InferenceSettings(dtype="float32"), CPU, threads=2)
    base = open_contestant("base", loader, loader.plan(()), torch.float32, WINDOW)
    return loader, base, Tokenizer.load(loader.base_folder, loader.base_metadata)


def planner_of(
    loader: ModelLoader, base: Contestant, problem: Problem, calibration: Sample, held_out: Scale, work: Path, seed: int
) -> Planner:
    study = SensitivityStudy(loader, problem, calibration, work / "sensitivities", seed=seed)
    started = time.monotonic()
    cost = study.cost()
    sensitivities = study.measure()
    print(
        f"seed {seed}: {cost.num_options} options measured on {cost.num_tokens} tokens in "
        f"{time.monotonic() - started:.0f} s (expected {cost.seconds:.0f} s)",
        flush=True,
    )
    checked = Scale(problem, Reference(base, calibration))
    return Planner(problem, sensitivities, use_of_texts(problem, sensitivities), held_out, checked)


class Kept:
    """Rows by their keys, in a file with one a line."""

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text("utf-8").splitlines() if file.exists() else []
        self._rows: dict[str, dict[str, Any]] = {json.dumps(key): row for key, row in map(json.loads, lines)}

    def __contains__(self, key: Sequence[Any]) -> bool:
        return json.dumps(key) in self._rows

    def __getitem__(self, key: Sequence[Any]) -> dict[str, Any]:
        return self._rows[json.dumps(key)]

    def add(self, key: Sequence[Any], row: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([key, row]) + "\n")
        self._rows[json.dumps(key)] = row


def row_of(planner: Planner, seed: int, text: str) -> dict[str, Any]:
    """Plan for a budget, measured on the held-out texts beside its rivals."""
    problem, held_out = planner.problem, planner.held_out
    found = planner.plan(parse_budget(text))
    choice = [int(index) for index in found.solution.choice]
    return {
        "seed": seed,
        "budget": text,
        "bits": problem.bits_per_weight(choice),
        "gap": found.solution.gap,
        "plan": asdict(held_out.divergence("plan", choice)),
        "domains": divergences(held_out, choice),
        "accepted": found.verdict.is_accepted,
        "returned": found.verdict.chosen,
        "rivals": {
            rival.kind: {
                "name": rival.name,
                "bits": problem.bits_per_weight(rival.choice),
                **asdict(rival.divergence),
                "domains": divergences(held_out, rival.choice),
                "plan_to_it": asdict(rival.difference),
            }
            for rival in found.verdict.rivals
        },
    }


def divergences(held_out: Scale, choice: Sequence[int]) -> dict[str, float]:
    """Domain → the mean divergence in its texts."""
    found = by_domain(held_out.figures("", choice), held_out.reference.sample)
    return {name: each.divergence.value for name, each in found.items() if each.divergence is not None}


def show(row: dict[str, Any]) -> None:
    print(f"\nseed {row['seed']}, {row['budget']}: {'accepted' if row['accepted'] else row['returned']}")
    print(f"  {'plan':46}{row['bits']:6.3f}  {shown(interval(row['plan'])):34} gap {row['gap']:.1e}")
    for kind, rival in row["rivals"].items():
        label = kind if rival["name"] == kind else f"{kind}: {rival['name']}"
        difference = shown(interval(rival["plan_to_it"]), "{:+.1%}")
        print(f"  {label[:45]:46}{rival['bits']:6.3f}  {shown(interval(rival)):34} plan {difference}", flush=True)


def show_over_seeds(rows: Iterable[dict[str, Any]], budgets: Sequence[str]) -> None:
    """Means over the seeds, and of what the plan is to each rival."""
    for budget in budgets:
        of_budget = [row for row in rows if row["budget"] == budget]
        accepted = sum(row["accepted"] for row in of_budget)
        print(f"\n{budget}, {len(of_budget)} seeds, {accepted} accepted")
        print(f"  {'plan':20}{shown(over_seeds([row['plan']['value'] for row in of_budget]))}")
        for kind in dict.fromkeys(kind for row in of_budget for kind in row["rivals"]):
            rivals = [row["rivals"][kind] for row in of_budget if kind in row["rivals"]]
            divergence = over_seeds([rival["value"] for rival in rivals])
            difference = over_seeds([rival["plan_to_it"]["value"] for rival in rivals])
            print(f"  {kind:20}{shown(divergence):34} plan {shown(difference, '{:+.1%}')}")


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean, with a 95% interval by Student's t."""
    mean = statistics.fmean(values)
    if not 2 <= len(values) <= len(STUDENT) + 1:
        return Interval(mean)
    reach = STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - reach, mean + reach)


def interval(fields: dict[str, Any]) -> Interval:
    return Interval(fields["value"], fields["low"], fields["high"])


def shown(value: Interval, form: str = "{:.5f}") -> str:
    if value.low is None or value.high is None:
        return form.format(value.value)
    return f"{form.format(value.value)} ({form.format(value.low)}–{form.format(value.high)})"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "demo"))
    parser.add_argument("--budgets", nargs="+", default=["3.5bpw", "4.5bpw", "6bpw"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "models" / "planning")
    parser.add_argument("--group-size", type=int, default=128, help="of the sources with coarse groups")
    parser.add_argument("--calibration", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--heldout", nargs="*", default=[], metavar="FILE")
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--heldout-tokens", type=int, default=12_000)
    parser.add_argument("--unchecked", action="store_true", help="take sensitivities as they are")
    parser.add_argument("--frontier", type=Path, help="draw it for the first seed")
    options = parser.parse_args()
    torch.manual_seed(0)
    loader, base, tokenizer = open_model(options.model, options.work, options.group_size)
    problem = problem_of(loader, compares=False)  # base's own roundings
    print("sources:", ", ".join(f"{name} {problem.bits_of(name):.3f}" for name in problem.sources))
    documents = heldout_documents(options.heldout)
    held_out_sample = sample_of(documents, tokenizer, window=WINDOW, max_tokens=options.heldout_tokens)
    held_out = Scale(problem, Reference(base, held_out_sample))
    print(f"held out: {held_out_sample.num_tokens} tokens, {held_out_sample.num_units} {held_out_sample.unit}")
    kept = Kept(options.work / "results.jsonl")
    results: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        texts = read_texts(options.calibration)
        calibration = sample_of(texts, tokenizer, window=WINDOW, max_tokens=options.tokens, seed=seed)
        keys = {
            text: [problem.sources, calibration.digest, held_out_sample.digest, options.unchecked, seed, text]
            for text in options.budgets
        }
        draws = options.frontier is not None and seed == options.first_seed
        if draws or any(key not in kept for key in keys.values()):
            planner = planner_of(loader, base, problem, calibration, held_out, options.work, seed)
            if options.unchecked:
                planner.calibration = None
            print(planner.use.remark())
            for text, key in keys.items():
                if key not in kept:
                    kept.add(key, row_of(planner, seed, text))
        for key in keys.values():
            show(kept[key])
            results.append(kept[key])
        if draws:
            low, high = (8 * value / problem.num_weights for value in planner.range_of("stored"))
            steps = [low + 0.1 + (min(high, 8.2) - low) * step / 7 for step in range(8)]
            points = planner.frontier([parse_budget(f"{bits:.3f}bpw") for bits in steps])
            options.frontier.write_text(frontier_html(points, Path(options.model).name, "held-out texts"), "utf-8")
    show_over_seeds(results, options.budgets)
    document = {"command": sys.argv, "commit": commit(), "hardware": hardware(), "results": results}
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Plans for the demo model against the plans that others would make, by seeds and budgets.

    python benchmarks/planning.py [--model FOLDER] [--budgets 3.5bpw 4.5bpw 6bpw] [--seeds 5] [--work FOLDER]
        [--calibration FILE …] [--heldout FILE …] [--tokens 16000] [--heldout-tokens 12000] [--frontier OUT.html]

Sources in int2, int3, int4 and int8, with several groups and zero points, are made in the work folder by rounding. A
seed draws the documents that sensitivities are measured on, and the labels of the gradients. The held-out texts are
never calibrated with; by default they are this project's own English, Chinese and Python, which no model has seen.
Activations are float32, so that weights alone count. Prints a table, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from amalgam.composition.loader import ModelLoader
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.settings import InferenceSettings, MixedPrecisionSettings, ModelSettings
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
# Name → format and options: group sizes and zero points are formats too.
SOURCES = {
    "int2-g32z": ("int2", QuantizeOptions(32, has_zero_points=True)),
    "int3-g128": ("int3", QuantizeOptions(128)),
    "int3-g32": ("int3", QuantizeOptions(32)),
    "int3-g32z": ("int3", QuantizeOptions(32, has_zero_points=True)),
    "int4-g128": ("int4", QuantizeOptions(128)),
    "int4-g32": ("int4", QuantizeOptions(32)),
    "int4-g32z": ("int4", QuantizeOptions(32, has_zero_points=True)),
    "int8-g128": ("int8", QuantizeOptions(128)),
}


def heldout_documents(files: list[str]) -> list[Document]:
    if files:
        return read_texts(files)
    found = [Document("english", path.read_text("utf-8")) for path in sorted((ROOT / "docs").rglob("*.md"))]
    found += [Document("python", path.read_text("utf-8")) for path in sorted((ROOT / "src/amalgam").rglob("*.py"))]
    chinese = (ROOT / "README.zh-CN.md").read_text("utf-8")
    return [*found, Document("chinese", chinese)]


def open_model(model: str, work: Path) -> tuple[ModelLoader, Contestant, Tokenizer]:
    paths = {}
    for name, (weight_format, options) in SOURCES.items():
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
    parser.add_argument("--calibration", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--heldout", nargs="*", default=[], metavar="FILE")
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--heldout-tokens", type=int, default=12_000)
    parser.add_argument("--unchecked", action="store_true", help="take sensitivities as they are")
    parser.add_argument("--frontier", type=Path, help="draw it for the first seed")
    options = parser.parse_args()
    torch.manual_seed(0)
    loader, base, tokenizer = open_model(options.model, options.work)
    problem = problem_of(loader, compares=False)  # base's own roundings
    print("sources:", ", ".join(f"{name} {problem.bits_of(name):.3f}" for name in problem.sources))
    documents = heldout_documents(options.heldout)
    held_out_sample = sample_of(documents, tokenizer, window=WINDOW, max_tokens=options.heldout_tokens)
    held_out = Scale(problem, Reference(base, held_out_sample))
    print(f"held out: {held_out_sample.num_tokens} tokens, {held_out_sample.num_units} {held_out_sample.unit}")
    results: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        texts = read_texts(options.calibration)
        calibration = sample_of(texts, tokenizer, window=WINDOW, max_tokens=options.tokens, seed=seed)
        planner = planner_of(loader, base, problem, calibration, held_out, options.work, seed)
        if options.unchecked:
            planner.calibration = None
        print(planner.use.remark())
        for text in options.budgets:
            found = planner.plan(parse_budget(text))
            choice = [int(index) for index in found.solution.choice]
            own = held_out.divergence("plan", choice)
            bits = problem.bits_per_weight(choice)
            print(f"\nseed {seed}, {text}: {'accepted' if found.verdict.is_accepted else found.verdict.chosen}")
            print(f"  {'plan':46}{bits:6.3f}  {shown(own):34} gap {found.solution.gap:.1e}")
            row: dict[str, Any] = {"seed": seed, "budget": text, "bits": bits, "plan": asdict(own), "rivals": {}}
            row["domains"] = {
                name: value.divergence.value
                for name, value in by_domain(held_out.figures("plan", choice), held_out_sample).items()
                if value.divergence is not None
            }
            row["accepted"] = found.verdict.is_accepted
            for rival in found.verdict.rivals:
                label = f"{rival.kind}: {rival.name}" if rival.name != rival.kind else rival.kind
                size = problem.bits_per_weight(rival.choice)
                difference = shown(rival.difference, "{:+.1%}")
                print(f"  {label[:45]:46}{size:6.3f}  {shown(rival.divergence):34} plan {difference}", flush=True)
                row["rivals"][rival.kind] = {"name": rival.name, "bits": size, **asdict(rival.divergence)}
                row["rivals"][rival.kind]["plan_to_it"] = asdict(rival.difference)
            results.append(row)
        if options.frontier is not None and seed == options.first_seed:
            low, high = (8 * value / problem.num_weights for value in planner.range_of("stored"))
            steps = [low + 0.1 + (min(high, 8.2) - low) * step / 7 for step in range(8)]
            points = planner.frontier([parse_budget(f"{bits:.3f}bpw") for bits in steps])
            options.frontier.write_text(frontier_html(points, "demo", "held-out texts"), encoding="utf-8")
    document = {"command": sys.argv, "commit": commit(), "hardware": hardware(), "results": results}
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())

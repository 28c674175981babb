"""Plans that follow the traffic: the demo model while its traffic turns from verse to Python and back.

    python benchmarks/autoplan.py --verse FILE … --code FILE … [--model FOLDER] [--budget 4bpw] [--rounds 10]
        [--seconds 4] [--work FOLDER] [--out autoplan.html]

One deployment serves all the time, with sampled requests from a quarter of the texts; half of them are what
sensitivities are measured on, and the last quarter is what divergences are. `static` is the plan for verse, which it
starts with; `autoplan` is what is served; `oracle` is the plan for the phase's traffic from its first token on, which
nobody could know. Prints a table, draws the curves of divergence and size, and prints one JSON object as the last line.
Fails if the budget was exceeded or a request dropped.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from plotly.subplots import make_subplots

from amalgam.composition.loader import ModelLoader
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.placement import build_rules
from amalgam.config.settings import Settings, build_settings
from amalgam.engine.params import SamplingParams
from amalgam.evaluation.quality import Reference
from amalgam.evaluation.running import Contestant, open_contestant
from amalgam.evaluation.texts import Document, Sample, read_texts, sample_of
from amalgam.formats.grid import QuantizeOptions
from amalgam.planning.following import Limits, Proposer
from amalgam.planning.problem import problem_of
from amalgam.planning.sensitivity import Sensitivities, SensitivityStudy
from amalgam.planning.use import Use, use_of_tally
from amalgam.planning.writing import rules_of
from amalgam.runtime.deployment import Deployment
from amalgam.runtime.opening import open_deployment
from amalgam.text.tokenizer import Tokenizer
from amalgam.tools.bench import commit, hardware

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 128
SOURCES = {
    "int3": ("int3", QuantizeOptions(32)),
    "int4": ("int4", QuantizeOptions(32)),
    "int8": ("int8", QuantizeOptions(128)),
}
PHASES = ("verse", "code", "verse")
COLOURS = {"static": "#E69F00", "autoplan": "#0072B2", "oracle": "#009E73"}


@dataclass(frozen=True)
class Row:
    """After one round.

    Attributes:
        divergence, bits: by the way of planning.
    """

    seconds: float
    phase: str
    divergence: dict[str, float]
    bits: dict[str, float]
    version: int
    requests: int


class Kind:
    """Texts of one kind: for sensitivities, for traffic, and to measure on."""

    def __init__(self, name: str, files: Sequence[str], tokenizer: Tokenizer) -> None:
        texts = [document.text for document in read_texts(list(files))]
        texts = [text[place : place + 1200] for text in texts for place in range(0, len(text), 1200)]
        self.calibration = [Document(name, text) for text in texts[::2]]
        self.prompts = [tokenizer.encode(text)[:96] for text in texts[1::4]]
        held_out = [Document(name, text) for text in texts[3::4]]
        self.held_out = sample_of(held_out, tokenizer, window=WINDOW, max_tokens=2000)


class Traffic:
    """Requests of one kind after another, four at a time, until it is stopped."""

    def __init__(self, deployment: Deployment) -> None:
        self.num_requests = 0
        self.errors: list[Exception] = []
        self.kind: Kind | None = None
        self._deployment = deployment
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run_and_tell)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run_and_tell(self) -> None:
        try:
            self._run()
        except Exception as error:  # without traffic, curves mean nothing
            self.errors.append(error)

    def _run(self) -> None:
        while not self._stopping.is_set():
            if self.kind is None:
                time.sleep(0.01)
                continue
            prompts = self.kind.prompts
            some = [prompts[(self.num_requests + place) % len(prompts)] for place in range(4)]
            params = [
                SamplingParams(max_new_tokens=32, temperature=1.0, seed=self.num_requests + place) for place in range(4)
            ]
            answers = self._deployment.engine.generate(some, params)
            self.errors += [answer.error for answer in answers if answer.error is not None]
            self.num_requests += len(answers)


class Scales:
    """Divergences of plans from base, each plan on each kind once."""

    def __init__(self, loader: ModelLoader, base: Contestant, samples: dict[str, Sample]) -> None:
        self._loader = loader
        self._base = base
        self._references = {name: Reference(base, sample) for name, sample in samples.items()}
        self._found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def divergence(self, rules: dict[str, str], kind: str) -> float:
        key = kind, tuple(sorted(rules.items()))
        if key not in self._found:
            plan = self._base.with_plan("plan", self._loader.plan(build_rules(rules)))
            self._found[key] = float(self._references[kind].figures(plan).divergence.mean())
        return self._found[key]


def sources_in(model: str, work: Path) -> dict[str, str]:
    for name, (weight_format, options) in SOURCES.items():
        if not (work / name).exists():
            quantize_checkpoint(model, work / name, weight_format, options, carries_others=False)
    return {name: str(work / name) for name in SOURCES}


def settings_of(
    model: str, sources: dict[str, str], rules: dict[str, str], kept: Path, options: argparse.Namespace
) -> Settings:
    autoplan = {
        "enabled": True, "sensitivities": str(kept), "budget": options.budget, "interval_seconds": options.seconds / 2,
        "short_minutes": 3 * options.seconds / 60, "long_minutes": 30 * options.seconds / 60, "min_tokens": 512,
        "sampled_share": 0.5, "sampled_tokens": 2048, "max_share": 1.0, "max_swaps_per_hour": 8, "min_gain": 0.05,
    }  # fmt: skip
    return build_settings(
        {
            "model": {"base_path": model, "mixed_precision": {"sources": sources, "weight_mapping": rules}},
            "inference": {"max_seq_length": 256, "max_batch_size": 8},
            "statistics": {"bucket_seconds": min(1.0, options.seconds / 4)},
            "planning": {"autoplan": autoplan},
        }
    )


def measured(
    loader: ModelLoader, kinds: dict[str, Kind], tokenizer: Tokenizer, work: Path
) -> tuple[Sensitivities, Path]:
    documents = [document for kind in kinds.values() for document in kind.calibration]
    sample = sample_of(documents, tokenizer, window=WINDOW, max_tokens=3000)
    study = SensitivityStudy(loader, problem_of(loader, compares=False), sample, work / "sensitivities")
    print(f"sensitivities on {sample.num_tokens} tokens: about {study.cost().seconds:.0f} s", flush=True)
    return study.measure(), study.folder


def use_of(model: str, kind: Kind) -> Use:
    """What traffic of one kind uses: counted by a deployment of its own."""
    settings = build_settings({"model": {"base_path": model}, "inference": {"max_seq_length": 256}})
    deployment = open_deployment(settings)
    try:
        assert deployment.statistics is not None
        deployment.engine.generate(kind.prompts[:64], SamplingParams(max_new_tokens=32, temperature=1.0, seed=0))
        tracker = deployment.statistics.tracker
        return use_of_tally(tracker.snapshot().tally, tracker.layer_ids, "the phase")
    finally:
        deployment.close()


def draw(rows: Sequence[Row], budget_bits: float, out: Path) -> None:
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.65, 0.35])
    x = [row.seconds for row in rows]
    for name, colour in COLOURS.items():
        line = {
            "color": colour,
            "width": 3 if name == "autoplan" else 1.5,
            "dash": "dot" if name == "oracle" else "solid",
        }
        y = [row.divergence[name] for row in rows]
        figure.add_scatter(x=x, y=y, name=name, line=line, row=1, col=1)
        bits = [row.bits[name] for row in rows]
        figure.add_scatter(x=x, y=bits, name=name, line=line, showlegend=False, row=2, col=1)
    figure.add_hline(y=budget_bits, line_dash="dash", line_color="#666666", annotation_text="budget", row=2, col=1)
    for before, row in pairwise(rows):
        if row.phase != before.phase:
            figure.add_vline(x=(before.seconds + row.seconds) / 2, line_color="#999999", line_dash="dot")
    figure.update_yaxes(title_text="KL from base, nats a token", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="bits a weight", row=2, col=1)
    figure.update_xaxes(title_text="seconds of traffic", row=2, col=1)
    figure.update_layout(title=f"Traffic turns: {' → '.join(PHASES)}", template="plotly_white", width=1000, height=620)
    figure.write_html(out, include_plotlyjs=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "demo"))
    parser.add_argument("--verse", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--code", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--budget", default="4bpw")
    parser.add_argument("--rounds", type=int, default=10, help="of each phase")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round's traffic")
    parser.add_argument("--work", type=Path, default=ROOT / "models" / "planning")
    parser.add_argument("--out", type=Path, default=Path("autoplan.html"))
    options = parser.parse_args()
    torch.manual_seed(0)
    sources = sources_in(options.model, options.work)
    plain = build_settings({"model": {"base_path": options.model, "mixed_precision": {"sources": sources}}})
    loader = ModelLoader(plain.model, plain.inference, torch.device("cpu"), threads=2)
    tokenizer = Tokenizer.load(loader.base_folder, loader.base_metadata)
    kinds = {"verse": Kind("verse", options.verse, tokenizer), "code": Kind("code", options.code, tokenizer)}
    sensitivities, kept = measured(loader, kinds, tokenizer, options.work)
    problem = problem_of(loader)
    proposer = Proposer(problem, sensitivities)
    budget_bits = float(options.budget.removesuffix("bpw"))
    limits = Limits("stored", budget_bits * problem.num_weights / 8, 2**62, 0, 0, 0, 0)
    narrowest = [0] * len(problem.items)
    plans = {
        name: rules_of(loader, problem, proposer.propose(use_of(options.model, kind), narrowest, limits).choice)
        for name, kind in kinds.items()
    }
    base = open_contestant("base", loader, loader.plan(()), torch.bfloat16, WINDOW)
    scales = Scales(loader, base, {name: kind.held_out for name, kind in kinds.items()})
    for rules in plans.values():  # beforehand, so that traffic need not wait
        for name in kinds:
            scales.divergence(rules, name)
    deployment = open_deployment(settings_of(options.model, sources, plans["verse"], kept, options))
    autoplan = deployment.autoplan
    assert autoplan is not None
    traffic, rows, started = Traffic(deployment), [], time.monotonic()
    try:
        for phase in PHASES:
            for _ in range(options.rounds):
                traffic.kind = kinds[phase]
                time.sleep(options.seconds)
                spent = time.monotonic() - started
                ways = {
                    "static": plans["verse"],
                    "autoplan": {rule.pattern: rule.source for rule in deployment.rules},
                    "oracle": plans[phase],
                }
                rows.append(
                    Row(
                        spent,
                        phase,
                        {name: scales.divergence(rules, phase) for name, rules in ways.items()},
                        {name: bits_of(loader, proposer, rules) for name, rules in ways.items()},
                        deployment.version_id,
                        traffic.num_requests,
                    )
                )
                values = "  ".join(f"{name} {value:.5f}" for name, value in rows[-1].divergence.items())
                print(
                    f"{spent:6.0f} s  {phase:6} v{rows[-1].version:<3} {values}  {rows[-1].bits['autoplan']:.3f} bits",
                    flush=True,
                )
    finally:
        traffic.stop()
        told = autoplan.describe()
        deployment.close()
    draw(rows, budget_bits, options.out)
    for decision in told["decisions"]:
        print(f"{decision['outcome']:20} {decision['reason']}")
    means = {name: sum(row.divergence[name] for row in rows) / len(rows) for name in COLOURS}
    widest = max(bits for row in rows for bits in row.bits.values())
    swaps = sum(decision["outcome"] == "committed" for decision in told["decisions"])
    print(
        f"\nmean KL: {', '.join(f'{name} {value:.5f}' for name, value in means.items())}; at most {widest:.3f} bits of "
        f"{budget_bits}; {swaps} swaps; {traffic.num_requests} requests, {len(traffic.errors)} dropped; {options.out}"
    )
    for error in traffic.errors[:3]:
        print(f"dropped: {error!r}", file=sys.stderr)
    print(
        json.dumps(
            {
                "command": " ".join(sys.argv),
                "commit": commit(),
                "hardware": hardware(),
                "mean": means,
                "swaps": swaps,
                "requests": traffic.num_requests,
                "dropped": len(traffic.errors),
                "widest_bits": widest,
                "rows": [asdict(row) for row in rows],
                "decisions": told["decisions"],
                "points": told["points"],
            }
        )
    )
    return int(bool(traffic.errors) or widest > budget_bits)


def bits_of(loader: ModelLoader, proposer: Proposer, rules: dict[str, str]) -> float:
    """Of the weights that have a choice, as stored."""
    choices, problem = loader.choose(build_rules(rules)), proposer.problem
    choice = []
    for item in problem.items:
        index = item.index_of(choices[item.name].source)
        if index is None:
            raise ValueError(f"{item.name} comes from {choices[item.name].source!r}, which is none of its options.")
        choice.append(index)
    return problem.bits_per_weight(choice)


if __name__ == "__main__":
    sys.exit(main())

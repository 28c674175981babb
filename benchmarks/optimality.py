"""How near to the best possible plan the planner's is, where all plans can be tried: 3^8 = 6,561 maps of one layer.

    python benchmarks/optimality.py [--model FOLDER] [--work FOLDER] [--text FILE …] [--tokens 1024] [--draws 64]
        [--experts 8]

Eight experts of the last layer in int3, int4 or int8 each, the rest in bf16. What an expert adds to a token is computed
once for each format. A token's divergence depends on the experts that it was sent to alone, so it is that of the head
over the sums of what those add, exactly, once for each of their 3^k combinations; a map's is the mean over the tokens.
The text is the sensitivities' own, so that the choice is judged and not the sample. Prints a row for each budget, and
one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amalgam.calibration.inputs import Inputs
from amalgam.calibration.stream import Stream
from amalgam.composition.loader import ModelLoader
from amalgam.composition.quantize import quantize_checkpoint
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import MixedPrecisionSettings, ModelSettings
from amalgam.config.placement import build_rules
from amalgam.evaluation.quality import Reference, divergence_of
from amalgam.evaluation.running import open_contestant
from amalgam.evaluation.texts import Document, read_texts, sample_of
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.kernels.weights import PackedWeight
from amalgam.planning.knapsack import solve
from amalgam.planning.losses import costs, losses
from amalgam.planning.problem import problem_of
from amalgam.planning.sensitivity import SensitivityStudy
from amalgam.planning.use import use_of_texts
from amalgam.text.tokenizer import Tokenizer
from amalgam.tools.bench import commit, hardware

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
FORMATS = {"int3": QuantizeOptions(32), "int4": QuantizeOptions(32), "int8": QuantizeOptions(128)}
WINDOW = 32
BUDGETS = (0.2, 0.4, 0.6, 0.8)  # of the way from the smallest map to the largest
_ROWS = 256
Divergence = Callable[[Tensor, Tensor], float]


class LastLayer:
    """The last layer's result, `[tokens, hidden]`, with any weights."""

    def __init__(self, loader: ModelLoader, token_ids: list[list[int]]) -> None:
        self._backend = ReferenceBackend(torch.float32, CPU)
        self._base = {weight.slot.name: weight for weight in loader.plan(())}
        spec = loader.spec
        self.stream = Stream(spec, token_ids, self.load(""))
        self._last = spec.num_layers - 1
        for layer in range(self._last):
            self.stream.run(layer, self.load(f"layers.{layer}."))
        self._before = list(self.stream.hidden)

    def load(self, prefix: str) -> dict[str, PackedWeight]:
        slots = (name for name in self._base if (name.startswith(prefix) if prefix else "layers." not in name))
        return {name: self._base[name].load(self._backend) for name in slots}

    def result(self, changed: dict[str, PackedWeight]) -> Tensor:
        def see(inputs: Inputs) -> dict[str, PackedWeight]:
            return {slot: changed[slot] for slot in inputs.slots if slot in changed}

        self.stream.hidden = list(self._before)
        self.stream.run(self._last, self.load(f"layers.{self._last}."), see)
        return torch.cat(self.stream.hidden)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "demo"))
    parser.add_argument("--work", type=Path, default=ROOT / "models" / "optimality")
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--experts", type=int, default=8, help="how many have a choice: 3^N maps")
    options = parser.parse_args()
    paths = {}
    for name, how in FORMATS.items():
        if not (options.work / name).exists():
            quantize_checkpoint(options.model, options.work / name, name, how, carries_others=False)
        paths[name] = str(options.work / name)
    settings = ModelSettings(base_path=options.model, mixed_precision=MixedPrecisionSettings(sources=paths))
    loader = ModelLoader(settings, InferenceSettings(dtype="float32"), CPU, threads=1)
    tokenizer = Tokenizer.load(loader.base_folder, loader.base_metadata)
    documents = (
        read_texts(options.text) if options.text else [Document("docs", (ROOT / "README.md").read_text("utf-8"))]
    )
    sample = sample_of(documents, tokenizer, window=WINDOW, max_tokens=options.tokens)

    last = loader.spec.num_layers - 1
    whole = problem_of(loader, sources=list(FORMATS), compares=False)
    whole = replace(whole, items=tuple(item for item in whole.items if item.layer == last))
    study = SensitivityStudy(loader, whole, sample, options.work / "sensitivities", draws=options.draws)
    sensitivities = study.measure()
    loss, cost = losses(whole, sensitivities, use_of_texts(whole, sensitivities)), costs(whole, "stored")
    used = sorted(
        {item.expert for item in whole.items if item.layer == last and item.expert is not None},
        key=lambda expert: -sensitivities.weights[name_of(last, expert)].num_tokens,
    )[: options.experts]
    rows = {expert: [r for r, i in enumerate(whole.items) if (i.layer, i.expert) == (last, expert)] for expert in used}
    names = [option.source for option in whole.items[rows[used[0]][0]].options]
    expected = np.array([loss[rows[expert]][:, : len(names)].sum(axis=0) for expert in used])
    sizes = np.array([cost[rows[expert]][:, : len(names)].sum(axis=0) for expert in used])

    layer = LastLayer(loader, [list(window.token_ids) for window in sample.windows])
    base = layer.result({})
    backend = ReferenceBackend(torch.float32, CPU)
    added = torch.zeros(len(used), len(names), *base.shape)
    for row, expert in enumerate(used):
        for column, source in enumerate(names):
            slots = {whole.items[r].slot: loader.candidate(whole.items[r].name, source) for r in rows[expert]}
            added[row, column] = layer.result({slot: w.load(backend) for slot, w in slots.items() if w}) - base
    maps = list(itertools.product(range(len(names)), repeat=len(used)))
    measured = dict(zip(maps, divergences(head_of(layer, loader, base), base, added, maps), strict=True))

    print(f"{len(measured):,} maps of {len(base)} tokens", flush=True)
    results: list[dict[str, Any]] = []
    totals = {choice: float(sizes[np.arange(len(used)), list(choice)].sum()) for choice in measured}
    print(f"{'budget':>8}{'maps':>8}{'best KL':>12}{'chosen KL':>12}{'above':>9}{'uniform':>10}")
    for share in BUDGETS:
        budget = min(totals.values()) + share * (max(totals.values()) - min(totals.values()))
        within = {choice: kl for choice, kl in measured.items() if totals[choice] <= budget}
        best = min(within.values())
        chosen = measured[tuple(int(index) for index in solve(expected, sizes, budget).choice)]
        even = min(kl for choice, kl in within.items() if len(set(choice)) == 1)
        results.append({"budget": budget, "maps": len(within), "best": best, "chosen": chosen, "uniform": even})
        print(
            f"{share:>8.0%}{len(within):>8}{best:>12.6f}{chosen:>12.6f}{chosen / best - 1:>+9.2%}{even:>10.6f}",
            flush=True,
        )
    # The same through the engine's own path, for one map.
    contestant = open_contestant("base", loader, loader.plan(()), torch.float32, WINDOW)
    map_ = tuple(number % len(names) for number in range(len(used)))
    rules = {whole.items[r].name: names[map_[n]] for n, expert in enumerate(used) for r in rows[expert]}
    figures = Reference(contestant, sample).figures(contestant.with_plan("map", loader.plan(build_rules(rules))))
    print(
        f"one of the maps: {measured[map_]:.6f}, by the engine {figures.divergence.mean():.6f}, which leaves each "
        "text's last token out"
    )
    print(json.dumps({"command": sys.argv, "commit": commit(), "hardware": hardware(), "results": results}))
    return 0


def divergences(of: Divergence, base: Tensor, added: Tensor, maps: Sequence[tuple[int, ...]]) -> list[float]:
    """The mean divergence of each map.

    Args:
        base: `[tokens, hidden]`.
        added: `[experts, formats, tokens, hidden]`.
        maps: the format of each expert.
    """
    choices = np.array(maps)
    is_sent = added.abs().amax(dim=(1, 3)).T > 0  # [tokens, experts]
    totals = np.zeros(len(maps))
    for experts, tokens in groups_of(is_sent):
        sums = np.zeros((added.shape[1],) * len(experts))
        for formats in np.ndindex(sums.shape):
            change = sum(added[e, f, tokens] for e, f in zip(experts, formats, strict=True))
            sums[formats] = of(base[tokens] + change, tokens)
        totals += sums[tuple(choices[:, e] for e in experts)]
    return [float(total) for total in totals / len(base)]


def groups_of(is_sent: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """Experts, and the tokens that were sent to just these."""
    sets, of_token = is_sent.unique(dim=0, return_inverse=True)
    for number, which in enumerate(sets):
        yield [int(e) for e in which.nonzero().flatten()], (of_token == number).nonzero().flatten()


def name_of(layer: int, expert: int) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"


def head_of(layer: LastLayer, loader: ModelLoader, base: Tensor) -> Divergence:
    """Hidden states behind the last layer of some tokens → the sum of their divergences from base's."""
    outside = layer.load("")
    head = outside["embedding" if loader.spec.has_tied_head else "head"].dequantize(torch.float32)
    norm, eps = outside["norm"].dense.float(), 1e-6

    def log_probabilities(hidden: Tensor) -> Tensor:
        normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * norm
        return (normed @ head.T).double().log_softmax(-1)

    reference = torch.cat([log_probabilities(rows) for rows in base.split(_ROWS)])

    def divergence(hidden: Tensor, tokens: Tensor) -> float:
        parts = zip(hidden.split(_ROWS), tokens.split(_ROWS), strict=True)
        return sum(float(divergence_of(reference[rows], log_probabilities(some)).sum()) for some, rows in parts)

    return divergence


if __name__ == "__main__":
    sys.exit(main())

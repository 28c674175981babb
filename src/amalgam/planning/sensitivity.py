"""What every weight in every format does to the output.

In: a `Problem`, texts. Out: `Sensitivities`: for each option the KL divergence that it alone would add, to second order
(`evaluation.gradients`), its error at the projection's output, and how often its expert was used meanwhile. Layer by
layer, each layer kept as a file of its own, so that what ends midway goes on from there.

Must never know: budgets, choices.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from amalgam.base.files import replace_file
from amalgam.base.strict_json import parse_json
from amalgam.composition.loader import ModelLoader
from amalgam.composition.planned import PlannedWeight
from amalgam.composition.progress import Progress
from amalgam.evaluation.gradients import OUTSIDE, Gradients, Seen
from amalgam.evaluation.texts import Sample
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.kernels.backends.reference.operators import changed_logits
from amalgam.kernels.weights import PackedWeight
from amalgam.planning.problem import Item, Problem

VERSION = 2  # of what a file holds; others are measured again
DRAWS = 2
STUDY = "study.json"  # what a folder is about
_HEAD_ROWS = 256
# Small operations of PyTorch, for the default number of draws: the demo model's time outside of products, by a profile.
_CALLS_PER_OPTION = 360  # to read and restore it
_CALLS_PER_WEIGHT = 170  # and sequence: forward, back, and the errors of its options
_FORWARD_AND_BACK = 2  # forward passes over all tokens, beside one for each draw and one for each option


@dataclass(frozen=True)
class OptionError:
    """One weight in one source.

    Attributes:
        divergence: nats per token of the texts, if nothing else changes.
        output_error: mean square of the change of the projection's output, relative to the output's.
        rounding_error: mean square of the change of the weight, relative to the weight's.
    """

    divergence: float
    output_error: float
    rounding_error: float


@dataclass(frozen=True)
class WeightErrors:
    """One weight.

    Attributes:
        num_tokens: that reached it.
        gate_mass: sum of their gate weights; of a weight that all tokens reach, their number.
        options: source → its errors.
    """

    num_tokens: int
    gate_mass: float
    options: Mapping[str, OptionError]


@dataclass(frozen=True)
class Sensitivities:
    """Of all weights that have a choice and were measured, by logical name.

    Attributes:
        digest: of those weights and their options, see `digest_of_weights`; empty: not known.
    """

    num_tokens: int
    weights: Mapping[str, WeightErrors]
    digest: str = ""


@dataclass(frozen=True)
class Cost:
    """What measuring takes, as said before it starts.

    Attributes:
        read_bytes: of checkpoints.
        memory_bytes: of hidden states and gradients, beside one layer's weights.
        operations: multiplications and additions.
        seconds: at the speed of a large product and of small operations on this machine now.
        num_done, num_layers: layers that are there already, of all.
    """

    num_weights: int
    num_options: int
    num_tokens: int
    read_bytes: int
    memory_bytes: int
    operations: float
    seconds: float
    num_done: int
    num_layers: int


class SensitivityStudy:
    """Measures a problem on texts; one file a layer under `folder`, which is named after all that they depend on."""

    def __init__(
        self, loader: ModelLoader, problem: Problem, sample: Sample, root: Path, *, draws: int = DRAWS, seed: int = 0
    ) -> None:
        self._loader = loader
        self._problem = problem
        self._sample = sample
        self._draws = draws
        self._seed = seed
        self._backend = ReferenceBackend(torch.float32, torch.device("cpu"))
        self._base = {weight.slot.name: weight for weight in loader.plan(())}
        self._by_slot = {item.slot: item for item in problem.items}
        self._candidates = {
            item.name: {option.source: self._candidate(item, option.source) for option in item.options}
            for item in problem.items
        }
        self.folder = root / self._digest()
        self._weights_digest = digest_of_weights(loader, problem)

    def _candidate(self, item: Item, source: str) -> PlannedWeight:
        found = self._loader.candidate(item.name, source)
        assert found is not None, (item.name, source)
        return found

    def _digest(self) -> str:
        """Names all that the figures depend on: every weight's bytes, the texts, how it is measured."""
        digest = hashlib.sha256(repr((VERSION, self._sample.digest, self._draws, self._seed)).encode())
        for weight in self._base.values():
            digest.update(repr(weight.key).encode())
        for name, candidates in self._candidates.items():
            for source, weight in candidates.items():
                digest.update(repr((name, source, weight.key)).encode())
        return digest.hexdigest()[:24]

    @property
    def layers(self) -> list[int]:
        """Those with weights that have a choice; `OUTSIDE` for weights outside of the layers."""
        return layers_of(self._problem)

    def cost(self) -> Cost:
        """Reads nothing; times a large product and some small operations."""
        tokens, spec = self._sample.num_tokens, self._loader.spec
        missing = [layer for layer in self.layers if self._read(layer) is None]
        items = [item for item in self._problem.items if layer_of(item) in missing]
        share = _active_share(self._loader)
        linear = sum(math.prod(w.slot.shape) * share(w.slot.role) for w in self._base.values() if w.slot.is_linear)
        passes = 2 * tokens * linear * (_FORWARD_AND_BACK + self._draws) if missing else 0
        sequences = len(self._sample.windows)
        options = sum(
            2 * item.num_weights * self._draws * (tokens * share(item.role) + sequences * len(item.options))
            for item in items
        )
        calls = (
            _CALLS_PER_OPTION * sum(len(item.options) for item in items) + _CALLS_PER_WEIGHT * len(items) * sequences
        )
        read = 2 * sum(weight.stored.nbytes for weight in self._base.values()) if missing else 0
        read += sum(option.stored_bytes for item in items for option in item.options)
        hidden = 4 * tokens * spec.hidden_size * (spec.num_layers + 1 + self._draws)
        per_layer: dict[str, float] = {}
        for weight in self._base.values():
            if weight.slot.is_linear and weight.slot.name.startswith("layers."):
                layer, (rows, columns) = weight.slot.name.split(".")[1], weight.slot.shape
                width = share(weight.slot.role) * (columns + self._draws * rows)
                per_layer[layer] = per_layer.get(layer, 0.0) + 4 * tokens * width
        hidden += int(max(per_layer.values(), default=0.0))
        return Cost(
            len(items),
            sum(len(item.options) for item in items),
            tokens,
            read,
            hidden,
            passes + options,
            2 * (passes + options) / _speed() + calls * _call_seconds(),  # half of that speed is reached
            len(self.layers) - len(missing),
            len(self.layers),
        )

    def measure(self, progress: Progress | None = None) -> Sensitivities:
        """All layers; those that are on the disk are read.

        Raises:
            CheckpointError: hidden states hold NaN or infinity; a source's file is damaged.
        """
        found = {layer: layer_errors for layer in self.layers if (layer_errors := self._read(layer)) is not None}
        missing = [layer for layer in self.layers if layer not in found]
        if missing:
            total = self._sample.num_tokens * (2 * self._loader.spec.num_layers - max(0, min(missing)))
            steps = _Steps(progress, total)
            gradients = Gradients(
                self._loader.spec,
                [window.token_ids for window in self._sample.windows],
                self._load,
                draws=self._draws,
                seed=self._seed,
                done=steps.add,
            )
            for layer, chunks in gradients.layers():
                if layer in missing:
                    found[layer] = self._measure_layer(layer, chunks)
                    self._write(layer, found[layer])
                else:
                    for _ in chunks:
                        pass
                if layer == min(missing):
                    break
            if OUTSIDE in missing:
                found[OUTSIDE] = self._measure_outside(gradients)
                self._write(OUTSIDE, found[OUTSIDE])
        weights = {name: errors for layer in sorted(found) for name, errors in found[layer].items()}
        study = {"version": VERSION, "num_tokens": self._sample.num_tokens, "weights": self._weights_digest}
        replace_file(self.folder / STUDY, json.dumps(study))
        return Sensitivities(self._sample.num_tokens, weights, self._weights_digest)

    def _load(self, layer: int) -> dict[str, PackedWeight]:
        prefix = f"layers.{layer}."
        return {
            slot: weight.load(self._backend)
            for slot, weight in self._base.items()
            if (slot.startswith(prefix) if layer != OUTSIDE else not slot.startswith("layers."))
        }

    def _measure_layer(self, layer: int, chunks: Iterator[list[Seen]]) -> dict[str, WeightErrors]:
        by_slot: dict[str, list[Seen]] = {}
        for chunk in chunks:
            for seen in chunk:
                by_slot.setdefault(seen.slot, []).append(seen)
        items = [item for item in self._problem.items if layer_of(item) == layer]
        return {item.name: self._errors(item, by_slot.pop(item.slot, [])) for item in items}

    def _measure_outside(self, gradients: Gradients) -> dict[str, WeightErrors]:
        """Of the head the divergence itself, since its inputs stay; of embeddings by gradients, as of projections.

        One that is both has both, which are taken to be independent.
        """
        outside, tokens = gradients.outside, self._sample.num_tokens
        result = {}
        for item in (item for item in self._problem.items if layer_of(item) == OUTSIDE):
            base = self._values(self._base[item.slot])
            norm = max(float(base.square().sum()), 1e-30)
            is_head = item.role == "head" or (item.slot == "embedding" and self._loader.spec.has_tied_head)
            options = {}
            for option in item.options:
                weight = self._candidates[item.name][option.source].load(self._backend)
                change = weight.dequantize(torch.float32) - base
                divergence = moved = 0.0
                if is_head:
                    divergence, moved = self._head_errors(gradients, base, change)
                if item.role == "embedding":
                    shifts = self._shifts(gradients, {**outside, item.slot: weight})
                    divergence += _squares_at_start(gradients, shifts) / (2 * self._draws * tokens)
                    moved = moved or _relative(shifts, gradients.embedded(outside))
                rounding = float(change.square().sum()) / norm
                options[option.source] = OptionError(divergence, moved, rounding)
            result[item.name] = WeightErrors(tokens, float(tokens), options)
        return result

    def _head_errors(self, gradients: Gradients, base: Tensor, change: Tensor) -> tuple[float, float]:
        """Nats a token, and the mean square of the logits' change relative to theirs."""
        spec, bias = self._loader.spec, self._base.get("head_bias")
        added = None if bias is None else bias.load(self._backend).dense.float()

        def distribution(products: Tensor) -> Tensor:
            logits = products if added is None else products + added
            return changed_logits(logits, spec.logits_scale, spec.logits_softcap).double().log_softmax(-1)

        divergence = above = below = 0.0
        for hidden in gradients.head_inputs:
            for rows in hidden.split(_HEAD_ROWS):
                products, moved = functional.linear(rows, base), functional.linear(rows, change)
                above, below = above + float(moved.square().sum()), below + float(products.square().sum())
                before, after = distribution(products), distribution(products + moved)
                divergence += float((before.exp() * (before - after)).sum())
        return max(0.0, divergence) / self._sample.num_tokens, above / max(below, 1e-30)

    @staticmethod
    def _shifts(gradients: Gradients, outside: Mapping[str, PackedWeight]) -> list[Tensor]:
        pairs = zip(gradients.embedded(outside), gradients.embedded(gradients.outside), strict=True)
        return [other - own for other, own in pairs]

    def _errors(self, item: Item, all_seen: Sequence[Seen]) -> WeightErrors:
        """One weight in all of its options; an expert that no token reached has rounding errors only."""
        base = self._values(self._base[item.slot])
        norm = max(float(base.square().sum()), 1e-30)
        sources = [option.source for option in item.options]
        changes = torch.stack([self._values(self._candidates[item.name][source]) - base for source in sources])
        rounding = changes.square().sum(dim=(1, 2)) / norm
        moment = torch.zeros(base.shape[1], base.shape[1])
        squares = torch.zeros(len(sources))
        for seen in all_seen:
            moment += seen.inputs.T @ seen.inputs
            squares += _squares(seen, changes.flatten(1))
        output = max(float((base @ moment * base).sum()), 1e-30)
        moved = [float((change @ moment * change).sum()) / output for change in changes]
        divergence = squares / (2 * self._draws * self._sample.num_tokens)
        return WeightErrors(
            sum(len(seen.inputs) for seen in all_seen),
            sum(seen.gate_mass for seen in all_seen),
            {
                source: OptionError(float(divergence[index]), max(0.0, moved[index]), float(rounding[index]))
                for index, source in enumerate(sources)
            },
        )

    def _values(self, weight: PlannedWeight) -> Tensor:
        return weight.load(self._backend).dequantize(torch.float32)

    def _file(self, layer: int) -> Path:
        return file_of(self.folder, layer)

    def _write(self, layer: int, errors: Mapping[str, WeightErrors]) -> None:
        document = {
            "version": VERSION,
            "weights": {
                name: {
                    "num_tokens": each.num_tokens,
                    "gate_mass": each.gate_mass,
                    "options": {
                        source: [option.divergence, option.output_error, option.rounding_error]
                        for source, option in each.options.items()
                    },
                }
                for name, each in errors.items()
            },
        }
        replace_file(self._file(layer), json.dumps(document))

    def _read(self, layer: int) -> dict[str, WeightErrors] | None:
        """What is on the disk of a layer; None if that is nothing, or cannot be used."""
        return errors_on_disk(self.folder, layer, self._problem)


def layer_of(item: Item) -> int:
    """`OUTSIDE` for a weight outside of the layers."""
    return OUTSIDE if item.layer is None else item.layer


def layers_of(problem: Problem) -> list[int]:
    """Those with weights that have a choice, in order; `OUTSIDE` comes first."""
    return sorted({layer_of(item) for item in problem.items})


def file_of(folder: Path, layer: int) -> Path:
    """Where a layer's errors are kept."""
    return folder / ("outside.json" if layer == OUTSIDE else f"layer-{layer:04}.json")


def errors_on_disk(folder: Path, layer: int, problem: Problem) -> dict[str, WeightErrors] | None:
    """A layer's errors; None if they are not there, or cannot be used for the problem."""
    try:
        document = parse_json(file_of(folder, layer).read_bytes())
        return _errors_of(document, {item.name for item in problem.items if layer_of(item) == layer})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def digest_of_weights(loader: ModelLoader, problem: Problem) -> str:
    """Names every weight of base and of the options: equal exactly if their bytes are."""
    digest = hashlib.sha256(repr(VERSION).encode())
    for weight in loader.plan(()):
        digest.update(repr(weight.key).encode())
    for item in problem.items:
        for option in item.options:
            found = loader.candidate(item.name, option.source)
            digest.update(repr((item.name, option.source, None if found is None else found.key)).encode())
    return digest.hexdigest()


def _errors_of(document: Any, names: set[str]) -> dict[str, WeightErrors]:
    if document["version"] != VERSION or document["weights"].keys() != names:
        raise ValueError("of another version or model")
    return {
        name: WeightErrors(
            int(each["num_tokens"]),
            float(each["gate_mass"]),
            {source: OptionError(*map(float, values)) for source, values in each["options"].items()},
        )
        for name, each in document["weights"].items()
    }


def _squares(seen: Seen, changes: Tensor) -> Tensor:
    """`[options]`: the squares of Σₜ gₜ · ΔW xₜ, each over one sequence and one draw, added up.

    The sum over a sequence is the product of ΔW with one matrix, Σₜ gₜ xₜᵀ, so that many options cost little more than
    one.

    Args:
        changes: ΔW of each option, `[options, out × in]`.
    """
    total = torch.zeros(len(changes))
    sizes = seen.sequences.unique_consecutive(return_counts=True)[1].tolist()
    start = 0
    for size in sizes:
        inputs = seen.inputs[start : start + size]
        for gradients in seen.gradients[:, start : start + size]:
            total += (changes @ (gradients.T @ inputs).flatten()).square()
        start += size
    return total


def _squares_at_start(gradients: Gradients, shifts: Sequence[Tensor]) -> float:
    """Σ of the squares of Σₜ gₜ · Δₜ, each over one sequence and one draw."""
    total = 0.0
    for slopes, shift, sequences in zip(gradients.at_start, shifts, gradients.sequences(), strict=True):
        products = (slopes * shift).sum(-1)  # [draws, tokens]
        ids = sequences - sequences[0]
        sums = torch.zeros(len(products), int(ids[-1]) + 1).index_add_(1, ids, products)
        total += float(sums.square().sum())
    return total


def _relative(shifts: Sequence[Tensor], values: Sequence[Tensor]) -> float:
    above = sum(float(shift.square().sum()) for shift in shifts)
    return above / max(sum(float(value.square().sum()) for value in values), 1e-30)


class _Steps:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, count: int) -> None:
        self._done = min(self._total, self._done + count)
        if self._progress is not None:
            self._progress("Measuring sensitivities", self._done, self._total)


def _active_share(loader: ModelLoader) -> Callable[[str], float]:
    spec = loader.spec
    share = spec.num_active_experts / spec.num_experts if spec.num_experts else 1.0
    return lambda role: share if role == "expert" else 1.0


def _speed() -> float:
    """Operations a second of a product, as it is now."""
    a, b = torch.ones(512, 1024), torch.ones(1024, 1024)
    return 2 * 512 * 1024 * 1024 / _least_seconds(lambda: a @ b, 4)


def _call_seconds() -> float:
    """What an operation with little to compute takes, as it is now."""
    a, calls = torch.ones(64, 64), 50

    def call() -> None:
        for _ in range(calls):
            (a @ a).square().sum()

    return _least_seconds(call, 20) / (3 * calls)


def _least_seconds(call: Callable[[], object], times: int) -> float:
    best = math.inf
    for _ in range(times):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best

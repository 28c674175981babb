"""Which experts the traffic uses, in every form that is asked for.

In: the tracker, and the weight version in use. Out: JSON, files. Must never know: HTTP, terminals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amalgam.config.statistics import StatisticsSettings
from amalgam.errors import RequestError, VersionNotFoundError
from amalgam.experts.by_format import FormatCounter
from amalgam.experts.hints import COLD, MIN_TOKENS
from amalgam.experts.overview import build_overview, compare_traffic, drift_minutes, drift_or_reason, drift_sides
from amalgam.experts.precision_map import precision_map
from amalgam.experts.saved.folder import load_named, save_named, write_file
from amalgam.experts.saved.names import check_name
from amalgam.experts.saved.sets import SavedSet, merge
from amalgam.experts.snapshot import ResetResult
from amalgam.experts.statistics import HOT, concentration, grid, label_rows, layer_rows, summary, window
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.weights import WeightVersion

if TYPE_CHECKING:
    from amalgam.experts.export.report import Export

WINDOWS = (1, 5, 15, 60, 6 * 60, 24 * 60)  # minutes, as far as they are kept


@dataclass(frozen=True)
class SavedSetInfo:
    """A set that has been saved."""

    name: str
    file_name: str
    num_tokens: int
    labels: tuple[str, ...]


class ExpertStatistics:
    """What the tracker has counted. Any thread; everything here blocks, for milliseconds up to seconds.

    Windows are the last `minutes`; None: since the last reset. All that takes one raises a RequestError if it is out of
    range.

    Args:
        tracker: what counts, in the engine's steps.
        version: gives the weight version that new requests start on.
        find: gives a version in memory by its number; None: it is not there.
        model: its name, for reports.
    """

    def __init__(
        self,
        tracker: ExpertTracker,
        version: Callable[[], WeightVersion],
        find: Callable[[int], WeightVersion | None],
        model: str,
    ) -> None:
        self.tracker = tracker
        self._version = version
        self._find = find
        self._model = model
        self._formats = FormatCounter(tracker)

    @property
    def revision(self) -> int:
        """Changes whenever the statistics do."""
        return self.tracker.revision

    @property
    def settings(self) -> StatisticsSettings:
        return self.tracker.settings

    def describe(self) -> dict[str, Any]:
        """What may be asked for. `windows` are minutes, the last of them all that is kept; `hot_from` and `cold_to`, in
        even shares, are those of the hints.
        """
        kept = self.settings.history_minutes
        return {
            "windows": sorted(
                {minutes for minutes in WINDOWS if minutes < kept} | {drift_minutes(self.settings), kept}
            ),
            "drift": drift_sides(self.settings),
            "half_life_minutes": self.settings.half_life_minutes,
            "has_reference": bool(self.settings.reference),
            "hot_from": HOT,
            "cold_to": COLD,
        }

    def overview(self, minutes: float | None = None, top_k: int | None = None) -> dict[str, Any]:
        """What `/expert_stats` answers: summary, layers, experts, the busiest, the most recent, drift and hints.

        Args:
            top_k: how many of the busiest; None: 10, or all where there are fewer.

        Raises:
            RequestError: `top_k` is out of range.
        """
        return build_overview(self.tracker, self._version(), minutes).as_json(top_k)

    def reset(self) -> ResetResult:
        """Forget all counts."""
        return self.tracker.reset()

    def grid(
        self, minutes: float | None = None, label: str | None = None, phase: str = "all", measure: str = "count"
    ) -> dict[str, Any]:
        """One number per layer and expert, and each layer's balance.

        Raises:
            RequestError: nothing has this label, or minutes are given with it.
        """
        return grid(self.tracker.snapshot(minutes, label), phase, measure)

    def labels(self) -> dict[str, Any]:
        """The labels that requests have had since the last reset."""
        return {"labels": label_rows(self.tracker.snapshot()), "max_labels": self.settings.max_labels}

    def compare(
        self, first: str, second: str, folder: str, phase: str = "all", measure: str = "count"
    ) -> dict[str, Any]:
        """Two kinds of traffic; see `overview.compare_traffic`."""
        return compare_traffic(self.tracker, first, second, folder, phase, measure)

    def coactivation(self, layer_id: int) -> dict[str, Any]:
        """How many sampled tokens used two experts of a layer together; on the diagonal, one of them.

        Raises:
            RequestError: the layer has no experts.
        """
        pairs = self.tracker.layer_pairs(layer_id)
        return {
            "layer_id": layer_id,
            "num_experts": self.tracker.num_experts,
            "pairs": pairs.together.tolist(),
            "sampled_tokens": pairs.num_tokens,
            "sampling": pairs.sampling,
        }

    def transitions(self, layer_id: int) -> dict[str, Any]:
        """How many sampled tokens used an expert of a layer (row) and then one of the next layer (column).

        Raises:
            RequestError: the layer has no experts, or none follows it.
        """
        pairs = self.tracker.layer_pairs(layer_id)
        if pairs.next_layer_id is None:
            raise RequestError(f"layer_id is {layer_id}.", remedy="No layer with experts follows this one.")
        return {
            "layer_id": layer_id,
            "next_layer_id": pairs.next_layer_id,
            "num_experts": self.tracker.num_experts,
            "matrix": [] if pairs.onward is None else pairs.onward.tolist(),
            "sampled_tokens": pairs.num_tokens,
            "sampling": pairs.sampling,
        }

    def concentration(self, minutes: float | None = None) -> dict[str, Any]:
        """Per layer, the Lorenz curve, Gini, and how many experts take 50, 90 and 99% of the activations."""
        snapshot = self.tracker.snapshot(minutes)
        return {"window": window(snapshot), "layers": concentration(snapshot)}

    def hints(self, minutes: float | None = None) -> dict[str, Any]:
        """What the statistics suggest; nothing before `min_tokens` tokens have been counted."""
        overview = build_overview(self.tracker, self._version(), minutes)
        return {
            "hints": [hint.as_json() for hint in overview.hints],
            "tokens": int(overview.snapshot.tally.num_tokens.sum()),
            "min_tokens": MIN_TOKENS,
        }

    def precision_map(self, weight_version: int | None = None) -> dict[str, Any]:
        """Format, source and bytes of each projection of each expert.

        Args:
            weight_version: its number; None: what new requests start on.

        Raises:
            VersionNotFoundError: it is not in memory.
        """
        version = self._version() if weight_version is None else self._find(weight_version)
        if version is None:
            raise VersionNotFoundError(
                f"Weight version {weight_version} is not in memory.",
                remedy="GET /weights lists those.",
                param="weight_version",
            )
        found = precision_map(version, self.tracker.layer_ids, self.tracker.num_experts)
        return {"weight_version": version.version_id, **found.as_json()}

    def use_of(self, layer_id: int, expert_id: int) -> dict[str, Any]:
        """One expert, since the last reset. `rank` 1 is the busiest of the layer; `share` is the part of the layer's
        use, `decaying_rate` activations per second with recent ones weighing more. The layer and the expert exist.
        """
        snapshot = self.tracker.snapshot()
        row = snapshot.layer_ids.index(layer_id)
        prompt, generated = (int(count) for count in snapshot.tally.counts[:, row, expert_id])
        layer = snapshot.tally.counts[:, row].sum(axis=0)
        last = float(snapshot.last_activation[row, expert_id])
        return {
            "activations": prompt + generated,
            "prompt_activations": prompt,
            "generated_activations": generated,
            "gate_mass": float(snapshot.tally.gate_mass[:, row, expert_id].sum()),
            "decaying_rate": float(snapshot.decaying_rate[row, expert_id]),
            "share": (prompt + generated) / max(int(layer.sum()), 1),
            "rank": int((layer > prompt + generated).sum()) + 1,
            "last_activation": None if math.isnan(last) else last,
        }

    def by_layer(self) -> dict[str, Any]:
        """`summary`, `layers` (a row each, in order) and `drift`, for those who poll: no expert has a row."""
        snapshot = self.tracker.snapshot()
        return {
            "summary": summary(snapshot),
            "layers": layer_rows(snapshot),
            "drift": drift_or_reason(self.tracker),
        }

    def activations_by_format(self) -> dict[tuple[str, str], int]:
        """(projection, format) → activations since the start, by the format that the expert had then.

        To be called just before new requests start on other weights, too.
        """
        return self._formats.attribute(self._version())

    def export(self, format: str, minutes: float | None = None) -> Export:
        """The statistics as a file; see `export.report.export`."""
        from amalgam.experts.export.report import export

        return export(self.tracker, format, version=self._version(), minutes=minutes, model=self._model)

    def export_to(self, folder: str | Path, format: str, minutes: float | None = None) -> Export:
        """The same, written to `folder`, under a name that nobody else has.

        Raises:
            ConfigError: the folder cannot be written to, or is full.
        """
        result = self.export(format, minutes)
        write_file(folder, result.file_name, result.content)
        return result

    def saved_set(self) -> SavedSet:
        """Everything counted since the last reset, to be written to a file."""
        return self.tracker.saved_set()

    def save_set(self, folder: str | Path, name: str, of: Sequence[str] | None = None) -> SavedSetInfo:
        """Save the counts, or the saved sets `of` put together, in `folder` under a name. One of that name is
        replaced.

        Raises:
            RequestError: a name is not plain, or unknown.
            CheckpointError: a set that is to be merged is damaged, or of another model.
            ConfigError: the folder cannot be written to, or is full; or the sets together have too many labels.
        """
        name = check_name(name)  # before the sets are read, which takes long
        result = self.saved_set() if of is None else merge([load_named(folder, one) for one in of])
        path = save_named(folder, name, result)
        return SavedSetInfo(path.stem, path.name, int(result.total.num_tokens.sum()), tuple(result.labels))

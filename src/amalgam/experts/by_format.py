"""How often experts were activated in each precision format, as a counter that never falls.

In: the tracker, and weight versions as they come and go. Out: totals by projection and format. Must never know: HTTP.
"""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np

from amalgam.experts.precision_map import precision_map
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.weights import WeightVersion


class FormatCounter:
    """Attributes activations to the formats that experts had when they were counted. Any thread.

    Requests that are still on their way when the weights change finish on the weights before; what they activate from
    then on is attributed to the new ones.
    """

    def __init__(self, tracker: ExpertTracker) -> None:
        self._tracker = tracker
        self._lock = threading.Lock()  # guards everything below
        self._attributed = np.zeros((len(tracker.layer_ids), tracker.num_experts), np.int64)
        self._totals: Counter[tuple[str, str]] = Counter()

    def attribute(self, version: WeightVersion) -> dict[tuple[str, str], int]:
        """Attribute what was activated since the last call to the formats of `version`, which was in use.

        Returns:
            (projection, format) → activations since the start.
        """
        precisions = precision_map(version, self._tracker.layer_ids, self._tracker.num_experts)
        with self._lock:
            counts = self._tracker.activations()
            self._totals.update(precisions.activations_by_format(counts - self._attributed))
            self._attributed = counts
            return dict(self._totals)

"""The routing of single requests, token by token, for those that asked.

In: rows and the spans they belong to. Out: `RoutingTrace`. Must never know: statistics.
Not locked: `ExpertTracker` calls it under its own lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from amalgam.errors import OverloadedError, RequestError
from amalgam.experts.recording import Rows
from amalgam.models.routing import RoutingTrace

if TYPE_CHECKING:
    from amalgam.models.routing import TokenSpan

_BYTES_PER_ACTIVATION = 2 + 4  # id and weight


@dataclass
class _Trace:
    reserved_bytes: int
    chunks: list[tuple[int, Rows]] = field(default_factory=list)  # position of the first row, rows


class TraceStore:
    """Traces of requests under way. Memory for a whole trace is reserved before its request is queued."""

    def __init__(self, layer_ids: Sequence[int], top_k: int, max_bytes: int) -> None:
        self._layer_ids = tuple(layer_ids)
        self._top_k = top_k
        self._max_bytes = max_bytes
        self._traces: dict[int, _Trace] = {}

    def admit(self, request_id: int, num_tokens: int) -> None:
        """Reserve memory for `num_tokens` tokens.

        Raises:
            RequestError: there would never be enough.
            OverloadedError: there is not enough now.
        """
        needed = num_tokens * len(self._layer_ids) * self._top_k * _BYTES_PER_ACTIVATION
        if needed > self._max_bytes:
            raise RequestError(
                f"The routing of {num_tokens} tokens takes {needed} bytes, and statistics.trace_bytes is "
                f"{self._max_bytes}.",
                remedy="Ask for fewer new tokens, or raise the setting.",
            )
        if needed + sum(trace.reserved_bytes for trace in self._traces.values()) > self._max_bytes:
            raise OverloadedError(
                "Traces of other requests take all of statistics.trace_bytes.", remedy="Try again later."
            )
        self._traces[request_id] = _Trace(needed)

    def add(self, span: TokenSpan, rows: Rows) -> None:
        """Keep a span's new rows; `rows` are those of its step."""
        first = max(span.start, span.record_from)
        if span.request_id in self._traces and first < span.stop:
            chunk = rows[slice(first, span.stop)]
            copy = Rows(chunk.expert_ids.copy(), chunk.gate_weights.copy(), chunk.phases, chunk.num_experts)
            self._traces[span.request_id].chunks.append((span.position + first - span.start, copy))

    def take(self, request_id: int) -> RoutingTrace | None:
        """Put a request's trace together and forget it."""
        trace = self._traces.pop(request_id, None)
        if trace is None:
            return None
        num_tokens = max((position + len(rows) for position, rows in trace.chunks), default=0)
        shape = (num_tokens, len(self._layer_ids), self._top_k)
        expert_ids, gate_weights = np.full(shape, -1, np.int16), np.zeros(shape, np.float32)
        for position, rows in trace.chunks:
            place = slice(position, position + len(rows))
            expert_ids[place] = rows.expert_ids.swapaxes(0, 1)
            gate_weights[place] = rows.gate_weights.swapaxes(0, 1)
        return RoutingTrace(self._layer_ids, expert_ids, gate_weights)

    @property
    def nbytes(self) -> int:
        """Memory that is reserved."""
        return sum(trace.reserved_bytes for trace in self._traces.values())

"""Which experts the traffic uses: counts, comparisons, pairs, hints.

In: windows, labels, names. Out: figures. All arithmetic is done in threads.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from amalgam.experts.saved.names import MAX_FILE_NAME_CHARS
from amalgam.server.api.queries import SharedQuery, SharedWindowQuery, WindowBody, WindowQuery, share
from amalgam.server.dependencies import ServiceArgument
from amalgam.server.http.body import Body, NoFields, StrictRoute
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.service import Service

router = APIRouter(route_class=StrictRoute, tags=["experts"])

_MAX_TRAFFIC = len("saved:") + MAX_FILE_NAME_CHARS  # the longest kind


class ExpertStatsBody(WindowBody):
    top_k: int | None = Field(default=None, ge=1)
    """How many of the busiest experts; null: 10, or all where there are fewer."""


class ExpertStatsQuery(ExpertStatsBody):
    model_config = ConfigDict(strict=False)


class MeasureQuery(SharedQuery):
    phase: Literal["all", "prompt", "generated"] = "all"
    """Prompt tokens, generated tokens, or both."""
    measure: Literal["count", "gate_mass"] = "count"
    """Activations, or the sum of their gate weights."""


class GridQuery(WindowQuery, MeasureQuery):
    label: str | None = Field(default=None, max_length=64)
    """Only requests with this `domain`, since the last reset; not together with minutes."""


class CompareQuery(MeasureQuery):
    a: str = Field(max_length=_MAX_TRAFFIC)
    """all, label:NAME, rest:NAME (all but that label), minutes:N, before:N (all but the last N minutes), reference
    (statistics.reference) or saved:NAME."""
    b: str = Field(default="all", max_length=_MAX_TRAFFIC)
    """The same; what `a` is compared with."""


class LayerQuery(SharedQuery):
    layer_id: int = Field(ge=0)
    """A decoder layer that has experts."""


class PrecisionMapQuery(Body):
    model_config = ConfigDict(strict=False)

    weight_version: int | None = Field(default=None, ge=1)
    """A version whose weights are in memory, for requests in flight alone too; null: what new requests start on."""


class ResetAnswer(BaseModel):
    activations: int
    tokens: int
    requests: int
    seconds: float
    """Since counting began, or since the reset before."""

    model_config = ConfigDict(use_attribute_docstrings=True)


@router.get("/expert_stats", response_model=dict[str, Any])
async def get_expert_stats(service: ServiceArgument, query: Annotated[ExpertStatsQuery, Query()]) -> Response:
    """Which experts the traffic uses: summary, layers, experts, the busiest, the most recent, drift and hints."""
    return await _expert_stats(service, query)


@router.post("/expert_stats", response_model=dict[str, Any])
async def post_expert_stats(service: ServiceArgument, body: ExpertStatsBody | None = None) -> Response:
    """The same, with the parameters in the body."""
    return await _expert_stats(service, body or ExpertStatsBody())


async def _expert_stats(service: Service, query: ExpertStatsBody) -> Response:
    overview = service.statistics.overview
    return await asyncio.to_thread(lambda: OrjsonResponse(overview(query.minutes, query.top_k)))


@router.post("/reset_expert_stats")
async def reset_expert_stats(service: ServiceArgument, body: NoFields | None = None) -> ResetAnswer:
    """Forget all counts; answers with what they were."""
    result = await asyncio.to_thread(service.statistics.reset)
    return ResetAnswer(
        activations=result.num_activations,
        tokens=result.num_tokens,
        requests=result.num_requests,
        seconds=result.seconds,
    )


@router.get("/experts/grid", response_model=dict[str, Any])
async def get_grid(service: ServiceArgument, query: Annotated[GridQuery, Query()]) -> Response:
    """One number per layer and expert, and each layer's balance."""
    make = service.statistics.grid
    return await share(service, "grid", query, lambda: make(query.minutes, query.label, query.phase, query.measure))


@router.get("/experts/labels", response_model=dict[str, Any])
async def get_labels(service: ServiceArgument, query: Annotated[SharedQuery, Query()]) -> Response:
    """The labels (`domain`) that requests have had since the last reset."""
    return await share(service, "labels", query, service.statistics.labels)


@router.get("/experts/compare", response_model=dict[str, Any])
async def get_comparison(service: ServiceArgument, query: Annotated[CompareQuery, Query()]) -> Response:
    """Difference of the shares (a − b) and Jensen-Shannon divergence of two windows, labels or saved sets."""
    make, folder = service.statistics.compare, service.settings.server.export_dir
    return await share(service, "compare", query, lambda: make(query.a, query.b, folder, query.phase, query.measure))


@router.get("/experts/coactivation", response_model=dict[str, Any])
async def get_coactivation(service: ServiceArgument, query: Annotated[LayerQuery, Query()]) -> Response:
    """How many sampled tokens used two experts of a layer together; on the diagonal, one of them."""
    make = service.statistics.coactivation
    return await share(service, "coactivation", query, lambda: make(query.layer_id))


@router.get("/experts/transitions", response_model=dict[str, Any])
async def get_transitions(service: ServiceArgument, query: Annotated[LayerQuery, Query()]) -> Response:
    """How many sampled tokens used an expert of a layer (row) and then one of the next layer (column)."""
    make = service.statistics.transitions
    return await share(service, "transitions", query, lambda: make(query.layer_id))


@router.get("/experts/concentration", response_model=dict[str, Any])
async def get_concentration(service: ServiceArgument, query: Annotated[SharedWindowQuery, Query()]) -> Response:
    """Per layer, the Lorenz curve, Gini, and how many experts take 50, 90 and 99% of the activations."""
    make = service.statistics.concentration
    return await share(service, "concentration", query, lambda: make(query.minutes))


@router.get("/experts/hints", response_model=dict[str, Any])
async def get_hints(service: ServiceArgument, query: Annotated[SharedWindowQuery, Query()]) -> Response:
    """What the statistics suggest, in English and Chinese, each with its figures; the most important first.

    Nothing before `min_tokens` tokens have been counted.
    """
    make = service.statistics.hints
    return await share(service, "hints", query, lambda: make(query.minutes))


@router.get("/experts/precision_map", response_model=dict[str, Any])
async def get_precision_map(
    request: Request, service: ServiceArgument, query: Annotated[PrecisionMapQuery, Query()]
) -> Response:
    """Format, source and bytes of each projection of each expert, in one weight version.

    Whoever keeps an answer may ask again with its ETag: after a restart the same number may mean other weights.
    """
    make = service.statistics.precision_map

    def respond() -> Response:
        response = OrjsonResponse(make(query.weight_version))
        etag = f'"{hashlib.sha256(response.body).hexdigest()[:32]}"'
        headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        response.headers.update(headers)
        return response

    return await asyncio.to_thread(respond)

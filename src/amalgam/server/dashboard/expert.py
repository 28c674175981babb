"""One expert: how much it is used, and where each of its projections comes from.

In: a layer and an expert. Out: a few figures; the page asks for them at each click, and the whole of `/expert_stats`
would be megabytes for a large model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.responses import Response

from amalgam.errors import RequestError
from amalgam.server.api.experts import SharedQuery, share
from amalgam.server.dependencies import ServiceArgument
from amalgam.server.http.body import StrictRoute

if TYPE_CHECKING:
    from amalgam.experts.tracker import ExpertTracker
    from amalgam.runtime.deployment import Deployment

PROJECTIONS = ("gate", "up", "down")

router = APIRouter(route_class=StrictRoute, include_in_schema=False)


class ExpertQuery(SharedQuery):
    layer_id: int = Field(ge=0)
    expert_id: int = Field(ge=0)


@router.get("/dashboard/expert")
async def expert(service: ServiceArgument, query: Annotated[ExpertQuery, Query()]) -> Response:
    """The use since the last reset, and the projections, of one expert."""
    deployment = service.deployment
    return await share(service, "expert", query, lambda: describe_expert(deployment, query.layer_id, query.expert_id))


def describe_expert(deployment: Deployment, layer_id: int, expert_id: int) -> dict[str, Any]:
    """
    Raises:
        RequestError: the model has no such expert.
    """
    version = deployment.version
    origins = version.origins
    slots = {part: f"layers.{layer_id}.mlp.experts.{expert_id}.{part}" for part in PROJECTIONS}
    found = [(part, origins[slot]) for part, slot in slots.items() if slot in origins]
    if not found:
        raise RequestError(
            f"Layer {layer_id} has no expert {expert_id}.", remedy="GET /model_info has the model's sizes."
        )
    return {
        "layer_id": layer_id,
        "expert_id": expert_id,
        "num_experts": deployment.spec.num_experts,
        "use": _use(deployment, layer_id, expert_id),
        "projections": [
            {
                "projection": part,
                "name": origin.name,
                "source": origin.source,
                "format": origin.format,
                "reason": origin.rule,
                "bytes": version[origin.slot].nbytes,
                "bits": version[origin.slot].nbytes * 8 / math.prod(origin.shape),
            }
            for part, origin in found
        ],
    }


def _use(deployment: Deployment, layer_id: int, expert_id: int) -> dict[str, Any] | None:
    """None if nothing is counted. `rank` 1 is the busiest of the layer; `share` is the part of the layer's use,
    `decaying_rate` activations per second with recent ones weighing more.
    """
    if deployment.observer is None:
        return None
    snapshot = cast("ExpertTracker", deployment.observer).snapshot()
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

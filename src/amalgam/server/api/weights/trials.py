"""A candidate for the weights, tried on live requests: canary and shadow.

In: which candidate, which share, what limits. Out: reports with a verdict. What they say is decided in
`amalgam.runtime.trials`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from amalgam.planning.trial_plans import CanaryLimits, CanaryPlan, Kind, ShadowLimits, ShadowPlan
from amalgam.server.api.common import AskedWeights
from amalgam.server.api.weights.answers import RemapAnswer, remap_answer
from amalgam.server.dependencies import Admission, ServiceArgument
from amalgam.server.http.body import Body, NoFields, StrictRoute
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.service import Service, in_own_thread

router = APIRouter(route_class=StrictRoute, tags=["weights"])

Share = Annotated[float, Field(ge=0, le=1)]
Slowdown = Annotated[float, Field(gt=0, le=1000)]
NumRequests = Annotated[int, Field(ge=1, le=2**20)]


class CanaryBody(Body):
    weights: AskedWeights
    """The candidate: the name of a named plan, or the id of a version that is kept."""
    share: Share = 0.05
    """Of the requests that ask for no weights, how many run on it."""
    min_requests: NumRequests = CanaryLimits.min_requests
    """That it has to answer before the verdict can be `promote`."""
    max_error_increase: Share = CanaryLimits.max_error_increase
    """Share of its requests that may fail beyond what fails on the current weights."""
    max_slowdown: Slowdown | None = None
    """Times as long as on the current weights that a token may take. null: any."""
    automatic: bool = False
    """Carry the verdict out as soon as there is one: promote it, or end the canary."""

    def plan(self) -> CanaryPlan:
        limits = CanaryLimits(self.min_requests, self.max_error_increase, self.max_slowdown)
        return CanaryPlan(self.weights, self.share, limits, self.automatic)


class ShadowBody(Body):
    weights: AskedWeights
    """The candidate: the name of a named plan, or the id of a version that is kept."""
    share: Share = 0.1
    """Of the requests that the current weights have answered, how many are computed with both."""
    min_requests: NumRequests = ShadowLimits.min_requests
    """That have to be compared before the verdict can be `promote`."""
    max_divergence: float = Field(default=ShadowLimits.max_divergence, ge=0, le=100)
    """KL divergence of the candidate's next tokens from the current ones, nats a token."""
    min_agreement: Share = ShadowLimits.min_agreement
    """Share of tokens for which both have the same likeliest one."""
    max_slowdown: Slowdown | None = None
    """Times as much of a core's time as with the current weights that a token may take. null: any."""
    max_requests: NumRequests = 200
    """That are compared in all."""
    max_tokens: int = Field(default=1024, ge=2, le=2**20)
    """Of a request that are computed. Requests with longer prompts are left out."""
    max_share: float = Field(default=0.25, gt=0, le=1)
    """Most of one core's time that comparing takes."""
    automatic: bool = False
    """Carry the verdict out as soon as there is one: promote it, or end the shadow."""

    def plan(self) -> ShadowPlan:
        limits = ShadowLimits(self.min_requests, self.max_divergence, self.min_agreement, self.max_slowdown)
        return ShadowPlan(
            self.weights, self.share, limits, self.automatic, self.max_requests, self.max_tokens, self.max_share
        )


@router.put("/weights/canary", dependencies=[Admission], response_model=dict[str, Any])
async def put_canary(body: CanaryBody, service: ServiceArgument) -> Response:
    """Let a share of new requests run on a candidate, or change the share. Answers with the report.

    Requests with the same `X-Amalgam-Session`, `prompt_cache_key`, `safety_identifier`, `user` or `metadata.user_id`
    stay together; others are chosen by chance.
    """
    trials = service.deployment.trials
    return OrjsonResponse(await in_own_thread(lambda: trials.start_canary(body.plan()).report()))


@router.put("/weights/shadow", dependencies=[Admission], response_model=dict[str, Any])
async def put_shadow(body: ShadowBody, service: ServiceArgument) -> Response:
    """Compute some requests with a candidate too, once the current weights have answered them. Answers with the report.

    Comparing takes place on one core at low priority; nobody waits for it.
    """
    trials = service.deployment.trials
    return OrjsonResponse(await in_own_thread(lambda: trials.start_shadow(body.plan()).report()))


@router.get("/weights/canary", response_model=dict[str, Any])
async def get_canary(service: ServiceArgument) -> Response:
    """The figures of the latest, checks against the limits with 95% confidence intervals, and the verdict."""
    return await _report(service, "canary")


@router.get("/weights/shadow", response_model=dict[str, Any])
async def get_shadow(service: ServiceArgument) -> Response:
    """The figures of the latest, checks against the limits with 95% confidence intervals, and the verdict."""
    return await _report(service, "shadow")


@router.delete("/weights/canary", response_model=dict[str, Any])
async def abort_canary(service: ServiceArgument) -> Response:
    """Try the candidate no more: new requests run on the current weights. Answers with the report."""
    return await _abort(service, "canary")


@router.delete("/weights/shadow", response_model=dict[str, Any])
async def abort_shadow(service: ServiceArgument) -> Response:
    """Compare no more. Answers with the report."""
    return await _abort(service, "shadow")


@router.post("/weights/canary/promote", dependencies=[Admission], response_model_exclude_none=True)
async def promote_canary(service: ServiceArgument, body: NoFields | None = None) -> RemapAnswer:
    """Let all new requests run on the candidate, whatever the verdict is."""
    return await _promote(service, "canary")


@router.post("/weights/shadow/promote", dependencies=[Admission], response_model_exclude_none=True)
async def promote_shadow(service: ServiceArgument, body: NoFields | None = None) -> RemapAnswer:
    """Let all new requests run on the candidate, whatever the verdict is."""
    return await _promote(service, "shadow")


async def _report(service: Service, kind: Kind) -> Response:
    report = service.deployment.trials.report
    return OrjsonResponse(await in_own_thread(lambda: report(kind)))


async def _abort(service: Service, kind: Kind) -> Response:
    abort = service.deployment.trials.abort
    return OrjsonResponse(await in_own_thread(lambda: abort(kind)))


async def _promote(service: Service, kind: Kind) -> RemapAnswer:
    promote = service.deployment.trials.promote
    return remap_answer(await in_own_thread(lambda: promote(kind)))

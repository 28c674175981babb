"""Which experts the traffic uses: statistics, reports, comparisons, traces.

In: windows, labels, names. Out: counts, figures, files. All arithmetic runs in worker threads.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from amalgam.engine.request import Observation, SamplingParams
from amalgam.errors import RequestError, UnsupportedError
from amalgam.server.dependencies import Admission, ServiceArgument
from amalgam.server.generation import complete
from amalgam.server.http.access import unless_client_leaves
from amalgam.server.http.body import Body, NoFields, StrictRoute
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.service import Service

if TYPE_CHECKING:
    from amalgam.experts.export.report import Export
    from amalgam.experts.tracker import ExpertTracker
    from amalgam.models.routing import RoutingTrace
    from amalgam.runtime.deployment import Deployment
    from amalgam.text.tokenizer import Tokenizer

# The modules of amalgam.experts are imported in worker threads: they import torch, and the port opens before that.

router = APIRouter(route_class=StrictRoute, tags=["experts"])
T = TypeVar("T")

_MAX_NAME = 200


class WindowBody(Body):
    minutes: float | None = Field(default=None, gt=0)
    """Count the last minutes only; null: since the last reset."""


class WindowQuery(WindowBody):
    model_config = ConfigDict(strict=False)  # a query holds nothing but strings


class SharedQuery(Body):
    model_config = ConfigDict(strict=False)

    statistics_version: int | None = Field(default=None, ge=0)
    """As the dashboard's events tell it: an answer of this version or later will do, even if it was made for somebody
    else in the last two seconds. null: it is made now."""


class SharedWindowQuery(WindowQuery, SharedQuery):
    pass


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
    a: str = Field(max_length=_MAX_NAME + 16)
    """all, label:NAME, rest:NAME (all but that label), minutes:N, before:N (all but the last N minutes), reference
    (statistics.reference) or saved:NAME."""
    b: str = Field(default="all", max_length=_MAX_NAME + 16)
    """The same; what `a` is compared with."""


class LayerQuery(SharedQuery):
    layer_id: int = Field(ge=0)
    """A decoder layer that has experts."""


class TraceBody(Body):
    text: str = Field(min_length=1)
    """What to run through the model."""
    chat: bool = False
    """Take the text as a user's message and put the model's chat template around it."""
    record: bool = False
    """Count these tokens in the statistics too."""


class ResetAnswer(BaseModel):
    activations: int
    tokens: int
    requests: int
    seconds: float
    """Since counting began, or since the reset before."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class ExportBody(WindowBody):
    format: Literal["json", "csv", "parquet", "npz", "png", "html"] = "json"
    """json: everything that /expert_stats answers; csv, parquet: a row per expert; npz: a saved set for
    numpy; png: a heatmap; html: a report."""


class ExportAnswer(BaseModel):
    file_name: str
    """The file's name in `server.export_dir`."""
    media_type: str
    encoding: Literal["text", "base64"]
    """How `content` holds the file."""
    content: str

    model_config = ConfigDict(use_attribute_docstrings=True)


class SaveSetBody(Body):
    name: str = Field(min_length=1, max_length=_MAX_NAME)
    """Letters, digits, . _ and -. A set of that name is replaced."""
    merge: list[str] | None = Field(default=None, min_length=1, max_length=64)
    """Saved sets to put together; null: save what has been counted since the last reset."""


class SavedSetAnswer(BaseModel):
    name: str
    file_name: str
    """In `server.export_dir`."""
    tokens: int
    labels: list[str]

    model_config = ConfigDict(use_attribute_docstrings=True)


class SavedSetsAnswer(BaseModel):
    sets: list[str]


@router.get("/expert_stats", response_model=dict[str, Any])
async def get_expert_stats(service: ServiceArgument, query: Annotated[ExpertStatsQuery, Query()]) -> Response:
    """Which experts the traffic uses: summary, layers, experts, the busiest, the most recent, drift and hints."""
    return await _expert_stats(service, query)


@router.post("/expert_stats", response_model=dict[str, Any])
async def post_expert_stats(service: ServiceArgument, body: ExpertStatsBody | None = None) -> Response:
    """The same, with the parameters in the body."""
    return await _expert_stats(service, body or ExpertStatsBody())


@router.post("/reset_expert_stats")
async def reset_expert_stats(service: ServiceArgument, body: NoFields | None = None) -> ResetAnswer:
    """Forget all counts; answers with what they were."""
    result = await asyncio.to_thread(tracker_of(service.deployment).reset)
    return ResetAnswer(
        activations=result.num_activations,
        tokens=result.num_tokens,
        requests=result.num_requests,
        seconds=result.seconds,
    )


@router.post("/export_expert_stats")
async def export_expert_stats(service: ServiceArgument, body: ExportBody | None = None) -> ExportAnswer:
    """Write the statistics to a file in `server.export_dir`; answers with its name and content."""
    body = body or ExportBody()
    folder = service.settings.server.export_dir

    def write(tracker: ExpertTracker) -> ExportAnswer:
        from amalgam.experts.saved.folder import write_file

        result = _export(service.deployment, tracker, body.format, body.minutes)
        write_file(folder, result.file_name, result.content)
        content = result.content.decode() if result.is_text else base64.b64encode(result.content).decode()
        return ExportAnswer(
            file_name=result.file_name,
            media_type=result.media_type,
            encoding="text" if result.is_text else "base64",
            content=content,
        )

    return await _in_worker(service, write)


@router.get("/experts/grid", response_model=dict[str, Any])
async def get_grid(service: ServiceArgument, query: Annotated[GridQuery, Query()]) -> Response:
    """One number per layer and expert, and each layer's balance."""

    def answer(tracker: ExpertTracker) -> dict[str, Any]:
        from amalgam.experts import statistics

        return statistics.grid(tracker.snapshot(query.minutes, query.label), query.phase, query.measure)

    return await _shared(service, "grid", query, answer)


@router.get("/experts/labels", response_model=dict[str, Any])
async def get_labels(service: ServiceArgument, query: Annotated[SharedQuery, Query()]) -> Response:
    """The labels (`domain`) that requests have had since the last reset."""

    def answer(tracker: ExpertTracker) -> dict[str, Any]:
        from amalgam.experts.statistics import label_rows

        return {"labels": label_rows(tracker.snapshot()), "max_labels": tracker.settings.max_labels}

    return await _shared(service, "labels", query, answer)


@router.get("/experts/compare", response_model=dict[str, Any])
async def get_comparison(service: ServiceArgument, query: Annotated[CompareQuery, Query()]) -> Response:
    """Difference of the shares (a − b) and Jensen-Shannon divergence of two windows, labels or saved sets."""
    folder = service.settings.server.export_dir

    def answer(tracker: ExpertTracker) -> dict[str, Any]:
        from amalgam.experts.overview import compare_traffic

        return compare_traffic(tracker, query.a, query.b, folder, query.phase, query.measure)

    return await _shared(service, "compare", query, answer)


@router.get("/experts/coactivation", response_model=dict[str, Any])
async def get_coactivation(service: ServiceArgument, query: Annotated[LayerQuery, Query()]) -> Response:
    """How many sampled tokens used two experts of a layer together; on the diagonal, one of them."""

    def answer(tracker: ExpertTracker) -> dict[str, Any]:
        pairs = tracker.layer_pairs(query.layer_id)
        return {
            "layer_id": query.layer_id,
            "num_experts": tracker.num_experts,
            "pairs": pairs.together.tolist(),
            "sampled_tokens": pairs.num_tokens,
            "sampling": pairs.sampling,
        }

    return await _shared(service, "coactivation", query, answer)


@router.get("/experts/transitions", response_model=dict[str, Any])
async def get_transitions(service: ServiceArgument, query: Annotated[LayerQuery, Query()]) -> Response:
    """How many sampled tokens used an expert of a layer (row) and then one of the next layer (column)."""

    def answer(tracker: ExpertTracker) -> dict[str, Any]:
        pairs = tracker.layer_pairs(query.layer_id)
        if pairs.next_layer_id is None:
            raise RequestError(f"layer_id is {query.layer_id}.", remedy="No layer with experts follows this one.")
        matrix = [] if pairs.onward is None else pairs.onward.tolist()
        return {
            "layer_id": query.layer_id,
            "next_layer_id": pairs.next_layer_id,
            "num_experts": tracker.num_experts,
            "matrix": matrix,
            "sampled_tokens": pairs.num_tokens,
            "sampling": pairs.sampling,
        }

    return await _shared(service, "transitions", query, answer)


@router.get("/experts/concentration", response_model=dict[str, Any])
async def get_concentration(service: ServiceArgument, query: Annotated[SharedWindowQuery, Query()]) -> Response:
    """Per layer, the Lorenz curve, Gini, and how many experts take 50, 90 and 99% of the activations."""

    def answer(tracker: ExpertTracker) -> dict[str, Any]:
        from amalgam.experts.statistics import concentration, window

        snapshot = tracker.snapshot(query.minutes)
        return {"window": window(snapshot), "layers": concentration(snapshot)}

    return await _shared(service, "concentration", query, answer)


@router.get("/experts/hints", response_model=dict[str, Any])
async def get_hints(service: ServiceArgument, query: Annotated[SharedWindowQuery, Query()]) -> Response:
    """What the statistics suggest, in English and Chinese, each with its figures; the most important first.

    Nothing before `min_tokens` tokens have been counted.
    """

    def answer(tracker: ExpertTracker) -> dict[str, Any]:
        from amalgam.experts.hints import MIN_TOKENS
        from amalgam.experts.overview import build_overview

        overview = build_overview(tracker, service.deployment.version, query.minutes)
        return {
            "hints": [hint.as_json() for hint in overview.hints],
            "tokens": int(overview.snapshot.tally.num_tokens.sum()),
            "min_tokens": MIN_TOKENS,
        }

    return await _shared(service, "hints", query, answer)


@router.get("/experts/precision_map", response_model=dict[str, Any])
async def get_precision_map(service: ServiceArgument) -> Response:
    """Format, source and bytes of each projection of each expert, in the version that new requests start on."""

    def answer(tracker: ExpertTracker) -> Response:
        from amalgam.experts.precision_map import precision_map

        version = service.deployment.version
        found = precision_map(version, tracker.layer_ids, tracker.num_experts)
        return OrjsonResponse({"weight_version": version.version_id, **found.as_json()})

    return await _in_worker(service, answer)


@router.post("/experts/trace", dependencies=[Admission], response_model=dict[str, Any])
async def trace(body: TraceBody, request: Request, service: ServiceArgument) -> Response:
    """Run a text through the model and tell the experts and gate weights of each of its tokens, layer by layer.

    A token that is not made of whole characters has its `bytes`, in hexadecimal digits, beside its `text`.
    """

    async def answer() -> Response:
        prompt = [{"role": "user", "content": body.text}] if body.chat else body.text
        [token_ids] = await service.encode([prompt])
        params = SamplingParams(max_new_tokens=1, do_sample=False)
        observation = Observation(wants_trace=True, is_counted=body.record)
        result = await complete(service.deployment.engine, token_ids, params, observation)
        assert result.trace is not None
        return await asyncio.to_thread(_trace_answer, service.deployment, token_ids, result.trace)

    return await unless_client_leaves(request.receive, answer())


@router.get("/experts/report", response_class=Response)
async def get_report(service: ServiceArgument, query: Annotated[WindowQuery, Query()]) -> Response:
    """Everything on one HTML page without scripts."""

    def answer(tracker: ExpertTracker) -> Response:
        from amalgam.experts.export.html import CONTENT_SECURITY_POLICY

        result = _export(service.deployment, tracker, "html", query.minutes)
        headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
        return Response(result.content, media_type=result.media_type, headers=headers)

    return await _in_worker(service, answer)


@router.get("/experts/heatmap.png", response_class=Response)
async def get_heatmap(service: ServiceArgument, query: Annotated[WindowQuery, Query()]) -> Response:
    """Layers × experts as a picture: each expert's use against an even share."""

    def answer(tracker: ExpertTracker) -> Response:
        result = _export(service.deployment, tracker, "png", query.minutes)
        return Response(result.content, media_type=result.media_type)

    return await _in_worker(service, answer)


@router.get("/experts/set.npz", response_class=Response)
async def get_set(service: ServiceArgument) -> Response:
    """A saved set of what has been counted since the last reset, which is not kept here, for `numpy.load` too."""

    def answer(tracker: ExpertTracker) -> Response:
        result = _export(service.deployment, tracker, "npz", None)
        return Response(result.content, media_type=result.media_type)

    return await _in_worker(service, answer)


@router.get("/experts/sets")
async def list_sets(service: ServiceArgument) -> SavedSetsAnswer:
    """The saved sets in `server.export_dir`."""

    def names() -> list[str]:
        from amalgam.experts.saved.folder import list_names

        return list_names(service.settings.server.export_dir)

    return SavedSetsAnswer(sets=await asyncio.to_thread(names))


@router.post("/experts/sets")
async def save_set(body: SaveSetBody, service: ServiceArgument) -> SavedSetAnswer:
    """Save the statistics, or several saved sets together, under a name, to be compared with later."""
    folder = service.settings.server.export_dir

    def save(tracker: ExpertTracker) -> SavedSetAnswer:
        from amalgam.experts.saved.folder import load_named, save_named
        from amalgam.experts.saved.sets import merge

        names = body.merge
        result = tracker.saved_set() if names is None else merge([load_named(folder, name) for name in names])
        path = save_named(folder, body.name, result)
        num_tokens = int(result.total.num_tokens.sum())
        return SavedSetAnswer(name=path.stem, file_name=path.name, tokens=num_tokens, labels=list(result.labels))

    result = await _in_worker(service, save)
    service.shared_answers.forget()  # of the set that was replaced
    return result


def tracker_of(deployment: Deployment) -> ExpertTracker:
    """
    Raises:
        UnsupportedError: nothing is counted.
    """
    if deployment.observer is None:
        raise UnsupportedError(
            "Expert statistics are not kept here.", remedy="Set statistics.enabled, and serve a model with experts."
        )
    return cast("ExpertTracker", deployment.observer)


async def _in_worker(service: Service, work: Callable[[ExpertTracker], T]) -> T:
    tracker = tracker_of(service.deployment)
    return await asyncio.to_thread(work, tracker)


async def _shared(
    service: Service, name: str, query: SharedQuery, work: Callable[[ExpertTracker], dict[str, Any]]
) -> Response:
    tracker = tracker_of(service.deployment)
    return await share(service, name, query, lambda: work(tracker))


async def share(service: Service, name: str, query: SharedQuery, work: Callable[[], dict[str, Any]]) -> Response:
    """What `work` gives, called in a thread unless somebody else's answer to the same query will do."""
    observer = service.deployment.observer
    revision = 0 if observer is None else cast("ExpertTracker", observer).revision
    key = (name, service.weight_version, query.model_copy(update={"statistics_version": None}))

    def make() -> bytes:
        return bytes(OrjsonResponse(work()).body)

    content = await service.shared_answers.get(key, query.statistics_version, revision, make)
    return Response(content, media_type=OrjsonResponse.media_type)


async def _expert_stats(service: Service, query: ExpertStatsBody) -> Response:
    def answer(tracker: ExpertTracker) -> Response:
        from amalgam.experts.overview import build_overview

        overview = build_overview(tracker, service.deployment.version, query.minutes)
        return OrjsonResponse(overview.as_json(query.top_k))

    return await _in_worker(service, answer)


def _export(deployment: Deployment, tracker: ExpertTracker, format: str, minutes: float | None) -> Export:
    from amalgam.experts.export.report import export

    return export(tracker, format, version=deployment.version, minutes=minutes, model=deployment.model_name)


def _trace_answer(deployment: Deployment, token_ids: list[int], trace: RoutingTrace) -> Response:
    return OrjsonResponse(
        {
            "tokens": [_token(deployment.tokenizer, token_id) for token_id in token_ids],
            "layer_ids": list(trace.layer_ids),
            "experts": trace.expert_ids,
            "gate_weights": trace.gate_weights,
        }
    )


def _token(tokenizer: Tokenizer, token_id: int) -> dict[str, Any]:
    text, content = tokenizer.token_text(token_id), tokenizer.token_bytes(token_id)
    fields = {"id": token_id, "text": text}
    return fields if content == text.encode() else {**fields, "bytes": content.hex()}

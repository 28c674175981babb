"""Which experts each token of one text goes to.

In: a text. Out: its tokens, their experts and gate weights.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Observation
from amalgam.server.api.common import WeightsField
from amalgam.server.dependencies import Admission, ServiceArgument
from amalgam.server.generation import complete
from amalgam.server.http.access import unless_client_leaves
from amalgam.server.http.body import StrictRoute
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.interface import Tokenizer
from amalgam.text.chat import ChatPrompt
from amalgam.text.filters.contract import ContentFilteredError

if TYPE_CHECKING:
    from amalgam.models.routing import RoutingTrace

router = APIRouter(route_class=StrictRoute, tags=["experts"])


class TraceBody(WeightsField):
    text: str = Field(min_length=1)
    """What to run through the model."""
    chat: bool = False
    """Take the text as a user's message and put the model's chat template around it."""
    record: bool = False
    """Count these tokens in the statistics too."""


@router.post("/experts/trace", dependencies=[Admission], response_model=dict[str, Any])
async def trace(body: TraceBody, request: Request, service: ServiceArgument) -> Response:
    """Run a text through the model and tell the experts and gate weights of each of its tokens, layer by layer.

    A token that is not made of whole characters has its `bytes`, in hexadecimal digits, beside its `text`.
    """

    service.choose_weights(body.weights)

    async def answer() -> Response:
        prompt = ChatPrompt([{"role": "user", "content": body.text}]) if body.chat else body.text
        [token_ids] = await service.encode([prompt], "text", is_answered=False)
        params = SamplingParams(max_new_tokens=1, do_sample=False)
        observation = Observation(wants_trace=True, is_counted=body.record)
        result = await complete(service.deployment.engine, token_ids, params, observation)
        if result.trace is None:
            raise ContentFilteredError("A filter lets the token not pass that follows this text.", param="text")
        return await asyncio.to_thread(_answer, service.deployment.tokenizer, token_ids, result.trace)

    return await unless_client_leaves(request.receive, answer())


def _answer(tokenizer: Tokenizer, token_ids: list[int], trace: RoutingTrace) -> Response:
    return OrjsonResponse(
        {
            "tokens": [_token(tokenizer, token_id) for token_id in token_ids],
            "layer_ids": list(trace.layer_ids),
            "experts": trace.expert_ids,
            "gate_weights": trace.gate_weights,
        }
    )


def _token(tokenizer: Tokenizer, token_id: int) -> dict[str, Any]:
    text, content = tokenizer.token_text(token_id), tokenizer.token_bytes(token_id)
    fields = {"id": token_id, "text": text}
    return fields if content == text.encode() else {**fields, "bytes": content.hex()}

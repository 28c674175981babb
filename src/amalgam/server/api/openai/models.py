"""`GET /v1/models`: the names under which the model can be asked for.

In: nothing. Out: OpenAI's list, with vLLM's `max_model_len`.
"""

from __future__ import annotations

import time

from fastapi import APIRouter

from amalgam.server.api.openai.documents import Model, ModelList, OpenAIErrorAnswer
from amalgam.server.dependencies import ServiceArgument
from amalgam.server.http.body import StrictRoute
from amalgam.server.service import Service

OWNER = "amalgam"

router = APIRouter(route_class=StrictRoute, tags=["openai"], responses=OpenAIErrorAnswer.RESPONSES)


@router.get("/v1/models")
@router.get("/models", include_in_schema=False)  # as llama-server has it, too
async def list_models(service: ServiceArgument) -> ModelList:
    """The served model, under each of its names."""
    return {"object": "list", "data": [_describe(service, name) for name in service.model_names]}


@router.get("/v1/models/{model:path}")
async def get_model(model: str, service: ServiceArgument) -> Model:
    """One of the names."""
    service.check_model(model)
    return _describe(service, model)


def _describe(service: Service, name: str) -> Model:
    return {
        "id": name,
        "object": "model",
        "created": int(time.time() - service.uptime_seconds),
        "owned_by": OWNER,
        "root": service.deployment.model_name,
        "parent": None,
        "max_model_len": service.deployment.engine.max_prompt_tokens + 1,
    }

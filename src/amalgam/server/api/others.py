"""What clients of vLLM and llama-server ask a server about itself.

In: nothing. Out: what they look for, as far as there is such a thing here. Must never know: requests in flight.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from typing_extensions import TypedDict

from amalgam.server.dependencies import ServiceArgument
from amalgam.server.http.body import StrictRoute
from amalgam.version import __version__

router = APIRouter(route_class=StrictRoute, tags=["operation"])


class VersionAnswer(TypedDict):
    version: str


class Modalities(TypedDict):
    vision: bool
    audio: bool


class Generation(TypedDict):
    """
    Attributes:
        n_ctx: most tokens of a sequence, prompt and answer together.
        params: how the model is sampled where a request says nothing, as far as its `generation_config.json` tells.
    """

    n_ctx: int
    params: dict[str, Any]


class PropsAnswer(TypedDict):
    default_generation_settings: Generation
    total_slots: int
    model_alias: str
    model_path: str
    chat_template: str
    modalities: Modalities
    build_info: str
    is_sleeping: bool


@router.get("/version")
async def version() -> VersionAnswer:
    """This program's version, as vLLM tells its own."""
    return {"version": __version__}


@router.get("/props")
async def props(service: ServiceArgument) -> PropsAnswer:
    """What llama-server tells of itself and its model. A slot is a place in a step: no request keeps one."""
    deployment, defaults = service.deployment, service.deployment.defaults
    sampling = defaults.as_json()
    return {
        "default_generation_settings": {
            "n_ctx": deployment.engine.max_prompt_tokens + 1,
            "params": {name: sampling[name] for name in sorted(defaults.from_model)},
        },
        "total_slots": service.settings.inference.max_batch_size,
        "model_alias": service.model_names[0],
        "model_path": service.settings.model.base_path,
        "chat_template": deployment.tokenizer.chat_template or "",
        "modalities": {"vision": False, "audio": False},
        "build_info": f"amalgam {__version__}",
        "is_sleeping": False,
    }

"""`POST /v1/embeddings`: texts → vectors, out of the hidden states that the model's last layer gives.

In: texts or token ids. Out: unit vectors, as numbers or float32 in base64.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from amalgam.engine.request import Observation
from amalgam.errors import RequestError
from amalgam.server.api.common import WeightsField
from amalgam.server.api.openai.answers import fingerprint
from amalgam.server.api.openai.documents import EmbeddingAnswer, OpenAIErrorAnswer
from amalgam.server.api.openai.fields import ModelField
from amalgam.server.api.openai.prompts import PromptLimit, Prompts, encode_prompts
from amalgam.server.dependencies import Admission, ServiceArgument
from amalgam.server.generation import run_all
from amalgam.server.http.access import unless_client_leaves
from amalgam.server.http.body import StrictRoute
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.http.record import current_record

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_INPUTS = 2048  # as OpenAI has it

router = APIRouter(route_class=StrictRoute, tags=["openai"], responses=OpenAIErrorAnswer.RESPONSES)


class EmbeddingBody(ModelField, WeightsField):
    input: Prompts
    """A text, a list of texts, token ids, or a list of such lists."""
    encoding_format: Literal["float", "base64"] = "float"
    """Numbers, or little-endian float32 in base64."""
    dimensions: int | None = Field(default=None, ge=1)
    """Only the model's own: the first numbers of a longer vector mean nothing where a model was not trained for it."""
    pooling: Literal["mean", "last"] | None = None
    """The mean of all tokens' hidden states, or the last one's. null: `server.embedding_pooling`."""
    normalize: bool = True
    """Scale to length 1, as OpenAI does."""
    add_special_tokens: bool = True
    """Put around a text what the tokenizer puts there."""
    domain: str | None = Field(default=None, min_length=1, max_length=64)
    """A label under which the expert statistics count this request apart."""


@router.post("/v1/embeddings", dependencies=[Admission], response_model=EmbeddingAnswer)
async def create_embeddings(body: EmbeddingBody, request: Request, service: ServiceArgument) -> Response:
    """Vectors of texts."""
    model = body.check_model(service)
    version = service.choose_weights(body.weights)

    async def answer() -> Response:
        prompts = await encode_prompts(
            service,
            "input",
            body.input,
            PromptLimit(MAX_INPUTS),
            add_special_tokens=body.add_special_tokens,
            is_answered=False,
            num_new_tokens=0,
        )
        prompts_ids = prompts.token_ids
        engine, observation = service.deployment.engine, Observation(body.domain)
        pooling = body.pooling or service.settings.server.embedding_pooling
        vectors = await run_all(
            lambda prompt_ids: engine.embed(prompt_ids, pooling, observation),
            prompts_ids,
            service.max_batch_in_flight,
            "input",
        )
        hidden = len(vectors[0])
        if body.dimensions not in (None, hidden):
            raise RequestError(
                f"dimensions is {body.dimensions}.", remedy=f"This model's vectors have {hidden}.", param="dimensions"
            )

        record = current_record.get()
        answered = version if record is None else record.weight_version or version

        def render() -> Response:
            num_tokens = sum(map(len, prompts_ids))
            content = {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": _shape(body, vector)}
                    for index, vector in enumerate(vectors)
                ],
                "model": model,
                "system_fingerprint": fingerprint(answered),
                "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
            }
            return OrjsonResponse(content)

        return await asyncio.to_thread(render)

    return await unless_client_leaves(request.receive, answer())


def _shape(body: EmbeddingBody, vector: npt.NDArray[np.float32]) -> Any:
    values = vector.astype("<f4")
    if body.normalize:
        length = float((values.astype("f8") ** 2).sum()) ** 0.5
        values = (values / length).astype("<f4") if length else values
    return b64encode(values.tobytes()).decode() if body.encoding_format == "base64" else values

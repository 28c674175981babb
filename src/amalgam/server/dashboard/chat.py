"""The playground's chat: messages in, the same event stream as `/generate` out.

In: a conversation and sampling parameters. Out: server-sent events. Must never know: what a chat template does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from amalgam.server.api.generate import ObservedFields, event_fields
from amalgam.server.dependencies import Admission, RequestId, ServiceArgument
from amalgam.server.generation import stream_events
from amalgam.server.http.access import unless_client_leaves
from amalgam.server.http.body import Body, StrictRoute
from amalgam.text.chat import ChatPrompt

MAX_MESSAGES = 512

router = APIRouter(route_class=StrictRoute, include_in_schema=False)


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: str


class ChatBody(ObservedFields):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    """The conversation so far, oldest first."""


@router.post("/dashboard/chat", dependencies=[Admission])
async def chat(body: ChatBody, request: Request, service: ServiceArgument, request_id: RequestId) -> Response:
    """Go on with a conversation, as the model's chat template has it."""
    params = replace(body.sampling_params(service.default_params), continues_prompt=False)
    observation = body.observation()
    service.choose_weights(body.weights)

    async def answer() -> Response:
        prompt = ChatPrompt([message.model_dump() for message in body.messages])
        [prompt_ids] = await service.encode([prompt], "messages")
        outputs = service.deployment.engine.stream(prompt_ids, params, observation)
        return stream_events(outputs, event_fields, request_id, service.settings.server.stream_comment_seconds)

    return await unless_client_leaves(request.receive, answer())

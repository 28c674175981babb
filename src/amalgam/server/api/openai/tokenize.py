"""`POST /tokenize` and `/detokenize`: texts and chats → token ids and back, as vLLM and llama-server have them.

In: a text, messages, or token ids. Out: token ids or a text.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from amalgam.errors import RequestError
from amalgam.server.api.common import MAX_INT, MAX_MESSAGES
from amalgam.server.api.openai.documents import (
    ContentTokens,
    DetokenizeAnswer,
    OpenAIErrorAnswer,
    Piece,
    TokenizeAnswer,
)
from amalgam.server.api.openai.fields import ModelField
from amalgam.server.api.openai.messages import Message, check_continued, for_template
from amalgam.server.api.openai.tools import MAX_TOOLS, SCHEMA_PLACE, FunctionTool, tool_use
from amalgam.server.api.refusing import Refused
from amalgam.server.api.variables import template_variables
from amalgam.server.dependencies import Admission, ServiceArgument
from amalgam.server.encoding import Prompt, TextPrompt
from amalgam.server.http.access import unless_client_leaves
from amalgam.server.http.body import StrictRoute
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.interface import Tokenizer
from amalgam.text.chat import ChatPrompt

MIN_TOKEN_LIMIT = 2**18  # texts may be counted that are longer than the model's context, but not without end

router = APIRouter(route_class=StrictRoute, tags=["openai"], responses=OpenAIErrorAnswer.RESPONSES)


class TokenizeBody(ModelField):
    refused: ClassVar = {"parse_special": Refused("The tokenizer's special tokens in a text are tokens.", (True,))}

    prompt: str | None = None
    """A text; or else messages, or content."""
    content: str | None = None
    """A text, answered as llama-server does: with `tokens` alone."""
    add_special: bool = False
    """Of content: put around it what the tokenizer puts around a text."""
    with_pieces: bool = False
    """Of content: answer with each token's text too."""
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    """A chat."""
    add_special_tokens: bool | None = None
    """Put around a text what the tokenizer puts there; the default. A chat has what its template says."""
    return_token_strs: bool = False
    """Answer with each token's text too."""
    tools: list[FunctionTool] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    def check(self) -> None:
        """
        Raises:
            RequestError: there is not one text or chat, a chat is to have special tokens around it, or a field is given
                that is of another server's.
        """
        given = [name for name in ("prompt", "messages", "content") if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"{' and '.join(given)} are given together" if given else "There is no prompt"
            raise RequestError(f"{what}.", remedy="Give one of prompt, messages and content.", param="prompt")
        for name in _OF_PROMPTS if self.content is not None else _OF_CONTENT:
            if name in self.model_fields_set:
                raise RequestError(
                    f"{name} is given with {given[0]}.",
                    remedy=f"llama-server's fields are content, {' and '.join(_OF_CONTENT)}; vLLM's are the others.",
                    param=name,
                )
        if self.messages is not None and self.add_special_tokens:
            raise RequestError(
                "add_special_tokens is true for messages.",
                remedy="Leave it out: the chat template says which special tokens there are.",
                param="add_special_tokens",
            )


_OF_CONTENT = ("add_special", "with_pieces")
_OF_PROMPTS = ("add_special_tokens", "return_token_strs")


class DetokenizeBody(ModelField):
    tokens: list[Annotated[int, Field(ge=0, le=MAX_INT)]] = Field(fail_fast=True)
    """Token ids."""


@router.post("/tokenize", dependencies=[Admission], response_model=TokenizeAnswer | ContentTokens)
async def tokenize(body: TokenizeBody, request: Request, service: ServiceArgument) -> Response:
    """Token ids of a text or a chat."""
    body.check_model(service)
    body.check()
    tokenizer = service.deployment.tokenizer
    max_model_len = service.deployment.engine.max_prompt_tokens + 1
    prompt: Prompt
    name = next(name for name in ("prompt", "messages", "content") if getattr(body, name) is not None)
    if body.content is not None:
        prompt = TextPrompt(body.content, body.add_special)
    elif body.messages is None:
        prompt = TextPrompt(body.prompt or "", body.add_special_tokens is not False)
    else:
        prompt = _chat_prompt(body, body.messages, tokenizer.chat_template)

    async def answer() -> Response:
        [token_ids] = await service.encode([prompt], name, max(MIN_TOKEN_LIMIT, max_model_len), is_filtered=False)

        def render() -> Response:
            if body.content is not None:
                tokens = [_piece(tokenizer, one) for one in token_ids] if body.with_pieces else token_ids
                return OrjsonResponse({"tokens": tokens})
            texts = [tokenizer.token_text(token_id) for token_id in token_ids] if body.return_token_strs else None
            content = {
                "count": len(token_ids),
                "max_model_len": max_model_len,
                "tokens": token_ids,
                "token_strs": texts,
            }
            return OrjsonResponse(content)

        return await service.encoder.turn(render)

    return await unless_client_leaves(request.receive, answer())


@router.post("/detokenize", dependencies=[Admission], response_model=DetokenizeAnswer)
async def detokenize(body: DetokenizeBody, request: Request, service: ServiceArgument) -> Response:
    """The text of token ids, special tokens included."""
    body.check_model(service)
    tokenizer = service.deployment.tokenizer
    limit = max(MIN_TOKEN_LIMIT, service.deployment.engine.max_prompt_tokens)
    if len(body.tokens) > limit:
        raise RequestError(f"tokens has {len(body.tokens)} entries.", remedy=f"Allowed: {limit}.", param="tokens")
    for index, token_id in enumerate(body.tokens):
        if token_id >= tokenizer.vocab_size:
            raise RequestError(
                f"tokens[{index}] is {token_id}.",
                remedy=f"Allowed: a token id from 0 to {tokenizer.vocab_size - 1}.",
                param="tokens",
            )

    async def answer() -> Response:
        text = await service.encoder.turn(lambda: tokenizer.decode(body.tokens, keeps_special_tokens=True))
        return OrjsonResponse({"prompt": text, "content": text})

    return await unless_client_leaves(request.receive, answer())


def _piece(tokenizer: Tokenizer, token_id: int) -> Piece:
    spelled = tokenizer.token_bytes(token_id)
    try:
        return {"id": token_id, "piece": spelled.decode()}
    except UnicodeDecodeError:
        return {"id": token_id, "piece": list(spelled)}


def _chat_prompt(body: TokenizeBody, messages: list[Message], template: str | None) -> ChatPrompt:
    use = tool_use([tool.function for tool in body.tools], None, SCHEMA_PLACE, is_parallel=True)
    normalized = for_template(messages, knows_developer="developer" in (template or ""))
    if body.continue_final_message:
        check_continued(normalized, adds_prompt=bool(body.add_generation_prompt))
    adds_prompt = body.add_generation_prompt
    return ChatPrompt(
        normalized,
        use.tools or None,
        variables=template_variables(template, body.chat_template_kwargs),
        add_generation_prompt=not body.continue_final_message if adds_prompt is None else adds_prompt,
        continue_final_message=body.continue_final_message,
    )

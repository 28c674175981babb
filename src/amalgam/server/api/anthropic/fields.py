"""The fields of a request, as https://platform.claude.com/docs/en/api/messages has them.

In: JSON. Out: checked objects. Must never know: templates, tokens.

What is declared here is honoured; all else is refused, by its name, as are kinds of content that the model cannot read.
What stands in `refused` is accepted where its value asks for nothing, as clients send it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from amalgam.engine.params import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS, MAX_TEMPERATURE
from amalgam.server.api.common import MAX_INT, MAX_MESSAGES, MAX_PARTS, WeightsField
from amalgam.server.api.refusing import Refused, RefusingBody
from amalgam.server.http.body import Body

MAX_TOOLS = 1024
_NAME = r"^[a-zA-Z0-9_-]{1,128}$"


class BetaQuery(Body):
    model_config = ConfigDict(strict=False)

    beta: bool = False
    """Accepted, and changes nothing: what is beta is asked for by its fields."""


class CacheControl(Body):
    """Accepted: whatever requests have in common at their beginning is computed once anyway."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] = "5m"


TOOLSET = {"toolset_name": Refused("Tools that Anthropic runs are not here.")}


class Block(RefusingBody):
    cache_control: CacheControl | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: list[Any] = Field(default_factory=list, max_length=0, fail_fast=True)
    """None: the model does not cite."""


class DirectCaller(Body):
    """The model: no program has called the tool."""

    type: Literal["direct"]


class ToolUseBlock(Block):
    refused = TOOLSET

    type: Literal["tool_use"]
    id: str = Field(pattern=r"^[a-zA-Z0-9_-]+$")
    name: str = Field(min_length=1)
    input: dict[str, Any]
    caller: DirectCaller | None = None


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""
    """Taken as it is: reasoning is the client's to send back or not."""


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Texts = Annotated[
    list[TextBlock],
    Field(max_length=MAX_PARTS, fail_fast=True),
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock]),
]


class ToolResultBlock(Block):
    refused = TOOLSET

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = Field(default_factory=list)
    is_error: bool = False


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ToolUseBlock | ThinkingBlock, Field(discriminator="type")]


class UserMessage(Body):
    role: Literal["user"]
    content: Annotated[
        list[UserBlock],
        Field(min_length=1, max_length=MAX_PARTS, fail_fast=True),
        BeforeValidator(_as_blocks, json_schema_input_type=str | list[UserBlock]),
    ]


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: Annotated[
        list[AssistantBlock],
        Field(max_length=MAX_PARTS, fail_fast=True),
        BeforeValidator(_as_blocks, json_schema_input_type=str | list[AssistantBlock]),
    ]


class SystemMessage(Body):
    role: Literal["system"]
    content: Texts


Message = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


class Tool(Block):
    refused = {"input_examples": Refused("Say in the description how the tool is used.", ([],))}  # noqa: RUF012

    name: str = Field(pattern=_NAME)
    description: str = ""
    input_schema: dict[str, Any]
    type: Literal["custom"] = "custom"
    """Tools that Anthropic runs are not here."""
    strict: bool = False
    """Arguments always fit the schema; refused for models whose calls have no mark, unless tool_choice demands one."""
    eager_input_streaming: bool = True
    """Arguments always come as they are written."""
    defer_loading: Literal[False] = False
    allowed_callers: list[Literal["direct"]] = Field(default_factory=list, fail_fast=True)


class ToolChoice(Body):
    disable_parallel_tool_use: bool = False
    """The answer ends with its first call."""


class AnyTool(ToolChoice):
    type: Literal["auto", "any"]


class NamedTool(ToolChoice):
    type: Literal["tool"]
    name: str


class NoTool(Body):
    type: Literal["none"]


BLOCK_BINDING = {"block_binding": Refused("Thoughts are taken as they are.", ({},))}


class ThinkingEnabled(RefusingBody):
    refused = BLOCK_BINDING
    place = "thinking."

    type: Literal["enabled"]
    budget_tokens: int = Field(ge=1, le=MAX_INT)
    """Most tokens of reasoning: then its end is forced. Told to the model too if its chat template has a
    `thinking_budget`.
    """
    display: Literal["summarized", "omitted"] = "summarized"
    """omitted: the answer says that there was reasoning, without its text. Else all of it is shown."""


class ThinkingAdaptive(RefusingBody):
    refused = BLOCK_BINDING
    place = "thinking."

    type: Literal["adaptive"]
    display: Literal["summarized", "omitted"] = "summarized"


class ThinkingDisabled(Body):
    type: Literal["disabled"]


Thinking = Annotated[ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled, Field(discriminator="type")]


class JSONFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(RefusingBody):
    refused = {"task_budget": Refused("Set max_tokens.")}  # noqa: RUF012
    place = "output_config."

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """For chat templates with a `reasoning_effort`."""
    format: JSONFormat | None = None
    """The text of the answer is JSON of this schema."""


class KeepThinking(Body):
    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(Body):
    """Accepted where it leaves the conversation as it is, as Claude Code sends it."""

    edits: list[KeepThinking] = Field(default_factory=list, max_length=16, fail_fast=True)


class Metadata(Body):
    user_id: str | None = Field(default=None, max_length=512)
    """Nobody is told. While a candidate for the weights is tried, requests of one user get the same weights."""


class PromptBody(RefusingBody):
    """What a prompt is made of."""

    refused = {  # noqa: RUF012
        "billing_policy": Refused("There are no bills.", ({"type": "billing_policy", "bill_to": "self"},)),
        "compaction": Refused("The conversation is the client's to shorten."),
        "container": Refused("Tools run at the client's."),
        "diagnostics": Refused("Nothing is stored to compare with.", ({}, {"previous_message_id": None})),
        "fallback_credit_token": Refused("There is one model."),
        "fallbacks": Refused("There is one model.", ([],)),
        "inference_geo": Refused("The answer is computed here.", ("global",)),
        "mcp_servers": Refused("Tools run at the client's.", ([],)),
        "thread": Refused(
            "Nothing is stored here: send the whole conversation.",
            details={"error_code": "thread_unsupported_request", "unsupported": ["thread"]},
        ),
        "user_profile_id": Refused("There are no profiles."),
        "workspace_id": Refused("There are no workspaces."),
    }

    model: str = Field(min_length=1, max_length=1024)
    """A name of the served model, see GET /v1/models."""
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    """The conversation, oldest first. The answer goes on with a last message of the assistant."""
    system: Texts = Field(default_factory=list)
    """What the conversation begins with."""
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True)
    """Functions that the model may call."""
    tool_choice: Annotated[AnyTool | NamedTool | NoTool, Field(discriminator="type")] = AnyTool(type="auto")
    """auto: as the model likes; any: at least one call; tool: calls of this one; none: no call."""
    thinking: Thinking = ThinkingDisabled(type="disabled")
    """Whether to reason first, for models whose chat template can be told."""
    output_config: OutputConfig = OutputConfig()
    """The form of the answer, and how hard to think about it."""
    cache_control: CacheControl | None = None
    """Accepted: common beginnings are cached anyway."""
    context_management: ContextManagement | None = None
    """Only what keeps everything: the conversation is the client's to shorten."""
    speed: Literal["standard"] = "standard"


class MessagesBody(PromptBody, WeightsField):
    max_tokens: int = Field(ge=1, le=MAX_INT)
    """Most tokens to generate; less if prompt and answer would exceed the model's sequence length."""
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]] = Field(
        default_factory=list, max_length=MAX_STOP_STRINGS, fail_fast=True
    )
    """Texts to end before."""
    stream: bool = False
    """Answer with server-sent events as the text comes."""
    temperature: float | None = Field(default=None, ge=0, le=MAX_TEMPERATURE)
    """Divides the logits; 0 is greedy. Without it what the model's `generation_config.json` says, and else 1."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the smallest set of tokens with this much probability."""
    top_k: int | None = Field(default=None, ge=0, le=MAX_INT)
    """Sample from this many of the likeliest tokens; 0: no limit."""
    metadata: Metadata = Metadata()
    """About the user."""
    service_tier: Literal["auto", "standard_only"] = "auto"
    """Accepted: there is one tier."""

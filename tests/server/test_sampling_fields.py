"""What the interfaces sample by where a request says nothing, and that it is what the request says where it does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from amalgam.engine.generation_config import ModelDefaults
from amalgam.engine.params import SamplingParams
from amalgam.server.api.anthropic.conversation import sampling_params
from amalgam.server.api.anthropic.fields import MessagesBody
from amalgam.server.api.common import neutral_defaults
from amalgam.server.api.generate import GenerateBody
from amalgam.server.api.openai.chat import ChatBody
from amalgam.server.api.openai.completions import CompletionBody

OF_THE_MODEL: dict[str, Any] = {
    "temperature": 0.3, "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.25, "min_tokens": 2,
    "stop": ("END",),
}  # fmt: skip
MESSAGES = {"messages": [{"role": "user", "content": "a"}]}
SERVICE: Any = SimpleNamespace(
    deployment=SimpleNamespace(defaults=ModelDefaults(SamplingParams(**OF_THE_MODEL), OF_THE_MODEL))
)


def native(fields: dict[str, Any]) -> SamplingParams:
    return GenerateBody.model_validate({"prompt": "a", **fields}).sampling_params(SERVICE.deployment.defaults.params)


def completions(fields: dict[str, Any]) -> SamplingParams:
    return CompletionBody.model_validate({"prompt": "a", **fields}).sampling_params(SERVICE)


def chat(fields: dict[str, Any]) -> SamplingParams:
    return ChatBody.model_validate({**MESSAGES, **fields}).sampling_params(SERVICE)


def messages(fields: dict[str, Any]) -> SamplingParams:
    body = MessagesBody.model_validate({**MESSAGES, "model": "demo", "max_tokens": 4, **fields})
    return sampling_params(body, neutral_defaults(SERVICE), keeps_special_tokens=False)


@pytest.mark.parametrize("params_of", [native, completions, chat, messages])
@pytest.mark.parametrize("nulls", [{}, {"temperature": None, "stop": None, "stop_sequences": None}])
def test_the_models_own_values_hold(params_of: Any, nulls: dict[str, Any]) -> None:
    allowed = {"stop_sequences"} if params_of is messages else {"stop"}
    params = params_of({name: value for name, value in nulls.items() if name in {"temperature"} | allowed})
    assert {name: getattr(params, name) for name in OF_THE_MODEL} == OF_THE_MODEL


@pytest.mark.parametrize("params_of", [native, completions, chat])
def test_a_requests_values_come_before_them(params_of: Any) -> None:
    said: dict[str, Any] = {
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "stop": "x", "stop_token_ids": [3],
        "logit_bias": {"7": -1.5}, "ignore_eos": True, "priority": -2, "speculate": False,
    }  # fmt: skip
    params = params_of(said)
    assert {name: getattr(params, name) for name in said} == said | {
        "stop": ("x",), "stop_token_ids": (3,), "logit_bias": ((7, -1.5),),
    }  # fmt: skip


def test_a_messages_stop_sequences_come_before_the_models() -> None:
    assert messages({"stop_sequences": ["x"]}).stop == ("x",)
